package block

import (
	"testing"

	"pgregory.net/rapid"
)

// TestMap_NewestWins checks the map against an array with one cell a byte.
func TestMap_NewestWins(t *testing.T) {
	type val struct{ id, at int64 }
	rapid.Check(t, func(rt *rapid.T) {
		const size = 200
		var model [size]val
		m := NewMap(func(v val, by int64) val { return val{v.id, v.at + by} })
		steps := rapid.IntRange(1, 60).Draw(rt, "steps")
		for i := range steps {
			off := rapid.Int64Range(0, size-1).Draw(rt, "off")
			e := Extent{off, rapid.Int64Range(0, size-off).Draw(rt, "len")}
			if rapid.IntRange(0, 4).Draw(rt, "op") == 0 {
				m.Delete(e)
				for b := e.Off; b < e.End(); b++ {
					model[b] = val{}
				}
				continue
			}
			m.Set(e, val{int64(i + 1), 0})
			for b := e.Off; b < e.End(); b++ {
				model[b] = val{int64(i + 1), b - e.Off}
			}
		}
		off := rapid.Int64Range(0, size-1).Draw(rt, "visit off")
		view := Extent{off, rapid.Int64Range(0, size-off).Draw(rt, "visit len")}
		var got [size]val
		m.Visit(view, func(p Extent, v val) bool {
			for b := p.Off; b < p.End(); b++ {
				got[b] = val{v.id, v.at + b - p.Off}
			}
			return true
		})
		var gaps [size]bool
		m.Gaps(view, func(g Extent) bool {
			for b := g.Off; b < g.End(); b++ {
				gaps[b] = true
			}
			return true
		})
		var sum int64
		m.All(func(e Extent, _ val) bool { sum += e.Len; return true })
		var mapped int64
		for b := range int64(size) {
			if model[b].id != 0 {
				mapped++
			}
			if b < view.Off || b >= view.End() {
				continue
			}
			if got[b] != model[b] {
				rt.Fatalf("byte %d: map has %v, model %v", b, got[b], model[b])
			}
			if gaps[b] != (model[b].id == 0) {
				rt.Fatalf("byte %d: gap %v, model %v", b, gaps[b], model[b])
			}
		}
		if sum != mapped || m.Bytes() != mapped {
			rt.Fatalf("map counts %d and %d bytes, model %d", m.Bytes(), sum, mapped)
		}
	})
}
