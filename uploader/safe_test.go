package uploader_test

import (
	"context"
	"slices"
	"sync"
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

// remembered is the state of a host, in memory.
type remembered struct {
	mu     sync.Mutex
	epochs []format.Epoch
}

func (r *remembered) Epochs() []format.Epoch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.epochs)
}

func (r *remembered) AddEpoch(e format.Epoch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.epochs = append(r.epochs, e)
	return nil
}

func (r *remembered) Tails() *uploader.Tails          { return nil }
func (r *remembered) SaveTails(*uploader.Tails) error { return nil }

// TestSafe_AValueThatWasNotChosenDoesNotCount: the second store holds another
// value of the entry, which an earlier start had put there and nowhere else.
// Until that store has the decided one, the entry is on one store only.
func TestSafe_AValueThatWasNotChosenDoesNotCount(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	a, b := fault.New(mem.New(mem.Options{Name: "a"})), fault.New(mem.New(mem.Options{Name: "b"}))
	r, err := repo.Create(ctx, []object.Store{a, b}, id.Root, format.Profile{Data: 2, Parity: 2}, id.Recipients(), 1)
	if err != nil {
		t.Fatal(err)
	}
	group := block.GroupID{1}
	ring := crypt.NewAgentRing(agent, id.RootPublic)
	ring.AddOwn(crypttest.Keys())
	state := &remembered{}
	start := func() (*uploader.Log, func()) {
		l := uploader.NewLog(uploader.LogConfig{
			Repo: r, Group: group, Agent: agent, Ring: ring, State: state, OnEntry: func(*grouplog.Entry) error { return nil },
		})
		run, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = l.Run(run)
		}()
		if err := l.TakeOffice(run); err != nil {
			t.Fatal(err)
		}
		return l, func() { stop(); <-done }
	}
	value := func(l *uploader.Log) []byte {
		n, parent, epoch := l.Next()
		return grouplog.Draft{Group: group, N: n, Parent: parent, Epoch: epoch, Keys: crypttest.Keys(), Items: &format.Items{}}.Make(agent)
	}

	// The first start's entry reaches the second store only.
	a.Add(fault.Rule{Op: fault.Put, Name: "*/log/*", Skip: 1, Before: fault.ErrInjected})
	l, stop := start()
	first, giveUp := context.WithCancel(ctx)
	go func() { _ = l.Append(first, value(l)) }()
	for len(b.Calls()) == 0 || l.Status()[1].Entry == 0 {
		time.Sleep(time.Millisecond)
	}
	giveUp()
	stop()

	// The second start does not see that store, and decides another value.
	a.Clear()
	b.Add(fault.Rule{Before: fault.ErrInjected})
	l, stop = start()
	defer stop()
	if err := l.Append(ctx, value(l)); err != nil {
		t.Fatal(err)
	}
	// The second store is back, for reading.
	b.Clear()
	b.Add(fault.Rule{Op: fault.Put, Before: fault.ErrInjected})
	for l.Status()[1].Entry == 0 {
		time.Sleep(time.Millisecond)
	}
	if safe := l.Safe(1); safe != 0 || !l.Exposed(1) {
		t.Errorf("entry %d is called safe, and one of its two stores holds another value", safe)
	}
	b.Clear()
	if err := l.AwaitSafe(ctx, 1, 0); err != nil {
		t.Errorf("it never becomes safe: %v", err)
	}
}

// What a writer before had decided becomes committed without a new entry, but
// not before it is on enough stores.
func TestLearn_CommittedOnceSafe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 2})
		x := w.start()
		w.random(512)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		back := w.down(1)
		w.random(512)
		w.cut()
		w.must(uploader.AwaitLogged(w.ctx, x.up, 2))
		x.kill()
		x = w.start()
		x.up.Learn(2, 2, map[block.VolumeIndex]block.Seq{0: 2}, w.volumes)
		w.must(uploader.AwaitOffice(w.ctx, x.log))
		time.Sleep(time.Minute)
		if c := x.up.Committed(0); c == 2 {
			t.Error("committed is what is on one store of two")
		}
		back()
		w.must(x.up.AwaitCommitted(w.ctx, 0, 2))
		x.stop()
	})
}
