package uploader

import (
	"context"
	"time"

	"drc/internal/format"
	"drc/internal/repo"
)

// awaitPlaced waits until every shard of p is on its store. If a store has
// been failing for long, at least k shards of each segment placed are enough,
// once the others are durable in the buffer: then it returns what is placed.
func (u *Uploader) awaitPlaced(ctx context.Context, p *pending) ([]format.Degraded, error) {
	for {
		enough, persisted := false, false
		err := u.mu.await(ctx, time.Second, func() bool {
			if p.missing == 0 {
				return true
			}
			enough, persisted = u.troubled(u.cfg.DegradeAfter) && u.enoughPlaced(p), p.persisted
			return enough
		})
		if err != nil || !enough {
			return nil, err
		}
		if persisted {
			break
		}
		// Should the stores be back before the buffer has room, they will do.
		if err := u.persist(ctx, p, func() bool { return p.missing == 0 }); err != nil {
			return nil, err
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []format.Degraded
	for i, s := range p.b.Segments {
		if all := uint64(1)<<s.Row.Profile.Total() - 1; s.Row.Inline == 0 && p.placed[i] != all {
			out = append(out, format.Degraded{Segment: s.Row.ID, Placed: p.placed[i]})
		}
	}
	return out, nil
}

// enoughPlaced reports whether each segment has at least k shards placed, and
// every shard that is missing belongs to a store that fails; u.mu is held.
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
