package uploader

import (
	"context"
	"sync"
	"time"
)

// monitor is a lock whose users can wait for a change of what it guards. The
// zero monitor is ready for use.
type monitor struct {
	sync.Mutex
	changed chan struct{} // closed at the next change; nil while nobody waits
}

// notify wakes all who wait; the lock is held.
func (m *monitor) notify() {
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
}

// await calls ready, with the lock held, until it returns true: at once, after
// each change and, if poll is not zero, that often.
func (m *monitor) await(ctx context.Context, poll time.Duration, ready func() bool) error {
	for {
		m.Lock()
		if ready() {
			m.Unlock()
			return nil
		}
		if m.changed == nil {
			m.changed = make(chan struct{})
		}
		changed := m.changed
		m.Unlock()
		if err := changedOrLater(ctx, changed, poll); err != nil {
			return err
		}
	}
}

// changedOrLater returns when changed is closed or, if poll is not zero, that
// time has passed.
func changedOrLater(ctx context.Context, changed <-chan struct{}, poll time.Duration) error {
	var tick <-chan time.Time
	if poll > 0 {
		t := time.NewTimer(poll)
		defer t.Stop()
		tick = t.C
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-changed:
	case <-tick:
	}
	return nil
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error { return changedOrLater(ctx, nil, d) }
