package uploader_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/format"
	"drc/internal/object/fault"
	"drc/uploader"
)

// manifests are the names of all manifests of a store.
func (w *world) manifests(i int) (out []string) {
	w.t.Helper()
	for info, err := range w.stores[i].List(w.ctx, format.ManifestPrefix(w.groupID, w.group.Branch), "") {
		w.must(err)
		out = append(out, info.Name)
	}
	return out
}

// alike fails unless all stores have the same manifests, at least min.
func (w *world) alike(min int) {
	w.t.Helper()
	for i := range w.stores {
		if a, b := w.manifests(0), w.manifests(i); len(b) < min || !slices.Equal(a, b) {
			w.t.Fatalf("store 0 has %d manifests and store %d has %d", len(a), i, len(b))
		}
	}
}

// large makes a batch whose manifest is too large for its entry: chunks that are
// all different.
func (w *world) large() {
	for i := range int64(4096) {
		w.noise(0, 1024*i, 512)
	}
	w.cut()
	w.must(w.w.up.AwaitLogged(w.ctx, w.journal.Captured()))
	if n := w.w.up.Stats().LastEntryBytes; n > 64<<10 {
		w.t.Fatalf("the manifest travels in its entry, of %d bytes", n)
	}
}

// fill makes n batches.
func (w *world) fill(n int) {
	for range n {
		w.write(0, 1024*w.rng.Int64N(4096), []byte{511: byte(w.rng.IntN(256))})
		w.cut()
	}
}

// A manifest that a crash kept from one store is put there after the restart.
func TestHeal_AfterAKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.start()
		w.fill(2)
		w.must(x.up.AwaitIdle(w.ctx))
		w.faults[1].Add(fault.Rule{Op: fault.Put, Name: "*/manifests/*", Before: fault.ErrInjected})
		w.large()
		w.fill(10)
		w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
		time.Sleep(time.Minute)
		x.kill()
		w.faults[1].Clear()
		if len(w.manifests(0)) == len(w.manifests(1)) {
			t.Fatal("nothing is missing: the test shows nothing")
		}
		x = w.start()
		w.fill(9)
		time.Sleep(time.Minute)
		x.stop()
		w.alike(2)
		if n := x.up.MergeStats().Healed; n == 0 {
			t.Error("nothing was healed")
		}
	})
}

// What a store missed during an outage that began before a start and outlives it
// is brought there when it is back, without a storm, and then nothing more is
// asked.
func TestHeal_OutageOverARestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.start()
		w.fill(2)
		w.must(x.up.AwaitIdle(w.ctx))
		back := w.down(2)
		for range 4 {
			w.large()
			w.fill(10)
		}
		w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
		time.Sleep(time.Minute)
		x.kill()
		before := x
		x = w.start()
		x.inherit(before)
		w.large()
		w.fill(10)
		w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
		time.Sleep(time.Hour)
		w.faults[0].Forget()
		back()
		time.Sleep(2 * time.Hour)
		w.alike(7)
		if n := w.faults[0].Count(fault.Get, "*/manifests/*"); n > len(w.manifests(0)) {
			t.Errorf("%d reads of %d manifests", n, len(w.manifests(0)))
		}
		if n := w.faults[0].Count(fault.List, "*"); n > 2 {
			t.Errorf("%d listings", n)
		}
		for _, f := range w.faults {
			f.Forget()
		}
		time.Sleep(24 * time.Hour)
		for _, f := range w.faults {
			if calls := f.Calls(); len(calls) != 0 {
				t.Errorf("%d calls in an idle day, the first %+v", len(calls), calls[0])
			}
		}
		x.stop()
		w.check(w.history(w.faults[2], w.faults[1]))
	})
}

// A long outage does not pile up manifests that wait for its end.
func TestHeal_LongOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.start()
		w.fill(2)
		w.must(x.up.AwaitIdle(w.ctx))
		back := w.down(2)
		w.fill(1300)
		w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
		w.must(uploader.AwaitMerged(w.ctx, x.up))
		time.Sleep(time.Hour)
		if st := x.up.Stats(); st.WaitingPuts > 140 {
			t.Errorf("%d puts wait", st.WaitingPuts)
		}
		back()
		time.Sleep(2 * time.Hour)
		w.alike(150)
		x.stop()
	})
}

// What somebody damaged is not spread: it is healed from a copy that is whole,
// or not at all.
func TestHeal_NotFromADamagedCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.start()
		w.large()
		w.fill(20)
		x.stop()
		names := w.manifests(2)
		flip := func(raw []byte) []byte { raw[len(raw)/3] ^= 1; return raw }
		for _, name := range names {
			w.stores[0].Tamper(name, flip)
			w.must(w.stores[2].Delete(w.ctx, name))
		}
		w.stores[1].Tamper(names[0], flip)
		x = w.start()
		w.fill(9)
		time.Sleep(time.Hour)
		x.stop()
		got := w.manifests(2)
		if slices.Contains(got, names[0]) {
			t.Error("a damaged manifest was put on another store")
		}
		for _, name := range names[1:] {
			if !slices.Contains(got, name) {
				t.Errorf("%s is missing", name)
				continue
			}
			a, _, err := w.stores[1].Get(w.ctx, name, 1<<30, nil)
			w.must(err)
			b, _, err := w.stores[2].Get(w.ctx, name, 1<<30, nil)
			w.must(err)
			w.same(name, b, a)
		}
	})
}
