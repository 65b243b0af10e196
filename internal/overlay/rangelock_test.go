package overlay

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestRangeLock_OrdersWhatOverlaps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l rangeLock
		ctx := t.Context()
		take := func(f func(context.Context, blocks) (*claim, error), r blocks) *claim {
			t.Helper()
			short, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			c, err := f(short, r)
			if err != nil {
				return nil
			}
			return c
		}
		a := take(l.lock, blocks{0, 10})
		if take(l.lock, blocks{10, 20}) == nil {
			t.Error("neighbours are held up")
		}
		if take(l.lock, blocks{9, 10}) != nil || take(l.lockShared, blocks{0, 1}) != nil {
			t.Error("two have the same block")
		}
		l.unlock(a)
		b := take(l.lockShared, blocks{0, 5})
		c := take(l.lockShared, blocks{4, 8})
		if b == nil || c == nil {
			t.Error("readers hold each other up, or who gave up does")
		}
		// A writer that waits comes before readers that come later.
		done := make(chan *claim)
		go func() { w, _ := l.lock(ctx, blocks{0, 8}); done <- w }()
		synctest.Wait()
		if take(l.lockShared, blocks{0, 1}) != nil {
			t.Error("a reader overtook a writer")
		}
		l.unlock(b)
		l.unlock(c)
		if w := <-done; w == nil || take(l.lockShared, blocks{0, 1}) != nil {
			t.Error("the writer did not get it")
		}
	})
}

func TestRangeLock_Random(t *testing.T) {
	var l rangeLock
	var mu sync.Mutex
	state := make([]int, 64) // readers, or -1 for a writer
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for range 400 {
				first := rng.Int64N(60)
				r := blocks{first, first + 1 + rng.Int64N(63-first)}
				reads := rng.IntN(2) == 0
				f := l.lock
				if reads {
					f = l.lockShared
				}
				ctx, cancel := context.WithCancel(t.Context())
				if rng.IntN(8) == 0 {
					cancel()
				}
				c, err := f(ctx, r)
				cancel()
				if errors.Is(err, context.Canceled) {
					continue
				}
				change := func(by int) {
					mu.Lock()
					defer mu.Unlock()
					for i := r.first; i < r.end; i++ {
						if by > 0 && (state[i] < 0 || (!reads && state[i] != 0)) {
							t.Errorf("block %d is had by two", i)
						}
						if reads {
							state[i] += by
						} else {
							state[i] -= by
						}
					}
				}
				change(1)
				change(-1)
				l.unlock(c)
			}
		})
	}
	wg.Wait()
	if len(l.queue) != 0 {
		t.Errorf("%d claims are left", len(l.queue))
	}
}
