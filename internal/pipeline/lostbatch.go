package pipeline

import (
	"context"
	"fmt"
	"slices"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
)

// Batches that were lost with disks of the buffer.
//
// A batch of which the buffer and the stores have too little can never be logged,
// and nothing behind it before it.
//
// The next start gives up the first such batch and all that follow. What the journal
// still holds of them is cut again, as what a dead agent had only in memory is. The
// rest was released, so the volumes have it: it is damage of the journal then (see
// judgeDamage), only its history is lost, and a gap begins. They are dropped from the
// buffer once that is noted: before, a crash leaves all as it was.
//
// An agent at work waits until all before it is logged. Then the writes go past the
// journal for a moment, as in bitmap mode, which brings the volumes up to date; that
// they must be compared in full is noted, durably; the batches are given up, and all
// that they said of volumes, names and gaps is said anew; and the group returns as from
// bitmap mode. A crash before the note leaves what the next start gives up itself, and
// one after it a note with which that start compares the volumes.
//
// Batches that were in memory when a whole buffer was lost can be made durable in the
// new one, and those in front of them are nowhere. Should the agent end before it has
// given them all up, nothing in the new buffer tells of the hole. The note of the loss
// does: a batch from before it that does not follow the end of the log when it is about
// to be logged is given up.

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

// lostBatchPoll is how often it is looked whether a lost batch is next.
const lostBatchPoll = time.Second

// watchLostBatches begins to give up what is lost as soon as nothing else can be logged.
func (g *group) watchLostBatches(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.lostBatch:
		}
		for g.lacksBatches() {
			if g.log.InOffice() && !g.capture.Diverted() && g.up.IsNext(g.isGone) {
				g.forced.Store(true)
				g.a.tellHeld(g.st.ID)
			}
			if sleep(ctx, lostBatchPoll) != nil {
				return
			}
		}
	}
}

// tellLostBatch is told that a sealed batch is lost.
func (g *group) tellLostBatch() { tell(g.lostBatch) }

// tellHole is uploader.Config.OnHole: batches were lost with a whole buffer, and others
// that were cut behind them are in this one.
func (g *group) tellHole() {
	g.holed.Store(true)
	g.tellLostBatch()
}

// holesUpTo is uploader.Config.HolesUpTo.
func (g *group) holesUpTo() (seq block.Seq) {
	for _, note := range g.resyncs {
		seq = max(seq, note.Hole)
	}
	return seq
}

// lacksBatches reports whether a batch that should be logged is lost.
func (g *group) lacksBatches() bool { return g.holed.Load() || g.spool.lacks() }

// isGone reports whether b can never be logged.
func (g *group) isGone(b *batch.Batch) bool { return g.spool.isLost(b) || g.up.IsBehindHole(b) }

// giveUpLost gives up the batches from the first on that is lost, if that is next to be
// logged. The writes go past the journal.
func (g *group) giveUpLost(ctx context.Context) error {
	if !g.log.InOffice() || !g.up.GiveUp(g.isGone) {
		return nil
	}
	for !g.seg.IsQuiet() { // what it is about to put is given up as well
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	after := g.up.Logged()
	oldest := g.inGap()
	if oldest.IsZero() {
		oldest = g.a.cfg.Now()
	}
	if err := g.noteWhole(oldest, true); err != nil {
		return err
	}
	g.marks.whole.Store(true)
	gone, err := g.up.TakeGone(ctx)
	if err != nil {
		return err
	}
	g.holed.Store(false)
	g.logger.Error("sealed writes that the stores lack were lost with disks of the buffer, or have rotted there: the volumes have them, their history is lost, and a gap begins", "after", after.String())
	for _, x := range gone {
		g.cannotBeNamed(x.Names)
		if err := g.spool.giveUp(x.Batch); err != nil {
			g.logger.Warn("a batch that is lost cannot be removed from the buffer; the next start tries again", "from", x.Batch.From.String(), "to", x.Batch.To.String(), "error", err)
		}
	}
	g.mu.Lock()
	g.wasSealed = max(g.wasSealed, g.seg.Sealed())
	g.seg.Rewind(after + 1)
	g.inherited = min(g.inherited, after)
	announced := g.prog.N > 0
	vols := g.unannounced(nil, nil)
	g.mu.Unlock()
	switch {
	case !announced:
		g.announceGroup()
	case len(vols) > 0:
		g.seg.Announce(func(it *format.Items) { it.Volumes = vols })
	}
	return nil
}
