package segmenter

import (
	"slices"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/segment"
)

const (
	// segmentBytes is how large a segment's payload gets before the next one
	// begins.
	segmentBytes = 8 << 20
	// inlineBytes is the largest payload that travels in its log entry.
	inlineBytes = 16 << 10
)

// content is what a piece of a volume holds in a batch: data, or zeroes if nil.
type content []byte

func (c content) advance(by int64) content {
	if c == nil {
		return nil
	}
	return c[by:]
}

// draft is a batch under construction: the newest content of each volume.
type draft struct {
	volumes map[block.VolumeIndex]*block.Map[content]
	bytes   int64
	oldest  int64
}

func newDraft() *draft { return &draft{volumes: map[block.VolumeIndex]*block.Map[content]{}} }

func (d *draft) volume(v block.VolumeIndex) *block.Map[content] {
	m := d.volumes[v]
	if m == nil {
		m = block.NewMap(content.advance)
		d.volumes[v] = m
	}
	return m
}

// add lays a write over what is there. It copies the data.
func (d *draft) add(w block.Write) {
	if d.oldest == 0 || w.Time < d.oldest {
		d.oldest = w.Time
	}
	d.bytes += w.Extent.Len
	if w.Kind == block.KindZero {
		d.volume(w.Volume).Set(w.Extent, nil)
		return
	}
	d.volume(w.Volume).Set(w.Extent, append(content(nil), w.Data...))
}

// packed says where packing put a chunk.
type packed struct {
	segment int // which of the batch's new segments
	ordinal int
}

// packer seals chunks into segments beside the goroutine that cuts and hashes.
type packer struct {
	keys   *crypt.KeySet
	in     chan []byte
	done   chan struct{}
	places []packed
	sealed []*segment.Sealed
}

func newPacker(keys *crypt.KeySet) *packer {
	p := &packer{keys: keys, in: make(chan []byte, 64), done: make(chan struct{})}
	go p.run()
	return p
}

func (p *packer) run() {
	defer close(p.done)
	var w *segment.Writer
	for chunk := range p.in {
		if w == nil {
			w = segment.NewWriter(p.keys)
		}
		p.places = append(p.places, packed{len(p.sealed), w.Add(chunk)})
		if w.Bytes() >= segmentBytes {
			p.sealed = append(p.sealed, w.Finish())
		}
	}
	if w != nil && w.Chunks() > 0 {
		p.sealed = append(p.sealed, w.Finish())
	}
}

// finish waits until all chunks are sealed.
func (p *packer) finish() {
	close(p.in)
	<-p.done
}

// build cuts, deduplicates, packs and seals a draft. Extents of chunks that are
// new get their segment when packing is done.
type builder struct {
	cut    *cutter
	hasher *crypt.ChunkHasher
	index  Index
	packer *packer

	fresh map[crypt.ChunkID]int // chunk of this batch -> number of the packed chunk
	count int
	out   []manifest.Extent
	// pending[i] >= 0 if out[i] waits for packed chunk number pending[i].
	pending []int
}

func (b *builder) volume(m *block.Map[content]) {
	b.out, b.pending = nil, nil
	var run []content // adjacent pieces of data
	var at block.Extent
	flush := func() {
		if len(run) > 0 {
			b.run(at, slices.Concat(run...))
			run = run[:0]
		}
		at = block.Extent{}
	}
	m.All(func(e block.Extent, c content) bool {
		if c == nil {
			flush()
			b.zero(e)
			return true
		}
		if len(run) > 0 && at.End() == e.Off {
			at.Len += e.Len
		} else {
			flush()
			at = e
		}
		run = append(run, c[:e.Len])
		return true
	})
	flush()
}

func (b *builder) zero(e block.Extent) {
	if n := len(b.out); n > 0 && b.out[n-1].Zero && b.out[n-1].End() == e.Off {
		b.out[n-1].Len += e.Len
		return
	}
	b.out = append(b.out, manifest.Extent{Extent: e, Zero: true})
	b.pending = append(b.pending, -1)
}

func (b *builder) run(e block.Extent, data []byte) {
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
		b.packer.in <- piece
	}
	b.out = append(b.out, x)
	b.pending = append(b.pending, number)
}

// seal turns a draft into the batch's volumes and segments.
func (s *Segmenter) seal(d *draft, out *batch.Batch) error {
	b := &builder{cut: s.cut, hasher: s.hasher, index: s.index, packer: newPacker(s.cfg.Keys), fresh: map[crypt.ChunkID]int{}}
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
	b.packer.finish()
	rows := make([]format.SegmentRow, len(b.packer.sealed))
	for i, sealed := range b.packer.sealed {
		seg := batch.Segment{}
		if len(b.packer.sealed) == 1 && len(sealed.Payload) <= inlineBytes {
			seg.Row, seg.Inline = sealed.Row(s.cfg.Profile, batch.InlineHere), sealed.Payload
		} else {
			shards, err := sealed.Shards(s.cfg.Profile)
			if err != nil {
				return err
			}
			seg.Row, seg.Shards = sealed.Row(s.cfg.Profile, 0), shards
		}
		rows[i] = seg.Row
		out.Segments = append(out.Segments, seg)
	}
	for i := range out.Volumes {
		for j, number := range pending[i] {
			if number >= 0 {
				at := b.packer.places[number]
				out.Volumes[i].Extents[j].Segment, out.Volumes[i].Extents[j].Chunk = rows[at.segment], at.ordinal
			}
		}
	}
	return nil
}
