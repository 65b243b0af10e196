package sim

import (
	"log/slog"
	"math/rand/v2"
	"sync"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/dedup"
	"drc/internal/format"
	"drc/internal/pipeline"
)

// index is a dedup index that loses the end of what was added with every death of
// its process, as the real one does.
type index struct {
	mu     sync.Mutex
	group  block.GroupID
	branch block.BranchID
	adds   []added
	m      map[crypt.ChunkID]dedup.Location
}

type added struct {
	n      uint64
	chunks map[crypt.ChunkID]dedup.Location
}

// opener is pipeline.OpenIndex over the indexes of a host.
func opener(all map[string]*index) pipeline.OpenIndex {
	return func(dir string, g block.GroupID, b block.BranchID, n uint64, _ *slog.Logger) (pipeline.Index, error) {
		x := all[dir]
		if x == nil || x.group != g || x.branch != b || (len(x.adds) > 0 && x.adds[len(x.adds)-1].n > n) {
			x = &index{group: g, branch: b, m: map[crypt.ChunkID]dedup.Location{}}
			all[dir] = x
		}
		return x, nil
	}
}

// lose is what is left of an index after its process died.
func (x *index) lose(rng *rand.Rand) *index {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := &index{group: x.group, branch: x.branch, m: map[crypt.ChunkID]dedup.Location{}}
	n.adds = append(n.adds, x.adds[:len(x.adds)-rng.IntN(min(len(x.adds), 3)+1)]...)
	for _, a := range n.adds {
		for id, l := range a.chunks {
			n.m[id] = l
		}
	}
	return n
}

func (x *index) Add(b *batch.Batch, _ block.GroupID, _ block.BranchID, n uint64) error {
	rows := map[block.SegmentID]format.SegmentRow{}
	for _, s := range b.Segments {
		rows[s.Row.ID] = s.Row
	}
	a := added{n: n, chunks: map[crypt.ChunkID]dedup.Location{}}
	for _, v := range b.Volumes {
		for _, e := range v.Extents {
			if row, ok := rows[e.Segment.ID]; ok && !e.Zero {
				a.chunks[e.ChunkID] = dedup.Location{Segment: row, Chunk: e.Chunk, Len: e.ChunkLen}
			}
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.adds = append(x.adds, a)
	for id, l := range a.chunks {
		x.m[id] = l
	}
	return nil
}

func (x *index) Lookup(id crypt.ChunkID) (dedup.Location, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l, ok := x.m[id]
	return l, ok
}

func (x *index) Close() error { return nil }
