package restorer_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/restorer"
)

// TestBranches_EveryPoint: of a history with branches, which fork anywhere, every
// checkpoint of every volume on every branch is what was written, with digests and
// without, and for who has followed it from the beginning; merged manifests of a parent
// that go beyond a fork are not laid over what is before it.
func TestBranches_EveryPoint(t *testing.T) {
	t.Parallel()
	for _, digests := range []bool{false, true} {
		t.Run(fmt.Sprintf("digests %t", digests), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, options{stores: 3, volumes: []int64{128 << 10, 64 << 10}, digests: digests})
			x := w.start()
			var f *restorer.Follower
			cuts := []int{70, 40, 90, 1, 30}
			if digests { // several full pages of entries, which branches divide anywhere
				cuts = []int{150, 290, 200, 1, 130}
			}
			for i, n := range cuts {
				for j := range n {
					w.random(32 << 10)
					if j%7 == 3 {
						x.seg.Checkpoint(fmt.Sprintf("name %d", j), w.clock.now())
					}
					w.cut()
				}
				if digests {
					w.settle(x)
				}
				x.stop()
				if f == nil {
					var err error
					f, err = restorer.Follow(w.ctx, w.config(), w.groupID)
					w.must(err)
				} else {
					_, err := f.Poll(w.ctx)
					w.must(err)
				}
				if i == len(cuts)-1 {
					break
				}
				h := w.history()
				// From any branch, at any of its checkpoints.
				volumes := h.Volumes()
				v := volumes[w.rng.IntN(len(volumes))]
				points := checkpoints(t, h, v)
				c := points[w.rng.IntN(len(points))]
				p, err := h.Resolve(w.ctx, v.Name, "seq:"+c.Seq.String())
				w.must(err)
				w.fork(h, p)
				w.must(h.Close())
				x = w.start()
			}
			h := w.history()
			w.check(h)
			if len(h.Branches()) != len(cuts) || len(h.Volumes()) != 2*len(cuts) {
				t.Fatalf("%d branches, %d volumes", len(h.Branches()), len(h.Volumes()))
			}
			w.check(f.History())
			cfg := w.config()
			cfg.UpTo = &restorer.Position{N: h.N(), Hash: h.Newest().Hash}
			again, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
			w.must(err)
			points := []string{"latest", "seq:0", "seq:7", "-10s", "name 3", "name 10", w.clock.now().Add(-100e9).Format("2006-01-02T15:04:05.999999999Z07:00")}
			for _, b := range h.Branches() {
				for _, seq := range []string{"1", b.ForkSeq.String(), (b.ForkSeq + 1).String(), "20"} {
					points = append(points, "seq:"+seq+"@"+b.ID.String()[:8])
				}
			}
			want := w.factsOf(h, points)
			for name, other := range map[string]*restorer.History{"followed": f.History(), "up to its end": again} {
				got := w.factsOf(other, points)
				got.Decided = want.Decided
				if !reflect.DeepEqual(got, want) {
					t.Errorf("%s: the history says\n%+v\nand else\n%+v", name, got, want)
				}
			}
			w.slowly(h)
		})
	}
}

// slowly looks for what the history of each volume has by going through all of it, and
// compares that with what is found.
func (w *world) slowly(h *restorer.History) {
	w.t.Helper()
	branches := map[block.BranchID]restorer.Branch{}
	for _, b := range h.Branches() {
		branches[b.ID] = b
	}
	for _, v := range h.Volumes() {
		// The entries of the volume's line, from its end to its beginning.
		var entries []*restorer.Entry
		b := branches[v.Branch]
		for at := b.EndN; at > 0; {
			e := entryOf(w.t, h, at)
			entries = append([]*restorer.Entry{e}, entries...)
			for at--; at > 0 && at < b.BeginN; b = branches[b.Parent] {
				at = min(at, b.Fork.N) // which may be on a parent of the parent
			}
		}
		last := map[block.Seq]*restorer.Entry{} // the checkpoint of a seq
		at := map[block.Seq][]string{}
		for _, e := range entries {
			last[e.Range.To] = e
			for _, c := range e.Names {
				at[c.Seq] = append(at[c.Seq], c.Name)
			}
		}
		for _, c := range checkpoints(w.t, h, v) {
			if e := last[c.Seq]; e == nil || e.N != c.N || fmt.Sprint(at[c.Seq]) != fmt.Sprint(c.Names) {
				w.t.Fatalf("volume %s has checkpoint %+v, and %v %q", v.Name, c, e, at[c.Seq])
			}
			delete(last, c.Seq)
		}
		if len(last) > 0 {
			w.t.Fatalf("volume %s lacks %d checkpoints", v.Name, len(last))
		}
		for _, e := range entries {
			p, err := h.Resolve(w.ctx, v.Name, "seq:"+e.Range.To.String())
			w.must(err)
			if p.Seq != e.Range.To {
				w.t.Fatalf("volume %s: seq %s is found at entry %d, seq %s", v.Name, e.Range.To, p.N, p.Seq)
			}
			got, err := h.Resolve(w.ctx, v.Name, "seq:"+e.Range.To.String()+"@"+e.Range.Branch.String())
			if err != nil || got.Seq != e.Range.To || got.Branch != e.Range.Branch {
				w.t.Fatalf("volume %s: seq %s on branch %s: %+v, %v", v.Name, e.Range.To, e.Range.Branch, got, err)
			}
		}
	}
}

// TestBranches_PointsAndChanges: a point is found by its branch, a branch that the
// volume is not on is told by the name that it has there, and changes lead from the
// parent onto the branch, but not from what the branch has left behind.
func TestBranches_PointsAndChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{1 << 20}})
	x := w.start()
	for range 20 {
		w.random(64 << 10)
		w.cut()
	}
	x.stop()
	h := w.history()
	at := func(h *restorer.History, volume, point string) restorer.Point {
		t.Helper()
		p, err := h.Resolve(w.ctx, volume, point)
		w.must(err)
		return p
	}
	w.fork(h, at(h, "v0", "seq:10"))
	x = w.start()
	for range 20 {
		w.random(64 << 10)
		w.cut()
	}
	x.stop()
	h = w.history()
	old, young := h.Branches()[0], h.Branches()[1]
	if !young.Current || old.Current || young.Parent != old.ID || young.ForkSeq != 10 || old.EndN != 20 || young.BeginN != 21 || h.Current() != young.ID {
		t.Fatalf("%+v, %+v", old, young)
	}
	for _, c := range []struct{ volume, point, want string }{
		{"v0", "seq:15@" + young.ID.String(), `called "v0-2"`},
		{"v0-2", "seq:15@" + old.ID.String()[:8], "no checkpoint of volume"},
		{"v0-2", "seq:5@" + young.ID.String()[:8], "no checkpoint of volume"},
		{"v0-2", "seq:5@ffffffff", "has no branch"},
		{"v0-2", "seq:5@" + old.ID.String()[:3], "has no branch"},
	} {
		if _, err := h.Resolve(w.ctx, c.volume, c.point); !errors.Is(err, restorer.ErrNoSuchPoint) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s@%s: %v", c.volume, c.point, err)
		}
	}
	if p := at(h, "v0-2", "seq:10@"+old.ID.String()); p.N != 10 || p.Branch != old.ID {
		t.Errorf("the fork on the parent: %+v", p)
	}
	if p := at(h, "v0-2", "seq:10"); p.N != 21 || p.Branch != young.ID {
		t.Errorf("the fork: %+v", p)
	}
	from, to := at(h, "v0-2", "seq:4"), at(h, "v0-2", "latest")
	ch, err := restorer.OpenChanges(w.ctx, h, from, to)
	w.must(err)
	got := w.model(0, 4)
	w.must(ch.Fetch(w.ctx, func(parts []restorer.Change) error {
		for _, p := range parts {
			if p.Zero {
				clear(got[p.Off:p.End()])
			} else {
				copy(got[p.Off:], p.Data)
			}
		}
		return nil
	}))
	w.same("what changes lead to", got, w.model(0, to.Seq))
	left := at(h, "v0", "seq:15")
	left.Volume = to.Volume
	if _, err := restorer.OpenChanges(w.ctx, h, left, to); !errors.Is(err, restorer.ErrNoSuchPoint) {
		t.Errorf("changes from what was left behind: %v", err)
	}
}

// TestBranches_WrongOnes: a branch that begins where nothing is, or that another entry
// is not of, is damage of the log, told by the number of the entry.
func TestBranches_WrongOnes(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(w *world, b *format.Branch){
		"a parent that is none":         func(_ *world, b *format.Branch) { b.Parent[0]++ },
		"the hash of another entry":     func(_ *world, b *format.Branch) { b.ForkHash[0]++ },
		"another seq":                   func(_ *world, b *format.Branch) { b.ForkSeq-- },
		"a volume too few":              func(_ *world, b *format.Branch) { b.Volumes = b.Volumes[:1] },
		"another volume":                func(_ *world, b *format.Branch) { b.Volumes[1].Index = 7 },
		"a name that is taken":          func(w *world, b *format.Branch) { b.Volumes[1].Name = w.volumes[0].Name },
		"a branch that began already":   func(w *world, b *format.Branch) { b.ID, b.Parent[0] = w.group.Branch, b.Parent[0]+1 },
		"writes that are of the parent": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, options{volumes: []int64{64 << 10, 64 << 10}})
			x := w.start()
			for range 5 {
				w.random(4 << 10)
				w.cut()
			}
			x.stop()
			h := w.history()
			p, err := h.Resolve(w.ctx, "v0", "seq:3")
			w.must(err)
			if spoil == nil {
				old := w.branch
				w.fork(h, p)
				w.branch = old
				y := w.start()
				w.random(4 << 10)
				w.cut()
				y.stop()
			} else {
				b := format.Branch{ID: block.BranchID(block.NewID()), Parent: w.branch, ForkN: p.N, ForkHash: p.Hash, ForkSeq: p.Seq,
					Volumes: []format.BranchVolume{{Index: 0, Name: "a"}, {Index: 1, Name: "b"}}}
				spoil(w, &b)
				w.beginBranch(b)
			}
			_, err = restorer.OpenHistory(w.ctx, w.config(), w.groupID)
			var corrupt *format.CorruptError
			if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), "log entry") {
				t.Errorf("the history can be read: %v", err)
			}
		})
	}
}
