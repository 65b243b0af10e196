package restorer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
)

// Beyond is what a host has of a volume behind the end of the history on the
// stores: batches that are not logged, and writes that are in none. With it an
// image is the volume as it was after its last write.
//
// The order is that of time, and the newest wins: the history, the batches, the
// writes.
type Beyond struct {
	// Seq is the last one that is in it.
	Seq block.Seq
	// Batches are what the batches changed on the volume, oldest first; each sorted
	// by address, without overlaps.
	Batches [][]manifest.Extent
	// Inline are the payloads of segments that would have travelled in a log entry.
	// The shards of others are looked for on the stores, as all are.
	Inline map[block.SegmentID][]byte
	// Writes visits the writes behind the batches, in order, each time it is
	// called; Data is valid during the visit. nil: there are none.
	Writes func(ctx context.Context, visit func(block.Write) error) error
}

// EndOfLog is the end of the history of a volume. Unlike the points of Resolve it
// need not be a checkpoint: while a resync goes on it is not.
func (h *History) EndOfLog(ctx context.Context, v Volume) (p Point, err error) {
	end := h.floor(v, h.N())
	for n := end; n > 0; n = h.floor(v, n-1) {
		e, err := h.Entry(ctx, n)
		if err != nil {
			return Point{}, err
		}
		if e.Range == nil {
			continue
		}
		if p, err = h.point(ctx, v, Checkpoint{N: e.N, Seq: e.Range.To, Time: e.Time(), Unconfirmed: e.Unconfirmed}); err != nil {
			return Point{}, err
		}
		last, err := h.Entry(ctx, end)
		if err != nil {
			return Point{}, err
		}
		p.N, p.Hash = end, last.Hash
		return p, nil
	}
	return Point{}, fmt.Errorf("%w: volume %q has no history yet", ErrNoSuchPoint, v.Name)
}

// Extend lays b over the image, before anything is read from it. The writes in b
// are for Restore only: other reads show the batches and not what is behind them.
func (im *Image) Extend(b *Beyond) {
	im.beyond = b
	im.over = block.NewMap(manifest.Extent.Advance)
	for _, extents := range b.Batches {
		for _, x := range extents {
			im.over.Set(x.Extent, x)
		}
	}
}

// laidOver puts what batches beyond the log have in e into m.
func (im *Image) laidOver(m *block.Map[manifest.Extent], e block.Extent) {
	if im.over == nil {
		return
	}
	im.over.Visit(e, func(part block.Extent, x manifest.Extent) bool {
		x.Extent = part
		m.Set(part, x)
		return true
	})
}

// identity stands for all that the image is made of.
func (im *Image) identity() format.Hash {
	if im.beyond == nil {
		return im.point.Hash
	}
	var raw []byte
	raw = append(raw, "beyond"...)
	raw = append(raw, im.point.Hash[:]...)
	raw = binary.LittleEndian.AppendUint64(raw, uint64(im.beyond.Seq))
	return sha256.Sum256(raw)
}

// writes puts the writes that are in no batch onto the target, as far as they are
// in e: in order, each at once, so that what comes later wins.
func (r *restore) writes(ctx context.Context, e block.Extent) error {
	if r.im.beyond == nil || r.im.beyond.Writes == nil {
		return nil
	}
	r.t.fresh = false // it may hold anything where a write has zeroes
	return r.im.beyond.Writes(ctx, func(w block.Write) error {
		part := w.Extent.Intersect(e)
		if part.Empty() {
			return nil
		}
		if w.Extent.End() > r.im.point.Volume.SizeBytes {
			return format.Corrupt("write "+w.Seq.String(), "it ends at %d, behind the end of the volume", w.Extent.End())
		}
		var err error
		n := part.Len
		if w.Kind == block.KindZero {
			n, err = r.t.zero(part)
		} else {
			at := part.Off - w.Extent.Off
			err = r.t.write([][]byte{w.Data[at : at+part.Len]}, part.Off)
		}
		r.written.Add(n)
		return err
	})
}
