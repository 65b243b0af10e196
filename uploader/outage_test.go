package uploader_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/internal/repo"
	"drc/uploader"
)

// logHost is a host that writes a group's log, with its state.
type logHost struct {
	t       *testing.T
	repo    *repo.Repository
	id      *crypt.Identity
	agent   *crypt.Agent
	stores  []*mem.Store
	faults  []*fault.Store
	state   *hostState
	forced  bool     // take over what another host writes
	fetches bool     // the key set comes when it is asked for
	heard   []uint64 // entries that OnEntry was told of
	ours    func(e *grouplog.Entry) error
	office  uploader.Office
	log     *uploader.Log
	stop    func()
}

var (
	logGroup = block.GroupID{7}
	logKeys  = crypttest.Keys()
)

func newLogHost(t *testing.T, stores int) *logHost {
	h := &logHost{t: t, id: crypttest.Identity(t), agent: crypttest.Agent(t), state: &hostState{}}
	var all []object.Store
	for i := range stores {
		m := mem.New(mem.Options{Name: fmt.Sprint(i)})
		f := fault.New(m)
		h.stores, h.faults, all = append(h.stores, m), append(h.faults, f), append(all, f)
	}
	var err error
	if h.repo, err = repo.Create(t.Context(), all, h.id.Root, format.Profile{Data: 1, Parity: 1}, h.id.Recipients(), 1); err != nil {
		t.Fatal(err)
	}
	return h
}

// run makes a Log and runs it.
func (h *logHost) run(ctx context.Context) {
	h.t.Helper()
	ring := crypt.NewAgentRing(h.agent, h.id.RootPublic)
	cfg := uploader.LogConfig{
		Repo: h.repo, Group: logGroup, Agent: h.agent, Ring: ring, State: h.state, Takeover: h.forced,
		OnEntry: func(e *grouplog.Entry) error { h.heard = append(h.heard, e.N); return nil }, Ours: h.ours, Office: h.office,
	}
	if h.fetches {
		cfg.KeySet = func(block.ID) error { ring.AddOwn(logKeys); return nil }
	} else {
		ring.AddOwn(logKeys)
	}
	h.log, h.stop = runLog(ctx, cfg)
}

// start is run, and waits until this host is in office.
func (h *logHost) start(ctx context.Context) {
	h.t.Helper()
	h.run(ctx)
	if err := h.log.TakeOffice(ctx); err != nil {
		h.t.Fatal(err)
	}
}

// append has one more entry decided.
func (h *logHost) append(ctx context.Context) error {
	n, parent, epoch := h.log.Next()
	value := grouplog.Draft{Group: logGroup, N: n, Parent: parent, Epoch: epoch, Keys: logKeys, Items: &format.Items{}}.Make(h.agent)
	if err := h.log.Append(ctx, value); err != nil {
		return err
	}
	return h.log.Save()
}

func (h *logHost) appends(ctx context.Context, n int) {
	h.t.Helper()
	for range n {
		if err := h.append(ctx); err != nil {
			h.t.Fatal(err)
		}
	}
}

// inOffice runs story in a bubble, with a host in office over so many stores
// that has had some entries decided.
func inOffice(t *testing.T, stores, entries int, story func(t *testing.T, h *logHost)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := newLogHost(t, stores)
		h.start(t.Context())
		h.appends(t.Context(), entries)
		story(t, h)
		h.stop()
	})
}

func (h *logHost) gets() int {
	n := 0
	for _, f := range h.faults {
		n += f.Count(fault.Get, "*/log/*")
		f.Forget()
	}
	return n
}

// whole fails if a store's log does not accept all entries up to n, with the
// same values as the others. It returns their hashes.
func (h *logHost) whole(ctx context.Context, n uint64) map[uint64]format.Hash {
	h.t.Helper()
	var logs []map[uint64]format.Hash
	for i, s := range h.stores {
		acc := &grouplog.Acceptor{Store: h.repo.Members[i].ID}
		for index := uint64(0); ; index++ {
			name := format.LogName(logGroup, index)
			raw, _, err := s.Get(ctx, name, 1<<30, nil)
			if err != nil {
				break
			}
			o, err := grouplog.VerifyObject(h.id.RootPublic, name, grouplog.Place{Repo: h.repo.ID, Group: logGroup, Store: acc.Store, Index: index}, raw)
			if err != nil {
				h.t.Fatal(err)
			}
			if err := acc.Add(name, o, raw); err != nil {
				h.t.Fatal(err)
			}
		}
		log := map[uint64]format.Hash{}
		for k := uint64(1); k <= n; k++ {
			a, ok := acc.Entry(k)
			if !ok {
				h.t.Fatalf("store %d lacks entry %d of %d", i, k, n)
			}
			log[k] = a.Hash
			if i > 0 && logs[0][k] != a.Hash {
				h.t.Fatalf("store %d holds another value of entry %d than store 0", i, k)
			}
		}
		logs = append(logs, log)
	}
	return logs[0]
}

// A store that is away for long costs no memory, and gets all that it lacks from
// the others when it is back, in bounded time and with about one read and one
// put for each entry.
func TestOutage_BoundedMemory(t *testing.T) {
	t.Parallel()
	inOffice(t, 3, 10, func(t *testing.T, h *logHost) {
		ctx := t.Context()
		down := h.faults[2].Add(fault.Rule{Before: fault.ErrInjected})
		h.appends(ctx, 500)
		if n := uploader.Remembered(h.log); n > 250 {
			t.Errorf("%d entries are in memory after an outage of 500", n)
		}
		down()
		h.gets()
		if err := h.log.AwaitSafe(ctx, 2, 509); err != nil {
			t.Fatal(err)
		}
		if n := h.gets(); n > 800 {
			t.Errorf("%d reads for 500 entries", n)
		}
		h.stop()
		h.whole(ctx, 510)
	})
}

// The same over restarts: a start reads only what it has not seen, although one
// store has been away since long before.
func TestOutage_OverRestarts(t *testing.T) {
	t.Parallel()
	inOffice(t, 3, 10, func(t *testing.T, h *logHost) {
		ctx := t.Context()
		down := h.faults[2].Add(fault.Rule{Before: fault.ErrInjected})
		for range 4 {
			h.appends(ctx, 200)
			h.stop()
			h.gets()
			h.start(ctx)
			if n := h.gets(); n > 20 {
				t.Errorf("%d reads for a start of a host that knows everything", n)
			}
		}
		down()
		if err := h.log.AwaitSafe(ctx, 2, 809); err != nil {
			t.Fatal(err)
		}
		h.stop()
		h.whole(ctx, 810)
		if len(h.heard) != 0 {
			t.Errorf("a host was told of entries that it had decided: %d", len(h.heard))
		}
	})
}

// A damaged object in the log of a store that others are filled from is not held
// against these.
func TestOutage_DamagedSource(t *testing.T) {
	t.Parallel()
	inOffice(t, 3, 5, func(t *testing.T, h *logHost) {
		ctx := t.Context()
		down := h.faults[2].Add(fault.Rule{Before: fault.ErrInjected})
		h.appends(ctx, 300)
		for i := range 2 { // both sources, at different places
			h.stores[i].Tamper(format.LogName(logGroup, uint64(60+100*i)), func(raw []byte) []byte { raw[len(raw)/2] ^= 1; return raw })
		}
		down()
		time.Sleep(time.Hour)
		if st := h.log.Status()[2]; st.State != "up" || st.Entry != 305 {
			t.Errorf("the store that was away: %+v", st)
		}
	})
}

// A short fault after a long one is over as soon as it is over: pauses do not
// stay as long as they once were.
func TestOutage_PausesBeginShortAgain(t *testing.T) {
	inOffice(t, 1, 0, func(t *testing.T, h *logHost) {
		ctx := t.Context()
		down := h.faults[0].Add(fault.Rule{Before: fault.ErrInjected})
		done := make(chan error)
		go func() { done <- h.append(ctx) }()
		time.Sleep(10 * time.Minute)
		down()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		h.appends(ctx, 1)
		h.faults[0].Add(fault.Rule{Op: fault.Put, Times: 1, Before: fault.ErrInjected})
		began := time.Now()
		h.appends(ctx, 1)
		if d := time.Since(began); d > time.Second {
			t.Errorf("one failed put cost %s", d)
		}
	})
}

// A log with a hole is damaged: nothing is put into the hole.
func TestLog_HoleIsNotFilled(t *testing.T) {
	inOffice(t, 1, 10, func(t *testing.T, h *logHost) {
		ctx := t.Context()
		h.stop()
		name := format.LogName(logGroup, 5)
		if err := h.stores[0].Delete(ctx, name); err != nil {
			t.Fatal(err)
		}
		h.state.tails = nil // as another host, or one that lost it in a power cut
		h.run(ctx)
		time.Sleep(time.Minute)
		if st := h.log.Status()[0]; st.State != "damaged" || !strings.Contains(st.LastError, "missing") {
			t.Errorf("%+v", st)
		}
		if _, err := h.stores[0].Stat(ctx, name); err == nil {
			t.Error("something was put into the hole")
		}
	})
}

// What keeps a host from taking office for a while does not keep it for good,
// and is told.
func TestOffice_HostTroublePasses(t *testing.T) {
	inOffice(t, 3, 10, func(t *testing.T, h *logHost) {
		ctx := t.Context()
		h.stop()
		full := fmt.Errorf("no space left on device")
		h.state.tails, h.state.fail = nil, full
		h.run(ctx)
		office := make(chan error)
		go func() { office <- h.log.TakeOffice(ctx) }()
		time.Sleep(time.Minute)
		if err := h.log.Trouble(); err == nil || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("trouble is %v", err)
		}
		h.state.setFail(nil)
		if err := <-office; err != nil {
			t.Fatal(err)
		}
		if err := h.log.Trouble(); err != nil || len(h.heard) != 10 {
			t.Errorf("told of %d entries, trouble %v", len(h.heard), err)
		}
	})
}

// A store that never answers holds up no more than one that says that it fails.
func TestOutage_AStoreThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.begin()
		for _, kind := range []string{"segments", "manifests"} {
			hang := make(chan struct{})
			w.faults[2].Add(fault.Rule{Op: fault.Put, Name: "*/" + kind + "/*", Block: hang})
			if kind == "segments" {
				w.noise(0, 0, 1<<20)
				w.cut()
			} else {
				w.large()
			}
			time.Sleep(10 * time.Minute)
			if n := x.up.Logged(); n != w.journal.Captured() {
				t.Errorf("%s hang, and up to %s of %s is logged", kind, n, w.journal.Captured())
			}
			if since, err := x.up.StoreTrouble(2); since.IsZero() || err == nil {
				t.Errorf("the store that hangs is called up")
			}
			close(hang)
			w.must(x.up.AwaitIdle(w.ctx))
			if since, err := x.up.StoreTrouble(2); !since.IsZero() || err != nil {
				t.Errorf("the store that is back is called down: %v", err)
			}
		}
		x.stop()
		w.check(w.history())
	})
}

// A store that fails now and then is read all the same, by a host that has to read
// its whole log: what was read stays read.
func TestOutage_ALogIsReadFromAStoreThatFailsNowAndThen(t *testing.T) {
	inOffice(t, 1, 100, func(t *testing.T, h *logHost) {
		h.stop()
		var calls atomic.Int64
		h.faults[0].Add(fault.Rule{Op: fault.Get, Hook: func(context.Context, fault.Call) error {
			if calls.Add(1)%6 == 0 {
				return fault.ErrInjected
			}
			return nil
		}})
		h.state.tails = nil
		began := time.Now()
		h.start(t.Context())
		if took := time.Since(began); took > 10*time.Minute {
			t.Errorf("a log of 100 entries was read after %s and %d calls", took, calls.Load())
		}
	})
}
