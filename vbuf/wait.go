package vbuf

import (
	"context"
	"math"
	"sync"

	"drc/internal/block"
)

// everMore is a position that is never reached: who waits for it waits for a
// turn.
const everMore = block.Seq(math.MaxUint64)

// waiter is one goroutine that waits for a position, or for its turn.
type waiter struct {
	seq block.Seq
	ch  chan struct{} // capacity 1; one token when woken
}

// waiters is who waits, in the order of arrival. Its lock is its owner's.
type waiters struct {
	list []*waiter
	free []*waiter // to be used again
}

// add enlists the caller, who then leaves the lock and calls wait.
func (ws *waiters) add(seq block.Seq) *waiter {
	var w *waiter
	if n := len(ws.free); n > 0 {
		w, ws.free = ws.free[n-1], ws.free[:n-1]
	} else {
		w = &waiter{ch: make(chan struct{}, 1)}
	}
	w.seq = seq
	ws.list = append(ws.list, w)
	return w
}

// wake wakes all who wait for seq or less, and one more, whose turn it is to
// lead if there is something left to do.
func (ws *waiters) wake(seq block.Seq) {
	kept, lead := ws.list[:0], true
	for _, w := range ws.list {
		switch {
		case w.seq <= seq:
			w.ch <- struct{}{}
		case lead:
			lead = false
			w.ch <- struct{}{}
		default:
			kept = append(kept, w)
		}
	}
	clear(ws.list[len(kept):])
	ws.list = kept
}

// wakeReached wakes all who wait for seq or less.
func (ws *waiters) wakeReached(seq block.Seq) {
	kept := ws.list[:0]
	for _, w := range ws.list {
		if w.seq <= seq {
			w.ch <- struct{}{}
		} else {
			kept = append(kept, w)
		}
	}
	clear(ws.list[len(kept):])
	ws.list = kept
}

func (ws *waiters) wakeAll() { ws.wakeReached(everMore) }

// wait blocks until w is woken or ctx ends. mu, the lock of ws, is not held on
// entry and is held on return. A wake-up that came together with the end of ctx
// is passed on.
func (ws *waiters) wait(ctx context.Context, mu *sync.Mutex, w *waiter) error {
	select {
	case <-w.ch:
		mu.Lock()
		ws.free = append(ws.free, w)
		return nil
	case <-ctx.Done():
	}
	mu.Lock()
	ws.leave(w)
	return context.Cause(ctx)
}

// leave takes back w without waiting for it. Under the lock of ws.
func (ws *waiters) leave(w *waiter) {
	select {
	case <-w.ch: // woken, so no longer in the list; its turn may be another's
		ws.wake(0)
	default:
		for i, o := range ws.list {
			if o == w {
				ws.list = append(ws.list[:i], ws.list[i+1:]...)
				break
			}
		}
	}
	ws.free = append(ws.free, w)
}
