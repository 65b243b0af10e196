package capture

import (
	"sync"

	"drc/internal/block"
)

// pieceBytes is about what a piece takes up besides its data.
const pieceBytes = 192

// piece is what one write left in the overlay.
type piece struct {
	seq    block.Seq
	data   []byte // nil: zeroes
	whole  int64  // length of the buffer that data is a part of, and keeps
	noHole bool
}

func (p piece) advance(by int64) piece {
	if p.data != nil {
		p.data = p.data[by:]
	}
	return p
}

// cost is the memory that p keeps, alone if need be.
func (p piece) cost() int64 { return p.whole + pieceBytes }

// overlay holds the writes that are not on the backing yet, newest version
// only. It is safe for concurrent use.
//
// What is left of a write that was overwritten in part keeps the buffer of the
// whole, as long as it is half of it; less is copied. So the memory in use is at
// most cost, and cost at most half as much again as what was admitted.
type overlay struct {
	mu       sync.RWMutex
	m        *block.Map[piece]
	bytes    int64 // of data, not of zeroes
	cost     int64 // of all pieces
	promised int64 // admitted and not set yet
	freed    chan struct{}
}

func newOverlay() *overlay {
	return &overlay{m: block.NewMap(piece.advance), freed: make(chan struct{})}
}

// writeCost is the most that a write of n bytes adds, but for what is copied: a
// piece, and another one if it cuts one in two.
func writeCost(n int64) int64 { return n + 2*pieceBytes }

// admit makes a promise of writeCost(n) bytes if there is room within limit, or
// if nothing is held. held is what would be held with it. set or
// giveBack must follow.
func (o *overlay) admit(n, limit int64) (ok bool, held int64, freed <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n = writeCost(n)
	if held = o.cost + o.promised + n; held <= limit || held == n {
		o.promised += n
		return true, held, nil
	}
	return false, held, o.freed
}

// giveBack takes the promise back of a write that is not set.
func (o *overlay) giveBack(n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.promised -= writeCost(n)
	o.wakeLocked()
}

func (o *overlay) wakeLocked() {
	close(o.freed)
	o.freed = make(chan struct{})
}

// set puts an admitted write in its place.
func (o *overlay) set(e block.Extent, p piece) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.promised -= writeCost(int64(len(p.data)))
	p.whole = int64(len(p.data))
	before := o.cost
	left, right := o.uncount(e)
	o.m.Set(e, p)
	o.count(e, p)
	o.recount(left)
	o.recount(right)
	if o.cost < before {
		o.wakeLocked()
	}
}

// uncount takes the pieces that reach into e out of the sums, and returns what
// of them lies before and behind e. o.mu is held.
func (o *overlay) uncount(e block.Extent) (left, right block.Extent) {
	o.m.VisitWhole(e, func(x block.Extent, p piece) bool {
		o.cost -= p.cost()
		if p.data != nil {
			o.bytes -= x.Len
		}
		if x.Off < e.Off {
			left = block.Extent{Off: x.Off, Len: e.Off - x.Off}
		}
		if x.End() > e.End() {
			right = block.Extent{Off: e.End(), Len: x.End() - e.End()}
		}
		return true
	})
	return left, right
}

func (o *overlay) count(e block.Extent, p piece) {
	o.cost += p.cost()
	if p.data != nil {
		o.bytes += e.Len
	}
}

// recount counts the piece x, what is left of a larger one, and lets go of its
// buffer if it is too large for it. o.mu is held.
func (o *overlay) recount(x block.Extent) {
	var rest piece
	found := false
	o.m.VisitWhole(block.Extent{Off: x.Off, Len: min(x.Len, 1)}, func(_ block.Extent, p piece) bool {
		rest, found = p, true
		return false
	})
	if !found {
		return
	}
	if rest.data != nil && 2*x.Len < rest.whole {
		rest.data = append([]byte(nil), rest.data[:x.Len]...)
		rest.whole = x.Len
		o.m.Set(x, rest)
	}
	o.count(x, rest)
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
		left, right := o.uncount(s)
		o.m.Delete(s)
		o.recount(left)
		o.recount(right)
	}
	o.wakeLocked()
}

// woken is closed when something has been removed, or at the next wake.
func (o *overlay) woken() <-chan struct{} {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.freed
}

// wake has those who wait for room look again.
func (o *overlay) wake() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wakeLocked()
}

// size is how many bytes of data are held, and how much memory that takes.
func (o *overlay) size() (bytes, cost int64) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.bytes, o.cost
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
// until they take up limit bytes, and where to go on (0 at the end).
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
		n += pieceBytes
		if p.data != nil {
			n += e.Len
		}
		return true
	})
	return out, next
}
