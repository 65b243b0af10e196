package capture

import (
	"sync"

	"drc/internal/block"
)

// piece is what one write left in the overlay.
type piece struct {
	seq    block.Seq
	data   []byte // nil: zeroes
	noHole bool
}

func (p piece) advance(by int64) piece {
	if p.data != nil {
		p.data = p.data[by:]
	}
	return p
}

// overlay holds the writes that are not on the backing yet, newest version
// only. It is safe for concurrent use.
type overlay struct {
	mu    sync.RWMutex
	m     *block.Map[piece]
	bytes int64 // of data, not of zeroes
	freed chan struct{}
}

func newOverlay() *overlay {
	return &overlay{m: block.NewMap(piece.advance), freed: make(chan struct{})}
}

// dataIn counts the bytes of data in e; o.mu is held.
func (o *overlay) dataIn(e block.Extent) int64 {
	n := int64(0)
	o.m.Visit(e, func(part block.Extent, p piece) bool {
		if p.data != nil {
			n += part.Len
		}
		return true
	})
	return n
}

func (o *overlay) set(e block.Extent, p piece) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.bytes -= o.dataIn(e)
	o.m.Set(e, p)
	if p.data != nil {
		o.bytes += e.Len
	}
}

// remove forgets the parts of e that still hold the write seq.
func (o *overlay) remove(e block.Extent, seq block.Seq) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var same []block.Extent
	o.m.Visit(e, func(part block.Extent, p piece) bool {
		if p.seq == seq {
			same = append(same, part)
		}
		return true
	})
	for _, s := range same {
		o.bytes -= o.dataIn(s)
		o.m.Delete(s)
	}
	close(o.freed)
	o.freed = make(chan struct{})
}

// wake has those who wait for room look again.
func (o *overlay) wake() {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.freed)
	o.freed = make(chan struct{})
}

// size is how many bytes of data are held, and a channel that closes when
// that becomes less.
func (o *overlay) size() (int64, <-chan struct{}) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.bytes, o.freed
}

// pieces is how many pieces are held.
func (o *overlay) pieces() int {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.m.Len()
}

// read fills the parts of p, which stands for e, that the overlay holds, and
// returns the parts that it does not.
func (o *overlay) read(e block.Extent, p []byte) (gaps []block.Extent) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	at := e.Off
	o.m.Visit(e, func(part block.Extent, v piece) bool {
		if part.Off > at {
			gaps = append(gaps, block.Extent{Off: at, Len: part.Off - at})
		}
		at = part.End()
		to := p[part.Off-e.Off : part.End()-e.Off]
		if v.data == nil {
			clear(to)
		} else {
			copy(to, v.data)
		}
		return true
	})
	if at < e.End() {
		gaps = append(gaps, block.Extent{Off: at, Len: e.End() - at})
	}
	return gaps
}

// placed is a piece and where it belongs.
type placed struct {
	block.Extent
	piece
}

// ready returns pieces of seqs up to upTo, in address order from from on,
// until they have limit bytes of data, and where to go on (0 at the end).
func (o *overlay) ready(upTo block.Seq, from, limit int64) (out []placed, next int64) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	n := int64(0)
	o.m.Visit(block.Extent{Off: from, Len: 1<<62 - from}, func(e block.Extent, p piece) bool {
		if p.seq > upTo {
			return true
		}
		if n >= limit {
			next = e.Off
			return false
		}
		out = append(out, placed{e, p})
		if p.data != nil {
			n += e.Len
		}
		return true
	})
	return out, next
}
