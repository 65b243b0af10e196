package uploader

import (
	"context"
	"fmt"
	"slices"
	"time"

	"drc/internal/batch"
)

// makeRoom waits until n more bytes of shards may be in memory. While something
// keeps the head of the queue it does not wait for that but persists the oldest
// batches.
func (u *Uploader) makeRoom(ctx context.Context, n int64) error {
	for {
		var oldest *pending
		err := u.mu.await(ctx, time.Second, func() bool {
			oldest = nil
			if u.memory == 0 || u.memory+n <= u.cfg.MemoryBytes {
				return true
			}
			if u.troubled(u.cfg.DegradeAfter/2) || u.blocked() != nil {
				for _, p := range u.queue {
					if !p.persisted { // in order, also what holds no memory
						oldest = p
						return true
					}
				}
				// All that can be in the buffer is there. What is left belongs to
				// the batch that is being logged, and waiting for that is waiting
				// for the stores.
				return true
			}
			return false
		})
		if err != nil || oldest == nil {
			return err
		}
		if err := u.persist(ctx, oldest, func() bool { return u.memory == 0 || u.memory+n <= u.cfg.MemoryBytes }); err != nil {
			return err
		}
	}
}

// troubled reports whether some store has been failing for at least d.
func (u *Uploader) troubled(d time.Duration) bool {
	for _, p := range u.putters {
		if since, _ := p.down(); !since.IsZero() && u.cfg.Now().Sub(since) >= d {
			return true
		}
	}
	for _, s := range u.cfg.Log.Status() {
		if !s.Since.IsZero() && u.cfg.Now().Sub(s.Since) >= d {
			return true
		}
	}
	return false
}

// keepWaiting makes batches durable in the buffer, oldest first, that have waited
// for stores that fail for DegradeAfter: the journal behind them can be given
// back then, so that an outage costs the buffer compressed space, and a restart
// need not cut them again.
func (u *Uploader) keepWaiting(ctx context.Context) {
	for {
		var oldest *pending
		find := func() bool {
			oldest = nil
			for _, p := range u.queue {
				if !p.persisted {
					oldest = p
					break
				}
			}
			return oldest != nil
		}
		if u.mu.await(ctx, 0, find) != nil {
			return
		}
		overdue := false
		err := u.mu.await(ctx, time.Second, func() bool {
			overdue = find() && u.cfg.Now().Sub(oldest.since) >= u.cfg.DegradeAfter && u.troubled(u.cfg.DegradeAfter)
			return overdue || oldest == nil
		})
		if err != nil {
			return
		}
		if overdue && u.persist(ctx, oldest, func() bool { return false }) != nil {
			return
		}
	}
}

// persist makes a batch durable in the buffer and drops what it holds in memory.
// It tries for as long as it takes, or until enough is true, which is called
// with u.mu held, or the batch is logged or given up: then it returns nil all the same. The
// only error is that ctx has ended.
func (u *Uploader) persist(ctx context.Context, p *pending, enough func() bool) error {
	try, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if u.mu.await(try, 0, func() bool { return p.logged || p.gone || enough() }) == nil {
			cancel()
		}
	}()
	defer func() { cancel(); <-watched }()
	var pause backoff
	for {
		err := u.persistOnce(try, p)
		if try.Err() != nil {
			err = nil
		}
		u.setTrouble(troubleKeep, err)
		if err == nil {
			return ctx.Err()
		}
		if pause.wait(try) != nil {
			u.setTrouble(troubleKeep, nil)
			return ctx.Err()
		}
	}
}

// persistOnce is one try of persist.
func (u *Uploader) persistOnce(ctx context.Context, p *pending) error {
	select {
	case u.persisting <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-u.persisting }()
	u.mu.Lock()
	if p.persisted || p.logged || p.gone {
		u.mu.Unlock()
		return nil
	}
	whole := *p.b
	whole.Segments = slices.Clone(p.b.Segments)
	for i := range whole.Segments {
		whole.Segments[i].Shards = slices.Clone(p.b.Segments[i].Shards)
	}
	p.spooled, u.keeps = true, p
	u.mu.Unlock()
	err := u.cfg.Spool.Persist(ctx, p.b, &whole)
	u.mu.Lock()
	var placedMeanwhile []Shard // before the buffer knew of them
	for i := range whole.Segments {
		for k := range whole.Segments[i].Shards {
			if p.placed[i]&(1<<k) != 0 {
				placedMeanwhile = append(placedMeanwhile, Shard{whole.Segments[i].Row.ID, k})
			}
		}
	}
	if err == nil {
		p.persisted = true
		u.outline(p)
	}
	u.mu.notify()
	u.mu.Unlock()
	for _, x := range placedMeanwhile {
		u.cfg.Spool.Placed(x.Segment, x.Index)
	}
	u.mu.Lock()
	u.keeps = nil
	u.mu.notify()
	u.mu.Unlock()
	if err != nil {
		return fmt.Errorf("keep seqs %s to %s in the buffer: %w", p.b.From, p.b.To, err)
	}
	return nil
}

// load returns the whole batch without its shards: from the buffer, if it is in
// memory only in outline. Of one that is given up the error is errGone.
func (u *Uploader) load(ctx context.Context, p *pending) (*batch.Batch, error) {
	var pause backoff
	for {
		u.mu.Lock()
		whole := *p.b
		persisted, gone := p.persisted, p.gone
		u.mu.Unlock()
		if gone {
			u.setTrouble(troubleLoad, nil)
			return nil, errGone
		}
		if !persisted {
			return &whole, nil
		}
		b, err := u.cfg.Spool.Load(p.b)
		u.setTrouble(troubleLoad, err)
		if err == nil {
			return b, nil
		}
		if pause.wait(ctx) != nil {
			return nil, ctx.Err()
		}
	}
}
