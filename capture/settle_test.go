package capture

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"drc/internal/block"
)

// instantJournal has everything durable at once and keeps nothing.
type instantJournal struct {
	Journal
	mu   sync.Mutex
	last block.Seq
}

func (j *instantJournal) Reserve(context.Context, int64) error         { return nil }
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
	good := b.f
	b.f = pw
	err = v.Settle(ctx)
	b.f = good
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
