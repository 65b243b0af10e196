package pipeline

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/format"
	"drc/vbuf"
)

// All of the buffer lost, and the agent lives.
//
// Writers stop at the first error that says so. Then, as when the buffer is full:
// it is noted durably, here in the state folder, that the volumes must be compared
// in full; what is in memory is written to the volumes, and they are synced; their
// records say so; writers go on, straight to the volumes. So nothing that was
// acknowledged is lost, and nobody gets an error. A crash before the note leaves
// what a lost buffer leaves: a decision is needed. So does one after it, until the
// records of all volumes say that they have everything; from then on the next start,
// with a buffer that works, finds the note and needs none.
//
// The way back, once somebody gives the agent an empty directory: all groups go past
// their journals; the buffer begins anew, with a generation above the lost one's;
// each group waits until what was sealed is on the stores, and returns as from bitmap
// mode. A crash in between leaves the note, and an empty journal or one that begins
// behind all that was captured: both have the next start compare the volumes.

// liveJournal is the group's journal, as capture uses it: that it is lost is no
// error of a write but has the writes go another way.
type liveJournal struct {
	Journal
	g *group
}

func (j liveJournal) Reserve(ctx context.Context, n int64) error {
	return j.g.survive(j.Journal.Reserve(ctx, n))
}

func (j liveJournal) WaitWritten(ctx context.Context, seq block.Seq) error {
	return j.g.survive(j.Journal.WaitWritten(ctx, seq))
}

func (j liveJournal) Flush(ctx context.Context) error {
	return j.g.survive(j.Journal.Flush(ctx))
}

// survive has writers stop when err says that the buffer is lost.
func (g *group) survive(err error) error {
	if err == nil || !errors.Is(err, vbuf.ErrLost) {
		return err
	}
	if g.capture.Refusal() != nil {
		return err
	}
	g.capture.Hold()
	tell(g.lost)
	return capture.ErrDiverted
}

// watchLost takes the writes past a journal that is lost.
func (g *group) watchLost(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			g.capture.Release() // who waits is refused by now
			return
		case <-g.lost:
		}
		diverted, err := g.divertLost(ctx)
		if !diverted && err == nil {
			continue // told more than once: what was told of has been seen to, perhaps to its end
		}
		if err == nil {
			g.logger.Error("all disks of the buffer have failed: what was in memory is on the volumes, and writes go straight to them. They are not protected until the agent has a buffer again: give it an empty directory on a disk that works, with drc buffer add DIR",
				"error", g.journal.Err())
			g.returnToBuffer(ctx)
			continue
		}
		if ctx.Err() == nil {
			g.capture.Refuse(fmt.Errorf("all disks of the buffer have failed, and the volumes cannot be brought up to date: %w", err))
			g.fail("going on without a buffer", err)
		}
	}
}

// divertLost takes the writes past a journal that is lost, if they are still held.
func (g *group) divertLost(ctx context.Context) (diverted bool, err error) {
	g.diverting.Lock() // bitmap mode may be about to begin, because the buffer was full or has lost something
	defer g.diverting.Unlock()
	if g.capture.Diverted() || !g.capture.Held() {
		return false, nil
	}
	g.seg.Suspend()
	g.mu.Lock()
	safe := g.safe
	g.mu.Unlock()
	g.marks.whole.Store(false)
	_, err = g.capture.Divert(ctx, g.marks, safe)
	return err == nil, err
}

// returnPoll is how often a group without a buffer looks whether it can go on.
const returnPoll = 500 * time.Millisecond

// returnToBuffer has the group's writes go through the journal again, once the
// buffer has begun anew and what was sealed before is on the stores: a gap ends
// with a resync of all.
func (g *group) returnToBuffer(ctx context.Context) {
	for said := ""; ; {
		if sleep(ctx, returnPoll) != nil {
			return
		}
		if !g.capture.Diverted() {
			return
		}
		if !g.renewed.Load() {
			continue
		}
		err := g.giveUpLost(ctx)
		if err == nil {
			if !g.mayLeaveBitmap() {
				continue
			}
			err = g.leaveBitmap(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		if err.Error() != said {
			said = err.Error()
			g.logger.Warn("the group cannot use the new buffer yet; trying again", "error", err)
		}
	}
}

// isLost reports whether all of the buffer is lost, as far as anybody has noticed.
func (a *Agent) isLost() bool {
	for _, g := range a.all() {
		if errors.Is(g.journal.Err(), vbuf.ErrLost) {
			return true
		}
	}
	return false
}

// lookForBuffer finds out whether all of the buffer is lost while nobody syncs
// anything there, as in bitmap mode. The marks of a group in that mode are lost with
// it: at once it is noted that all of its volumes must be compared. Only watchFull
// calls it, in that mode.
func (g *group) lookForBuffer() error {
	g.a.buffer.Look()
	for _, o := range g.a.all() {
		if !o.capture.Diverted() {
			_ = o.survive(o.journal.Err()) // as its next write would
		}
	}
	if err := g.journal.Err(); errors.Is(err, vbuf.ErrLost) && !g.marks.whole.Load() {
		return g.marks.all(g.bitmap.Since(), err)
	}
	return nil
}

// renewBuffer begins the buffer anew on an empty directory after all of it was lost.
// Before that the writes of every group go past the journal, also of those that
// have not noticed: nothing that was acknowledged is in the journals only.
func (a *Agent) renewBuffer(ctx context.Context, dir vbuf.DirOptions) error {
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, g := range a.all() {
		for !g.capture.Diverted() && g.capture.Refusal() == nil {
			g.capture.Hold()
			tell(g.lost)
			if sleep(wait, returnPoll/10) != nil {
				return fmt.Errorf("the volumes of group %s cannot be brought up to date, and until they are the buffer that was lost is not given up: drc status says why", g.name)
			}
		}
	}
	for _, g := range a.all() {
		if err := g.lacking.note(); err != nil {
			return fmt.Errorf("note of group %s that shards are missing on the stores: %w", g.name, err)
		}
	}
	for _, g := range a.all() {
		// What a group in bitmap mode has marked is lost with the old buffer.
		if g.capture.Diverted() && !g.marks.whole.Load() {
			if err := g.marks.all(g.bitmap.Since(), vbuf.ErrLost); err != nil {
				return err
			}
		}
	}
	if err := a.buffer.Renew(ctx, []vbuf.DirOptions{dir}); err != nil {
		return err
	}
	for _, g := range a.all() {
		g.renewed.Store(true)
	}
	a.cfg.Logger.Warn("the buffer has begun anew: the volumes are protected again as soon as they have been compared with their history", "path", dir.Path)
	return nil
}

// lossOf is vbuf.Options.OnLoss.
func (a *Agent) lossOf(l vbuf.Loss) {
	for _, g := range a.all() {
		if g.st.ID != l.Group {
			continue
		}
		if l.Batch != nil {
			g.tellLostBatch()
		} else {
			// The volumes have what the journal has lost, or will in a moment.
			g.forced.Store(true)
			a.tellHeld(l.Group)
		}
	}
}

// groupMarks are what a group's writes past the journal are remembered by: the
// buffer's bitmap, and where that cannot be written a note that all of each volume
// must be compared.
type groupMarks struct {
	g     *group
	whole atomic.Bool
}

// Add implements capture.Marks.
func (m *groupMarks) Add(v block.VolumeIndex, e block.Extent) { m.g.bitmap.Add(v, e) }

// Activate implements capture.Marks.
func (m *groupMarks) Activate(oldest time.Time) error {
	if err := m.g.journal.Err(); err != nil { // the bitmap is on the same disks
		return m.all(oldest, err)
	}
	err := m.g.bitmap.Activate(oldest)
	if err == nil {
		return nil
	}
	return m.all(oldest, err)
}

// Mark implements capture.Marks.
func (m *groupMarks) Mark(ctx context.Context, v block.VolumeIndex, e block.Extent) error {
	if m.whole.Load() {
		return nil
	}
	err := m.g.bitmap.Mark(ctx, v, e)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return m.all(m.g.bitmap.Since(), err)
}

// Deactivate implements capture.Marks. A note that all must be compared stays, and
// no longer says that the volumes have everything: the journal is in use again.
func (m *groupMarks) Deactivate() error {
	err := m.g.bitmap.Deactivate()
	if !m.whole.Load() {
		if err != nil { // the next try does without it
			return errors.Join(err, m.all(m.g.bitmap.Since(), err))
		}
		return nil
	}
	m.g.mu.Lock()
	defer m.g.mu.Unlock()
	if err := m.g.journalBegun(); err != nil {
		return err
	}
	m.whole.Store(false)
	return nil
}

// all notes durably that all of each volume must be compared, because cause keeps
// the bitmap from being written.
func (m *groupMarks) all(oldest time.Time, cause error) error {
	m.g.logger.Warn("what is written past the journal cannot be remembered by region: the volumes will be compared in full", "error", cause)
	if err := m.g.noteWhole(oldest, false); err != nil {
		return errors.Join(cause, err)
	}
	m.whole.Store(true)
	return nil
}

// regions are what of a volume was written past the journal.
func (m *groupMarks) regions(v *volume) []block.Extent {
	if m.whole.Load() {
		return []block.Extent{{Len: v.desc.SizeBytes}}
	}
	return m.g.bitmap.Regions(v.desc.Index)
}

// noteWhole notes durably that all of each volume must be compared, and that the
// volumes themselves have, or are about to get, all that was captured. With unsaid the
// log is not known to say that gaps have begun: what would have said so is given up.
func (g *group) noteWhole(oldest time.Time, unsaid bool) error {
	captured, after := g.capture.Captured(), g.up.Logged()
	g.mu.Lock()
	defer g.mu.Unlock()
	notes := maps.Clone(g.resyncs)
	for _, v := range g.volumes {
		note, noted := notes[v.desc.Index]
		if !noted {
			_, begun := g.prog.Resync[v.desc.Index]
			note = resyncNote{Begun: begun, After: after, Reason: format.GapBuffer}
		}
		note.Begun = note.Begun && !unsaid // twice is no harm
		note.endsAt(after)
		note.N, note.Older, note.Remaining = g.prog.N, nil, []block.Extent{{Len: v.desc.SizeBytes}}
		note.Dropped, note.Cut, note.Hole, note.Whole = captured, captured, captured, true
		if note.Since == 0 {
			note.Since = oldest.UnixNano()
		}
		notes[v.desc.Index] = note
	}
	if err := g.files.saveResyncs(notes); err != nil {
		return fmt.Errorf("note that the volumes must be compared: %w", err)
	}
	g.resyncs, g.ended = notes, nil
	for _, v := range g.volumes {
		delete(g.prog.Resync, v.desc.Index) // how far another one had come
	}
	if g.gapSince.IsZero() {
		g.gapSince = oldest
	}
	return nil
}

// hasAll reports whether a volume is known to have all that was captured, though
// the journal does not: see noteWhole.
func (g *group) hasAll(v *volume) bool {
	note, r := g.resyncs[v.desc.Index], v.plan.record
	ours := v.plan.finding == capture.FindingClean || v.plan.finding == capture.FindingReplay
	// Later writes that were numbered were the journal's.
	return note.Whole && r != nil && ours && r.Group == g.st.ID.String() && r.Applied == note.Dropped
}
