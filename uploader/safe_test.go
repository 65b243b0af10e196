package uploader_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/object/fault"
	"drc/uploader"
)

// TestSafe_AValueThatWasNotChosenDoesNotCount: the second store holds another
// value of the entry, which an earlier start had put there and nowhere else.
// Until that store has the decided one, the entry is on one store only.
func TestSafe_AValueThatWasNotChosenDoesNotCount(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h := newLogHost(t, 2)
	a, b := h.faults[0], h.faults[1]

	// The first start's entry reaches the second store only.
	a.Add(fault.Rule{Op: fault.Put, Name: "*/log/*", Skip: 1, Before: fault.ErrInjected})
	h.start(ctx)
	first, giveUp := context.WithCancel(ctx)
	given := make(chan error)
	go func() { given <- h.append(first) }()
	if err := uploader.AwaitHeld(ctx, h.log, 1, 1); err != nil {
		t.Fatal(err)
	}
	giveUp()
	if err := <-given; err == nil {
		t.Fatal("an entry on one store of two was decided: the test shows nothing")
	}
	h.stop()

	// The second start does not see that store, and decides another value.
	a.Clear()
	b.Add(fault.Rule{Before: fault.ErrInjected})
	h.start(ctx)
	defer h.stop()
	h.appends(ctx, 1)
	// The second store is back, for reading.
	b.Clear()
	b.Add(fault.Rule{Op: fault.Put, Before: fault.ErrInjected})
	if err := uploader.AwaitHeld(ctx, h.log, 1, 1); err != nil {
		t.Fatal(err)
	}
	if safe := h.log.Safe(1); safe != 0 || !h.log.Exposed(1) {
		t.Errorf("entry %d is called safe, and one of its two stores holds another value", safe)
	}
	b.Clear()
	if err := h.log.AwaitSafe(ctx, 1, 0); err != nil {
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
		w.must(x.up.AwaitLogged(w.ctx, 2))
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
