package overlay

import (
	"context"

	"drc/internal/block"
)

// Allocation implements block.Device: FILE tells where it has holes, the base
// does for what is not written. The answer is that of no single moment.
func (d *Device) Allocation(ctx context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if err := d.geometry.CheckRange(e); err != nil {
		return err
	}
	if e.Empty() {
		return nil
	}
	m := merger{visit: visit, more: true}
	// One page after the other, so that memory does not grow with e.
	err := blocksOf(e).onPages(func(n int64, from, to int) error {
		if !m.more {
			return nil
		}
		w, err := d.writtenOf(n)
		if err != nil {
			return err
		}
		for i := from; i < to && m.more; {
			end := w.runEnd(i, to)
			x := d.extent(blocks{n*pageBlocks + int64(i), n*pageBlocks + int64(end)}).Intersect(e)
			if w.has(i) {
				err = d.fileAllocation(x, m.add)
			} else if err = d.base.Allocation(ctx, x, m.add); err != nil {
				err = &baseError{err}
			}
			if err != nil {
				return err
			}
			i = end
		}
		return nil
	})
	if err == nil {
		m.flush()
	}
	return err
}

// writtenOf returns the written bits of page n.
func (d *Device) writtenOf(n int64) (words, error) {
	if err := d.enter(); err != nil {
		return words{}, err
	}
	defer d.leave()
	return d.bits.written(n)
}

// fileAllocation visits data and holes of e in FILE. A hole that does not begin
// and end with sectors is called so as far as it does.
func (d *Device) fileAllocation(e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	sector := int64(d.geometry.SectorSize)
	for at := e.Off; at < e.End(); {
		dataAt, err := d.file.NextData(at)
		if err != nil {
			return local("find data in", d.name, err)
		}
		if dataAt = min(dataAt/sector*sector, e.End()); dataAt > at {
			if !visit(block.Extent{Off: at, Len: dataAt - at}, true) {
				return nil
			}
			at = dataAt
			continue
		}
		end, err := d.dataEnd(at, e.End())
		if err != nil {
			return err
		}
		if !visit(block.Extent{Off: at, Len: end - at}, false) {
			return nil
		}
		at = end
	}
	return nil
}

// dataEnd is where the data that begins in the sector at ends, or end if that
// comes first. A hole of less than a sector is data.
func (d *Device) dataEnd(at, end int64) (int64, error) {
	sector := int64(d.geometry.SectorSize)
	for {
		holeAt, err := d.file.NextHole(at)
		if err != nil {
			return 0, local("find holes in", d.name, err)
		}
		if holeAt = (holeAt + sector - 1) / sector * sector; holeAt >= end {
			return end, nil
		}
		if at, err = d.file.NextData(holeAt); err != nil {
			return 0, local("find data in", d.name, err)
		}
		if at >= holeAt+sector {
			return holeAt, nil
		}
	}
}

// merger hands on pieces, neighbours of one kind as one.
type merger struct {
	visit func(piece block.Extent, hole bool) bool
	more  bool
	open  block.Extent
	hole  bool
}

func (m *merger) add(piece block.Extent, hole bool) bool {
	switch {
	case piece.Empty() || !m.more:
	case !m.open.Empty() && m.hole == hole:
		m.open.Len += piece.Len
	default:
		m.flush()
		m.open, m.hole = piece, hole
	}
	return m.more
}

func (m *merger) flush() {
	if !m.open.Empty() && m.more {
		m.more = m.visit(m.open, m.hole)
	}
	m.open = block.Extent{}
}
