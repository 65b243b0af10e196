package uploader

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"

	"drc/internal/format"
)

// history merges runs as the merger does, without any manifests.
type history struct {
	runs   runs
	found  []foundManifest // every manifest ever made
	border func(n uint64) bool
	stuck  func(n uint64) bool
}

func (h *history) add(n uint64) {
	h.runs = append(h.runs, run{from: n, to: n, border: h.border(n), stuck: h.stuck(n)})
	for {
		from, to, ok := h.runs.due()
		base := false
		if !ok {
			if to, base = h.runs.baseDue(); !base {
				return
			}
			from = 0
		}
		a, b := h.runs[from], h.runs[to-1]
		m := run{from: a.from, to: b.to, level: a.level + 1, border: b.border, name: "x"}
		if base {
			m.level = levelBase
		}
		h.found = append(h.found, foundManifest{ManifestName: format.ManifestName{From: m.from, To: m.to}, name: "x"})
		h.runs = h.runs.replace(from, to, m)
	}
}

func never(uint64) bool { return false }

// However long the history, few manifests cover it up to any entry.
func TestRuns_FewCoverAnyPrefix(t *testing.T) {
	t.Parallel()
	h := &history{border: never, stuck: never}
	for n := uint64(1); n <= 10_000; n++ {
		h.add(n)
	}
	// What reaches beyond n is of no use for n: it is left out here already.
	slices.SortFunc(h.found, func(a, b foundManifest) int { return cmp.Compare(a.To, b.To) })
	worst, usable := 0, 0
	for n := uint64(1); n <= 10_000; n++ {
		for usable < len(h.found) && h.found[usable].To <= n {
			usable++
		}
		if n < 2000 || n%mergeWidth == mergeWidth-1 { // behind a full run is a better place
			worst = max(worst, len(planRuns(h.found[:usable], 1, n)))
		}
	}
	if worst > 35 || len(h.runs) > runsMax {
		t.Errorf("up to %d manifests, at the end %d", worst, len(h.runs))
	}
}

// Named checkpoints are not merged across, except by bases, which keep the
// plan short however many there are.
func TestRuns_BordersAndBases(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 2))
		every := 1 + rng.IntN(40)
		borders := map[uint64]bool{}
		h := &history{border: func(n uint64) bool {
			borders[n] = rng.IntN(every) == 0
			return borders[n]
		}, stuck: never}
		for n := uint64(1); n <= 3000; n++ {
			h.add(n)
			if len(h.runs) > runsMax {
				t.Fatalf("%d runs", len(h.runs))
			}
			if n%97 == 0 { // a restart finds the same
				again := planRuns(h.found, 1, n)
				for i := range again {
					again[i].border = borders[again[i].to]
				}
				if len(again) > len(h.runs) {
					t.Fatalf("%d runs are %d after a restart", len(h.runs), len(again))
				}
				h.runs = again
			}
		}
		at := uint64(1)
		for _, r := range h.runs {
			if r.from != at || r.to < r.from {
				t.Fatalf("run %d-%d where entry %d is next", r.from, r.to, at)
			}
			at = r.to + 1
		}
		for _, m := range h.found {
			for n := m.From; n < m.To; n++ {
				if borders[n] && m.From != 1 {
					t.Fatalf("entries %d-%d are merged across the named checkpoint at %d", m.From, m.To, n)
				}
			}
		}
	}
}

// What cannot be verified is left alone, and what is around it is merged.
func TestRuns_StuckEntriesAreLeftAlone(t *testing.T) {
	h := &history{border: never, stuck: func(n uint64) bool { return n == 100 || n == 333 }}
	for n := uint64(1); n <= 5000; n++ {
		h.add(n)
	}
	for _, m := range h.found {
		if (m.From <= 100 && m.To >= 100) || (m.From <= 333 && m.To >= 333) {
			t.Fatalf("entries %d-%d", m.From, m.To)
		}
	}
	if n := len(planRuns(h.found, 1, 5000)); n > 100 {
		t.Errorf("%d manifests", n)
	}
}

func TestLevelOf(t *testing.T) {
	for _, c := range []struct {
		from, to uint64
		level    int
	}{{5, 5, 0}, {1, 8, 1}, {17, 24, 1}, {1, 64, 2}, {1, 16, levelBase}, {1, 63, levelBase}, {513, 1024, 3}} {
		if got := levelOf(c.from, c.to); got != c.level {
			t.Errorf("entries %d to %d are of level %d", c.from, c.to, got)
		}
	}
}
