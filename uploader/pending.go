package uploader

import (
	"fmt"
	"math/bits"
	"slices"
	"time"

	"drc/internal/batch"
	"drc/internal/format"
)

// pending is a batch on its way.
type pending struct {
	b         *batch.Batch
	placed    []uint64  // for each segment: bit i says that shard i is placed
	refused   []uint64  // for each segment: bit i says that shard i can never be placed
	missing   int       // puts that are not over
	exposed   int       // shards that are not placed, once it is logged
	since     time.Time // when it was put
	memory    int64     // what it holds in memory, bytes
	spooled   bool      // the buffer knows of it
	resumed   bool      // it is of an earlier process
	persisted bool      // the buffer has it durably; b is its outline only
	logged    bool      // it is in a decided entry; b is its outline only
	unwanted  bool      // no entry refers to its segments, nor will: the log had its writes already, or it was given up
	appending bool      // it is being logged
	gone      bool      // it was given up; b is its outline only
	names     []format.NamedCheckpoint
}

func newPending(b *batch.Batch, placed []uint64) *pending {
	return &pending{b: b, placed: placed, refused: make([]uint64, len(b.Segments)), names: b.Items.Checkpoints}
}

// wanted says for each segment which shards it has that go to stores.
func (p *pending) wanted() []uint64 {
	out := make([]uint64, len(p.b.Segments))
	for i, s := range p.b.Segments {
		if s.Row.Inline == 0 {
			out[i] = uint64(1)<<s.Row.Profile.Total() - 1
		}
	}
	return out
}

// refusals is how many shards can never be placed.
func (p *pending) refusals() (n int) {
	for _, r := range p.refused {
		n += bits.OnesCount64(r)
	}
	return n
}

// stuck says which segment has so many shards that can never be placed that the
// others are not enough; nil: none.
func (p *pending) stuck() error {
	for i, s := range p.b.Segments {
		if left := s.Row.Profile.Total() - bits.OnesCount64(p.refused[i]); s.Row.Inline == 0 && left < s.Row.Profile.Data {
			return fmt.Errorf("segment %s: %d of its %d shards can be placed, and %d are needed: on other stores %w",
				s.Row.ID, left, s.Row.Profile.Total(), s.Row.Profile.Data, errTaken)
		}
	}
	return nil
}

// extentBytes is about what an extent of a batch takes in memory.
const extentBytes = 128

// held is about what a batch takes in memory, in bytes.
func held(b *batch.Batch) int64 {
	n := int64(0)
	for _, s := range b.Segments {
		n += int64(len(s.Inline))
		for _, shard := range s.Shards {
			n += int64(len(shard))
		}
	}
	for _, v := range b.Volumes {
		n += extentBytes * int64(len(v.Extents))
	}
	return n
}

// outline makes the batch give up all that the buffer can tell again; u.mu is
// held. Its slices may be in use elsewhere, and are left alone.
func (u *Uploader) outline(p *pending) {
	segments := slices.Clone(p.b.Segments)
	for i := range segments {
		segments[i].Inline, segments[i].Shards = nil, nil
	}
	p.b.Segments, p.b.Volumes, p.b.Items = segments, nil, format.Items{}
	u.memory -= p.memory
	p.memory = 0
}
