package capture

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"drc/internal/block"
)

// instantJournal has everything durable at once and keeps nothing.
type instantJournal struct {
	Journal
	mu   sync.Mutex
	last block.Seq
}

func (j *instantJournal) Reserve(context.Context, int64) error { return nil }
func (j *instantJournal) Divert(error)                         {}
func (j *instantJournal) Read(block.Seq, int64, func(block.Write) error) (block.Seq, error) {
	return 0, errors.New("it keeps nothing")
}
func (j *instantJournal) Unreserve(int64)                              {}
func (j *instantJournal) WaitWritten(context.Context, block.Seq) error { return nil }
func (j *instantJournal) Flush(context.Context) error                  { return nil }

func (j *instantJournal) Enqueue(w block.Write) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last = w.Seq
}

func (j *instantJournal) Durable() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.last
}

// TestSettle_TrustsNoSyncAfterOneThatFailed has the backing's sync fail once.
// The system tells of a lost write only once, so neither a later Settle nor
// Close may call it applied.
func TestSettle_TrustsNoSyncAfterOneThatFailed(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	b, _, err := OpenBacking(filepath.Join(dir, "v"), BackingOptions{CreateBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(NewGroup(&instantJournal{}, 0, nil), Options{Name: "v", Backing: b, SectorSize: 512, RecordDir: dir}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.WriteAt(ctx, make([]byte, 4096), 0, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, worked, err := v.Step(0); err != nil || !worked {
		t.Fatalf("worked %v: %v", worked, err)
	}
	pr, pw, err := os.Pipe() // which cannot be synced
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	defer pw.Close()
	good := b.disk.(*kernelDisk).f
	b.disk.(*kernelDisk).f = pw
	err = v.Settle(ctx)
	b.disk.(*kernelDisk).f = good
	if err == nil {
		t.Fatal("settled without a sync")
	}
	if err := v.Settle(ctx); err == nil {
		t.Error("a later sync was trusted")
	}
	if err := v.Close(ctx); err == nil {
		t.Error("closed as if all were well")
	}
	r, err := ReadRecord(dir, b.path)
	if err != nil || r.Clean || r.Applied != 0 {
		t.Errorf("the record says %+v (%v), want not clean, applied 0", r, err)
	}
}

// TestAllocation_ZeroesThatKeepTheirSpaceAreNoHole asks before they are applied.
func TestAllocation_ZeroesThatKeepTheirSpaceAreNoHole(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	b, _, err := OpenBacking(filepath.Join(dir, "v"), BackingOptions{CreateBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(NewGroup(&instantJournal{}, 0, nil), Options{Name: "v", Backing: b, SectorSize: 512, RecordDir: dir}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Abandon()
	e := block.Extent{Len: 65536}
	for _, noHole := range []bool{true, false} {
		if err := v.Zero(ctx, e, block.ZeroOptions{NoHole: noHole}); err != nil {
			t.Fatal(err)
		}
		if err := v.Allocation(ctx, e, func(p block.Extent, hole bool) bool {
			if hole == noHole {
				t.Errorf("zeroes with NoHole %v: %s is called a hole: %v", noHole, p, hole)
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// countingMarks only count.
type countingMarks struct{ n int }

func (m *countingMarks) Add(block.VolumeIndex, block.Extent) {}
func (m *countingMarks) Activate(time.Time) error            { return nil }
func (m *countingMarks) Deactivate() error                   { return nil }
func (m *countingMarks) Mark(context.Context, block.VolumeIndex, block.Extent) error {
	m.n++
	return nil
}

// TestDivert_FlushIsASyncOfTheBacking: past the journal a flush syncs what was
// written since the last one, a FUA write is synced, and after a sync that has
// failed nothing is called durable any more.
func TestDivert_FlushIsASyncOfTheBacking(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	b, _, err := OpenBacking(filepath.Join(dir, "v"), BackingOptions{CreateBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	syncs, fails := 0, error(nil)
	sysOf(b).fsync = func(fd int) error {
		syncs++
		if fails != nil {
			return fails
		}
		return kernel.fsync(fd)
	}
	g := NewGroup(&instantJournal{}, 0, nil)
	v, err := New(g, Options{Name: "v", Backing: b, SectorSize: 512, RecordDir: dir}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Abandon()
	marks := &countingMarks{}
	if _, err := g.Divert(ctx, marks, 0); err != nil {
		t.Fatal(err)
	}
	step := func(what string, want int, do func() error) {
		t.Helper()
		before := syncs
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if syncs-before != want {
			t.Errorf("%s: %d syncs, want %d", what, syncs-before, want)
		}
	}
	p := make([]byte, 512)
	step("a write", 0, func() error { return v.WriteAt(ctx, p, 0, block.WriteOptions{}) })
	step("a flush", 1, func() error { return v.Flush(ctx) })
	step("a flush of nothing", 0, func() error { return v.Flush(ctx) })
	step("a write with FUA", 1, func() error { return v.WriteAt(ctx, p, 0, block.WriteOptions{FUA: true}) })
	step("a zero", 0, func() error { return v.Zero(ctx, block.Extent{Len: 512}, block.ZeroOptions{}) })
	fails = errors.New("the disk is dying")
	if err := v.Flush(ctx); !errors.Is(err, fails) {
		t.Errorf("flushed: %v", err)
	}
	fails = nil
	if err := v.Flush(ctx); err == nil {
		t.Error("a sync after one that failed was trusted")
	}
	if err := v.WriteAt(ctx, p, 0, block.WriteOptions{}); err == nil {
		t.Error("a write to a backing whose sync has failed was taken")
	}
	if marks.n != 3 {
		t.Errorf("%d marks for 3 writes", marks.n)
	}
}

// oneWrite is a journal of one write.
type oneWrite struct{ instantJournal }

func (j *oneWrite) Read(_ block.Seq, _ int64, visit func(block.Write) error) (block.Seq, error) {
	w := block.Write{Seq: 1, Kind: block.KindData, Extent: block.Extent{Len: 512}, Data: make([]byte, 512)}
	if err := visit(w); err != nil {
		return 1, err
	}
	return 2, nil
}

// TestReplay_TheLastWriteFails: that the very last write cannot be applied is no
// end of the journal.
func TestReplay_TheLastWriteFails(t *testing.T) {
	b, _, err := OpenBacking(filepath.Join(t.TempDir(), "v"), BackingOptions{CreateBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	path := b.path
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if b, _, err = OpenBacking(path, BackingOptions{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if applied, err := Replay(b, 0, &oneWrite{}, 0, 1); err == nil || applied != 0 {
		t.Errorf("replayed onto what cannot be written: applied %s, %v", applied, err)
	}
}
