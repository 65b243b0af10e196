package nbd

import (
	"context"
	"encoding/binary"
	"sync/atomic"
	"time"

	"drc/internal/block"
)

const (
	// sparseReadBytes is the length from which on a read looks for holes first.
	sparseReadBytes = 64 << 10
	// readPiecesMax bounds the chunks of one read.
	readPiecesMax = 32
	// holeBytesMin is the least hole worth a chunk.
	holeBytesMin = 4096
	// statusPiecesMax bounds the descriptors of one BLOCK_STATUS reply. The
	// client asks again for the rest.
	statusPiecesMax = 2048
	// cacheStepBytes is how much of a CACHE request is read at a time.
	cacheStepBytes = 1 << 20
)

// execute carries q out and appends its reply to c.out, which it leaves begun:
// the caller decides, with c.out.end, whether it goes out at once.
func (c *conn) execute(q *request, pace *atomic.Int64, start time.Time) {
	ctx := c.transmitter.ctx
	if q.reject != nil {
		c.refuse(q, q.reject)
		return
	}
	var err error
	switch q.cmd {
	case cmdRead:
		c.executeRead(ctx, q, pace, start)
		return
	case cmdBlockStatus:
		c.executeStatus(ctx, q, pace, start)
		return
	case cmdWrite:
		if q.buf != nil {
			err = c.dev.WriteAt(ctx, q.buf.data, int64(q.off), block.WriteOptions{FUA: q.flags&cmdFlagFUA != 0})
			c.freeBuffer(q.buf)
		}
	case cmdTrim, cmdWriteZeroes:
		if q.length > 0 {
			err = c.dev.Zero(ctx, q.extent(), block.ZeroOptions{
				FUA:    q.flags&cmdFlagFUA != 0,
				NoHole: q.flags&cmdFlagNoHole != 0,
				Fast:   q.flags&cmdFlagFastZero != 0,
			})
		}
	case cmdFlush:
		err = c.dev.Flush(ctx)
	case cmdCache:
		err = c.executeCache(ctx, q)
	}
	observe(pace, start)
	if err != nil {
		c.refuse(q, err)
		return
	}
	c.out.begin().simple(q.cookie, 0)
}

// observe folds a duration into a running mean of about the last eight.
func observe(pace *atomic.Int64, start time.Time) {
	d := min(time.Since(start), observedMax)
	mean := pace.Load()
	pace.Store(mean + (int64(d)-mean)/8)
}

// refuse begins an error reply.
func (c *conn) refuse(q *request, err error) {
	code := wireError(q.cmd, err)
	if code == wireEIO && c.transmitter.ctx.Err() == nil {
		c.failures.log(c, q, err)
	}
	b := c.out.begin()
	if c.terms.structured {
		b.errorChunk(q.cookie, code, err.Error())
	} else {
		b.simple(q.cookie, code)
	}
}

func (c *conn) executeRead(ctx context.Context, q *request, pace *atomic.Int64, start time.Time) {
	if q.buf == nil { // of no bytes
		b := c.out.begin()
		if c.terms.structured {
			b.chunk(q.cookie, chunkFlagDone, chunkNone, 0, 0)
		} else {
			b.simple(q.cookie, 0)
		}
		return
	}
	var holes []block.Extent
	if c.terms.structured && q.length >= sparseReadBytes {
		holes = c.holes(ctx, q.extent())
		if len(holes) == 1 && holes[0] == q.extent() {
			c.freeBuffer(q.buf)
			c.out.begin().holeChunk(q.cookie, chunkFlagDone, int64(q.off), int64(q.length))
			return
		}
	}
	// One read of the whole, so that it is ordered as a whole against writes.
	// It comes before any success header is written.
	err := c.dev.ReadAt(ctx, q.buf.data, int64(q.off))
	observe(pace, start)
	if err != nil {
		c.freeBuffer(q.buf)
		c.refuse(q, err)
		return
	}
	if q.flags&cmdFlagDF != 0 {
		holes = nil
	}
	// A write may have filled a hole before the read: what was read decides.
	kept := holes[:0]
	for _, h := range holes {
		if allZero(q.buf.data[h.Off-int64(q.off) : h.End()-int64(q.off)]) {
			kept = append(kept, h)
		}
	}
	b := c.out.begin()
	b.own(q.buf)
	if !c.terms.structured {
		b.simple(q.cookie, 0)
		b.payload(q.buf.data)
		return
	}
	at, end := int64(q.off), int64(q.off)+int64(q.length)
	data := func(to int64) {
		if at < to {
			b.dataChunk(q.cookie, doneIf(to == end), at, q.buf.data[at-int64(q.off):to-int64(q.off)])
		}
	}
	for _, h := range kept {
		data(h.Off)
		b.holeChunk(q.cookie, doneIf(h.End() == end), h.Off, h.Len)
		at = h.End()
	}
	data(end)
}

func doneIf(last bool) uint16 {
	if last {
		return chunkFlagDone
	}
	return 0
}

// holes returns the holes in e that are worth a chunk of their own, in order.
// An error of the device only means that none are known.
func (c *conn) holes(ctx context.Context, e block.Extent) []block.Extent {
	var holes []block.Extent
	seen := 0
	err := c.visitHoles(ctx, e, func(hole block.Extent) bool {
		if hole.Len >= holeBytesMin {
			holes = append(holes, hole)
		}
		seen++
		return seen < readPiecesMax/2 // between two there is data
	})
	if err != nil {
		return nil
	}
	return holes
}

// visitHoles visits the holes in e in order, each whole and of whole sectors: a
// file system may tell of smaller pieces than a client may ask for. What lies
// between them is data.
func (c *conn) visitHoles(ctx context.Context, e block.Extent, visit func(hole block.Extent) bool) error {
	sector := int64(c.terms.geometry.SectorSize)
	var open block.Extent
	closed := func() bool {
		from, end := (open.Off+sector-1)/sector*sector, open.End()/sector*sector
		open = block.Extent{}
		return from >= end || visit(block.Extent{Off: from, Len: end - from})
	}
	more := true
	err := c.dev.Allocation(ctx, e, func(piece block.Extent, hole bool) bool {
		piece = piece.Intersect(e)
		switch {
		case piece.Empty():
		case !hole:
			more = closed()
		case !open.Empty() && open.End() == piece.Off:
			open.Len += piece.Len
		default:
			more = closed()
			open = piece
		}
		return more
	})
	if err == nil && more {
		closed()
	}
	return err
}

// allZero reports whether p is all zeroes.
func allZero(p []byte) bool {
	for len(p) >= 64 {
		q := p[:64]
		if binary.NativeEndian.Uint64(q)|binary.NativeEndian.Uint64(q[8:])|
			binary.NativeEndian.Uint64(q[16:])|binary.NativeEndian.Uint64(q[24:])|
			binary.NativeEndian.Uint64(q[32:])|binary.NativeEndian.Uint64(q[40:])|
			binary.NativeEndian.Uint64(q[48:])|binary.NativeEndian.Uint64(q[56:]) != 0 {
			return false
		}
		p = p[64:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// executeStatus answers BLOCK_STATUS for base:allocation.
func (c *conn) executeStatus(ctx context.Context, q *request, pace *atomic.Int64, start time.Time) {
	limit := statusPiecesMax
	if q.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	type run struct {
		length int64
		state  uint32
	}
	var runs []run
	e := q.extent()
	at, full := e.Off, false // the runs end at at
	upTo := func(end int64, state uint32) bool {
		switch n := len(runs); {
		case end <= at:
			return true
		case n > 0 && runs[n-1].state == state:
			runs[n-1].length += end - at
		case n == limit:
			full = true
			return false
		default:
			runs = append(runs, run{end - at, state})
		}
		at = end
		return true
	}
	err := c.visitHoles(ctx, e, func(hole block.Extent) bool {
		return upTo(hole.Off, 0) && upTo(hole.End(), stateHole|stateZero)
	})
	observe(pace, start)
	if err != nil {
		c.refuse(q, err)
		return
	}
	if !full {
		upTo(e.End(), 0)
	}
	b := c.out.begin()
	n := 4 + 8*len(runs)
	room := b.chunk(q.cookie, chunkFlagDone, chunkBlockStatus, uint32(n), n)
	binary.BigEndian.PutUint32(room, contextAllocationID)
	for i, r := range runs {
		binary.BigEndian.PutUint32(room[4+8*i:], uint32(r.length))
		binary.BigEndian.PutUint32(room[8+8*i:], r.state)
	}
}

// executeCache reads the range and throws it away, so that whatever caches the
// device has are warm.
func (c *conn) executeCache(ctx context.Context, q *request) error {
	e := q.extent()
	if e.Empty() {
		return nil
	}
	buf, err := c.takeBuffer(int(min(e.Len, cacheStepBytes)))
	if err != nil {
		return err
	}
	defer c.freeBuffer(buf)
	for e.Len > 0 {
		// A device need not look at ctx, and a request may be of 4 GiB: nobody
		// reads on for a client that is gone.
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		step := min(e.Len, cacheStepBytes)
		if err := c.dev.ReadAt(ctx, buf.data[:step], e.Off); err != nil {
			return err
		}
		e.Off += step
		e.Len -= step
	}
	return nil
}
