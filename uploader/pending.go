package uploader

import (
	"slices"

	"drc/internal/batch"
	"drc/internal/format"
)

// pending is a batch on its way.
type pending struct {
	b         *batch.Batch
	placed    []uint64 // for each segment: bit i says that shard i is placed
	missing   int      // puts that have not succeeded
	memory    int64    // what it holds in memory, bytes
	spooled   bool     // the buffer knows of it
	persisted bool     // the buffer has it durably; b is its outline only
	logged    bool     // it is in a decided entry; b is its outline only
	unwanted  bool     // the log had its writes already, and its entry has no segments
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
