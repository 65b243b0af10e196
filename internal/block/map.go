package block

import "github.com/tidwall/btree"

// Map is an extent map in which the newest wins: Set replaces whatever the
// extent covered before, cutting older pieces at its edges. Pieces never
// overlap and are kept in address order. The zero Map is not usable; see
// NewMap. A Map is not safe for concurrent use.
type Map[V any] struct {
	tree    btree.BTreeG[piece[V]]
	advance func(v V, by int64) V
	bytes   int64
}

type piece[V any] struct {
	off, end int64
	v        V
}

// NewMap returns an empty map. advance(v, by) gives the value of what remains
// of a piece with value v when its first by bytes are cut off; nil means that
// values do not depend on the position.
func NewMap[V any](advance func(v V, by int64) V) *Map[V] {
	if advance == nil {
		advance = func(v V, _ int64) V { return v }
	}
	less := func(a, b piece[V]) bool { return a.off < b.off }
	return &Map[V]{
		tree:    *btree.NewBTreeGOptions(less, btree.Options{NoLocks: true}),
		advance: advance,
	}
}

// Len is the number of pieces.
func (m *Map[V]) Len() int { return m.tree.Len() }

// Bytes is the sum of the lengths of all pieces.
func (m *Map[V]) Bytes() int64 { return m.bytes }

// Set makes e map to v.
func (m *Map[V]) Set(e Extent, v V) {
	if e.Empty() {
		return
	}
	m.Delete(e)
	m.tree.Set(piece[V]{e.Off, e.End(), v})
	m.bytes += e.Len
}

// Delete forgets e.
func (m *Map[V]) Delete(e Extent) {
	if e.Empty() {
		return
	}
	// The one piece that begins before e and reaches into it.
	var left piece[V]
	found := false
	m.tree.Descend(piece[V]{off: e.Off - 1}, func(p piece[V]) bool {
		left, found = p, p.end > e.Off
		return false
	})
	if found {
		m.tree.Set(piece[V]{left.off, e.Off, left.v})
		m.bytes -= left.end - e.Off
		if left.end > e.End() {
			m.tree.Set(piece[V]{e.End(), left.end, m.advance(left.v, e.End()-left.off)})
			m.bytes += left.end - e.End()
			return
		}
	}
	for {
		var next piece[V]
		found = false
		m.tree.Ascend(piece[V]{off: e.Off}, func(p piece[V]) bool {
			next, found = p, p.off < e.End()
			return false
		})
		if !found {
			return
		}
		m.tree.Delete(next)
		m.bytes -= next.end - next.off
		if next.end > e.End() {
			m.tree.Set(piece[V]{e.End(), next.end, m.advance(next.v, e.End()-next.off)})
			m.bytes += next.end - e.End()
			return
		}
	}
}

// Visit calls f for each mapped part of e in address order until f returns
// false. Parts are cut to e. f must not change the map.
func (m *Map[V]) Visit(e Extent, f func(part Extent, v V) bool) {
	if e.Empty() {
		return
	}
	start := e.Off
	m.tree.Descend(piece[V]{off: e.Off}, func(p piece[V]) bool {
		if p.end > e.Off {
			start = p.off
		}
		return false
	})
	m.tree.Ascend(piece[V]{off: start}, func(p piece[V]) bool {
		if p.off >= e.End() {
			return false
		}
		part := Extent{p.off, p.end - p.off}.Intersect(e)
		v := p.v
		if part.Off > p.off {
			v = m.advance(v, part.Off-p.off)
		}
		return f(part, v)
	})
}

// VisitWhole is Visit without cutting: f gets each piece that reaches into e as
// it is.
func (m *Map[V]) VisitWhole(e Extent, f func(e Extent, v V) bool) {
	if e.Empty() {
		return
	}
	start := e.Off
	m.tree.Descend(piece[V]{off: e.Off}, func(p piece[V]) bool {
		if p.end > e.Off {
			start = p.off
		}
		return false
	})
	m.tree.Ascend(piece[V]{off: start}, func(p piece[V]) bool {
		return p.off < e.End() && f(Extent{p.off, p.end - p.off}, p.v)
	})
}

// All calls f for every piece in address order until f returns false. f must
// not change the map.
func (m *Map[V]) All(f func(e Extent, v V) bool) {
	m.tree.Scan(func(p piece[V]) bool { return f(Extent{p.off, p.end - p.off}, p.v) })
}

// Gaps calls f for each part of e that is not mapped, in address order, until
// f returns false.
func (m *Map[V]) Gaps(e Extent, f func(gap Extent) bool) {
	at, more := e.Off, true
	m.Visit(e, func(part Extent, _ V) bool {
		if part.Off > at {
			more = f(Extent{at, part.Off - at})
		}
		at = part.End()
		return more
	})
	if more && at < e.End() {
		f(Extent{at, e.End() - at})
	}
}
