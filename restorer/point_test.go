package restorer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/restorer"
	"drc/segmenter"
)

// timeline is a history of one write an entry, at the given seconds after the
// beginning.
func timeline(t testing.TB, seconds ...int) (*world, time.Time) {
	t.Helper()
	w := newWorld(t, options{stores: 1, volumes: []int64{64 << 10}})
	begin := w.clock.now()
	x := w.start()
	for i, s := range seconds {
		w.clock.set(begin.Add(time.Duration(s-1) * time.Second)) // cut adds one
		w.write(0, int64(i)*512, bytes.Repeat([]byte{byte(i + 1)}, 512))
		w.cut()
	}
	x.stop()
	return w, begin
}

func TestResolve_Times(t *testing.T) {
	w, begin := timeline(t, 10, 20, 30, 15, 25, 100)
	h := w.history()
	at := func(s int) string { return begin.Add(time.Duration(s) * time.Second).Format(time.RFC3339Nano) }
	local := func(s int, layout string) string {
		return begin.Add(time.Duration(s) * time.Second).Local().Format(layout)
	}
	for _, c := range []struct {
		point string
		seq   block.Seq
		note  string
	}{
		{"latest", 6, ""},
		{"", 6, ""},
		{at(10), 1, ""},
		{at(12), 1, ""},
		{at(100), 6, ""},
		{at(5000), 6, ""},
		{at(20), 4, "clock was set back"}, // 15 comes after 20 and 30
		{at(26), 5, "clock was set back"},
		{at(31), 5, ""},
		{local(31, "2006-01-02 15:04:05"), 5, ""},
		{local(100, "2006-01-02 15:04:05"), 6, ""},
		{"-0s", 6, ""},
		{"-1s", 5, ""},
		{"-1m10s", 5, ""},
		{"-1m14s", 5, "clock was set back"},
		{"-88s", 1, ""},
		{"seq:3", 3, ""},
		{"seq:3@" + h.Group.Branch.String(), 3, ""},
		{"seq:3@" + h.Group.Branch.String()[:6], 3, ""},
	} {
		p, err := h.Resolve(context.Background(), "v0", c.point)
		if err != nil || p.Seq != c.seq || strings.Contains(p.Note, "set back") != (c.note != "") {
			t.Errorf("%s: seq %s, note %q, error %v; want seq %s", c.point, p.Seq, p.Note, err, c.seq)
		}
	}
	for _, c := range []struct{ point, says string }{
		{at(5), "from seq 1"},
		{"-2h30m", "from seq 1"},
		{"seq:7", "the one before is seq:6"},
		{"seq:0", "the one after is seq:1"},
		{"seq:x", "decimal"},
		{"seq:3@feedfeed", "branch"},
		{"before-the-upgrade", "checkpoint"},
		{"-15", "duration"},
	} {
		if _, err := h.Resolve(context.Background(), "v0", c.point); !errors.Is(err, restorer.ErrNoSuchPoint) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.point, err)
		}
	}
	if _, err := h.Resolve(context.Background(), "v9", "latest"); !errors.Is(err, restorer.ErrNoSuchVolume) {
		t.Error(err)
	}
	// A day alone is its beginning.
	if _, err := h.Resolve(context.Background(), "v0", local(0, "2006-01-02")); !errors.Is(err, restorer.ErrNoSuchPoint) {
		t.Error(err)
	}
	if p, err := h.Resolve(context.Background(), "v0", begin.AddDate(0, 0, 2).Local().Format("2006-01-02")); err != nil || p.Seq != 6 {
		t.Error(p, err)
	}
}

func TestResolve_Names(t *testing.T) {
	w := newWorld(t, options{stores: 1, volumes: []int64{64 << 10}})
	x := w.start()
	for i := range 9 {
		w.random(512)
		if i%3 == 1 {
			x.seg.Checkpoint(fmt.Sprintf("name %d", i), w.clock.now())
		}
		if i == 8 {
			x.seg.Checkpoint("name 1", w.clock.now())
			x.seg.Checkpoint("2026-01-02", w.clock.now())
		}
		if i%2 == 0 {
			w.cut()
		}
	}
	w.cut()
	w.cut()
	x.stop()
	h := w.history()
	for name, seq := range map[string]block.Seq{"name 4": 5, "name 7": 8, "name 1": 9, "2026-01-02": 9} {
		p, err := h.Resolve(context.Background(), "v0", name)
		if err != nil || p.Seq != seq {
			t.Errorf("%s: seq %s, %v", name, p.Seq, err)
			continue
		}
		w.checkPoint(h, "v0", name, w.model(0, seq))
	}
	if p, _ := h.Resolve(context.Background(), "v0", "name 1"); !strings.Contains(p.Note, "newest") {
		t.Error(p.Note)
	}
	v, _ := h.Volume("v0")
	if got := h.Names(v); len(got) != 5 || got[0].Name != "name 1" || got[0].Seq != 2 {
		t.Errorf("names %v", got)
	}
	w.check(h)
}

// While a volume is resynced its entries are no checkpoints of it, other
// volumes go on, and the end of the resync is one.
func TestResolve_GapsAndPartials(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 2, volumes: []int64{40 << 20, 64 << 10}})
	x := w.start()
	for range 3 {
		w.random(8 << 10)
		w.cut()
	}
	before := w.journal.Captured()
	beforeTime := w.clock.now()
	// The backing changed without DRC: its content is what a resync reads.
	backing := blocktest.NewMemory(40<<20, nil)
	foreign := fill(w.rng, make([]byte, 21<<20))
	w.must(backing.WriteAt(w.ctx, w.model(0, before), 0, block.WriteOptions{}))
	w.must(backing.WriteAt(w.ctx, foreign, 4<<20, block.WriteOptions{}))
	base, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	x.seg.AddResync(segmenter.Resync{Volume: 0, Backing: backing, Remaining: []block.Extent{{Len: 40 << 20}}, After: before,
		Begin: &format.GapBegin{Volume: 0, After: before, Reason: format.GapForeign}})
	x.seg.StartResync(0, baseline{base})
	var partialTimes []time.Time
	for range 20 {
		w.write(1, 0, fill(w.rng, make([]byte, 512)))
		w.cut()
		if x.seg.ResyncRemaining(0) == 0 {
			break
		}
		partialTimes = append(partialTimes, w.clock.now())
	}
	if len(partialTimes) == 0 {
		t.Fatal("the resync was one batch")
	}
	end := w.journal.Captured()
	w.write(1, 512, fill(w.rng, make([]byte, 512)))
	w.cut()
	x.stop()
	h := w.history()
	v0, _ := h.Volume("v0")
	v1, _ := h.Volume("v1")
	gaps := h.Gaps(v0)
	if len(gaps) != 1 || gaps[0].Open || gaps[0].After != before || gaps[0].Until != end || gaps[0].Reason != format.GapForeign {
		t.Fatalf("gaps %+v", gaps)
	}
	if a, b := len(checkpoints(t, h, v0)), len(checkpoints(t, h, v1)); a != b-len(partialTimes) {
		t.Fatalf("%d checkpoints of v0, %d of v1, %d partial", a, b, len(partialTimes))
	}
	p, err := h.Resolve(context.Background(), "v0", partialTimes[0].Format(time.RFC3339Nano))
	if err != nil || p.Seq != before || !strings.Contains(p.Note, "gap") {
		t.Fatalf("in the gap: %+v, %v", p, err)
	}
	if p, err = h.Resolve(context.Background(), "v0", beforeTime.Format(time.RFC3339Nano)); err != nil || p.Seq != before || p.Note != "" {
		t.Fatalf("before the gap: %+v, %v", p, err)
	}
	if _, err = h.Resolve(context.Background(), "v0", "seq:"+(before+1).String()); !errors.Is(err, restorer.ErrNoSuchPoint) || !strings.Contains(err.Error(), "gap") {
		t.Fatal(err)
	}
	if p, err = h.Resolve(context.Background(), "v1", "seq:"+(before+1).String()); err != nil || p.Note != "" {
		t.Fatal(p, err)
	}
	want := make([]byte, 40<<20)
	w.must(backing.ReadAt(w.ctx, want, 0))
	w.checkPoint(h, "v0", "seq:"+end.String(), want)
	w.checkPoint(h, "v0", "latest", want)
	w.checkPoint(h, "v1", "latest", w.model(1, w.journal.Captured()))
}

// baseline is what a resync compares with.
type baseline struct{ im *restorer.Image }

func (b baseline) Extents(ctx context.Context, _ block.VolumeIndex, e block.Extent) ([]manifest.Extent, error) {
	return b.im.Extents(ctx, e)
}
