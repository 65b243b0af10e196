package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"drc/internal/block"
)

// ErrDiverted is what a call gets that waited for the journal when the group's
// writes were taken past it, or back. Nothing is lost; who gets it tries again.
var ErrDiverted = errors.New("the way of the group's writes is being changed")

// Marks remembers, durably, the regions of a group's volumes that are written
// past the journal.
//
// In that mode a write is marked, then written to its backing: the region's mark
// is durable before the write reaches the backing, so that after any crash what
// is not marked is as the history has it. FLUSH is a sync of the backings.
type Marks interface {
	// Add marks a region in memory; Activate makes that durable.
	Add(v block.VolumeIndex, e block.Extent)
	// Activate makes durable what was added, then that the marks count. oldest is
	// when the oldest write was captured that they stand for.
	Activate(oldest time.Time) error
	// Mark marks a region, durably when it returns nil.
	Mark(ctx context.Context, v block.VolumeIndex, e block.Extent) error
	// Deactivate says, durably, that the marks do not count any more.
	Deactivate() error
}

// way tells how writes go at present: past the journal if marks is not nil, and
// not at all until switching, if that is not nil, is closed.
func (g *Group) way() (marks Marks, switching <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.switching != nil {
		return nil, g.switching
	}
	return g.marks, nil
}

// Diverted reports whether the group's writes go past the journal.
func (g *Group) Diverted() bool {
	marks, _ := g.way()
	return marks != nil
}

// settled waits until no switch is under way, and tells how writes go then.
func (g *Group) settled(ctx context.Context) (Marks, error) {
	for {
		marks, switching := g.way()
		if switching == nil {
			return marks, nil
		}
		select {
		case <-switching:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// close keeps writers out until open is called, and returns the newest Seq.
func (g *Group) close() (last block.Seq, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.switching != nil && !g.held {
		return 0, errors.New("capture: a switch is under way")
	}
	if g.switching == nil {
		g.switching = make(chan struct{})
	}
	g.held = false
	return g.captured, nil
}

// Hold keeps writers out until the next Divert, because the journal is lost. It
// does nothing while writes do not go through the journal.
func (g *Group) Hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.switching == nil && g.marks == nil {
		g.switching, g.held = make(chan struct{}), true
	}
}

// Held reports whether Hold keeps writers out.
func (g *Group) Held() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held
}

// Release takes Hold back.
func (g *Group) Release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held {
		close(g.switching)
		g.switching, g.held = nil, false
	}
}

// open lets writers in again, past the journal if marks is not nil.
func (g *Group) open(marks Marks) {
	g.mu.Lock()
	g.marks = marks
	close(g.switching)
	g.switching = nil
	g.mu.Unlock()
}

// Divert takes the group's writes past the journal, which cannot hold them: from
// then on they go straight to the backings, and marks remembers where. Everything
// up to safe is known to be history or on its way there for certain; what was
// captured behind that is marked, and may be dropped from the journal once Divert
// has returned. It returns the newest Seq; the writes that follow have none.
//
// The order: writers stop; all that was captured behind safe is marked; the marks
// count, durably; all of it is written to the backings, and they are synced; the
// records say so; writers go on. A crash before the marks count leaves things as
// they were. After that the journal still has what the backings may lack, until
// the records say otherwise. So what is not durable in the journal may be written
// to a backing here: it is marked.
//
// After an error the writes go on through the journal, and it can be tried again. By
// then a backing may have what the journal has not durable: either that becomes
// durable there before the marks are given up, or they stay.
func (g *Group) Divert(ctx context.Context, marks Marks, safe block.Seq) (last block.Seq, err error) {
	oldest := g.OldestAfter(safe)
	if oldest.IsZero() {
		oldest = g.now()
	}
	if last, err = g.close(); err != nil {
		return 0, err
	}
	g.journal.Divert(ErrDiverted)
	active := false
	defer func() {
		if err == nil {
			g.open(marks)
			return
		}
		g.journal.Divert(nil)
		if active {
			if ferr := g.flushJournal(ctx); ferr != nil {
				err = errors.Join(err, fmt.Errorf("the marks stay: %w", ferr))
			} else {
				err = errors.Join(err, marks.Deactivate())
			}
		}
		g.open(nil)
	}()
	g.markCaptured(marks, safe)
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := marks.Activate(oldest); err != nil {
		return 0, err
	}
	active = true
	for _, v := range g.members() {
		if err := v.applyAll(ctx, last); err != nil {
			return 0, fmt.Errorf("bring volume %s up to seq %s: %w", v.o.Name, last, err)
		}
	}
	return last, nil
}

// flushJournal makes durable in the journal all that was captured, also for a
// caller that is to end, and does not wait for long: writers are kept out.
func (g *Group) flushJournal(ctx context.Context) error {
	if g.journal.Durable() >= g.Captured() {
		return nil
	}
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), divertFlush)
	defer cancel()
	err := g.journal.Flush(wait)
	if errors.Is(err, ErrDiverted) { // which says to try again, and what fails here is told to writers
		return errors.New("the journal takes nothing any more")
	}
	return err
}

// markCaptured marks all that was captured behind safe and is in the journal or
// the overlays. What is in neither was overwritten by what is.
func (g *Group) markCaptured(marks Marks, safe block.Seq) {
	for next, durable := safe+1, g.journal.Durable(); next <= durable; {
		after, err := g.journal.Read(next, 64<<20, func(w block.Write) error {
			marks.Add(w.Volume, w.Extent)
			return nil
		})
		if err != nil || after <= next {
			// What cannot be read may have been anywhere.
			for _, v := range g.members() {
				marks.Add(v.o.Index, block.Extent{Len: v.o.Backing.size})
			}
			return
		}
		next = after
	}
	for _, v := range g.members() {
		pieces, next := v.overlay.ready(^block.Seq(0), 0, 1<<62)
		for _, p := range pieces {
			marks.Add(v.o.Index, p.Extent)
		}
		if next != 0 {
			panic("capture: the overlay was not read to its end")
		}
	}
}

func (g *Group) members() []*Volume {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.volumes
}

// applyAll writes everything up to last to the backing, also what is not durable
// in the journal, syncs it, and notes that.
func (v *Volume) applyAll(ctx context.Context, last block.Seq) error {
	if err := v.settling.take(ctx); err != nil {
		return err
	}
	defer v.settling.give()
	if err := v.lostError(); err != nil {
		return err
	}
	for from := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, worked, err := v.apply(last, from)
		if err != nil {
			return err
		}
		if !worked {
			break
		}
		from = next
	}
	return v.syncAndNote(last)
}

// syncAndNote syncs the backing and has the record say that everything up to
// applied is on it. v.settling is held.
func (v *Volume) syncAndNote(applied block.Seq) error {
	v.applying.Lock() // a step that has set dirty is over before the sync
	v.mu.Lock()
	v.dirty = false
	v.mu.Unlock()
	v.applying.Unlock()
	err := v.sync()
	if err == nil {
		err = v.record(applied, false)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		v.dirty = true
		return err
	}
	v.applied = applied
	return nil
}

// direct marks a write and writes it to the backing. It fails with ErrDiverted,
// and does nothing, if writes do not go that way any more.
func (v *Volume) direct(ctx context.Context, marks Marks, w block.Write, p piece, fua bool) error {
	g := v.group
	g.directly.RLock()
	defer g.directly.RUnlock()
	g.mu.Lock()
	refusal := g.refusal
	if refusal == nil && (g.switching != nil || g.marks != marks) {
		refusal = ErrDiverted
	}
	g.mu.Unlock()
	if refusal != nil {
		return refusal
	}
	if err := v.lostError(); err != nil {
		return err
	}
	if changed := v.Changed(); changed != nil && changed.IsCut {
		return changed
	}
	if w.Kind == block.KindData || p.noHole {
		// ENOSPC comes before anything is changed or marked.
		for e := w.Extent; e.Len > 0; e = rest(e, sweepBytes) {
			if err := v.reserve(block.Extent{Off: e.Off, Len: min(e.Len, sweepBytes)}); err != nil {
				return err
			}
		}
	}
	if err := marks.Mark(ctx, v.o.Index, w.Extent); err != nil {
		return err
	}
	v.mu.Lock()
	v.dirty = true
	v.mu.Unlock()
	err := v.writeDirect(w, p)
	v.unsynced.Store(true) // not before: a flush that is under way may miss the write
	if err != nil {
		return err
	}
	g.bytes.Add(w.Extent.Len)
	if fua || v.o.Ack == AckDurable {
		return v.sync()
	}
	return nil
}

func (v *Volume) writeDirect(w block.Write, p piece) error {
	if w.Kind == block.KindData {
		v.space.RLock()
		defer v.space.RUnlock()
		return v.o.Backing.WriteAt(w.Data, w.Extent.Off)
	}
	for e := w.Extent; e.Len > 0; e = rest(e, sweepBytes) {
		part := block.Extent{Off: e.Off, Len: min(e.Len, sweepBytes)}
		v.space.Lock()
		err := v.o.Backing.Zero(part, p.noHole)
		v.space.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// flushDirect syncs the backings of all volumes of the group that were written.
func (g *Group) flushDirect() error {
	g.flushing.Lock() // who finds nothing to sync must not be ahead of the sync
	defer g.flushing.Unlock()
	var errs []error
	for _, v := range g.members() {
		if v.unsynced.Swap(false) {
			errs = append(errs, v.sync())
		} else {
			errs = append(errs, v.lostError())
		}
	}
	return errors.Join(errs...)
}

// Undivert brings the group's writes back into the journal. empty has the journal
// hold nothing and go on behind last; note then makes durable that the marked
// regions of the volumes it names must be resynced, and deactivates the marks. Of
// each of these volumes one sector is written as it is, so that the state that
// the resync starts from has a Seq of its own. After an error the writes go on
// past the journal, and it can be tried again.
//
// The order: writers stop; the backings are synced; the journal is ready; room
// for the first writes is promised; note; the first writes are numbered; writers
// go on.
func (g *Group) Undivert(ctx context.Context, empty func(last block.Seq) error, note func() ([]*Volume, error)) (err error) {
	g.mu.Lock()
	marks := g.marks
	g.mu.Unlock()
	if marks == nil {
		return errors.New("capture: the group's writes are not diverted")
	}
	last, err := g.close()
	if err != nil {
		return err
	}
	g.directly.Lock() // what is under way ends
	defer g.directly.Unlock()
	defer func() {
		if err != nil {
			g.journal.Divert(ErrDiverted)
			g.open(marks)
			return
		}
		g.open(nil)
	}()
	for _, v := range g.members() {
		if err := v.settleDirect(ctx, last); err != nil {
			return err
		}
	}
	if err := empty(last); err != nil {
		return err
	}
	g.journal.Divert(nil)
	touches := int64(0)
	defer func() {
		for ; touches > 0; touches-- {
			g.journal.Unreserve(touchBytes)
		}
	}()
	wait, cancel := context.WithTimeout(ctx, undivertRoom)
	defer cancel()
	for range g.members() {
		if err := g.journal.Reserve(wait, touchBytes); err != nil {
			return fmt.Errorf("the journal has no room yet: %w", err)
		}
		touches++
	}
	touched := make([][]byte, 0, len(g.members()))
	for _, v := range g.members() {
		p := make([]byte, v.o.SectorSize)
		if err := v.o.Backing.ReadAt(p, v.o.Backing.size-int64(len(p))); err != nil {
			return err
		}
		touched = append(touched, p)
	}
	volumes, err := note()
	if err != nil {
		return err
	}
	for i, v := range g.members() {
		for _, wanted := range volumes {
			if v == wanted {
				v.touchNow(touched[i])
				touches--
			}
		}
	}
	return nil
}

const (
	// touchBytes is the largest sector.
	touchBytes = 4096
	// undivertRoom is how long Undivert waits for room in a journal that should
	// have it.
	undivertRoom = 2 * time.Second
	// divertFlush is how long a Divert that fails waits for the journal.
	divertFlush = 2 * time.Second
)

// touchNow numbers and enqueues a write of the last sector as it is, for which
// touchBytes of the journal are reserved, while writers are kept out.
func (v *Volume) touchNow(p []byte) {
	g := v.group
	e := block.Extent{Off: v.o.Backing.size - int64(len(p)), Len: int64(len(p))}
	_, _, _ = v.overlay.admit(e.Len, 1<<62)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.enqueue(block.Write{Volume: v.o.Index, Kind: block.KindData, Extent: e, Data: p}, g.now(), func(w block.Write) {
		v.overlay.set(w.Extent, piece{seq: w.Seq, data: w.Data})
	})
}

// settleDirect is Settle of a volume whose writes go past the journal.
func (v *Volume) settleDirect(ctx context.Context, applied block.Seq) error {
	if err := v.settling.take(ctx); err != nil {
		return err
	}
	defer v.settling.give()
	return v.syncAndNote(applied)
}
