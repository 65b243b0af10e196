package uploader

import (
	"slices"

	"drc/internal/format"
)

const (
	// mergeWidth is how many runs of one level become one of the next.
	mergeWidth = 8
	// runsMax is how many runs may cover the history before a base is written.
	runsMax = 48
	// mergeInputsMax bounds the manifests that are merged at a time.
	mergeInputsMax = 64
	// levelBase is the level of a base that was not made by size: it is never
	// one of mergeWidth.
	levelBase = -1
)

// run is a stretch of entries that one manifest covers: a merged one, or at
// level 0 the entry's own.
type run struct {
	from, to uint64
	level    int
	name     string // of the merged manifest's object; empty at level 0
	size     int64  // of that object, bytes
	border   bool   // a named checkpoint stands at to, or may: nothing is merged across
	stuck    bool   // not merged: it cannot be read back for certain, or is too large
}

// runs cover the entries of a branch from its first one on without a hole, in order.
type runs []run

// due finds the first mergeWidth neighbours of one level without a border
// between them.
func (r runs) due() (from, to int, ok bool) {
	for i, n := 0, 0; i < len(r); i++ {
		switch {
		case r[i].stuck || r[i].level == levelBase:
			n = 0
			continue
		case n > 0 && r[i-1].level == r[i].level && !r[i-1].border:
			n++
		default:
			n = 1
		}
		if n == mergeWidth {
			return i + 1 - mergeWidth, i + 1, true
		}
	}
	return 0, 0, false
}

// baseDue finds the runs, from the first on, that a new base shall replace.
func (r runs) baseDue() (to int, ok bool) {
	if len(r) <= runsMax {
		return 0, false
	}
	to = min(len(r), mergeInputsMax)
	if i := slices.IndexFunc(r[:to], func(x run) bool { return x.stuck }); i >= 0 {
		to = i
	}
	return to, to >= mergeWidth
}

// replace puts merged in the place of runs [from, to).
func (r runs) replace(from, to int, merged run) runs {
	return slices.Replace(r, from, to, merged)
}

// foundManifest is a merged manifest found on the stores.
type foundManifest struct {
	format.ManifestName
	name string
	size int64
}

// planRuns covers entries begin to n: always with the manifest that begins at the
// first uncovered entry and reaches farthest, as readers do.
func planRuns(found []foundManifest, begin, n uint64) runs {
	best := map[uint64]foundManifest{}
	for _, m := range found {
		if b, ok := best[m.From]; m.To <= n && m.From < m.To && (!ok || b.To < m.To) {
			best[m.From] = m
		}
	}
	var out runs
	for at := begin; at <= n; {
		m, ok := best[at]
		if !ok {
			out = append(out, run{from: at, to: at})
			at++
			continue
		}
		out = append(out, run{from: m.From, to: m.To, level: levelOf(m.From, m.To), name: m.name, size: m.size})
		at = m.To + 1
	}
	return out
}

// levelOf is the level of a merged run: one of level i has mergeWidth^i
// entries; any other is a base.
func levelOf(from, to uint64) int {
	level := 0
	for n := to - from + 1; n > 1; n /= mergeWidth {
		if n%mergeWidth != 0 {
			return levelBase
		}
		level++
	}
	return level
}
