package uploader

import (
	"context"
	"time"

	"drc/internal/format"
	"drc/internal/repo"
)

// awaitPlaced waits until every shard of p is on its store. Of a store that has
// been failing for long, or holds something else in a shard's place, it waits
// for nothing: at least k shards of each segment placed are enough then, once the
// others are durable in the buffer. It returns what is placed. It waits for nothing if
// p is given up.
func (u *Uploader) awaitPlaced(ctx context.Context, p *pending) ([]format.Degraded, error) {
	for {
		enough, persisted := false, false
		err := u.mu.await(ctx, time.Second, func() bool {
			enough, persisted = false, p.persisted
			if p.gone {
				return true
			}
			if p.missing == 0 && p.refusals() == 0 {
				return true
			}
			enough = (p.missing == 0 || u.troubled(u.cfg.DegradeAfter)) && u.enoughPlaced(p)
			return enough
		})
		if err != nil || !enough {
			return nil, err
		}
		if persisted {
			break
		}
		// Should the stores be back before the buffer has room, they will do.
		if err := u.persist(ctx, p, func() bool { return p.missing == 0 && p.refusals() == 0 }); err != nil {
			return nil, err
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []format.Degraded
	for i, all := range p.wanted() {
		if p.placed[i] != all {
			out = append(out, format.Degraded{Segment: p.b.Segments[i].Row.ID, Placed: p.placed[i]})
		}
	}
	return out, nil
}

// enoughPlaced reports whether each segment has at least k shards placed, and
// every shard that is missing belongs to a store that fails, or that holds
// something else in its place; u.mu is held.
func (u *Uploader) enoughPlaced(p *pending) bool {
	for i, s := range p.b.Segments {
		if s.Row.Inline != 0 {
			continue
		}
		have := 0
		for shard := range s.Row.Profile.Total() {
			if p.placed[i]&(1<<shard) != 0 {
				have++
				continue
			}
			if p.refused[i]&(1<<shard) != 0 {
				continue
			}
			if since, _ := u.putters[repo.ShardMember(s.Row.ID, shard, len(u.putters))].down(); since.IsZero() {
				return false
			}
		}
		if have < s.Row.Profile.Data {
			return false
		}
	}
	return true
}
