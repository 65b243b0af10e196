package pipeline

import (
	"fmt"
	"slices"

	"drc/internal/batch"
	"drc/internal/block"
)

// Batches that were lost with disks of the buffer.
//
// A batch of which the buffer and the stores have too little can never be logged,
// and nothing behind it before it. The next start gives up the first such batch and
// all that follow. What the journal still holds of them is cut again, as what a
// dead agent had only in memory is. The rest was released, so the volumes have it:
// it is damage of the journal then (see judgeDamage), only its history is lost, and
// a gap begins. They are dropped from the buffer once that is noted: before, a
// crash leaves all as it was.

// withoutLost splits the batches that the buffer has kept into those to go on with
// and those to give up. dropped is the last Seq of these that no journal has.
func (g *group) withoutLost(batches []*batch.Batch, placed [][]uint64) (kept []*batch.Batch, keptPlaced [][]uint64, gone []*batch.Batch, dropped block.Seq) {
	first := slices.IndexFunc(batches, g.spool.isLost)
	if first < 0 {
		return batches, placed, nil, 0
	}
	gone = batches[first:]
	from, end := gone[0].From, gone[len(gone)-1].To
	switch at := g.journal.First(); {
	case at == 0 || at > end:
		dropped = end
	case at > from:
		dropped = at - 1
	}
	what := "they are cut again from the journal"
	if dropped >= from {
		what = fmt.Sprintf("the volumes have them: their history up to seq %s is lost, and a gap begins", dropped)
	} else {
		dropped = 0
	}
	g.logger.Error("sealed writes were lost with disks of the buffer; "+what, "from", from.String(), "to", end.String())
	return batches[:first], placed[:first], gone, dropped
}

// isLost reports whether the buffer and the stores together have too little of b.
func (p *spool) isLost(b *batch.Batch) bool {
	p.mu.Lock()
	k := p.kept[b]
	p.mu.Unlock()
	return k != nil && slices.Contains(p.s.Lost(), k.vb)
}

// lacks reports whether a batch that is to be logged is lost.
func (p *spool) lacks() bool {
	lost := p.s.Lost()
	if len(lost) == 0 {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.kept {
		if slices.Contains(lost, k.vb) {
			return true
		}
	}
	return false
}
