package restorer_test

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/format"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/restorer"
	"drc/segmenter"
)

// eventful is a history of about n entries with all that a history can have: names,
// a clock that is set back, gaps, restarts, entries of two volumes. Digests are
// written.
func eventful(t testing.TB, stores, n int) *world {
	t.Helper()
	w := newWorld(t, options{stores: stores, volumes: []int64{256 << 10, 64 << 10}, digests: true})
	x := w.start()
	w.random(2 << 10)
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	for i := range n {
		switch w.rng.IntN(40) {
		case 0:
			w.clock.set(w.clock.now().Add(-time.Duration(w.rng.IntN(30)) * time.Second))
		case 1:
			x.seg.Checkpoint(fmt.Sprintf("name %d", w.rng.IntN(20)), w.clock.now())
		case 2:
			if i%3 == 0 {
				w.settle(x)
				x.stop()
				x = w.start()
			}
		case 3:
			w.resync(x)
		}
		for range w.rng.IntN(3) {
			w.random(2 << 10)
		}
		w.cut()
	}
	w.settle(x)
	x.stop()
	return w
}

// settle has all that was captured logged, and the digests of it written. What
// stands behind a named checkpoint may be in no batch yet, and the next writer begins
// behind all that was captured.
func (w *world) settle(x *writer) {
	w.t.Helper()
	for w.must(x.up.AwaitIdle(w.ctx)); x.up.Logged() < w.journal.Captured(); w.must(x.up.AwaitIdle(w.ctx)) {
		w.cut()
	}
	w.digested(x)
}

// digested waits until the digests that are due are on the stores. What is decided is
// known.
func (w *world) digested(x *writer) {
	w.t.Helper()
	next, _, _ := x.log.Next()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		newest := uint64(0)
		if all := names(w.t, w.stores[0], format.DigestPrefix(w.groupID)); len(all) > 0 {
			newest, _, _ = format.ParseDigestName(w.groupID, all[0])
		}
		if newest/64 == (next-1)/64 {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("the newest digest is of entry %d, and %d are decided", newest, next-1)
		}
	}
}

// resync has a volume compared with what it is, over some entries.
func (w *world) resync(x *writer) {
	v := block.VolumeIndex(w.rng.IntN(2))
	seq := w.journal.Captured()
	size := w.volumes[v].SizeBytes
	backing := blocktest.NewMemory(size, nil)
	w.must(backing.WriteAt(w.ctx, w.model(v, seq), 0, block.WriteOptions{}))
	w.must(x.up.AwaitIdle(w.ctx))
	h := w.history()
	if len(h.Resyncs) > 0 {
		return // one at a time: the next must not be compared with what is older than this one
	}
	base, err := restorer.OpenImage(w.ctx, h, w.volumes[v].Name, "latest")
	w.must(err)
	x.seg.AddResync(segmenter.Resync{Volume: v, Backing: backing, Remaining: []block.Extent{{Len: size}}, After: seq,
		Begin: &format.GapBegin{Volume: v, After: seq, Reason: format.GapForeign}})
	x.seg.StartResync(v, baseline{base})
	// The backing does not change: nothing is written to it before it has been read.
	vol, _ := h.Volume(w.volumes[v].Name)
	for gaps := len(h.Gaps(vol)); len(h.Gaps(vol)) == gaps || len(h.Resyncs) > 0; {
		w.write(1-v, 0, fill(w.rng, make([]byte, 512)))
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		h = w.history()
	}
}

// copies are copies of the stores, of which change may change each.
func (w *world) copies(change func(i int, s *mem.Store)) []object.Store {
	w.t.Helper()
	var out []object.Store
	for i, s := range w.stores {
		c := s.Clone()
		if change != nil {
			change(i, c)
		}
		out = append(out, c)
	}
	return out
}

// withoutDigests deletes a store's digests.
func (w *world) withoutDigests(_ int, s *mem.Store) {
	for _, name := range names(w.t, s, format.DigestPrefix(w.groupID)) {
		w.must(s.Delete(w.ctx, name))
	}
}

// facts are what a history says.
type facts struct {
	N, Decided  uint64
	Group       format.Group
	Volumes     []restorer.Volume
	Names       [][]restorer.Named
	Branches    []restorer.Branch
	Gaps        [][]restorer.Gap
	Checkpoints [][]restorer.Checkpoint
	Hashes      []format.Hash
	Resyncs     []format.Partial
	Points      []string
}

// factsOf reads all that a history says, and resolves points.
func (w *world) factsOf(h *restorer.History, points []string) facts {
	w.t.Helper()
	f := facts{N: h.N(), Decided: h.Decided, Group: h.Group, Volumes: h.Volumes(), Branches: h.Branches(), Resyncs: h.Resyncs}
	w.must(h.Each(w.ctx, 1, func(e *restorer.Entry) bool {
		f.Hashes = append(f.Hashes, e.Hash)
		return true
	}))
	for _, v := range h.Volumes() {
		f.Gaps = append(f.Gaps, h.Gaps(v))
		f.Names = append(f.Names, h.Names(v))
		f.Checkpoints = append(f.Checkpoints, checkpoints(w.t, h, v))
		for _, p := range points {
			at, err := h.Resolve(w.ctx, v.Name, p)
			f.Points = append(f.Points, fmt.Sprintf("%s@%s: %d %s %s %q %v", v.Name, p, at.N, at.Seq, at.Hash, at.Note, err))
		}
	}
	return f
}

// A history that is read from a digest on says what it says when all of it is read.
func TestDigest_SaysWhatTheLogsSay(t *testing.T) {
	t.Parallel()
	for _, n := range []int{300, 600} {
		w := eventful(t, 1+n/300, n)
		end := w.journal.Captured()
		points := []string{"latest", "-0s", "-40s", "-10000h", "2030-01-01", "name 1", "name 2", "name 3", "seq:0", "seq:1", fmt.Sprint("seq:", end), fmt.Sprint("seq:", end+1)}
		for range 40 {
			points = append(points, fmt.Sprint("seq:", w.rng.Uint64N(uint64(end)+1)),
				time.Unix(1_700_000_000+w.rng.Int64N(int64(n)), w.rng.Int64N(2)*500_000_000).UTC().Format(time.RFC3339Nano))
		}
		for i, s := range w.stores {
			if len(names(t, s, format.DigestPrefix(w.groupID))) == 0 {
				t.Fatalf("store %d has no digest after %d entries", i, n)
			}
		}
		with, without := w.history(w.copies(nil)...), w.history(w.copies(w.withoutDigests)...)
		a, b := w.factsOf(with, points), w.factsOf(without, points)
		if !reflect.DeepEqual(a, b) {
			for i := range min(len(a.Points), len(b.Points)) {
				if a.Points[i] != b.Points[i] {
					t.Errorf("with digests\n%s\nwithout\n%s", a.Points[i], b.Points[i])
				}
			}
			a.Points, b.Points = nil, nil
			if !reflect.DeepEqual(a, b) {
				t.Errorf("with digests\n%+v\nwithout\n%+v", a, b)
			}
		}
		for _, v := range with.Volumes() {
			all := checkpoints(t, with, v)
			for range 10 {
				c := all[w.rng.IntN(len(all))]
				w.checkPoint(without, v.Name, "seq:"+c.Seq.String(), w.model(v.Index, c.Seq))
				w.checkPoint(with, v.Name, "seq:"+c.Seq.String(), w.model(v.Index, c.Seq))
			}
		}
	}
}

// A long history is opened, and an old point found in it, with a number of requests
// that does not depend on its length.
func TestDigest_FewRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{64 << 10}, digests: true})
	x := w.start()
	requests := map[int]int{}
	begin := w.clock.now()
	for i := range 1500 {
		w.write(0, int64(i%64)*512, fill(w.rng, make([]byte, 512)))
		w.cut()
		if i != 200 && i != 1499 {
			continue
		}
		w.must(x.everywhere(w.ctx))
		w.faults[0].Forget()
		h := w.history()
		im, err := restorer.OpenImage(w.ctx, h, "v0", begin.Add(100*time.Second).Format(time.RFC3339))
		w.must(err)
		got := make([]byte, 64<<10)
		w.must(im.ReadAt(w.ctx, got, 0))
		w.same("second 100", got, w.model(0, im.Point().Seq))
		requests[i] = len(w.faults[0].Calls())
		w.must(h.Close())
	}
	x.stop()
	if a, b := requests[200], requests[1499]; b > 2*a || b > 350 {
		t.Errorf("%d requests with 200 entries, %d with 1,500", a, b)
	}
}

// Whatever is wrong with digests, or with logs that they were made of, the history
// is right; and what is wrong with the logs is noticed.
func TestDigest_OfNoUse(t *testing.T) {
	t.Parallel()
	w := eventful(t, 3, 400)
	want := w.factsOf(w.history(w.copies(w.withoutDigests)...), []string{"latest", "name 1", "-20s"})
	each := func(change func(name string, s *mem.Store)) func(int, *mem.Store) {
		return func(_ int, s *mem.Store) {
			for _, name := range names(t, s, format.DigestPrefix(w.groupID)) {
				change(name, s)
			}
		}
	}
	if n := len(names(t, w.stores[0], format.DigestPrefix(w.groupID))); n < 3 {
		t.Fatalf("only %d digests: the test shows nothing", n)
	}
	newest := names(t, w.stores[0], format.DigestPrefix(w.groupID))[0]
	entries := names(t, w.stores[0], format.LogPrefix(w.groupID))
	for what, change := range map[string]func(int, *mem.Store){
		"garbage":            each(func(name string, s *mem.Store) { s.Tamper(name, func([]byte) []byte { return []byte("garbage") }) }),
		"empty":              each(func(name string, s *mem.Store) { s.Tamper(name, func([]byte) []byte { return nil }) }),
		"a bit changed":      each(func(name string, s *mem.Store) { s.Tamper(name, func(p []byte) []byte { p[len(p)/2] ^= 4; return p }) }),
		"the newest damaged": func(_ int, s *mem.Store) { s.Tamper(newest, func(p []byte) []byte { p[len(p)-100] ^= 4; return p }) },
		"damaged in two stores": func(i int, s *mem.Store) {
			if i > 0 {
				each(func(name string, s *mem.Store) {
					s.Tamper(name, func(p []byte) []byte { p[len(p)-100] ^= 4; return p })
				})(i, s)
			}
		},
		"only the newest is left": each(func(name string, s *mem.Store) {
			if name != newest {
				w.must(s.Delete(w.ctx, name))
			}
		}),
		"on one store only": func(i int, s *mem.Store) {
			if i != 1 {
				w.withoutDigests(i, s)
			}
		},
		"each under the other's name": func(_ int, s *mem.Store) {
			all := names(t, s, format.DigestPrefix(w.groupID))
			a, _, err := s.Get(w.ctx, all[0], 1<<30, nil)
			w.must(err)
			s.Tamper(all[1], func([]byte) []byte { return slices.Clone(a) })
		},
		"foreign names": func(_ int, s *mem.Store) {
			for _, name := range []string{"0000000000000000-00000000000000000000000000000000", "x", "fffffffffffffff0-zz"} {
				_, err := s.Put(w.ctx, format.DigestPrefix(w.groupID)+name, []byte("foreign"))
				w.must(err)
			}
		},
	} {
		h := w.history(w.copies(change)...)
		if got := w.factsOf(h, []string{"latest", "name 1", "-20s"}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the history is another one", what)
		}
		w.checkPoint(h, "v0", "latest", w.model(0, w.journal.Captured()))
	}
	// A store whose log was rolled back, or written anew, has no say.
	for what, change := range map[string]func(int, *mem.Store){
		"rolled back behind the digest": func(i int, s *mem.Store) {
			for _, name := range entries[20:] {
				if i == 0 {
					_ = s.Delete(w.ctx, name)
				}
			}
		},
		"ends before what others know": func(i int, s *mem.Store) {
			if i == 0 {
				_ = s.Delete(w.ctx, entries[len(entries)-1])
				_ = s.Delete(w.ctx, entries[len(entries)-2])
			}
		},
	} {
		h := w.history(w.copies(change)...)
		if !slices.ContainsFunc(h.Warnings, func(s string) bool { return strings.Contains(s, "rolled back") }) {
			t.Errorf("%s: warnings %q", what, h.Warnings)
		}
		if got := w.factsOf(h, []string{"latest", "name 1", "-20s"}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the history is another one", what)
		}
	}
}

// All stores together rolled back to before a digest that one of them kept: nothing
// is made up, and what is there is read.
func TestDigest_AheadOfTheLogs(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{64 << 10}, digests: true})
	x := w.start()
	for range 150 {
		w.random(2 << 10)
		w.cut()
	}
	w.must(x.up.AwaitIdle(w.ctx))
	w.digested(x)
	x.stop()
	logs := names(t, w.stores[0], format.LogPrefix(w.groupID))
	h := w.history(w.copies(func(_ int, s *mem.Store) {
		for _, name := range logs[40:] {
			w.must(s.Delete(w.ctx, name))
		}
	})...)
	if h.N() >= 40 || h.N() < 35 {
		t.Fatalf("%d entries are read of 40 objects", h.N())
	}
	w.check(h)
}

// What the values of old entries hold is found in the logs, also where a digest does
// not say where: it was made when the store was away.
func TestDigest_ValuesOfOldEntriesAreFound(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 3, volumes: []int64{64 << 10}, digests: true})
	x := w.start()
	down := w.faults[2].Add(fault.Rule{Op: fault.Put, Before: fault.ErrInjected})
	for i := range 200 {
		w.random(2 << 10)
		w.cut()
		if i%30 == 29 {
			w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
			x.kill()
			x = w.start()
		}
	}
	w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
	down()
	x.stop()
	cfg := w.config(w.given(2)...) // it alone is no majority, and it has all
	h, err := restorer.OpenHistory(context.Background(), cfg, w.groupID)
	w.must(err)
	w.check(h)
}

// Digests need not be on every store: where those that have them are lost, before or
// after the history was opened, the logs of the others tell.
func TestDigest_OnALostStore(t *testing.T) {
	t.Parallel()
	w := eventful(t, 3, 600)
	points := []string{"latest", "name 1", "-20s", "-300s", "seq:100"}
	want := w.factsOf(w.history(w.copies(w.withoutDigests)...), points)
	stores := w.copies(func(i int, s *mem.Store) {
		if i > 0 {
			w.withoutDigests(i, s)
		}
	})
	lossy := fault.New(stores[0])
	stores[0] = lossy
	h := w.history(stores...)
	if n := lossy.Count(fault.GetRange, format.DigestPrefix(w.groupID)+"*"); n == 0 {
		t.Fatal("no digest was read: the test shows nothing")
	}
	lossy.Add(fault.Rule{Before: fault.ErrInjected})
	if got := w.factsOf(h, points); !reflect.DeepEqual(got, want) {
		t.Errorf("lost afterwards: the history is another one:\n%+v\nand was\n%+v", got, want)
	}
	w.checkPoint(h, "v0", "latest", w.model(0, w.journal.Captured()))
	w.must(h.Close())
	h = w.history(stores[1:]...)
	if got := w.factsOf(h, points); !reflect.DeepEqual(got, want) {
		t.Error("lost before: the history is another one")
	}
	// A digest that is there, and of which the pages are not.
	h = w.history(w.copies(func(_ int, s *mem.Store) {
		for _, name := range names(t, s, format.DigestPrefix(w.groupID))[1:] {
			w.must(s.Delete(w.ctx, name))
		}
	})...)
	if got := w.factsOf(h, points); !reflect.DeepEqual(got, want) {
		t.Error("without the older digests: the history is another one")
	}
}
