package restorer_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/manifest"
	"drc/internal/object/fault"
	"drc/restorer"
)

// scribe writes log objects as no honest writer would order them.
type scribe struct {
	w    *world
	accs []grouplog.Acceptor
}

// newScribe takes up the logs where they are.
func (w *world) newScribe() *scribe {
	w.t.Helper()
	s := &scribe{w: w}
	for i, st := range w.stores {
		s.accs = append(s.accs, grouplog.Acceptor{Store: w.repo.Members[i].ID})
		for j, name := range names(w.t, st, format.LogPrefix(w.groupID)) {
			raw, _, err := st.Get(w.ctx, name, format.MaxLogObjectBytes, nil)
			w.must(err)
			o, err := grouplog.VerifyObject(w.id.RootPublic, name, grouplog.Place{Repo: w.repo.ID, Group: w.groupID,
				Store: w.repo.Members[i].ID, Index: uint64(j)}, raw)
			w.must(err)
			w.must(s.accs[i].Add(name, o, raw))
		}
	}
	return s
}

// append puts an object at the end of a store's log.
func (s *scribe) append(store int, epoch format.Epoch, decided uint64, value []byte) {
	s.w.t.Helper()
	a := &s.accs[store]
	o := format.LogObject{Kind: format.LogPromise, Repo: s.w.repo.ID, Group: s.w.groupID, Store: a.Store,
		Index: a.Next, Previous: a.Last, Epoch: epoch, Decided: decided, Value: value}
	if value != nil {
		o.Kind = format.LogCommit
	}
	raw := grouplog.SignObject(s.w.agent, o)
	name := format.LogName(s.w.groupID, a.Next)
	_, err := s.w.stores[store].Put(s.w.ctx, name, raw)
	s.w.must(err)
	o, err = grouplog.VerifyObject(s.w.id.RootPublic, name, grouplog.Place{Repo: s.w.repo.ID, Group: s.w.groupID, Store: a.Store, Index: a.Next}, raw)
	s.w.must(err)
	s.w.must(a.Add(name, o, raw))
}

// value makes entry n: it zeroes or not the first sectors of v0, up to seq.
func (s *scribe) value(n uint64, parent format.Hash, epoch format.Epoch, to block.Seq, zeroBytes int64) []byte {
	b := manifest.NewBuilder(format.ManifestHeader{Group: s.w.groupID, Branch: s.w.group.Branch, FromN: n, ToN: n, To: to}, s.w.agent, s.w.w.keys)
	b.Add(0, manifest.Extent{Extent: block.Extent{Len: zeroBytes}, Zero: true})
	return grouplog.Draft{Group: s.w.groupID, N: n, Parent: parent, Epoch: epoch, Keys: s.w.w.keys, Items: &format.Items{
		Range:    &format.Range{Branch: s.w.group.Branch, From: to, To: to, Time: s.w.clock.now().UnixNano()},
		Manifest: b.Finish(),
	}}.Make(s.w.agent)
}

// A fenced writer left a value in one store that another writer's value
// replaced: whatever stores are read, no history ever mixes the two.
func TestHistory_StaleValueOfFencedWriter(t *testing.T) {
	w := newWorld(t, options{stores: 3, volumes: []int64{64 << 10}})
	x := w.start()
	w.write(0, 0, fill(w.rng, make([]byte, 32<<10)))
	w.cut()
	x.stop()
	s := w.newScribe()
	n, parent := s.accs[0].Latest.N, s.accs[0].Latest.Hash
	old := s.accs[0].Promised
	taker := format.Epoch{Number: old.Number + 1, Random: block.NewID()}
	stale := s.value(n+1, parent, old, 2, 4096)
	chosen := s.value(n+1, parent, taker, 3, 8192)
	after := s.value(n+2, format.HashOf(chosen), taker, 4, 16384)
	s.append(0, old, n, stale)
	for i := 1; i <= 2; i++ {
		s.append(i, taker, n, nil)
		s.append(i, taker, n, chosen)
	}
	data := w.model(0, 1)
	expect := func(what string, seq block.Seq, zeroed int, unconfirmed bool, stores ...int) {
		t.Helper()
		var list []int
		list = append(list, stores...)
		var given = w.given(list...)
		h := w.history(given...)
		want := slices.Clone(data)
		clear(want[:zeroed])
		im := w.checkPoint(h, "v0", "latest", want)
		if im.Point().Seq != seq || h.Unconfirmed() != unconfirmed || im.Point().Unconfirmed != unconfirmed {
			t.Fatalf("%s: seq %s, unconfirmed %v", what, im.Point().Seq, h.Unconfirmed())
		}
	}
	expect("all stores", 3, 8192, false, 0, 1, 2)
	expect("the stale one only", 2, 4096, true, 0)
	expect("stale and one new", 3, 8192, true, 0, 1)
	expect("the majority", 3, 8192, false, 1, 2)
	s.append(1, taker, n+1, after)
	expect("a newer entry in a minority", 4, 16384, true, 0, 1, 2)
	expect("that minority alone", 4, 16384, true, 1)
	// The parent of the newer entry shows that the entry before it is decided.
	h := w.history(w.given(0, 1)...)
	if h.Decided != n+1 {
		t.Fatalf("decided up to %d, want %d", h.Decided, n+1)
	}
	// The stale value, caught up: the late put of a fenced writer counts nowhere.
	s.append(0, taker, n+1, nil)
	s.append(0, old, n, stale)
	s.append(2, taker, n+2, after)
	expect("all, with a late put", 4, 16384, false, 0, 1, 2)
	// Only the behind store: the promise in it tells that there is more.
	h = w.history(w.given(0)...)
	if !h.Unconfirmed() || len(h.Warnings) == 0 {
		t.Fatalf("unconfirmed %v, warnings %v", h.Unconfirmed(), h.Warnings)
	}
	s2 := w.newScribe()
	s2.append(0, format.Epoch{Number: taker.Number + 1}, n+2, nil)
	h = w.history(w.given(0)...)
	if !strings.Contains(strings.Join(h.Warnings, "\n"), "goes on to entry") {
		t.Fatalf("warnings %v", h.Warnings)
	}
}

// A writer in office knows where the history ends: what a writer that it has fenced
// left behind that, on a store that has no vote to decide it, is not read; and
// stores that do not hold the end are said to be behind.
func TestHistory_UpToWhatIsDecided(t *testing.T) {
	w := newWorld(t, options{stores: 3, volumes: []int64{64 << 10}})
	x := w.start()
	w.write(0, 0, fill(w.rng, make([]byte, 32<<10)))
	w.cut()
	x.stop()
	s := w.newScribe()
	end := restorer.Position{N: s.accs[0].Latest.N, Hash: s.accs[0].Latest.Hash}
	old := s.accs[0].Promised
	taker := format.Epoch{Number: old.Number + 1, Random: block.NewID()}
	s.append(0, old, end.N, s.value(end.N+1, end.Hash, old, 2, 4096))
	s.append(1, taker, end.N, nil)
	s.append(2, taker, end.N, nil)
	if h := w.history(w.given(0, 1, 2)...); h.N() != end.N+1 || !h.Unconfirmed() {
		t.Fatalf("a reader that knows nothing finds %d entries, unconfirmed %v", int(h.N()), h.Unconfirmed())
	}
	read := func(upTo restorer.Position, stores ...int) (*restorer.History, error) {
		cfg := w.config(w.given(stores...)...)
		cfg.UpTo = &upTo
		return restorer.OpenHistory(w.ctx, cfg, w.groupID)
	}
	h, err := read(end, 0, 1, 2)
	w.must(err)
	if h.N() != end.N || h.Unconfirmed() || entryOf(t, h, end.N).Hash != end.Hash {
		t.Errorf("up to entry %d there are %d, unconfirmed %v", end.N, int(h.N()), h.Unconfirmed())
	}
	w.checkPoint(h, "v0", "latest", w.model(0, 1))
	chosen := s.value(end.N+1, end.Hash, taker, 3, 8192)
	s.append(1, taker, end.N, chosen)
	s.append(2, taker, end.N, chosen)
	next := restorer.Position{N: end.N + 1, Hash: format.HashOf(chosen)}
	if _, err := read(next, 0); !errors.Is(err, restorer.ErrBehind) {
		t.Errorf("the store that has another entry there, alone: %v", err)
	}
	if h, err := read(next, 0, 2); err != nil || entryOf(t, h, end.N+1).Hash != next.Hash {
		t.Errorf("with one that has the entry: %v", err)
	}
	if _, err := read(restorer.Position{}, 0, 1, 2); !errors.Is(err, restorer.ErrNoEntries) {
		t.Errorf("up to before the first entry: %v", err)
	}
}

// The values of old entries come from the local cache where that is good, and from
// the stores where it is not.
func TestHistory_LocalCache(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 2, digests: true})
	x := w.start()
	for i := range int64(150) {
		w.write(0, i*4096, fill(w.rng, make([]byte, 512)))
		w.cut()
	}
	x.stop()
	cfg := w.config()
	cfg.CacheDir = t.TempDir()
	open := func() int {
		t.Helper()
		for _, f := range w.faults {
			f.Forget()
		}
		h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
		w.must(err)
		defer func() { w.must(h.Close()) }()
		if h.Unconfirmed() || len(h.Warnings) > 0 || h.N() < 150 {
			t.Fatalf("%d entries, warnings %v", int(h.N()), h.Warnings)
		}
		w.checkPoint(h, "v0", "latest", w.model(0, w.journal.Captured()))
		return w.faults[0].Count(fault.Get, "*/log/*") + w.faults[1].Count(fault.Get, "*/log/*")
	}
	first := open()
	second := open()
	if second > first-80 {
		t.Fatalf("%d objects were read with the cache, %d without", second, first)
	}
	files, err := filepath.Glob(filepath.Join(cfg.CacheDir, "*", "*"))
	w.must(err)
	if len(files) == 0 {
		t.Fatal("there is no cache")
	}
	for _, name := range files {
		whole, err := os.ReadFile(name)
		w.must(err)
		for range 15 {
			bad := slices.Clone(whole)
			switch w.rng.IntN(3) {
			case 0:
				bad[w.rng.IntN(len(bad))] ^= 1 << w.rng.IntN(8)
			case 1:
				bad = bad[:w.rng.IntN(len(bad))]
			case 2:
				at := w.rng.IntN(len(bad))
				bad = append(bad[:at:at], bad[min(len(bad), at+50):]...)
			}
			w.must(os.WriteFile(name, bad, 0o600))
			open()
		}
	}
	// More history, after the cache was made.
	y := w.start()
	for range 5 {
		w.random(4 << 10)
		w.cut()
	}
	y.stop()
	open()
	// Another repository's cache is of no use.
	w.must(os.RemoveAll(cfg.CacheDir))
	open()
}

func TestFind(t *testing.T) {
	w := newWorld(t, options{stores: 2, volumes: []int64{64 << 10, 64 << 10}})
	x := w.start()
	w.random(4 << 10)
	w.cut()
	x.stop()
	h, v, err := restorer.Find(w.ctx, w.config(), "v1")
	w.must(err)
	if v.Name != "v1" || h.GroupID != w.groupID || h.Group.Name != "g" {
		t.Fatalf("found %v in %v", v, h.Group)
	}
	_, _, err = restorer.Find(w.ctx, w.config(), "nothing")
	if !errors.Is(err, restorer.ErrNoSuchVolume) || !strings.Contains(err.Error(), "v0, v1") {
		t.Fatal(err)
	}
	groups, err := restorer.Groups(w.ctx, w.config())
	w.must(err)
	if len(groups) != 1 {
		t.Fatalf("groups %v", groups)
	}
}

// A writer that is ended before it is in office has nothing to wait for.
func TestHarness_StopBeforeOffice(t *testing.T) {
	w := newWorld(t, options{stores: 3})
	for _, f := range w.faults {
		f.Add(fault.Rule{Op: fault.List, Block: make(chan struct{})})
	}
	w.start().stop()
}

// A value that is not in every store, and is no longer in memory or on the
// local disk, is had from one that has it, whichever is asked first.
func TestHistory_ValueThatNotAllStoresHave(t *testing.T) {
	w := newWorld(t, options{stores: 3})
	x := w.start()
	w.random(4 << 10)
	w.cut()
	w.must(x.everywhere(w.ctx))
	w.faults[1].Add(fault.Rule{Op: fault.Put, Before: fault.ErrInjected})
	for range 20 {
		w.random(4 << 10)
		w.cut()
	}
	w.must(x.up.AwaitIdle(w.ctx))
	x.kill()
	cfg := w.config()
	cfg.CacheDir = t.TempDir()
	for range 3 {
		h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
		w.must(err)
		w.checkPoint(h, "v0", "latest", w.model(0, w.journal.Captured()))
		w.must(h.Close())
		values, err := filepath.Glob(filepath.Join(cfg.CacheDir, "*", "*.values"))
		if err != nil || len(values) != 1 {
			t.Fatalf("%v, %v", values, err)
		}
		w.must(os.Truncate(values[0], 0))
	}
}

// The objects of a long log are listed few times.
func TestHistory_LongLogIsListedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1})
	x := w.start()
	for range 1030 { // more than two stretches
		w.write(0, 0, fill(w.rng, make([]byte, 512)))
		w.cut()
	}
	x.stop()
	w.faults[0].Forget()
	h := w.history()
	if n := w.faults[0].Count(fault.List, format.LogPrefix(w.groupID)); n > 2 || int(h.N()) < 1030 {
		t.Fatalf("%d listings of a log of %d entries", n, int(h.N()))
	}
}
