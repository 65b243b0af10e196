package restorer_test

import (
	"context"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/restorer"
)

func lastMiB(size int) block.Extent { return block.Extent{Off: int64(size) - 1<<20, Len: 1 << 20} }

// However much is restored at a time and however slow the stores are, what is
// in memory is bounded; with a store lost, too.
func TestRestore_MemoryIsBounded(t *testing.T) {
	const volume, bound = 128 << 20, 96 << 20
	w := newWorld(t, options{stores: 3, volumes: []int64{volume}})
	x := w.start()
	for off := int64(0); off < volume; off += 16 << 20 {
		w.write(0, off, fill(w.rng, make([]byte, 16<<20)))
		w.cut()
	}
	x.stop()
	for i := range w.journal.writes {
		w.journal.writes[i].Data = nil // 192 MiB that nobody needs any more
	}
	var mu sync.Mutex
	calls, most := 0, uint64(0)
	live := func() uint64 {
		least := ^uint64(0)
		for range 3 { // what others make and drop between the two calls is not live
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			least = min(least, m.HeapAlloc)
		}
		return least
	}
	for _, f := range w.faults {
		f.Add(fault.Rule{Op: fault.GetRange, Name: "*/segments/*", Hook: func(context.Context, fault.Call) error {
			time.Sleep(20 * time.Millisecond) // until all that may be under way is
			mu.Lock()
			defer mu.Unlock()
			if calls++; calls%8 == 0 {
				most = max(most, live())
			}
			return nil
		}})
	}
	for _, given := range [][]object.Store{w.given(0, 1, 2), w.given(0, 2)} {
		im, err := restorer.OpenImage(w.ctx, w.history(given...), "v0", "latest")
		w.must(err)
		before := live()
		most = 0
		_, err = restorer.Restore(w.ctx, im, filepath.Join(t.TempDir(), "volume"), restorer.Options{Concurrency: 64})
		w.must(err)
		t.Logf("%d stores: %d MiB", len(given), (most-before)>>20)
		if most > before+bound {
			t.Errorf("%d stores: %d MiB are in memory", len(given), (most-before)>>20)
		}
	}
}
