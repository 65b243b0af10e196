package uploader_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/restorer"
	"drc/uploader"
)

// merged lists the merged manifests of a store.
func (w *world) merged(s object.Store) (out []format.ManifestName) {
	w.t.Helper()
	for info, err := range s.List(w.ctx, format.ManifestPrefix(w.groupID, w.group.Branch), "") {
		w.must(err)
		if m, ok := format.ParseManifestName(w.groupID, info.Name); ok && m.From < m.To {
			out = append(out, m)
		}
	}
	return out
}

// covers is how many manifests cover entries 1 to n.
func (w *world) covers(n uint64) int {
	best := map[uint64]uint64{}
	for _, m := range w.merged(w.stores[0]) {
		if m.To <= n {
			best[m.From] = max(best[m.From], m.To)
		}
	}
	count := 0
	for at := uint64(1); at <= n; at++ {
		at = max(at, best[at])
		count++
	}
	return count
}

// plain makes a history of n entries of which nothing is merged.
func (w *world) plain(n int) {
	w.t.Helper()
	w.noMerge = true
	x := w.start()
	w.batches(n)
	x.stop()
	w.noMerge = false
}

// unmerge takes the merged manifests from the stores.
func (w *world) unmerge() {
	for _, s := range w.stores {
		for _, m := range w.merged(s) {
			w.must(s.Delete(w.ctx, m.Name(w.groupID)))
		}
	}
}

// cutNamed makes a batch that ends in a named checkpoint.
func (w *world) cutNamed(name string) {
	w.w.seg.Checkpoint(name, w.clock.now())
	w.cut()
}

// checkBorders fails if a manifest that is no base crosses a named checkpoint.
func (w *world) checkBorders() {
	w.t.Helper()
	for _, m := range w.merged(w.stores[0]) {
		for n := m.From; n < m.To; n++ {
			if x := w.entries.m[n]; x.named && m.From != 1 {
				w.t.Fatalf("entries %d to %d are merged across the named checkpoint at entry %d", m.From, m.To, n)
			}
		}
	}
}

// Every checkpoint is what the volumes were, with the merged manifests and
// without them, whatever happened: restarts, kills, names, hosts that forget,
// starts that do not merge.
func TestMerge_EveryCheckpointIsItsPrefix(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, options{
			stores: rapid.IntRange(1, 3).Draw(t, "stores"), volumes: []int64{128 << 10, 64 << 10},
			seed: rapid.Uint64Min(1).Draw(t, "seed"),
		})
		x := w.start()
		entries := rapid.SampledFrom([]int{12, 20, 30, 40, 70}).Draw(t, "entries")
		for i := range entries {
			w.random(8 << 10)
			switch rapid.IntRange(0, 40).Draw(t, "event") {
			case 0:
				w.cut()
				x.stop()
				if rapid.Bool().Draw(t, "forget") {
					w.entries.forget(1, rapid.Uint64Range(0, uint64(i)).Draw(t, "forgotten"))
				}
				w.noMerge = rapid.IntRange(0, 3).Draw(t, "merging") == 0
				x = w.start()
			case 1:
				w.cut()
				w.must(x.up.AwaitIdle(w.ctx)) // nothing is lost; a merge may be cut short
				x.kill()
				x = w.start()
			case 2, 3:
				w.cutNamed(fmt.Sprint("name ", i))
			case 4:
				w.cut()
				x.merged()
			default:
				w.cut()
			}
		}
		x.stop()
		w.checkBorders()
		h := w.history()
		known := content{}
		w.checkKnowing(h, known)
		// An image asks the stores which manifests are merged when it is opened.
		w.unmerge()
		w.checkKnowing(h, known)
	})
}

// The first history of its group has as few manifests as the sizes allow, and
// the image is opened by way of them.
func TestMerge_ManyEntriesFewManifests(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{volumes: []int64{1 << 20}})
	x := w.start()
	const entries = 600
	for range entries {
		w.write(0, 4096*w.rng.Int64N(256), []byte(strings.Repeat(string(rune('a'+w.rng.IntN(26))), 4096)))
		w.cut()
	}
	x.stop()
	if n := w.covers(entries); n > 10 {
		t.Errorf("%d manifests cover %d entries: %+v", n, entries, x.up.MergeStats())
	}
	w.faults[0].Forget()
	h := w.history()
	w.faults[0].Forget()
	w.checkPoint(h, "v0", "latest", w.model(0, entries))
	if n := w.faults[0].Count(fault.GetRange, "*/manifests/*"); n > 30 {
		t.Errorf("%d reads of manifests for one image", n)
	}
}

// Nothing is asked of the stores once all is merged.
func TestMerge_IdleCostsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 2})
		x := w.start()
		w.batches(70)
		x.merged()
		synctest.Wait()
		for _, f := range w.faults {
			f.Forget()
		}
		time.Sleep(24 * time.Hour) // of the bubble's time
		synctest.Wait()
		for _, f := range w.faults {
			if calls := f.Calls(); len(calls) != 0 {
				t.Errorf("%d calls in an idle day, the first %+v", len(calls), calls[0])
			}
		}
		x.kill()
	})
}

// A restart finds what there is with one listing, when the first merge is due
// and not before, and goes on from there.
func TestMerge_RestartListsOnceAndLate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	x := w.start()
	w.batches(100)
	x.stop()
	before := len(w.merged(w.stores[0]))
	w.faults[0].Forget()
	x = w.start()
	w.batches(3)
	x.merged()
	if n := w.faults[0].Count(fault.List, "*/manifests/*"); n != 0 {
		t.Errorf("%d listings before anything is due", n)
	}
	w.batches(25)
	x.merged()
	if n := w.faults[0].Count(fault.List, "*/manifests/*"); n != 1 {
		t.Errorf("%d listings", n)
	}
	x.stop()
	if after := len(w.merged(w.stores[0])); after != before+5 || w.covers(128) != 2 {
		t.Errorf("%d merged manifests became %d; %d cover all", before, after, w.covers(128))
	}
	w.check(w.history())
}

// A start that has written whole runs by itself needs the key sets of the starts
// before it to merge them with theirs.
func TestMerge_ManifestsOfEarlierStarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	for _, n := range []int{24, 32, 8} {
		x := w.start()
		w.batches(n)
		x.merged()
		x.stop()
	}
	if n := w.covers(64); n != 1 {
		t.Errorf("%d manifests cover 64 entries", n)
	}
	w.check(w.history())
}

// A kill while a manifest is on its way leaves it on one store of two, which is
// too few: it is made again.
func TestMerge_KilledInTheMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3})
		x := w.start()
		block := make(chan struct{})
		for _, f := range w.faults[1:] {
			f.Add(fault.Rule{Op: fault.Put, Name: "*/manifests/*", Block: block})
		}
		w.batches(8)
		synctest.Wait()
		x.kill()
		for _, f := range w.faults {
			f.Clear()
		}
		x = w.start()
		w.batches(8)
		x.stop()
		if a, b := w.merged(w.stores[0]), w.merged(w.stores[1]); len(a) != 3 || len(b) != 2 {
			t.Errorf("merged manifests: %v and %v", a, b)
		}
		w.check(w.history())
	})
}

// A merge that fails is no error of the writer: commits go on, and it is made
// some entries later.
func TestMerge_FailuresAreTriedAgainLater(t *testing.T) {
	t.Parallel()
	for name, rule := range map[string]fault.Rule{
		"listing": {Op: fault.List, Name: "*/manifests/*", Times: 2, Before: fault.ErrInjected},
		"put":     {Op: fault.Put, Name: "*/manifests/*", Times: 3, Before: fault.ErrInjected},
		"read":    {Op: fault.Get, Name: "*/log/*", Times: 0, Before: fault.ErrInjected},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, options{})
				w.noMerge = name == "read" // so that values must be read back
				x := w.start()
				w.batches(90)
				x.stop()
				w.noMerge = false
				x = w.start()
				w.must(x.log.AwaitSafe(w.ctx, 0, 89))
				w.must(uploader.AwaitOffice(w.ctx, x.log))
				remove := w.faults[0].Add(rule)
				w.batches(9)
				x.merged()
				if st := x.up.MergeStats(); name != "put" && (st.Failures == 0 || st.Merges > 0) {
					t.Errorf("%+v", st)
				}
				remove()
				for range 80 {
					w.batches(1)
					x.merged()
				}
				x.stop()
				if st := x.up.MergeStats(); st.Merges == 0 || w.covers(179) > 40 {
					t.Errorf("%+v, and %d manifests cover all", st, w.covers(179))
				}
				w.check(w.history())
			})
		})
	}
}

// A base of a large volume of which little has changed refers to its pages
// where they lie. Named checkpoints at every entry forbid all other merging.
func TestMerge_BaseRefersToWhatHasNotChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{volumes: []int64{4 << 30}})
	x := w.start()
	for i := range int64(100_000) {
		// Of all lengths, or the manifest would be small enough for its entry.
		w.zero(0, block.Extent{Off: i * 8192, Len: 512 * (1 + w.rng.Int64N(8))})
	}
	w.cut()
	for i := range int64(49) {
		w.write(0, (1000+i)*8192, []byte(strings.Repeat("x", 4096)))
		w.cutNamed(fmt.Sprint(i))
	}
	x.stop()
	list := w.merged(w.stores[0])
	if st := x.up.MergeStats(); len(list) != 1 || list[0].From != 1 || st.Bases != 1 || st.Merges != 0 {
		t.Fatalf("%v, %+v", list, st)
	}
	name := list[0].Name(w.groupID)
	raw, _, err := w.stores[0].Get(w.ctx, name, 1<<30, nil)
	w.must(err)
	base, err := manifest.OpenBytes(w.ring, name, raw)
	w.must(err)
	own, home := 0, 0
	for _, p := range base.Directory.Pages {
		if p.Home.IsZero() {
			own++
		} else {
			home++
		}
	}
	if own > 4 || home < 95 || len(raw) > 40<<10 {
		t.Errorf("%d pages of its own and %d elsewhere, %d bytes", own, home, len(raw))
	}
	im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	got := make([]byte, 64*8192)
	w.must(im.ReadAt(w.ctx, got, 990*8192))
	want := make([]byte, len(got))
	for i := range 49 {
		copy(want[(10+i)*8192:], strings.Repeat("x", 4096))
	}
	w.same("around what was changed", got, want)
}

// Another host, which has nothing but the stores, goes on merging where the
// first one stopped.
func TestMerge_TakenOverByAnotherHost(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 2})
	w.noMerge = true
	x := w.start()
	for i := range 40 {
		w.random(4 << 10)
		if i == 20 {
			w.cutNamed("kept")
		} else {
			w.cut()
		}
	}
	x.stop()
	w.noMerge, w.state.epochs, w.state.tails, w.entries.m = false, nil, nil, nil
	x = w.start()
	w.batches(24)
	x.stop()
	if n := w.covers(64); n > 16 {
		t.Errorf("%d manifests", n)
	}
	w.checkBorders()
	w.check(w.history())
}

// A host that has forgotten the hashes finds them along the parents of newer
// entries, and learns where the named checkpoints are.
func TestMerge_WalksTheParents(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.plain(40)
	w.entries.forget(3, 40) // what is not known may carry a name: only a base is made
	x := w.start()
	w.batches(60)
	x.stop()
	if st := x.up.MergeStats(); st.Bases != 1 || st.Failures != 0 || w.covers(100) > 20 {
		t.Errorf("%+v, and %d manifests", st, w.covers(100))
	}
	w.check(w.history())
}

// What a fenced writer left in the log of one store is not read back for the
// entry that was decided.
func TestFetch_NotAStaleValue(t *testing.T) {
	w := newWorld(t, options{stores: 3})
	w.plain(10)
	w.noMerge = true
	// Entry 11 of this start reaches the first store only.
	x := w.start()
	w.must(uploader.AwaitOffice(w.ctx, x.log))
	for _, f := range w.faults[1:] {
		f.Add(fault.Rule{Op: fault.Put, Name: "*/log/*", Before: fault.ErrInjected})
	}
	w.faults[0].Forget()
	stale := len(w.journal.writes)
	w.batches(1)
	w.must(w.faults[0].Wait(w.ctx, fault.Put, "*/log/*", 1))
	w.must(uploader.AwaitHeld(w.ctx, x.log, 0, 11))
	x.kill()
	w.faults[1].Clear()
	w.faults[2].Clear()
	// The next start does not see that store, and decides another entry 11.
	w.faults[0].Add(fault.Rule{Before: fault.ErrInjected})
	w.journal.writes, w.journal.durable = w.journal.writes[:stale], block.Seq(stale)
	x = w.start()
	w.batches(6)
	w.must(x.up.AwaitIdle(w.ctx))
	w.faults[0].Clear()
	x.stop()

	w.noMerge = false
	x = w.start()
	w.must(uploader.AwaitOffice(w.ctx, x.log))
	w.must(uploader.AwaitLoaded(w.ctx, x.log))
	hash, _, _ := w.entries.Entry(11)
	for i, f := range w.faults {
		for j, g := range w.faults {
			g.Clear()
			if j != i {
				g.Add(fault.Rule{Op: fault.Get, Before: fault.ErrInjected})
			}
		}
		raw, err := x.log.Fetch(w.ctx, 11, hash)
		w.must(err)
		if format.HashOf(raw) != hash {
			t.Errorf("store %s gave another value", f.URL())
		}
	}
	for _, f := range w.faults {
		f.Clear()
	}
	if _, err := x.log.Fetch(w.ctx, 11, format.Hash{1}); err == nil {
		t.Error("a value that nobody decided was fetched")
	}
	w.batches(8)
	x.stop()
	if len(w.merged(w.stores[0])) == 0 {
		t.Error("nothing was merged")
	}
	w.check(w.history())
}

// Where what the host remembers is not what the log holds, nothing is merged.
func TestMerge_NotWhatCannotBeVerified(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.plain(40)
	w.must(w.entries.Note(12, format.Hash{1, 2, 3}, false))
	x := w.start()
	w.batches(16)
	x.stop()
	list := w.merged(w.stores[0])
	for _, m := range list {
		if m.From <= 12 && m.To >= 12 {
			t.Errorf("entries %d to %d were merged", m.From, m.To)
		}
	}
	if len(list) < 4 {
		t.Errorf("only %v", list)
	}
	w.check(w.history())
}

// A store that was away gets the merged manifests when it is back, from the
// others: they do not wait in memory.
func TestMerge_LateStoreGetsThemFromTheOthers(t *testing.T) {
	w := newWorld(t, options{stores: 3})
	x := w.begin()
	w.faults[2].Add(fault.Rule{Op: fault.Put, Name: "*/manifests/*", Before: fault.ErrInjected})
	w.batches(15)
	// The second one begins when enough stores have the first.
	w.must(w.faults[0].Wait(w.ctx, fault.Put, "*/manifests/*", 2))
	w.faults[2].Clear()
	x.stop()
	if n := len(w.merged(w.stores[2])); n != 2 {
		t.Errorf("%d manifests on the store that was away", n)
	}
	w.check(w.history(w.faults[2], w.faults[1]))
}

// A writer that was fenced merges nothing more.
func TestMerge_NotWhenFenced(t *testing.T) {
	w := newWorld(t, options{})
	x := w.start()
	w.batches(7)
	x.merged()
	w.noMerge = true
	y := w.start()
	w.must(uploader.AwaitOffice(w.ctx, y.log))
	w.w = x
	w.batches(1)
	if err := <-x.done; !errors.Is(err, uploader.ErrFenced) {
		t.Fatalf("the old writer ended with %v", err)
	}
	if n := len(w.merged(w.stores[0])); n != 0 || !x.log.Fenced() {
		t.Errorf("%d merged manifests", n)
	}
	y.kill()
}
