package segmenter

import (
	"crypto/subtle"

	"github.com/restic/chunker"

	"drc/internal/block"
	"drc/internal/format"
)

// zeroBlock is the unit in which runs are searched for zeroes.
const zeroBlock = 4096

// The chunk sizes of new groups; see docs/FORMAT.md, "Chunking".
const (
	DefaultMinChunk = 16 << 10
	DefaultAvgBits  = 16 // cut about every 64 KiB behind the minimum
	DefaultMaxChunk = 256 << 10
)

// NewPolynomial returns a random chunker polynomial for a new group.
func NewPolynomial() (uint64, error) {
	p, err := chunker.RandomPolynomial()
	return uint64(p), err
}

// mask is laid over the bytes that the chunker sees. The rolling hash of a run
// of zeroes is zero, so without it the chunker cuts at every such run, and
// pages of databases come out at the minimum size. 0x5a is one of many
// constants that do; it is part of the format.
const mask = 0x5a

var masks = func() []byte {
	m := make([]byte, format.MaxChunkBytes)
	for i := range m {
		m[i] = mask
	}
	return m
}()

// cutter cuts runs of data into chunks. It is not safe for concurrent use.
type cutter struct {
	group  format.Group
	base   *chunker.BaseChunker
	masked []byte
}

func newCutter(g format.Group) *cutter {
	return &cutter{group: g, base: chunker.NewBase(chunker.Pol(g.Polynomial)), masked: make([]byte, g.MaxChunk)}
}

func (c *cutter) reset() {
	c.base.Reset(chunker.Pol(c.group.Polynomial),
		chunker.WithBaseBoundaries(uint(c.group.MinChunk), uint(c.group.MaxChunk)),
		chunker.WithBaseAverageBits(int(c.group.AvgBits)))
}

// cut calls chunk for the pieces of run, in order. A run of no more than the
// minimum chunk size is one piece.
func (c *cutter) cut(run []byte, chunk func(at int, piece []byte)) {
	if len(run) <= int(c.group.MinChunk) {
		if len(run) > 0 {
			chunk(0, run)
		}
		return
	}
	c.reset()
	at := 0
	for at < len(run) {
		rest := run[at:min(at+int(c.group.MaxChunk), len(run))]
		subtle.XORBytes(c.masked, rest, masks[:len(rest)])
		n := c.base.NextSplitPoint(c.masked[:len(rest)])
		if n < 0 {
			n = len(rest)
		}
		chunk(at, rest[:n])
		at += n // a split point resets the chunker
	}
}

// splitZeroes calls data and zero for the parts of a run that hold something
// and that are all zeroes, in order; borders lie on multiples of zeroBlock of
// the volume.
func splitZeroes(e block.Extent, run []byte, data func(e block.Extent, p []byte), zero func(e block.Extent)) {
	start, inZero := int64(0), false
	emit := func(end int64) {
		if end == start {
			return
		}
		part := block.Extent{Off: e.Off + start, Len: end - start}
		if inZero {
			zero(part)
		} else {
			data(part, run[start:end])
		}
		start = end
	}
	for at := int64(0); at < e.Len; {
		next := min((e.Off+at)/zeroBlock*zeroBlock+zeroBlock-e.Off, e.Len)
		if z := isZero(run[at:next]); z != inZero {
			emit(at)
			inZero = z
		}
		at = next
	}
	emit(e.Len)
}

var zeroes [zeroBlock]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroes))
		if string(p[:n]) != string(zeroes[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
