package segmenter_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/segmenter"
)

// holed is a journal that has lost its writes up to gone.
type holed struct {
	*journal
	gone block.Seq
}

func (h *holed) Read(from, upTo block.Seq, limit int64, visit func(block.Write) error) (block.Seq, error) {
	if from <= h.gone {
		return from, errors.New("the journal does not hold it any more")
	}
	return h.journal.Read(from, upTo, limit, visit)
}

// TestDrop_AGapThenAResync: writes that never reach a batch, and some that have
// no Seq at all, become a gap, a resync of their regions, and one checkpoint.
func TestDrop_AGapThenAResync(t *testing.T) {
	const size = 1 << 20
	j, out := &holed{journal: &journal{}}, &batches{}
	s := segmenter.New(config(0), j, out, nothing{})
	d := &disk{content: make([]byte, size), at: -1}
	write := func(seed uint64, off int64) {
		p := data(seed, 64<<10)
		copy(d.content[off:], p)
		j.add(0, off, p)
	}
	write(1, 0)
	write(2, 64<<10)
	for step(t, s) {
	}
	before := bytes.Clone(d.content)
	write(3, 128<<10)
	write(4, 0)
	name := s.Checkpoint("lost", time.Unix(1, 0))
	s.Suspend()
	if !s.IsQuiet() || step(t, s) {
		t.Fatal("it goes on although it is suspended")
	}
	copy(d.content[512<<10:], data(5, 64<<10)) // past the journal
	j.gone = j.Captured()
	names := s.Drop(j.gone)
	if len(names) != 1 || names[0].Name != "lost" || names[0].Seq != name {
		t.Errorf("names that cannot be given: %+v", names)
	}
	s.ResyncAgain(0, d, []block.Extent{{Off: 0, Len: 192 << 10}}, format.GapBuffer)
	s.ResyncAgain(0, d, []block.Extent{{Off: 512 << 10, Len: 64 << 10}}, format.GapBuffer)
	j.add(0, size-512, make([]byte, 512)) // the state gets a Seq of its own
	s.Resume()
	if !step(t, s) { // the journal alone: the baseline is not there yet
		t.Fatal("the write behind the gap was not cut")
	}
	b := out.all[len(out.all)-1]
	if b.From != 3 || b.To != 5 || len(b.Items.GapBegins) != 1 || b.Items.GapBegins[0].After != 2 || len(b.Items.Partials) != 1 {
		t.Errorf("behind the gap: seqs %d to %d, %+v", b.From, b.To, b.Items)
	}
	image := make([]byte, size)
	replay(t, out.all[:len(out.all)-1], image)
	if !bytes.Equal(image, before) {
		t.Error("what was cut before the gap is not as it was")
	}
	s.StartResync(0, known(nil))
	for step(t, s) {
	}
	b = out.all[len(out.all)-1]
	if len(b.Items.Partials) != 0 || !slices.Equal(b.Items.GapEnds, []block.VolumeIndex{0}) {
		t.Errorf("at the end: %+v", b.Items)
	}
	replay(t, out.all, image)
	if !bytes.Equal(image, d.content) {
		t.Error("what was resynced is not what the volume holds")
	}
}

// TestDrop_WhatWasToBeHistoryBeforeAResync: a resync is to begin behind writes that
// are in the journal, and these are dropped. The gap begins in front of them then: no
// entry that lacks them is a checkpoint.
func TestDrop_WhatWasToBeHistoryBeforeAResync(t *testing.T) {
	const size = 1 << 20
	j, out := &holed{journal: &journal{}}, &batches{}
	s := segmenter.New(config(0), j, out, nothing{})
	d := &disk{content: make([]byte, size), at: -1}
	write := func(seed uint64, off int64) {
		p := data(seed, 64<<10)
		copy(d.content[off:], p)
		j.add(0, off, p)
	}
	write(1, 0)
	write(2, 64<<10)
	for step(t, s) {
	}
	write(3, 128<<10)
	write(4, 0)
	s.AddResync(segmenter.Resync{Volume: 0, Backing: d, Remaining: []block.Extent{{Off: 512 << 10, Len: 64 << 10}}, After: 4,
		Begin: &format.GapBegin{After: 4, Reason: format.GapForeign}})
	s.Suspend()
	j.gone = j.Captured()
	s.Drop(j.gone)
	s.ResyncAgain(0, d, []block.Extent{{Off: 0, Len: 192 << 10}}, format.GapBuffer)
	j.add(0, size-512, make([]byte, 512))
	s.Resume()
	step(t, s)
	b := out.all[len(out.all)-1]
	if b.From != 3 || b.To != 5 || !slices.Equal(b.Items.GapBegins, []format.GapBegin{{After: 2, Reason: format.GapForeign}}) || len(b.Items.Partials) != 1 {
		t.Errorf("behind the gap: seqs %d to %d, %+v", b.From, b.To, b.Items)
	}
	s.StartResync(0, known(nil))
	for step(t, s) {
	}
	image := make([]byte, size)
	replay(t, out.all, image)
	if !bytes.Equal(image, d.content) {
		t.Error("what was resynced is not what the volume holds")
	}
}

// TestSuspend_WhileRegionsAreRead: regions that were read when writes began to go
// past the journal are in no batch, for they may show what has no Seq.
func TestSuspend_WhileRegionsAreRead(t *testing.T) {
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 0)
	d := &disk{content: data(1, 1<<20)}
	d.change = func() { s.Suspend() }
	s.AddResync(segmenter.Resync{Volume: 0, Backing: d, Remaining: []block.Extent{{Len: 1 << 20}}, Begin: &format.GapBegin{Reason: format.GapInitialSync}})
	s.StartResync(0, known(nil))
	j.add(0, 0, data(2, 512))
	step(t, s)
	for _, b := range out.all {
		if len(b.Items.GapEnds) > 0 || len(b.Items.Partials) != 1 || b.Items.Partials[0].Remaining[0].Len != 1<<20 {
			t.Errorf("a batch says %+v", b.Items)
		}
	}
	if s.ResyncRemaining(0) != 1<<20 || !s.IsQuiet() {
		t.Errorf("%d bytes remain, quiet %v", s.ResyncRemaining(0), s.IsQuiet())
	}
}

func TestUnion(t *testing.T) {
	e := func(pairs ...int64) (out []block.Extent) {
		for i := 0; i < len(pairs); i += 2 {
			out = append(out, block.Extent{Off: pairs[i], Len: pairs[i+1]})
		}
		return out
	}
	for _, c := range []struct{ a, b, want []block.Extent }{
		{nil, nil, nil},
		{e(0, 10), nil, e(0, 10)},
		{e(0, 10, 20, 10), e(10, 10), e(0, 30)},
		{e(0, 100), e(5, 5, 200, 1), e(0, 100, 200, 1)},
		{e(50, 10), e(0, 10, 55, 20), e(0, 10, 50, 25)},
	} {
		if got := segmenter.Union(c.a, c.b); !slices.Equal(got, c.want) {
			t.Errorf("%v and %v: %v, want %v", c.a, c.b, got, c.want)
		}
	}
}
