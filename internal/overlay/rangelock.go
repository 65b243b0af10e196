package overlay

import (
	"context"
	"slices"
	"sync"
)

// blocks is a run of blocks [first, end), by their numbers.
type blocks struct{ first, end int64 }

func (r blocks) overlaps(o blocks) bool { return r.first < o.end && o.first < r.end }

// rangeLock orders requests for overlapping runs of blocks: those that change
// something one after the other, in the order in which they came; those that only
// read side by side. The zero rangeLock is ready to use.
type rangeLock struct {
	mu    sync.Mutex
	queue []*claim // in the order in which they came: those that hold and those that wait
}

// claim is one request's hold on a run of blocks, or its wait for it.
type claim struct {
	run   blocks
	reads bool
	held  bool
	ready chan struct{} // closed when it is held
}

func (c *claim) conflicts(o *claim) bool {
	return c.run.overlaps(o.run) && (!c.reads || !o.reads)
}

// lock waits until nobody who came before has anything to do with r.
func (l *rangeLock) lock(ctx context.Context, r blocks) (*claim, error) {
	return l.wait(ctx, &claim{run: r, ready: make(chan struct{})})
}

// lockShared waits until nobody who came before changes anything in r.
func (l *rangeLock) lockShared(ctx context.Context, r blocks) (*claim, error) {
	return l.wait(ctx, &claim{run: r, reads: true, ready: make(chan struct{})})
}

func (l *rangeLock) wait(ctx context.Context, c *claim) (*claim, error) {
	l.mu.Lock()
	l.queue = append(l.queue, c)
	l.grant()
	l.mu.Unlock()
	select {
	case <-c.ready:
		return c, nil
	case <-ctx.Done():
		l.unlock(c)
		return nil, ctx.Err()
	}
}

// unlock gives a claim up, held or not.
func (l *rangeLock) unlock(c *claim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = slices.DeleteFunc(l.queue, func(o *claim) bool { return o == c })
	l.grant()
}

// grant gives the lock to all who have no conflict with anybody before them. The
// queue is as long as there are requests in flight, which servers bound.
func (l *rangeLock) grant() {
	for i, c := range l.queue {
		if c.held || slices.ContainsFunc(l.queue[:i], c.conflicts) {
			continue
		}
		c.held = true
		close(c.ready)
	}
}
