package segmenter

import (
	"slices"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/manifest"
)

// builder cuts, deduplicates, packs and seals a draft. Extents of chunks that are
// new get their segment when packing is done.
type builder struct {
	cut    *cutter
	hasher *crypt.ChunkHasher
	index  Index
	packer *packer

	fresh  map[crypt.ChunkID]int // chunk of this batch -> number of the packed chunk
	count  int
	out    []manifest.Extent
	joined []byte // memory for runs of pieces that are not adjacent in memory
	// pending[i] >= 0 if out[i] waits for packed chunk number pending[i].
	pending []int
}

func (b *builder) volume(m *block.Map[content]) {
	b.out, b.pending = nil, nil
	var at block.Extent // a run of data
	var run content
	flush := func() {
		if len(run) > 0 {
			b.cutRun(at, run)
		}
		at, run = block.Extent{}, nil
	}
	m.All(func(e block.Extent, c content) bool {
		switch {
		case c == nil:
			flush()
			b.zero(e)
		case len(run) > 0 && at.End() == e.Off:
			at.Len += e.Len
			run = b.join(run, c[:e.Len])
		default:
			flush()
			at, run = e, c[:e.Len]
		}
		return true
	})
	flush()
}

// join returns run followed by c. Only pieces that do not lie behind one
// another in memory anyway are copied, into b.joined.
func (b *builder) join(run, c content) content {
	n := len(run)
	if cap(run)-n >= len(c) && &run[:n+1][n] == &c[0] {
		return run[:n+len(c)]
	}
	if len(b.joined) == 0 || &run[0] != &b.joined[0] {
		b.joined = append(b.joined[:0], run...)
	}
	b.joined = append(b.joined[:n], c...)
	return content(b.joined)
}

func (b *builder) zero(e block.Extent) {
	if n := len(b.out); n > 0 && b.out[n-1].Zero && b.out[n-1].End() == e.Off {
		b.out[n-1].Len += e.Len
		return
	}
	b.out = append(b.out, manifest.Extent{Extent: e, Zero: true})
	b.pending = append(b.pending, -1)
}

func (b *builder) cutRun(e block.Extent, data []byte) {
	splitZeroes(e, data, func(part block.Extent, p []byte) {
		b.cut.cut(p, func(at int, piece []byte) {
			b.chunk(block.Extent{Off: part.Off + int64(at), Len: int64(len(piece))}, piece)
		})
	}, b.zero)
}

func (b *builder) chunk(e block.Extent, piece []byte) {
	x := manifest.Extent{Extent: e, ChunkID: b.hasher.ID(piece), ChunkLen: len(piece)}
	number := -1
	if n, ok := b.fresh[x.ChunkID]; ok {
		number = n
	} else if loc, ok := b.index.Lookup(x.ChunkID); ok && loc.Len == len(piece) {
		x.Segment, x.Chunk = loc.Segment, loc.Chunk
	} else {
		number = b.count
		b.count++
		b.fresh[x.ChunkID] = number
		b.packer.add(piece)
	}
	b.out = append(b.out, x)
	b.pending = append(b.pending, number)
}

// seal turns a draft into the batch's volumes and segments.
func (s *Segmenter) seal(d *draft, out *batch.Batch) error {
	b := &builder{
		cut: s.cut, hasher: s.hasher, index: s.index, joined: s.joined,
		packer: newPacker(s.writer, s.cfg.Profile), fresh: map[crypt.ChunkID]int{},
	}
	var order []block.VolumeIndex
	for v := range d.volumes {
		order = append(order, v)
	}
	slices.Sort(order)
	pending := make([][]int, 0, len(order))
	for _, v := range order {
		b.volume(d.volumes[v])
		if len(b.out) > 0 {
			out.Volumes = append(out.Volumes, batch.VolumeExtents{Volume: v, Extents: b.out})
			pending = append(pending, b.pending)
		}
	}
	s.joined = b.joined
	segments, places, err := b.packer.finish()
	if err != nil {
		return err
	}
	out.Segments = segments
	for i := range out.Volumes {
		for j, number := range pending[i] {
			if number >= 0 {
				at := places[number]
				out.Volumes[i].Extents[j].Segment, out.Volumes[i].Extents[j].Chunk = segments[at.segment].Row, at.ordinal
			}
		}
	}
	return nil
}
