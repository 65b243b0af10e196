// Package batch is what segmenter hands to uploader: a stretch of a group's
// history, cut, deduplicated, sealed, and not yet numbered as a log entry. The
// buffer keeps its encoded form when the stores cannot take it at once.
package batch

import (
	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
)

// InlineHere stands in SegmentRow.Inline for "the log entry that carries this
// batch": its number is given only when the batch is logged.
const InlineHere = 1<<64 - 1

// Batch is one stretch of history. It is immutable once cut.
type Batch struct {
	From, To block.Seq // To is From-1 if there are no writes in it
	Items    format.Items
	Volumes  []VolumeExtents // sorted by index
	Segments []Segment
	KeySet   block.ID // under which its new segments are sealed
	Bytes    int64    // bytes of writes that the batch stands for
	Oldest   int64    // when its oldest write was captured, ns since 1970 UTC
}

// VolumeExtents is what the batch changed on one volume: sorted extents that
// do not overlap.
type VolumeExtents struct {
	Volume  block.VolumeIndex
	Extents []manifest.Extent
}

// Segment is a new segment of the batch: inline, or as shard objects.
type Segment struct {
	Row    format.SegmentRow
	Inline []byte   // the payload, if Row.Inline is InlineHere
	Shards [][]byte // shard objects; nil where the buffer has them on disk
}

const pageExtents = format.MaxPageExtents

// Encode returns the batch without its shards, for the buffer.
func (b *Batch) Encode() []byte {
	var e format.Encoder
	e.String("DRCB")
	e.U8(1)
	e.U64(uint64(b.From))
	e.U64(uint64(b.To))
	e.Raw(b.KeySet[:])
	e.I64(b.Bytes)
	e.I64(b.Oldest)
	e.Bytes(b.Items.Encode())
	var pages []format.Page
	var volumes []block.VolumeIndex
	for _, v := range b.Volumes {
		for at := 0; at < len(v.Extents); at += pageExtents {
			pages = append(pages, page(v.Extents[at:min(at+pageExtents, len(v.Extents))]))
			volumes = append(volumes, v.Volume)
		}
	}
	e.Uvarint(uint64(len(pages)))
	for i, p := range pages {
		e.U16(uint16(volumes[i]))
		e.Bytes(p.Encode())
	}
	// The rows of new segments travel as a page without extents.
	rows := format.Page{}
	for _, s := range b.Segments {
		rows.Segments = append(rows.Segments, s.Row)
	}
	e.Bytes(rows.Encode())
	for _, s := range b.Segments {
		e.Bytes(s.Inline)
	}
	return e.Buf
}

func page(extents []manifest.Extent) format.Page {
	var p format.Page
	index := map[block.SegmentID]int{}
	for _, x := range extents {
		row := format.ManifestExtent{Extent: x.Extent, Zero: x.Zero}
		if !x.Zero {
			i, ok := index[x.Segment.ID]
			if !ok {
				i = len(p.Segments)
				index[x.Segment.ID] = i
				p.Segments = append(p.Segments, x.Segment)
			}
			row.Segment, row.Chunk, row.Offset, row.ChunkID, row.ChunkLen = i, x.Chunk, x.Offset, x.ChunkID, x.ChunkLen
		}
		p.Extents = append(p.Extents, row)
	}
	return p
}

// Decode reads what Encode wrote. Byte slices alias raw.
func Decode(name string, raw []byte) (*Batch, error) {
	d := format.NewDecoder(name, raw)
	d.Magic("DRCB", 1)
	b := &Batch{From: block.Seq(d.U64()), To: block.Seq(d.U64()), KeySet: d.ID(), Bytes: d.I64(), Oldest: d.I64()}
	items := d.Bytes(format.MaxValueBytes)
	if d.Err() != nil {
		return nil, d.Err()
	}
	it, err := format.DecodeItems(name, items)
	if err != nil {
		return nil, err
	}
	b.Items = *it
	rows := map[block.SegmentID]format.SegmentRow{}
	for range d.Len(1<<20, 3) {
		v := block.VolumeIndex(d.U16())
		body := d.Bytes(64 << 20)
		if d.Err() != nil {
			return nil, d.Err()
		}
		p, err := format.DecodePage(name, body)
		if err != nil {
			return nil, err
		}
		if n := len(b.Volumes); n == 0 || b.Volumes[n-1].Volume != v {
			b.Volumes = append(b.Volumes, VolumeExtents{Volume: v})
		}
		ve := &b.Volumes[len(b.Volumes)-1]
		for _, row := range p.Segments {
			if known, ok := rows[row.ID]; ok && known != row {
				return nil, format.Corrupt(name, "segment %s is described in two ways", row.ID)
			}
			rows[row.ID] = row
		}
		for _, x := range p.Extents {
			if n := len(ve.Extents); n > 0 && x.Off < ve.Extents[n-1].End() {
				return nil, format.Corrupt(name, "an extent of volume %d at %d lies before the end of another, %d", v, x.Off, ve.Extents[n-1].End())
			}
			m := manifest.Extent{Extent: x.Extent, Zero: x.Zero}
			if !x.Zero {
				m.Segment, m.Chunk, m.Offset, m.ChunkID, m.ChunkLen = p.Segments[x.Segment], x.Chunk, x.Offset, x.ChunkID, x.ChunkLen
			}
			ve.Extents = append(ve.Extents, m)
		}
	}
	body := d.Bytes(64 << 20)
	if d.Err() != nil {
		return nil, d.Err()
	}
	fresh, err := format.DecodePage(name, body)
	if err != nil {
		return nil, err
	}
	for _, r := range fresh.Segments {
		s := Segment{Row: r}
		if in := d.Bytes(format.MaxInlineBytes); len(in) > 0 {
			s.Inline = in
		}
		b.Segments = append(b.Segments, s)
	}
	return b, d.Done()
}
