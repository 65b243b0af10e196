package uploader

import "context"

// AwaitMerged waits until everything is merged that is due.
func AwaitMerged(ctx context.Context, u *Uploader) error {
	m := u.merger
	for m != nil {
		m.mu.Lock()
		changed, ready := m.changed, m.top == m.done || m.top < m.nextTry
		m.mu.Unlock()
		if ready {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
	return nil
}
