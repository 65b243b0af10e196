package pipeline

import (
	"fmt"
	"maps"
	"slices"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
)

// resyncsFile holds, durably, the resyncs of a group that are not known to have
// ended. A resync is noted there before the backing's record says that the
// backing is ours: otherwise an agent that dies before the first entry of the
// resync would take what it has not compared for its history.
const resyncsFile = "resyncs.json"

// resyncNote is one resync, as it was at the last start. What the progress says
// up to entry N, and batches of the key sets Older, are older than the note and
// in it.
type resyncNote struct {
	N         uint64           `json:"n"`
	Older     []block.ID       `json:"older"`
	Remaining []block.Extent   `json:"remaining"`
	Begun     bool             `json:"begun"` // the log, or a batch on its way there, has the beginning of its gap
	After     block.Seq        `json:"after"` // history up to here is right in spite of it
	Reason    format.GapReason `json:"reason"`
	// Dropped is the last seq that the journal lacks although it is in no batch.
	Dropped block.Seq `json:"dropped,omitempty"`
	// Cut is up to where this process had cut batches when it made the note; they
	// may carry a key set that later batches carry too, so that Older cannot tell.
	// A start has cut nothing yet, and its resync may end without a seq of its own.
	Cut block.Seq `json:"cut,omitempty"`
	// Hole is up to where batches had been cut when all of the buffer was lost: of
	// these some may be in the next buffer, behind others that are nowhere.
	Hole block.Seq `json:"hole,omitempty"`
	// Whole says that the volume has all that was captured up to Dropped, though no
	// buffer has it: see noteWhole.
	Whole bool `json:"whole,omitempty"`
	// Since is when the oldest write was captured that history lacks, ns since 1970
	// UTC, if that is known.
	Since int64 `json:"since,omitempty"`
}

// endsAt says that what is not in the log, nor on its way there, is history up to
// after at most: the rest has been dropped. A gap that has begun there is not
// touched by it.
func (r *resyncNote) endsAt(after block.Seq) {
	if !r.Begun {
		r.After = min(r.After, after)
	}
}

// outlives reports whether a resync that is noted is another one than what a batch up
// to seq to says of the volume: what came before that is in no batch cannot have ended
// what makes up for it, nor say how far that has come.
func (r resyncNote) outlives(to block.Seq) bool { return r.Cut > 0 && to <= r.Cut }

type resyncNotes map[block.VolumeIndex]resyncNote

func (f groupFiles) loadResyncs() (resyncNotes, error) {
	notes := resyncNotes{}
	_, err := f.dir.LoadJSON(&notes, f.path(resyncsFile)...)
	return notes, err
}

func (f groupFiles) saveResyncs(notes resyncNotes) error {
	return f.dir.SaveJSON(notes, f.path(resyncsFile)...)
}

// openResync tells of the resync of volume v that is under way, if there is one,
// by the notes, by what is in the log, and by the batches that wait in the
// buffer.
func openResync(v block.VolumeIndex, notes resyncNotes, p *progress, batches []*batch.Batch) (r resyncNote, open bool) {
	note, noted := notes[v]
	r, open = note, noted
	if left, ok := p.Resync[v]; ok && (!noted || p.N > note.N) {
		r.Remaining, r.Begun, open = left, true, true
	}
	for _, b := range batches {
		if noted && (slices.Contains(note.Older, b.KeySet) || note.outlives(b.To)) {
			continue
		}
		for _, x := range b.Items.GapBegins {
			if x.Volume == v {
				r.Begun, r.After, r.Reason = true, x.After, x.Reason
			}
		}
		for _, x := range b.Items.Partials {
			if x.Volume == v {
				r.Remaining, r.Begun, open = x.Remaining, true, true
			}
		}
		if slices.Contains(b.Items.GapEnds, v) {
			open = false
		}
	}
	return r, open && len(r.Remaining) > 0
}

// noteResyncs notes the planned resyncs, durably. batches are those that the
// buffer kept. With begin the journal has yet to begin anew: until it has, the notes go
// on to say which volumes have all that it lacks, as the next start must know should
// this one not come so far.
func (g *group) noteResyncs(batches []*batch.Batch, begin bool) error {
	notes := maps.Clone(g.resyncs)
	var older []block.ID
	for _, b := range batches {
		if !slices.Contains(older, b.KeySet) {
			older = append(older, b.KeySet)
		}
	}
	changed := false
	for _, v := range g.volumes {
		i, p := v.desc.Index, &v.plan
		if len(p.resync) == 0 {
			continue
		}
		r := resyncNote{N: g.prog.N, Older: older, Remaining: p.resync, Begun: p.begin == nil, After: p.after, Dropped: g.dropped, Hole: g.resyncs[i].Hole, Since: g.resyncs[i].Since}
		r.Whole = begin && g.hasAll(v) && r.Dropped == g.resyncs[i].Dropped
		if r.Since == 0 && !g.gapSince.IsZero() {
			r.Since = g.gapSince.UnixNano()
		}
		delete(g.prog.Resync, i)
		if p.begin != nil {
			r.Reason = p.begin.Reason
		} else {
			g.prog.Resync[i] = p.resync
		}
		notes[i], changed = r, true
	}
	if !changed {
		return nil
	}
	if err := g.files.saveResyncs(notes); err != nil {
		return err
	}
	g.resyncs = notes
	return nil
}

// journalBegun notes, durably, that what is captured from here on is in the journal: a
// volume that has all that was captured before may lack it.
func (g *group) journalBegun() error {
	notes := maps.Clone(g.resyncs)
	whole := false
	for v, note := range notes {
		whole = whole || note.Whole
		note.Whole = false
		notes[v] = note
	}
	if !whole {
		return nil
	}
	if err := g.files.saveResyncs(notes); err != nil {
		return fmt.Errorf("note that the journal is in use again: %w", err)
	}
	g.resyncs = notes
	return nil
}

// forgetJoined removes the notes of volumes that have not joined after all. Those
// of others stay: what was noted may be known from nothing else any more.
func (g *group) forgetJoined(joined []format.Volume) error {
	notes := maps.Clone(g.resyncs)
	for _, v := range joined {
		delete(notes, v.Index)
	}
	return g.files.saveResyncs(notes)
}

// noteResync takes what an entry says of resyncs into the progress. What an
// earlier process has cut says nothing of a resync that this one has planned:
// the plan knows it already, or is about a later change of the volume. Nor does what
// this process has cut before the resync was noted. g.mu is held.
func (g *group) noteResync(it *format.Items, mine bool) {
	said := func(v block.VolumeIndex) bool {
		if note, noted := g.resyncs[v]; noted && note.outlives(it.Range.To) {
			return false
		}
		return mine || !slices.ContainsFunc(g.volumes, func(o *volume) bool { return o.desc.Index == v && len(o.plan.resync) > 0 })
	}
	for _, v := range it.GapEnds {
		if said(v) {
			delete(g.prog.Resync, v)
			g.ended = append(g.ended, v)
		}
	}
	for _, p := range it.Partials {
		if said(p.Volume) {
			g.prog.Resync[p.Volume] = p.Remaining
		}
	}
}

// forgetResyncs removes the notes of resyncs that have ended, once the progress
// that says so is saved. g.mu is held.
func (g *group) forgetResyncs() {
	notes := maps.Clone(g.resyncs)
	for _, v := range g.ended {
		delete(notes, v)
	}
	g.ended = nil
	if len(notes) == len(g.resyncs) {
		return
	}
	if err := g.files.saveResyncs(notes); err != nil {
		g.logger.Warn("forget a resync that has ended; a restart will do it again", "error", err)
	}
	g.resyncs = notes
	g.gapMayHaveEnded()
}
