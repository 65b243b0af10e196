package pipeline

import (
	"log/slog"
	"slices"
	"testing"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/state"
	"drc/internal/vfs"
)

// A gap was about to end when all of the buffer was lost, and it is noted that the
// volumes must be compared in full. What was cut before that reaches the log after it:
// it says that the gap has ended, or how little is left to be read. That is so, and
// says nothing of what must be compared now.
func TestResyncs_WhatWasCutBeforeTheNote(t *testing.T) {
	whole := []block.Extent{{Len: 1 << 20}}
	before := []format.Items{
		{Range: &format.Range{From: 41, To: 50}, GapEnds: []block.VolumeIndex{0}},
		{Range: &format.Range{From: 41, To: 50}, Partials: []format.Partial{{Volume: 0, Remaining: []block.Extent{{Len: 512}}}}},
	}
	for _, it := range before {
		dir, err := state.OpenOn(vfs.NewMem(), "/state")
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		notes := resyncNotes{0: {N: 7, Remaining: whole, Dropped: 50, Cut: 50, Whole: true}}
		g := &group{files: groupFiles{dir, block.GroupID{1}}, prog: newProgress(), resyncs: notes, logger: slog.New(slog.DiscardHandler)}
		g.prog.N = 8
		g.noteResync(&it, true)
		g.forgetResyncs()
		after := &it
		if r, open := openResync(0, g.resyncs, g.prog, nil); !open || !r.Whole || !slices.Equal(r.Remaining, whole) {
			t.Errorf("after %+v was logged: %+v, open %v", it, r, open)
		}
		// The old disks are back after a reboot, with the batch.
		waits := []*batch.Batch{{From: 41, To: 50, Items: *after}}
		if r, open := openResync(0, g.resyncs, g.prog, waits); !open || !slices.Equal(r.Remaining, whole) {
			t.Errorf("with %+v in the buffer: %+v, open %v", it, r, open)
		}
		// What ends the resync that is noted does end it.
		g.noteResync(&format.Items{Range: &format.Range{From: 51, To: 51}, GapEnds: []block.VolumeIndex{0}}, true)
		g.forgetResyncs()
		if len(g.resyncs) != 0 {
			t.Errorf("the resync has ended, and is noted: %+v", g.resyncs)
		}
	}
}

// An initial sync ends with a batch of no seq. The note of it ends with it: a later
// resync would begin under its name.
func TestResyncs_AnInitialSyncEndsAtSeqZero(t *testing.T) {
	dir, err := state.OpenOn(vfs.NewMem(), "/state")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	notes := resyncNotes{0: {Remaining: []block.Extent{{Len: 1 << 20}}, Reason: format.GapInitialSync}}
	g := &group{files: groupFiles{dir, block.GroupID{1}}, prog: newProgress(), resyncs: notes, logger: slog.New(slog.DiscardHandler)}
	end := format.Items{Range: &format.Range{}, GapBegins: []format.GapBegin{{Reason: format.GapInitialSync}}, GapEnds: []block.VolumeIndex{0}}
	if _, open := openResync(0, g.resyncs, g.prog, []*batch.Batch{{Items: end}}); open {
		t.Error("its end waits in the buffer, and a start would go on with it")
	}
	g.noteResync(&end, true)
	g.forgetResyncs()
	if len(g.resyncs) != 0 {
		t.Errorf("it has ended, and is noted: %+v", g.resyncs)
	}
}
