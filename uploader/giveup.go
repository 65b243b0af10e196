package uploader

import (
	"context"
	"errors"
	"slices"

	"drc/internal/batch"
	"drc/internal/format"
)

// A batch of which the buffer and the stores have too little can never be logged, nor
// what was cut behind it before it. Once it is next, all that is queued is given up;
// what it held must come about in another way.
//
// From GiveUp on nothing is logged, and what is put is given up as well, until TakeGone
// has returned it all.

// errGone: a batch was given up.
var errGone = errors.New("the batch was given up")

// Gone is a batch that was given up.
type Gone struct {
	Batch *batch.Batch
	Names []format.NamedCheckpoint // that travelled with it
}

// GiveUp gives up all that is queued if lost says so of the next batch to be logged
// and that is not being logged already. It reports whether nothing is logged any more:
// then, too, if it has been called before and TakeGone has not.
func (u *Uploader) GiveUp(lost func(*batch.Batch) bool) bool {
	u.mu.Lock()
	if u.givingUp {
		u.mu.Unlock()
		return true
	}
	if len(u.queue) == 0 || u.queue[0].appending {
		u.mu.Unlock()
		return false
	}
	head := u.queue[0]
	u.mu.Unlock()
	if !lost(head.b) {
		return false
	}
	u.mu.Lock()
	if len(u.queue) == 0 || u.queue[0] != head || head.appending {
		u.mu.Unlock()
		return false
	}
	u.givingUp = true
	all := u.queue
	u.queue = nil
	for _, p := range all {
		u.leave(p)
	}
	u.mu.notify()
	u.mu.Unlock()
	for _, p := range all {
		for _, x := range u.putters {
			x.drop(p)
		}
	}
	return true
}

// IsNext reports whether what says so of the next batch to be logged.
func (u *Uploader) IsNext(what func(*batch.Batch) bool) bool {
	u.mu.Lock()
	if len(u.queue) == 0 {
		u.mu.Unlock()
		return false
	}
	next := u.queue[0].b
	u.mu.Unlock()
	return what(next)
}

// leave gives p up; u.mu is held.
func (u *Uploader) leave(p *pending) {
	p.gone, p.unwanted = true, true
	u.foundAll(p)
	u.outline(p)
	u.gone = append(u.gone, p)
}

// TakeGone returns what was given up, in order, once none of it is being made durable
// any more. Nothing may be put meanwhile; what is put from then on is logged again.
func (u *Uploader) TakeGone(ctx context.Context) ([]Gone, error) {
	if err := u.mu.await(ctx, 0, func() bool { return u.keeps == nil || !u.keeps.gone }); err != nil {
		return nil, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []Gone
	for _, p := range u.gone {
		out = append(out, Gone{Batch: p.b, Names: slices.Clone(p.names)})
	}
	u.gone, u.givingUp = nil, false
	return out, nil
}

// isBehindHole reports whether b, the next batch, begins behind what follows the end
// of the log. What is missing between them was in batches that were lost with a buffer
// of which this one knows nothing.
func (u *Uploader) isBehindHole(b *batch.Batch) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return b.To <= u.cfg.HolesUpTo && b.From > u.lastTo+1
}

// IsBehindHole is what OnHole tells of a batch that is next.
func (u *Uploader) IsBehindHole(b *batch.Batch) bool {
	return u.cfg.Log.InOffice() && u.isBehindHole(b)
}
