package uploader_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/object/fault"
	"drc/internal/object/gate"
)

// meter counts the requests that are under way at a store.
type meter struct {
	mu        sync.Mutex
	now, most int
}

// spoil makes each matching call of a store take so long, and then end with err.
func (m *meter) spoil(s *fault.Store, op fault.Op, d time.Duration, err error) (undo func()) {
	return s.Add(fault.Rule{Op: op, Hook: func(ctx context.Context, _ fault.Call) error {
		m.mu.Lock()
		m.now++
		m.most = max(m.most, m.now)
		m.mu.Unlock()
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
		m.mu.Lock()
		m.now--
		m.mu.Unlock()
		return err
	}})
}

func (m *meter) reset() (most int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	most, m.most = m.most, m.now
	return most
}

// segments makes n batches of a segment each, too large to travel inline.
func (w *world) segments(n int) {
	w.t.Helper()
	for range n {
		w.noise(0, 512<<10*w.rng.Int64N(8), 512<<10)
		w.cut()
	}
}

// A store that fails sees one request at a time, and few, whatever waits for it:
// shards of many batches, its log, manifests, merges, and what lists and heals.
// When it is back that is noticed soon, and it is used at full width again.
func TestOutage_NoStorm(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		op  fault.Op
		bad []int
	}{
		"one store dead":               {"", []int{2}},
		"one store read, not written":  {fault.Put, []int{2}},
		"all stores dead":              {"", []int{0, 1, 2}},
		"all stores read, not written": {fault.Put, []int{0, 1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}, seed: 3})
				x := w.begin()
				w.segments(10)
				w.must(x.up.AwaitIdle(w.ctx))
				meters := make([]meter, 3)
				var undo []func()
				for _, i := range c.bad {
					undo = append(undo, meters[i].spoil(w.faults[i], c.op, time.Second, fault.ErrInjected))
				}
				w.segments(30)
				for i := range int64(4096) { // its manifest is an object
					w.noise(0, 1024*i, 512)
				}
				w.cut()
				time.Sleep(10 * time.Minute)
				if n := x.up.Stats().WaitingPuts; n < 50 {
					t.Fatalf("only %d puts wait: the test shows nothing", n)
				}
				for _, i := range c.bad {
					w.faults[i].Forget()
					meters[i].reset()
				}
				time.Sleep(30 * time.Minute)
				for _, i := range c.bad {
					puts, all := w.faults[i].Count(fault.Put, "*"), len(w.faults[i].Calls())
					if puts > 130 || all > 300 || (c.op == "" && all > 130) {
						t.Errorf("store %d: %d requests in half an hour, %d of them puts", i, all, puts)
					}
					if all < 50 {
						t.Errorf("store %d: %d requests in half an hour: it is hardly tried", i, all)
					}
					if n := meters[i].reset(); n > 1 {
						t.Errorf("store %d: %d requests at a time", i, n)
					}
				}
				for _, f := range undo {
					f()
				}
				for _, i := range c.bad {
					meters[i].spoil(w.faults[i], fault.Put, 100*time.Millisecond, nil)
				}
				time.Sleep(gate.PauseMax + 2*time.Second)
				for _, i := range c.bad {
					if n := meters[i].reset(); n < 3 {
						t.Errorf("store %d: it is back, and %d requests at a time are made", i, n)
					}
				}
				w.must(x.up.AwaitIdle(w.ctx))
				x.stop()
			})
		})
	}
}

// After a long outage of all stores everything catches up in the order in which
// it was written, what is written meanwhile included. That begins when the stores
// are noticed to be back, gate.PauseMax after the outage's end at the latest, and
// from then on the lag falls all the time.
func TestOutage_CatchesUpOldestFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}, seed: 4})
		x := w.begin()
		var undo []func()
		for _, f := range w.faults {
			undo = append(undo, f.Add(fault.Rule{Before: fault.ErrInjected}))
		}
		w.segments(80)
		time.Sleep(time.Hour)
		for i, f := range w.faults {
			undo[i]()
			f.Add(fault.Rule{Op: fault.Put, Delay: 200 * time.Millisecond})
		}
		committed, oldest := x.up.Committed(0), int64(0)
		noticed := time.Now().Add(gate.PauseMax + 2*time.Second) // at the latest
		for range 70 {
			w.segments(1) // a batch a second goes on to be written
			time.Sleep(time.Second)
			c := x.up.Committed(0)
			at, _ := x.up.Waiting()
			if c < committed || (at != 0 && at < oldest) {
				t.Fatalf("committed went from %s to %s, and the oldest write that waits from %d to %d", committed, c, oldest, at)
			}
			if time.Now().After(noticed) && c < w.journal.Captured()-2 && c < committed+3 {
				t.Fatalf("%s of %s is committed, a second ago it was %s: the lag does not fall", c, w.journal.Captured(), committed)
			}
			committed, oldest = c, at
		}
		if at, _ := x.up.Waiting(); committed < w.journal.Captured()-2 || (at != 0 && w.clock.now().Sub(time.Unix(0, at)) > 10*time.Second) {
			t.Errorf("70 seconds after an outage of an hour %s of %s is committed, and a write of %s waits", committed, w.journal.Captured(), time.Unix(0, at))
		}
		x.stop()
		w.check(w.history())
	})
}

// A store that comes back lacks much. What is written from then on does not wait
// until it has all that, and it gets that all the same.
func TestOutage_NewEntriesDoNotWaitForOldShards(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}, seed: 5})
		x := w.begin()
		down := w.faults[2].Add(fault.Rule{Before: fault.ErrInjected})
		w.segments(60)
		time.Sleep(10 * time.Minute)
		if n := x.up.Logged(); n != w.journal.Captured() {
			t.Fatalf("up to %s of %s is logged without the third store", n, w.journal.Captured())
		}
		down()
		w.faults[2].Add(fault.Rule{Op: fault.Put, Name: "*/segments/*", Delay: 2 * time.Second})
		time.Sleep(gate.PauseMax + 3*time.Second)
		lacks := x.up.Stats().WaitingPuts
		if lacks < 60 {
			t.Fatalf("only %d shards wait: the test shows nothing", lacks)
		}
		for range 10 {
			began := time.Now()
			w.segments(1)
			ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
			if err := x.up.AwaitLogged(ctx, w.journal.Captured()); err != nil {
				t.Fatalf("new writes wait for %d old shards: %v", x.up.Stats().WaitingPuts, err)
			}
			cancel()
			if d := time.Since(began); d > 8*time.Second {
				t.Errorf("a new entry took %s", d)
			}
		}
		if n := x.up.Stats().WaitingPuts; n >= lacks {
			t.Errorf("%d shards waited, and %d do after ten new entries", lacks, n)
		}
		w.must(x.up.AwaitIdle(w.ctx))
		if x.log.Exposed(w.repo.Tolerates()) {
			t.Error("the history is still exposed")
		}
		x.stop()
		w.check(w.history(w.faults[1], w.faults[2]))
	})
}

// What waits for stores that are gone is made durable in the buffer soon, however
// little it is: the journal need not be kept for it.
func TestOutage_WhatWaitsIsKeptInTheBuffer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}, seed: 6})
		x := w.begin()
		for _, f := range w.faults {
			f.Add(fault.Rule{Before: fault.ErrInjected})
		}
		w.segments(3)
		w.batches(3)
		time.Sleep(time.Minute)
		x.spool.mu.Lock()
		kept := len(x.spool.records)
		x.spool.mu.Unlock()
		if st := x.up.Stats(); kept != 6 || st.QueuedBatches != 6 || st.QueuedBytes != 0 {
			t.Errorf("of %d batches that wait %d are in the buffer, and %d bytes in memory", st.QueuedBatches, kept, st.QueuedBytes)
		}
		for _, f := range w.faults {
			f.Clear()
		}
		x.stop()
		w.check(w.history())
	})
}
