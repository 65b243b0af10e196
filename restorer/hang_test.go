package restorer_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/restorer"
)

// manySegments makes a history of n segments of data and some small entries.
func manySegments(t *testing.T, stores, n int) (*world, []byte) {
	t.Helper()
	w := forked(t, fmt.Sprint("many segments ", stores, n), func() *world {
		w := newWorld(t, options{stores: stores, volumes: []int64{int64(n) << 20}})
		x := w.start()
		for i := range int64(n) {
			w.write(0, i<<20, fill(w.rng, make([]byte, 700<<10)))
			w.cut()
			w.write(0, i<<20+512, fill(w.rng, make([]byte, 512)))
			w.cut()
		}
		x.stop()
		return w
	})
	return w, w.model(0, w.journal.Captured())
}

// hang makes a store answer nothing any more. With deaf it does not even heed
// that it is no longer asked, as a folder on a server that is gone.
func hang(f *fault.Store, deaf bool) (release func()) {
	never := make(chan struct{})
	if deaf {
		f.Add(fault.Rule{Hook: func(context.Context, fault.Call) error { <-never; return nil }})
	} else {
		f.Add(fault.Rule{Block: never})
	}
	return func() { close(never) }
}

// A store that stops to answer, at whatever moment, holds a restore up for some
// seconds, and not for ever, nor for those seconds at each request.
func TestHang_OneStoreOfSeveral(t *testing.T) {
	t.Parallel()
	for _, stores := range []int{2, 3} {
		for _, deaf := range []bool{false, true} {
			for _, when := range []string{"before the history", "before the image", "in the restore"} {
				t.Run(fmt.Sprint(stores, " stores, deaf ", deaf, ", ", when), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						w, want := manySegments(t, stores, 6)
						cfg := w.config()
						f := w.faults[stores-1]
						began := time.Now()
						release := func() {}
						if when == "before the history" {
							release = hang(f, deaf)
						}
						h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
						w.must(err)
						if when == "before the image" {
							release = hang(f, deaf)
						}
						im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
						w.must(err)
						if when == "in the restore" {
							f.Add(fault.Rule{Op: fault.GetRange, Skip: 5, Block: t.Context().Done()})
						}
						name := filepath.Join(t.TempDir(), "volume")
						_, err = restorer.Restore(w.ctx, im, name, restorer.Options{})
						w.must(err)
						w.sameFile(name, want)
						if d := time.Since(began); d > time.Minute {
							t.Errorf("it took %s", d)
						}
						release()
						f.Clear()
						synctest.Wait()
					})
				})
			}
		}
	}
}

// Where no other store has what the one that hangs has, the restore ends with
// an error that names it.
func TestHang_OnlyStore(t *testing.T) {
	t.Parallel()
	for _, deaf := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, _ := manySegments(t, 1, 6)
			im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
			w.must(err)
			release := hang(w.faults[0], deaf)
			name := filepath.Join(t.TempDir(), "volume")
			began := time.Now()
			_, err = restorer.Restore(w.ctx, im, name, restorer.Options{})
			if err == nil || !strings.Contains(err.Error(), w.stores[0].URL()) {
				t.Errorf("%v", err)
			}
			if d := time.Since(began); d > 10*time.Minute {
				t.Errorf("it took %s", d)
			}
			release()
			synctest.Wait()
		})
	}
}

// Where one request to each store is stuck, all for the same object, one is made
// again: the stores answer others.
func TestHedge_OneRequestToEachStoreIsStuck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := everyKind(t, 3)
		want := w.model(0, block.Seq(len(w.journal.writes)))
		h := w.history()
		var mu sync.Mutex
		first, stuck := fault.Call{}, 0
		for _, f := range w.faults {
			asked := false
			f.Add(fault.Rule{Op: fault.GetRange, Name: "*/manifests/*", Hook: func(ctx context.Context, c fault.Call) error {
				mu.Lock()
				if first.Name == "" {
					first = c
				}
				mine := c.Name == first.Name && c.Off == first.Off && !asked
				if mine {
					asked = true
					stuck++
				}
				mu.Unlock()
				if mine {
					<-ctx.Done()
				}
				return ctx.Err()
			}})
		}
		began := time.Now()
		w.checkPoint(h, "v0", "latest", want)
		if d := time.Since(began); d > 15*time.Second {
			t.Errorf("it took %s", d)
		}
		if stuck != 3 {
			t.Errorf("%d requests were stuck", stuck)
		}
	})
}

// A single request that is stuck is made again, also where there is one store.
func TestHedge_StuckRequest(t *testing.T) {
	t.Parallel()
	for _, stores := range []int{1, 3} {
		for _, pattern := range []string{"*/segments/*", "*/manifests/*"} {
			synctest.Test(t, func(t *testing.T) {
				w := everyKind(t, stores)
				want := w.model(0, block.Seq(len(w.journal.writes)))
				h := w.history()
				im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
				w.must(err)
				var asked atomic.Int64
				for _, f := range w.faults { // whichever is asked first
					f.Add(fault.Rule{Op: fault.GetRange, Name: pattern, Hook: func(ctx context.Context, _ fault.Call) error {
						if asked.Add(1) == 1 {
							<-ctx.Done()
						}
						return ctx.Err()
					}})
				}
				began := time.Now()
				got := make([]byte, len(want))
				w.must(im.ReadAt(w.ctx, got, 0))
				w.same(pattern, got, want)
				if d := time.Since(began); d > 15*time.Second {
					t.Errorf("%d stores, %s: it took %s", stores, pattern, d)
				}
				if len(h.Damage()) != 0 {
					t.Errorf("damage: %v", h.Damage())
				}
				if asked.Load() < 2 {
					t.Errorf("%d stores, %s: no request was stuck", stores, pattern)
				}
			})
		}
	}
}

// Stores that become slow for everyone do not get much more to do for it.
func TestHedge_IsBounded(t *testing.T) {
	t.Parallel()
	requests := func(slow time.Duration) (n int) {
		synctest.Test(t, func(t *testing.T) {
			w, want := manySegments(t, 1, 32)
			im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
			w.must(err)
			w.faults[0].Forget()
			w.faults[0].Add(fault.Rule{Op: fault.GetRange, Skip: 20, Delay: slow})
			got := make([]byte, len(want))
			for off := 0; off < len(want); off += 4 << 20 {
				w.must(im.ReadAt(w.ctx, got[off:off+4<<20], int64(off)))
			}
			w.same("read", got, want)
			n = w.faults[0].Count(fault.GetRange, "*/segments/*")
		})
		return n
	}
	quick, slow := requests(0), requests(15*time.Second)
	if slow > quick+quick/10+10 {
		t.Errorf("%d requests of slow stores, %d of quick ones", slow, quick)
	}
	if slow == quick {
		t.Errorf("no request was made twice")
	}
}

// What a lost shard held is rebuilt from the same range of the others: a
// restore fetches about as much as with all stores, and a small read little.
func TestRebuild_FetchesOnlyWhatItNeeds(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 3, volumes: []int64{16 << 20}})
	x := w.start()
	for i := range int64(4) {
		w.write(0, i*4<<20, fill(w.rng, make([]byte, 4<<20)))
		w.cut()
	}
	x.stop()
	want := w.model(0, w.journal.Captured())
	for lost := range 3 {
		var given []object.Store
		for i, f := range w.faults {
			if i != lost {
				given = append(given, f)
			}
		}
		im, err := restorer.OpenImage(w.ctx, w.history(given...), "v0", "latest")
		w.must(err)
		name := filepath.Join(t.TempDir(), "volume")
		sum, err := restorer.Restore(w.ctx, im, name, restorer.Options{})
		w.must(err)
		w.sameFile(name, want)
		if most := int64(len(want)) * 21 / 20; sum.FetchedBytes > most {
			t.Errorf("store %d lost: %d bytes fetched for %d", lost, sum.FetchedBytes, len(want))
		}
		h := w.history(given...)
		im, err = restorer.OpenImage(w.ctx, h, "v0", "latest")
		w.must(err)
		w.must(im.ReadAt(w.ctx, make([]byte, 512), 0)) // the index, pages
		for off := int64(256 << 10); off < 4<<20; off += 512 << 10 {
			for _, f := range w.faults {
				f.Forget()
			}
			got := make([]byte, 512)
			w.must(im.ReadAt(w.ctx, got, off))
			w.same("a small read", got, want[off:off+512])
			read := int64(0)
			for _, f := range w.faults {
				for _, c := range f.Calls() {
					read += c.Size
					if c.Op == fault.Get {
						t.Errorf("%s is read whole", c.Name)
					}
				}
			}
			if read > 2<<20 {
				t.Errorf("store %d lost: %d bytes read for 512 at %d", lost, read, off)
			}
		}
	}
}
