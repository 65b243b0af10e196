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
		st.WaitingPuts += len(p.queues[0]) + len(p.queues[1]) + p.active
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

// What the buffer can fail at. One that works says nothing of the other.
const (
	troubleKeep = iota // a batch
	troubleLoad        // the record of one
	troubleKinds
)

// setTrouble notes what the buffer fails at; nil: nothing.
func (u *Uploader) setTrouble(kind int, err error) {
	u.mu.Lock()
	before := u.troubles[kind]
	u.troubles[kind] = err
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
	for _, err := range u.troubles {
		if err != nil {
			return err
		}
	}
	if err := u.blocked(); err != nil {
		return err
	}
	return u.cfg.Log.Trouble()
}

// blocked is why a batch can never be logged, as things are; nil: all can. u.mu
// is held.
func (u *Uploader) blocked() error {
	for _, err := range u.lost {
		return err
	}
	if u.refused == 0 {
		return nil
	}
	for _, p := range u.queue {
		if err := p.stuck(); err != nil {
			return err
		}
	}
	return nil
}

// StoreDamage is the first object that a store refused because it holds other
// bytes under its name; nil: none since the start.
func (u *Uploader) StoreDamage(i int) error {
	p := u.putters[i]
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.damage
}

// StoreTrouble is since when a store has failed to take objects, and how.
func (u *Uploader) StoreTrouble(i int) (time.Time, error) { return u.putters[i].down() }

// Waiting is what waits to be put on a store.
type Waiting struct {
	Objects int
	Bytes   int64
}

// StoreWaiting is what waits to be put on a store, log entries apart: those that
// are on too few stores wait as batches.
func (u *Uploader) StoreWaiting(i int) Waiting {
	p := u.putters[i]
	p.mu.Lock()
	defer p.mu.Unlock()
	return Waiting{len(p.queues[0]) + len(p.queues[1]) + p.active, p.held}
}
