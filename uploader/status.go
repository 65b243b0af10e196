package uploader

import (
	"context"
	"time"
)

// Stats are counts since the start.
type Stats struct {
	Entries        int64
	PutBytes       int64
	Requests       int64
	Degraded       int64
	WaitingPuts    int
	QueuedBatches  int
	QueuedBytes    int64
	LastEntryBytes int64
}

// Stats returns a copy of the counts.
func (u *Uploader) Stats() Stats {
	u.mu.Lock()
	st := u.stats
	st.QueuedBatches = len(u.queue)
	st.QueuedBytes = u.memory
	u.mu.Unlock()
	for _, p := range u.putters {
		p.mu.Lock()
		st.PutBytes += p.bytes
		st.Requests += p.requests
		st.WaitingPuts += len(p.queue) + p.active
		p.mu.Unlock()
	}
	return st
}

// Waiting describes what was put and is not committed: when its oldest write
// was captured (ns since 1970 UTC, 0 if there is none), and its bytes.
func (u *Uploader) Waiting() (oldest, bytes int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	take := func(at, n int64) {
		if at != 0 && (oldest == 0 || at < oldest) {
			oldest = at
		}
		bytes += n
	}
	for _, e := range u.logged {
		take(e.oldest, e.bytes)
	}
	for _, p := range u.queue {
		take(p.b.Oldest, p.b.Bytes)
	}
	return oldest, bytes
}

// AwaitIdle waits until every batch that was put is logged and every put has
// succeeded.
func (u *Uploader) AwaitIdle(ctx context.Context) error {
	return u.mu.await(ctx, 100*time.Millisecond, func() bool {
		if len(u.queue) > 0 || len(u.logged) > 0 {
			return false
		}
		for _, p := range u.putters {
			if p.waiting() > 0 {
				return false
			}
		}
		return true
	})
}

// setTrouble notes what the buffer fails at; nil: nothing.
func (u *Uploader) setTrouble(err error) {
	u.mu.Lock()
	before := u.trouble
	u.trouble = err
	u.mu.Unlock()
	if err != nil && before == nil {
		u.cfg.Logger.Warn("the buffer fails; trying again", "error", err)
	}
}

// Trouble is what keeps this host from bringing history to the stores, other
// than stores that are out of reach; nil if nothing does. It is tried again.
func (u *Uploader) Trouble() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.trouble != nil {
		return u.trouble
	}
	return u.cfg.Log.Trouble()
}

// StoreTrouble is since when a store has failed to take objects, and how.
func (u *Uploader) StoreTrouble(i int) (time.Time, error) { return u.putters[i].down() }
