package uploader_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/object/fault"
	"drc/uploader"
)

var errDisk = errors.New("the disk fails")

// down takes all stores from i on away, and returns what brings them back.
func (w *world) down(i int) func() {
	var back []func()
	for _, f := range w.faults[i:] {
		back = append(back, f.Add(fault.Rule{Before: fault.ErrInjected}))
	}
	return func() {
		for _, b := range back {
			b()
		}
	}
}

// Small batches, which travel in their entries, and what large ones say beside
// their shards do not pile up in memory while no store takes anything: the buffer
// has them.
func TestBuffer_HoldsABacklog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		w.memory = 256 << 10
		x := w.begin()
		back := w.down(0)
		for i := range 150 {
			w.random(4 << 10)
			if i%10 == 0 {
				w.random(512 << 10)
			}
			w.cut()
			time.Sleep(time.Second)
			if st := x.up.Stats(); st.QueuedBytes > w.memory+1<<20 {
				t.Fatalf("batch %d: %d bytes in memory", i, st.QueuedBytes)
			}
		}
		back()
		x.stop()
		if st := x.up.Stats(); st.QueuedBytes != 0 {
			t.Errorf("%d bytes are still accounted for", st.QueuedBytes)
		}
		w.check(w.history())
	})
}

// brokenBuffer is a world in which one store of three is away, until back is
// called, and the buffer fails; a batch with shards is about to be cut.
func brokenBuffer(t *testing.T) (w *world, x *writer, back func()) {
	w = newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
	x = w.begin()
	back = w.down(2)
	x.spool.setFail(errDisk)
	w.noise(0, 0, 1<<20)
	return w, x, back
}

// A buffer that fails does not stop the uploader: it says so, tries again, and
// goes on as soon as the buffer works.
func TestBuffer_FailsForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, x, back := brokenBuffer(t)
		w.random(4 << 20)
		w.random(4 << 20)
		w.cut()
		time.Sleep(10 * time.Minute)
		if err := x.up.Trouble(); !errors.Is(err, errDisk) {
			t.Errorf("trouble is %v", err)
		}
		if _, n := x.spool.held(); n < 5 || n > 100 {
			t.Errorf("%d tries in ten minutes", n)
		}
		if x.up.Logged() > 1 {
			t.Error("an entry went out whose shards are neither on the stores nor in the buffer")
		}
		x.spool.setFail(nil)
		time.Sleep(time.Minute)
		if err := x.up.Trouble(); err != nil || x.up.Logged() < 4 {
			t.Errorf("trouble is %v, and entries up to %s are logged", err, x.up.Logged())
		}
		back()
		x.stop()
		w.check(w.history())
	})
}

// A buffer that fails, or has no room, and a store that was away and is back: the
// store is enough. Otherwise nothing would ever be released.
func TestBuffer_FailsAndTheStoreIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, x, back := brokenBuffer(t)
		w.random(4 << 20)
		w.cut()
		time.Sleep(time.Minute)
		back()
		time.Sleep(2 * time.Minute)
		if err := x.up.Trouble(); err != nil || x.up.Logged() != 3 {
			t.Errorf("trouble is %v, and entries up to %s are logged", err, x.up.Logged())
		}
		x.stop()
		w.check(w.history())
	})
}

// While one batch waits for room in the buffer, those before it are logged, and
// give up the room that it waits for.
func TestBuffer_FullOfWhatIsLoggedNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.begin()
		x.spool.room = 1
		back := w.down(0)
		for range 3 {
			w.random(512 << 10)
			w.cut()
			time.Sleep(time.Minute)
		}
		if !x.spool.isFull() {
			t.Fatal("nothing waits for the buffer")
		}
		back()
		time.Sleep(time.Minute)
		if at := x.up.Logged(); at != 4 {
			t.Errorf("a minute after the stores are back entries up to %s are logged, of 4", at)
		}
		x.stop()
		w.check(w.history())
	})
}

// Decided entries that are on too few stores are remembered in bounded memory,
// and become committed when they are.
func TestBuffer_ManyEntriesOnTooFewStores(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 2})
		w.noMerge = true
		x := w.start()
		w.random(512)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		back := w.down(1)
		for range 1500 {
			w.write(0, 0, []byte(strings.Repeat("x", 512)))
			w.cut()
		}
		w.must(x.up.AwaitLogged(w.ctx, 1501))
		if c := x.up.Committed(0); c != 1 {
			t.Errorf("committed is %s, on one store of two", c)
		}
		if n := uploader.Unsafe(x.up); n > 1024 {
			t.Errorf("%d entries are in memory", n)
		}
		back()
		w.must(x.up.AwaitCommitted(w.ctx, 0, 1501))
		x.stop()
	})
}

// A batch whose writes the log has already becomes an entry without segments:
// nobody waits for its shards, and they are not put when the store takes them
// again.
func TestBuffer_WhatTheLogHasIsNotPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{volumes: []int64{4 << 20}})
		x := w.begin()
		x.up.Learn(1, 1000, nil, nil)
		w.faults[0].Add(fault.Rule{Op: fault.Put, Name: "*/segments/*", Before: fault.ErrInjected})
		w.noise(0, 0, 1<<20)
		w.random(4 << 20)
		w.random(4 << 20)
		w.cut()
		w.must(x.log.AwaitSafe(w.ctx, 0, 1))
		time.Sleep(time.Minute)
		w.faults[0].Clear()
		w.faults[0].Forget()
		time.Sleep(10 * time.Minute)
		w.must(x.up.AwaitIdle(w.ctx))
		if n := w.faults[0].Count(fault.Put, "*/segments/*"); n > 1 { // one was under way
			t.Errorf("%d shards were put that no entry refers to", n)
		}
		x.kill()
	})
}
