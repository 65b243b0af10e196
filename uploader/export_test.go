package uploader

import (
	"context"
	"slices"

	"drc/internal/batch"
)

// AwaitMerged waits until everything is merged that is due.
func AwaitMerged(ctx context.Context, u *Uploader) error {
	m := u.merger
	if m == nil {
		return nil
	}
	return m.mu.await(ctx, 0, func() bool { return !m.due() })
}

// AwaitOffice waits until TakeOffice has succeeded.
func AwaitOffice(ctx context.Context, l *Log) error {
	return l.mu.await(ctx, 0, func() bool { return l.inOffice })
}

// AwaitLoaded waits until every store's log has been read.
func AwaitLoaded(ctx context.Context, l *Log) error {
	return l.mu.await(ctx, 0, func() bool {
		return !slices.ContainsFunc(l.views, func(v view) bool { return !v.loaded })
	})
}

// AwaitHeld waits until a store's log has entry n.
func AwaitHeld(ctx context.Context, l *Log, store int, n uint64) error {
	return l.mu.await(ctx, 0, func() bool { return l.views[store].acc.Latest.N >= n })
}

// Remembered is how many entries a Log has in memory.
func Remembered(l *Log) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for i := range l.views {
		n += len(l.views[i].entries)
	}
	return n
}

// Unsafe is how many decided entries are remembered because they are not safe.
func Unsafe(u *Uploader) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.logged)
}

// Unlogged is what of a batch is to be logged.
func Unlogged(u *Uploader, b *batch.Batch) *batch.Batch { return u.unlogged(b) }
