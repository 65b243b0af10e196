package restorer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/object/fault"
	"drc/restorer"
)

// Every checkpoint equals the volume after exactly its first seq writes.
func TestImage_EveryCheckpointIsItsPrefix(t *testing.T) {
	for stores := 1; stores <= 3; stores++ {
		t.Run(fmt.Sprint(stores), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, options{stores: stores, volumes: []int64{1 << 20, 512 << 10, 4096}})
			x := w.start()
			for range scaled(25, 60) {
				most := int64(8 << 10)
				if w.rng.IntN(4) == 0 {
					most = 300 << 10
				}
				for range 1 + w.rng.IntN(5) {
					w.random(most)
				}
				w.cut()
			}
			x.stop()
			h := w.history()
			if h.Unconfirmed() || len(h.Warnings) != 0 || len(h.Damage()) != 0 {
				t.Fatalf("unconfirmed %v, warnings %v, damage %v", h.Unconfirmed(), h.Warnings, h.Damage())
			}
			w.check(h)
		})
	}
}

// A history of many small entries, over several starts of the agent,
// is read whole.
func TestImage_ManyEntries(t *testing.T) {
	t.Parallel()
	each := scaled(130, 1000)
	w := newWorld(t, options{stores: 2, volumes: []int64{256 << 10, 64 << 10}})
	for range 3 {
		x := w.start()
		for range each {
			w.random(2 << 10)
			w.cut()
		}
		x.stop()
	}
	h := w.history()
	if int(h.N()) < 3*each || h.Unconfirmed() {
		t.Fatalf("%d entries, unconfirmed %v", int(h.N()), h.Unconfirmed())
	}
	for _, v := range h.Volumes() {
		points := checkpoints(t, h, v)
		for i := 0; i < len(points); i += 97 {
			w.checkPoint(h, v.Name, "seq:"+points[i].Seq.String(), w.model(v.Index, points[i].Seq))
		}
		w.checkPoint(h, v.Name, "latest", w.model(v.Index, block.Seq(len(w.journal.writes))))
	}
}

// Any read returns what the model has there, from many goroutines at once, and
// Allocation calls nothing a hole that is not zero.
func TestImage_ReadsOfAnyShape(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 3, volumes: []int64{36 << 20}}) // more than a window
	x := w.start()
	for range 30 {
		w.random(1 << 20)
		w.random(8 << 10)
		w.cut()
	}
	x.stop()
	im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	want := w.model(0, im.Point().Seq)
	rapid.Check(t, func(r *rapid.T) {
		n := 512 * rapid.Int64Range(0, 4096).Draw(r, "sectors")
		off := 512 * rapid.Int64Range(0, (int64(len(want))-n)/512).Draw(r, "offset")
		got := make([]byte, n)
		if err := im.ReadAt(w.ctx, got, off); err != nil || !bytes.Equal(got, want[off:off+n]) {
			r.Fatalf("read of %d+%d differs: %v", off, n, err)
		}
	})
	var g errgroup.Group
	for range 3 {
		g.Go(func() error {
			return restorer.Compare(w.ctx, im, bytes.NewReader(want))
		})
	}
	w.must(g.Wait())
	at := int64(0)
	zero := make([]byte, len(want))
	w.must(im.Allocation(w.ctx, block.Extent{Len: int64(len(want))}, func(p block.Extent, hole bool) bool {
		if p.Off != at || p.Len <= 0 {
			t.Fatalf("piece %s follows %d", p, at)
		}
		at = p.End()
		if hole && !bytes.Equal(want[p.Off:p.End()], zero[:p.Len]) {
			t.Fatalf("%s is no hole", p)
		}
		return true
	}))
	if at != int64(len(want)) {
		t.Fatalf("the allocation ends at %d", at)
	}
	if err := im.ReadAt(w.ctx, make([]byte, 512), int64(len(want))); !errors.Is(err, block.ErrOutOfRange) {
		t.Fatal(err)
	}
	if err := im.WriteAt(w.ctx, make([]byte, 512), 0, block.WriteOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Fatal(err)
	}
}

// With an agent's key the map can be looked up and content cannot be read.
func TestImage_AgentSeesTheMapAndNotTheContent(t *testing.T) {
	w := newWorld(t, options{stores: 1})
	x := w.start()
	w.write(0, 4096, bytes.Repeat([]byte("secret. "), 8192))
	w.cut()
	x.stop()
	cfg := w.config()
	cfg.Ring = crypt.NewAgentRing(w.agent, w.id.RootPublic)
	h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
	w.must(err)
	im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
	w.must(err)
	extents, err := im.Extents(w.ctx, block.Extent{Off: 0, Len: 1 << 20})
	w.must(err)
	hasher := crypt.NewChunkHasher(w.group.ChunkIDKey)
	content := w.model(0, 1)
	n := int64(0)
	for _, x := range extents {
		if x.ChunkID != hasher.ID(content[x.Off:x.End()]) {
			t.Fatalf("the chunk at %s has another id", x.Extent)
		}
		n += x.Len
	}
	if n != 64<<10 {
		t.Fatalf("%d bytes are mapped", n)
	}
	if err := im.ReadAt(w.ctx, make([]byte, 512), 4096); !errors.Is(err, crypt.ErrWrongKey) {
		t.Fatalf("read with an agent's key: %v", err)
	}
}

// A merged manifest stands for its entries: with pages of its own, and with
// pages that live in another manifest. Damaged everywhere, it is done without.
func TestImage_MergedManifests(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 2, volumes: []int64{1 << 20, 1 << 20}})
	x := w.start()
	for range 40 {
		w.random(64 << 10)
		w.cut()
	}
	x.stop()
	h := w.history()
	w.merge(h, 1, 10, nil)
	w.merge(h, 11, 30, nil)
	base := w.merge(h, 1, 35, nil)
	w.check(w.history()) // every point, each with its own plan
	im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	if got := im.Layers(); len(got) == 0 || got[0] != [2]uint64{1, 35} {
		t.Fatalf("the plan is %v", got)
	}
	flip := func(p []byte) []byte { p[len(p)-200] ^= 1; return p }
	for _, s := range w.stores {
		s.Tamper(base.name, flip)
	}
	h = w.history()
	w.check(h)
	if len(h.Damage()) != 2 || h.Damage()[0].Object != base.name {
		t.Fatalf("damage found: %v", h.Damage())
	}
	// In one store only: the other copy is used.
	w.stores[1].Tamper(base.name, flip)
	w.stores[0].Tamper(base.name, func(p []byte) []byte { return p[:len(p)-1] })
	w.check(w.history())
}

// Pages of a merged manifest may live in an older one.
func TestImage_PagesAtHomeElsewhere(t *testing.T) {
	w := newWorld(t, options{stores: 2})
	x := w.start()
	for i := range 10 {
		p := make([]byte, 8<<10)
		w.write(0, int64(i)*32<<10, fill(w.rng, p))
		w.cut()
	}
	for i := range 10 {
		p := make([]byte, 8<<10)
		w.write(0, 512<<10+int64(i)*32<<10, fill(w.rng, p))
		w.cut()
	}
	x.stop()
	h := w.history()
	old := w.merge(h, 1, 10, nil)
	w.merge(h, 1, 20, &old)
	h = w.history()
	for _, s := range w.faults {
		s.Forget()
	}
	im := w.checkPoint(h, "v0", "latest", w.model(0, 20))
	if got := im.Layers(); !slices.Equal(got, [][2]uint64{{1, 20}}) {
		t.Fatalf("the plan is %v", got)
	}
	if w.faults[0].Count(fault.GetRange, old.name)+w.faults[1].Count(fault.GetRange, old.name) == 0 {
		t.Fatal("no page was read from its home")
	}
	w.check(h)
}

// merge writes the manifest of entries from to to, as a merger would. It
// refers to the pages of old, whose extents no later entry may overlap or
// precede.
func (w *world) merge(h *restorer.History, from, to uint64, old *mergedObject) mergedObject {
	w.t.Helper()
	keys := w.w.keys
	b := manifest.NewBuilder(format.ManifestHeader{Group: w.groupID, Branch: w.group.Branch, FromN: from, ToN: to}, w.agent, keys)
	first := from
	if old != nil {
		first = old.m.Header.ToN + 1
		for _, row := range old.m.Directory.Pages {
			row.Home, row.HomeName, row.HomeKeySet = old.m.Header.ID, old.name, old.m.Header.KeySet
			b.AddPage(row)
		}
	}
	for _, v := range h.Volumes() {
		m := block.NewMap(manifest.Extent.Advance)
		for n := first; n <= to; n++ {
			extents, err := restorer.EntryExtents(w.ctx, h, v, n)
			w.must(err)
			for _, x := range extents {
				m.Set(x.Extent, x)
			}
		}
		m.All(func(e block.Extent, x manifest.Extent) bool {
			x.Extent = e
			b.Add(v.Index, x)
			return true
		})
	}
	raw := b.Finish()
	o := mergedObject{name: format.ManifestName{Branch: w.group.Branch, From: from, To: to, ID: b.ID()}.Name(w.groupID)}
	for _, s := range w.stores {
		_, err := s.Put(w.ctx, o.name, raw)
		w.must(err)
	}
	var err error
	o.m, err = manifest.OpenBytes(w.ring, o.name, raw)
	w.must(err)
	return o
}

type mergedObject struct {
	name string
	m    *manifest.Manifest
}

// fill fills p with noise.
func fill(rng *rand.Rand, p []byte) []byte {
	n := len(p) &^ 7
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
	for i := n; i < len(p); i++ {
		p[i] = byte(rng.Uint32())
	}
	return p
}
