package uploader

import (
	"fmt"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/repo"
)

// puts prepares the puts of the shards of p that are not placed.
func (u *Uploader) puts(p *pending) (jobs []func()) {
	for i, s := range p.b.Segments {
		if s.Row.Inline != 0 {
			continue
		}
		for shard := range s.Row.Profile.Total() {
			if p.placed[i]&(1<<shard) != 0 {
				continue
			}
			p.missing++
			member := repo.ShardMember(s.Row.ID, shard, len(u.putters))
			j := put{
				name:    format.SegmentName(u.cfg.Group, s.Row.ID, s.Row.Expiry, shard),
				owner:   p,
				size:    format.ShardObjectBytes(format.ShardBytes(s.Row.Payload, s.Row.Profile.Data)),
				body:    func() ([]byte, error) { return u.shard(p, i, shard) },
				placed:  func() { u.shardPlaced(p, i, shard) },
				refused: func(error) { u.shardRefused(p, i, shard) },
			}
			jobs = append(jobs, func() { u.putters[member].add(j) })
		}
	}
	return jobs
}

// shard returns the bytes of a shard, from memory or from the buffer.
func (u *Uploader) shard(p *pending, segment, shard int) ([]byte, error) {
	u.mu.Lock()
	s, unwanted := p.b.Segments[segment], p.unwanted
	u.mu.Unlock()
	if unwanted {
		return nil, errUnwanted
	}
	if s.Shards != nil && s.Shards[shard] != nil {
		return s.Shards[shard], nil
	}
	raw, err := u.cfg.Spool.ReadShard(s.Row.ID, shard)
	if err != nil {
		err = fmt.Errorf("%w: read shard %d of segment %s from the buffer: %w", errNoSource, shard, s.Row.ID, err)
	}
	u.mu.Lock()
	if x := (Shard{s.Row.ID, shard}); err != nil && !p.logged && !p.gone {
		u.lost[x] = err
	} else {
		delete(u.lost, x)
	}
	u.mu.Unlock()
	return raw, err
}

func (u *Uploader) shardPlaced(p *pending, segment, shard int) {
	u.mu.Lock()
	s := &p.b.Segments[segment]
	p.placed[segment] |= 1 << shard
	p.missing--
	if p.exposed > 0 {
		p.exposed--
		u.cfg.Log.expose(-1)
	}
	spooled := p.spooled
	if s.Shards != nil && s.Shards[shard] != nil {
		n := int64(len(s.Shards[shard]))
		s.Shards[shard] = nil
		p.memory -= n
		u.memory -= n
	}
	id := s.Row.ID
	u.mu.notify()
	u.mu.Unlock()
	if spooled {
		u.cfg.Spool.Placed(id, shard)
	}
}

// shardRefused notes that a shard can never be placed. It stays in memory or in
// the buffer, as what is missing on a store does.
func (u *Uploader) shardRefused(p *pending, segment, shard int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	p.refused[segment] |= 1 << shard
	u.refused++
	p.missing--
	u.mu.notify()
}

// foundAll forgets which shards of p could not be read; u.mu is held.
func (u *Uploader) foundAll(p *pending) {
	for _, s := range p.b.Segments {
		for i := range s.Row.Profile.Total() {
			delete(u.lost, Shard{s.Row.ID, i})
		}
	}
}

// Shard names one shard of a segment.
type Shard struct {
	Segment block.SegmentID
	Index   int
}

// HeldShard is a shard that the buffer holds.
type HeldShard struct {
	Shard
	SizeBytes int64
}

// Heal brings shards to their stores whose entry is decided already, and which
// the buffer has kept since.
func (u *Uploader) Heal(shards []HeldShard) {
	u.cfg.Log.expose(len(shards))
	for _, s := range shards {
		u.putters[repo.ShardMember(s.Segment, s.Index, len(u.putters))].add(put{
			name:  format.SegmentName(u.cfg.Group, s.Segment, format.ExpiryNone, s.Index),
			heals: true,
			size:  s.SizeBytes,
			body: func() ([]byte, error) {
				raw, err := u.cfg.Spool.ReadShard(s.Segment, s.Index)
				if err != nil {
					err = fmt.Errorf("%w: %w", errNoSource, err)
				}
				return raw, err
			},
			placed: func() {
				u.cfg.Log.expose(-1)
				u.cfg.Spool.Placed(s.Segment, s.Index)
			},
			refused: func(error) {}, // it stays exposed
		})
	}
}

// Replace brings a shard that was made again from others to its store, for as long as
// it takes; done is told once the store has it (nil), or has said that it never will.
func (u *Uploader) Replace(s Shard, raw []byte, done func(error)) {
	u.putters[repo.ShardMember(s.Segment, s.Index, len(u.putters))].add(put{
		name:    format.SegmentName(u.cfg.Group, s.Segment, format.ExpiryNone, s.Index),
		heals:   true,
		size:    int64(len(raw)),
		body:    func() ([]byte, error) { return raw, nil },
		placed:  func() { done(nil) },
		refused: done,
	})
}
