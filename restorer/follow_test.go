package restorer_test

import (
	"errors"
	"reflect"
	"testing"

	"drc/internal/format"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/restorer"
)

// follow follows the history of the world's group, from the stores given.
func (w *world) follow(stores ...object.Store) *restorer.Follower {
	w.t.Helper()
	f, err := restorer.Follow(w.ctx, w.config(stores...), w.groupID)
	w.must(err)
	return f
}

// A history that is followed says what one says that is opened then, over restarts of
// the writer, digests, gaps and names; a poll that finds nothing costs one request.
func TestFollower_SaysWhatAnOpenedHistorySays(t *testing.T) {
	t.Parallel()
	for _, stores := range []int{1, 3} {
		w := newWorld(t, options{stores: stores, volumes: []int64{256 << 10, 64 << 10}, digests: true})
		x := w.start()
		w.random(2 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		f := w.follow()
		for i := range 150 {
			for range w.rng.IntN(4) {
				w.random(2 << 10)
				w.cut()
			}
			switch w.rng.IntN(12) {
			case 0:
				x.seg.Checkpoint("a name", w.clock.now())
				w.random(2 << 10)
				w.cut()
			case 1:
				w.settle(x)
				x.stop()
				x = w.start()
				w.random(2 << 10) // what was logged before, the new writer does not count
				w.cut()
			case 2:
				w.resync(x)
			}
			if w.rng.IntN(2) == 0 {
				w.must(x.up.AwaitIdle(w.ctx))
			}
			n := f.History().N()
			news, err := f.Poll(w.ctx)
			w.must(err)
			if news != (f.History().N() > n) {
				t.Fatalf("poll says %v, and the history had %d entries and has %d", news, n, f.History().N())
			}
			if h := f.History(); h.N() != h.Decided {
				t.Fatalf("%d entries, of which %d are decided", h.N(), h.Decided)
			}
			if i%10 == 0 {
				w.settle(x)
				for range stores + 1 {
					_, err = f.Poll(w.ctx)
					w.must(err)
				}
				points := []string{"latest", "a name", "-3s"}
				if a, b := w.factsOf(f.History(), points), w.factsOf(w.history(), points); !reflect.DeepEqual(a, b) {
					t.Fatalf("followed\n%+v\nopened\n%+v", a, b)
				}
			}
		}
		w.settle(x)
		x.stop()
		for range stores + 1 {
			_, err := f.Poll(w.ctx)
			w.must(err)
		}
		before := f.Requests()
		for range 10 {
			if news, err := f.Poll(w.ctx); news || err != nil {
				t.Fatal(news, err)
			}
		}
		if n := f.Requests() - before; n != 10 {
			t.Errorf("10 polls that found nothing cost %d requests", n)
		}
	}
}

// Stores that are away, and what they bring when they are back, do not stop who
// follows, and nothing that is not decided is ever said.
func TestFollower_StoresAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 3, digests: true})
	x := w.start()
	w.random(2 << 10)
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	var all []object.Store
	var faults []*fault.Store
	for _, s := range w.stores {
		fs := fault.New(s)
		faults, all = append(faults, fs), append(all, fs)
	}
	f := w.follow(all...)
	back := faults[1].Add(fault.Rule{Before: fault.ErrInjected})
	for range 20 {
		w.random(2 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		for range 3 {
			if _, err := f.Poll(w.ctx); err != nil {
				t.Fatal(err)
			}
		}
		if next, _, _ := x.log.Next(); f.History().N() != next-1 {
			t.Fatalf("%d entries are decided, and %d are known", next-1, f.History().N())
		}
	}
	back()
	x.stop()
}

// A log of which decided entries are gone is not followed, and said so.
func TestFollower_RolledBackStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1})
	x := w.start()
	for range 5 {
		w.random(2 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
	}
	f := w.follow()
	n := f.History().N()
	logs := names(t, w.stores[0], format.LogPrefix(w.groupID))
	for range 2 {
		w.random(2 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
	}
	// The first object behind what is known is lost: nothing is new then, until the
	// log is listed.
	w.must(w.stores[0].Delete(w.ctx, format.LogName(w.groupID, uint64(len(logs)))))
	if news, err := f.Poll(w.ctx); news || err != nil {
		t.Fatal(news, err)
	}
	f.ListNow()
	var corrupt *format.CorruptError
	if news, err := f.Poll(w.ctx); news || !errors.As(err, &corrupt) || f.History().N() != n {
		t.Fatalf("%v, %v", news, err)
	}
	x.stop()
}
