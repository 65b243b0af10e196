package pipeline

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/format"
	"drc/segmenter"
	"drc/vbuf"
)

// WhenFull says what becomes of a group's writers when the buffer is full.
type WhenFull int

const (
	// WhenFullDefault is WhenFullBitmap, unless another volume of the group says
	// something else.
	WhenFullDefault WhenFull = iota
	// WhenFullBitmap has them go on: what they change is remembered by region, and
	// a gap begins in the history.
	WhenFullBitmap
	// WhenFullHold has them wait for as long as it takes.
	WhenFullHold
)

// Bitmap mode.
//
// It begins when writers have waited for room in the buffer for bitmapGrace.
// First the segmenter is suspended, then the writes are taken past the journal
// (capture.Group.Divert: stop, mark, apply, sync), then the journal is released.
// What is sealed stays: it becomes history when the stores are back.
//
// It ends when all that is sealed is history and there is room. The writes are
// brought back into the journal (capture.Group.Undivert); before the first of
// them is numbered, the marked regions are noted as a resync, durably, with the
// end of what was dropped, and the marks are given up. A crash between the two
// finds both and resyncs what is in either. The resync begins the gap in the
// history, after the last seq that was sealed, and its end is one checkpoint.
const (
	bitmapGrace = 300 * time.Millisecond
	// bitmapStay is how long bitmap mode lasts at least. It doubles up to
	// bitmapStayMax each time that it begins within that time of its last end, so
	// that a host whose stores are too slow for it does not begin a resync every
	// few seconds.
	bitmapStay    = 2 * time.Second
	bitmapStayMax = time.Minute
)

// whenFull is what the volumes of a group say.
func whenFull(vols []VolumeConfig) (WhenFull, error) {
	said := WhenFullDefault
	for _, v := range vols {
		if v.WhenFull == WhenFullDefault {
			continue
		}
		if said != WhenFullDefault && said != v.WhenFull {
			return 0, fmt.Errorf("the volumes of group %s disagree about when-full: it is one for a group, so say the same of each", v.GroupName())
		}
		said = v.WhenFull
	}
	if said == WhenFullDefault {
		said = WhenFullBitmap
	}
	return said, nil
}

// openBitmap opens the group's bitmap, and returns what it has marked if it
// counts. dropped is the last seq that the journal lacks because of it, 0 if none.
func (g *group) openBitmap(ctx context.Context) (marked map[block.VolumeIndex][]block.Extent, dropped block.Seq, err error) {
	if g.bitmap, err = g.a.buffer.Bitmap(ctx, g.st.ID); err != nil {
		return nil, 0, err
	}
	marked = map[block.VolumeIndex][]block.Extent{}
	damaged := g.bitmap.Damaged()
	if damaged != nil {
		g.logger.Error("the buffer's bitmap of changed regions cannot be read: the volumes are compared in full", "error", damaged)
	}
	for _, v := range g.volumes {
		regions := g.bitmap.Regions(v.desc.Index)
		if damaged != nil && !v.plan.fresh {
			regions = []block.Extent{{Len: v.desc.SizeBytes}}
		}
		if len(regions) > 0 {
			marked[v.desc.Index] = regions
		}
	}
	for _, note := range g.resyncs {
		dropped = max(dropped, note.Dropped)
	}
	if g.bitmap.Active() || damaged != nil {
		dropped = max(dropped, g.journal.Released())
		g.gapSince = g.bitmap.Since()
	}
	return marked, dropped, nil
}

// clearBitmap gives up what is marked, once that is noted as a resync, and makes
// room for the marks to come. Without room the writers are held when the buffer is
// full.
func (g *group) clearBitmap() error {
	if err := g.bitmap.Deactivate(); err != nil {
		return err
	}
	if err := g.bitmap.Prepare(g.bitmapVolumes()); err != nil {
		g.logger.Warn("there is no room for the bitmap of changed regions: should the buffer be full, writers wait", "error", err)
		g.whenFull = WhenFullHold
	}
	return nil
}

func (g *group) bitmapVolumes() (vols []vbuf.BitmapVolume) {
	for _, d := range g.st.Volumes {
		if d.SizeBytes > 0 {
			vols = append(vols, vbuf.BitmapVolume{Index: d.Index, SizeBytes: d.SizeBytes})
		}
	}
	return vols
}

// addHeld is where a group is told that a writer waits for room.
func (a *Agent) addHeld(id block.GroupID) chan struct{} {
	a.heldMu.Lock()
	defer a.heldMu.Unlock()
	if a.held == nil {
		a.held = map[block.GroupID]chan struct{}{}
	}
	if a.held[id] == nil {
		a.held[id] = make(chan struct{}, 1)
	}
	return a.held[id]
}

// tellHeld is vbuf.Options.Held.
func (a *Agent) tellHeld(id block.GroupID) {
	a.heldMu.Lock()
	held := a.held[id]
	a.heldMu.Unlock()
	tell(held)
}

// tell leaves word in a channel that holds one; who has word already needs no more.
func tell(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watchFull takes the group into bitmap mode and out of it.
func (g *group) watchFull(ctx context.Context) {
	stay, ended := bitmapStay, time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.held:
		}
		forced := g.forced.Swap(false)
		if !forced && (g.whenFull == WhenFullHold || !g.waitsStill(ctx)) {
			continue
		}
		if g.capture.Diverted() {
			continue
		}
		if !ended.IsZero() && g.a.cfg.Now().Sub(ended) < bitmapStayMax {
			stay = min(2*stay, bitmapStayMax)
		} else {
			stay = bitmapStay
		}
		entered, err := g.enterBitmap(ctx)
		if err == nil && !entered {
			continue
		}
		if err != nil {
			if forced { // what was lost is lost, whether writers wait or not
				g.forced.Store(true)
			}
			if ctx.Err() != nil || g.capture.Refusal() != nil {
				continue
			}
			g.logger.Error("the buffer is full, and bitmap mode cannot begin: writers wait; trying again", "error", err)
			g.retryHeld(ctx, stay)
			continue
		}
		said := ""
		for pause := stay; ; pause = time.Second {
			if sleep(ctx, pause) != nil {
				return
			}
			err := g.lookForBuffer()
			if err == nil {
				err = g.giveUpLost(ctx)
			}
			if err == nil {
				if !g.mayLeaveBitmap() {
					continue
				}
				err = g.leaveBitmap(ctx)
			}
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return
			}
			if err.Error() != said {
				said = err.Error()
				g.logger.Warn("bitmap mode cannot end yet; trying again", "error", err)
			}
		}
		ended = g.a.cfg.Now()
	}
}

// batchBytes is how many bytes of writes a batch takes at most: even if they cannot
// be compressed their segments fit, with parity, into the eighth of each disk that
// the journals leave to the next batch.
func batchBytes(st vbuf.Stats) int64 {
	n := int64(segmenter.DefaultBatchBytes)
	for _, d := range st.Disks {
		n = min(n, d.CapacityBytes/16)
	}
	return max(n, 256<<10)
}

// coarseBytes is the most that a batch waits for while room in the buffer is
// short.
const coarseBytes = 96 << 20

// coarse is segmenter.Config.Coarse: while the stores do not take what is sealed
// and more than half of the buffer is used, batches wait for a quarter of it.
func (g *group) coarse() int64 {
	if g.up.Stats().QueuedBatches == 0 {
		return 0
	}
	st := g.a.buffer.Stats()
	if st.Waiting > 0 || st.UsedBytes <= st.CapacityBytes/2 {
		return 0
	}
	return min(coarseBytes, st.CapacityBytes/4)
}

const (
	// manyBatches is how many batches may wait for the stores, each as short as the
	// RPO asks for: some hours' worth.
	manyBatches = 16 << 10
	// moreBatches is how many more make the next ones twice as long.
	moreBatches = 4 << 10
	// patienceMax is how long a batch gets at most.
	patienceMax = 5 * time.Minute
)

// patience is segmenter.Config.Patience: the longer an outage is the longer are
// the steps of its history, so that the number of batches, and the memory for
// them, is bounded.
func (g *group) patience() time.Duration { return patienceOf(g.up.Stats().QueuedBatches, g.a.cfg.RPO) }

func patienceOf(waiting int, rpo time.Duration) time.Duration {
	d := rpo / 2
	for n := waiting - manyBatches; n >= 0 && d < patienceMax; n -= moreBatches {
		d *= 2
	}
	return min(d, max(patienceMax, rpo/2))
}

// retryHeld looks again after a while, as nobody tells twice.
func (g *group) retryHeld(ctx context.Context, after time.Duration) {
	if sleep(ctx, after) == nil {
		g.a.tellHeld(g.st.ID)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// waitsStill tries to make room the usual way, and reports whether writers wait
// all the same for bitmapGrace.
func (g *group) waitsStill(ctx context.Context) bool {
	wait, cancel := context.WithTimeout(ctx, bitmapGrace)
	defer cancel()
	for _, v := range g.volumes {
		if v.dev.Full() == nil && v.dev.Failed() == nil {
			_ = v.dev.Settle(wait) // who cannot settle cannot be applied either: Divert says why
		}
	}
	g.release()
	for {
		if g.a.buffer.Stats().Waiting == 0 {
			return false
		}
		if sleep(wait, 20*time.Millisecond) != nil {
			return ctx.Err() == nil && g.journal.Err() == nil
		}
	}
}

// enterBitmap begins bitmap mode, unless the writes go past the journal already.
func (g *group) enterBitmap(ctx context.Context) (entered bool, err error) {
	g.diverting.Lock() // the buffer may be found to be lost meanwhile
	defer g.diverting.Unlock()
	if g.capture.Diverted() {
		return false, nil
	}
	if err := g.capture.Refusal(); err != nil {
		return false, err
	}
	g.bitmap.Forget()
	g.seg.Suspend()
	g.mu.Lock()
	safe := max(g.safe, g.journal.Released()) // what was dropped before is noted
	g.mu.Unlock()
	g.marks.whole.Store(false)
	last, err := g.capture.Divert(ctx, g.marks, safe)
	if err != nil {
		g.seg.Resume()
		return false, err
	}
	g.journal.Release(last)
	g.mu.Lock()
	if g.gapSince.IsZero() {
		g.gapSince = g.bitmap.Since()
	}
	g.mu.Unlock()
	g.logger.Warn("bitmap mode begins, as the buffer is full or has lost what is not history yet. Writes go on at full speed, and only where they go is remembered; a gap begins in the history, and everything before it stays restorable",
		"sealed", g.seg.Sealed().String(), "captured", last.String())
	return true, nil
}

// mayLeaveBitmap reports whether all that is sealed is history and there is room
// for the journal.
func (g *group) mayLeaveBitmap() bool {
	g.mu.Lock()
	failed := g.failed
	g.mu.Unlock()
	st := g.a.buffer.Stats()
	return failed == nil && g.seg.IsQuiet() && g.log.InOffice() && g.up.Stats().QueuedBatches == 0 &&
		(g.journal.Err() == nil || g.renewed.Load()) && st.UsedBytes <= st.CapacityBytes/4*3
}

// leaveBitmap ends bitmap mode with the beginning of a resync.
func (g *group) leaveBitmap(ctx context.Context) error {
	var dropped block.Seq
	after := g.seg.Sealed()
	var resynced []*volume
	err := g.capture.Undivert(ctx, func(last block.Seq) error {
		dropped = last
		if g.journal.Durable() < last || g.renewed.Load() {
			_, err := g.a.buffer.ResetJournal(ctx, g.st.ID, last+1)
			return err
		}
		g.journal.Release(last)
		return nil
	}, func() (devs []*capture.Volume, err error) {
		marked := map[*volume][]block.Extent{}
		for _, v := range g.volumes {
			if regions := g.marks.regions(v); len(regions) > 0 {
				marked[v] = regions
				resynced = append(resynced, v)
				devs = append(devs, v.dev)
			}
		}
		if err := g.noteGap(marked, after, dropped); err != nil {
			return nil, err
		}
		if err := g.marks.Deactivate(); err != nil {
			return nil, err
		}
		g.cannotBeNamed(g.seg.Drop(dropped))
		g.mu.Lock()
		defer g.mu.Unlock()
		for v, regions := range marked {
			g.seg.ResyncAgain(v.desc.Index, v.dev, regions, format.GapBuffer)
			g.baselines[v.desc.Index]++
		}
		return devs, nil
	})
	if err != nil {
		return err
	}
	if g.renewed.Swap(false) {
		if err := g.bitmap.Begin(g.bitmapVolumes()); err != nil {
			g.logger.Warn("the new buffer does not take the bitmap of changed regions: should it be full, the volumes are compared in full", "error", err)
		}
	}
	g.mu.Lock()
	g.gapMayHaveEnded() // where nothing is compared nothing else says so
	g.mu.Unlock()
	g.seg.Resume()
	for _, v := range resynced {
		g.background(func(ctx context.Context) { g.giveBaseline(ctx, v) })
	}
	g.logger.Info("there is room in the buffer again: bitmap mode has ended, and what was changed is being compared with the history", "after", after.String())
	return nil
}

// noteGap notes durably that regions must be resynced, besides those that are
// already being resynced.
func (g *group) noteGap(marked map[*volume][]block.Extent, after, dropped block.Seq) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	notes := maps.Clone(g.resyncs)
	for v, regions := range marked {
		i := v.desc.Index
		left, begun := g.prog.Resync[i]
		note, noted := notes[i]
		switch under := g.seg.Regions(i); {
		case len(under) == 0: // none is under way
			note = resyncNote{After: after, Reason: format.GapBuffer}
		case !noted:
			note = resyncNote{Begun: begun, After: after, Reason: format.GapBuffer}
			regions = segmenter.Union(regions, under)
		default:
			note.Begun = note.Begun || (begun && g.prog.N > note.N)
			note.endsAt(after)
			regions = segmenter.Union(regions, under)
		}
		if len(left) > 0 && note.Begun {
			regions = segmenter.Union(regions, left)
		}
		note.N, note.Older, note.Remaining = g.prog.N, nil, regions
		note.Dropped, note.Cut, note.Whole = dropped, dropped, false
		if note.Since == 0 {
			note.Since = g.gapSince.UnixNano()
		}
		notes[i] = note
	}
	if err := g.files.saveResyncs(notes); err != nil {
		return fmt.Errorf("note what must be compared: %w", err)
	}
	g.resyncs = notes
	g.ended = slices.DeleteFunc(g.ended, func(i block.VolumeIndex) bool {
		return slices.ContainsFunc(slices.Collect(maps.Keys(marked)), func(v *volume) bool { return v.desc.Index == i })
	})
	return nil
}

// errGap: a checkpoint that was asked for is in a gap.
var errGap = errors.New("the buffer was full before it could be made, and a gap has begun in the history: ask for it again when drc status says continuous")

// cannotBeNamed tells those who wait for named checkpoints that these will never
// be.
func (g *group) cannotBeNamed(names []format.NamedCheckpoint) {
	if len(names) == 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, n := range names {
		g.unnamed[namedKey{n.Name, n.Time}] = true
		g.logger.Warn("a named checkpoint cannot be made, as the buffer was full", "name", n.Name)
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

// inGap is since when history lacks writes of the group; zero if it does not.
func (g *group) inGap() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.gapSince
}

// gapMayHaveEnded forgets since when there was a gap once no volume is being
// resynced. g.mu is held.
func (g *group) gapMayHaveEnded() {
	if !g.gapSince.IsZero() && len(g.resyncs) == 0 && !g.bitmap.Active() {
		g.logger.Info("the gap in the history has ended", "since", g.gapSince.UTC().Format(time.RFC3339))
		g.gapSince = time.Time{}
	}
}
