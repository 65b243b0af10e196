package manifest_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/manifest"
)

// shelf holds manifest objects and opens their pages, as a store would.
type shelf struct {
	t       fataler
	ring    *crypt.Ring
	agent   *crypt.Agent
	objects map[string][]byte
	opened  int
}

type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func newShelf(t testing.TB) *shelf {
	return &shelf{t: t, ring: crypttest.Ring(t), agent: crypttest.Agent(t), objects: map[string][]byte{}}
}

func (s *shelf) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func nameOf(h format.ManifestHeader) string {
	return format.ManifestName{Branch: h.Branch, From: h.FromN, To: h.ToN, ID: h.ID}.Name(h.Group)
}

// input makes a finished manifest an input: an object, or inline.
func (s *shelf) input(raw []byte, inline bool) manifest.Input {
	s.t.Helper()
	m, err := manifest.OpenBytes(s.ring, "manifest", raw)
	s.must(err)
	in := manifest.Input{Manifest: m}
	if !inline {
		in.Name = nameOf(m.Header)
		s.objects[in.Name] = raw
	}
	in.Page = func(row format.PageRow) ([]manifest.Extent, error) {
		s.opened++
		from := raw
		if !row.Home.IsZero() {
			if from = s.objects[row.HomeName]; from == nil {
				return nil, fmt.Errorf("no object %s", row.HomeName)
			}
		}
		sealed, err := manifest.BytesReader("manifest", from)(row.Offset, int64(row.StoredBytes))
		if err != nil {
			return nil, err
		}
		return m.OpenPage(row, sealed)
	}
	return in
}

func entriesHeader(from, to uint64) format.ManifestHeader {
	h := header()
	h.FromN, h.ToN = from, to
	return h
}

// merge merges inputs, spilling at partBytes, and opens what comes out.
func (s *shelf) merge(partBytes int, inputs ...manifest.Input) (manifest.Input, *manifest.Merge) {
	s.t.Helper()
	m := &manifest.Merge{Inputs: inputs, Ring: s.ring, PartBytes: partBytes, Spill: func(name string, raw []byte) error {
		n, ok := format.ParseManifestName(header().Group, name)
		if !ok || n.From != n.To {
			s.t.Fatalf("a page store is called %s, which readers would plan with", name)
		}
		stored, err := manifest.OpenBytes(s.ring, name, raw)
		s.must(err)
		if nameOf(stored.Header) != name {
			s.t.Fatalf("the page store %s says that it is %s", name, nameOf(stored.Header))
		}
		s.objects[name] = raw
		return nil
	}}
	h := entriesHeader(inputs[0].Manifest.Header.FromN, inputs[len(inputs)-1].Manifest.Header.ToN)
	id, raw, err := m.Into(manifest.NewBuilder(h, s.agent, crypttest.Keys()))
	s.must(err)
	out := s.input(raw, false)
	if out.Manifest.Header.ID != id || out.Manifest.Header.FromN != h.FromN || out.Manifest.Header.ToN != h.ToN {
		s.t.Fatalf("header %+v", out.Manifest.Header)
	}
	return out, m
}

// content is what an input says of a volume.
func (s *shelf) content(in manifest.Input, v block.VolumeIndex) *block.Map[manifest.Extent] {
	s.t.Helper()
	m := block.NewMap(manifest.Extent.Advance)
	for _, row := range in.Manifest.Pages(v, everything) {
		page, err := in.Page(row)
		s.must(err)
		if len(page) != row.Extents {
			s.t.Fatalf("a page of %d extents has %d", row.Extents, len(page))
		}
		for _, x := range page {
			m.Set(x.Extent, x)
		}
	}
	return m
}

// parts are the pieces of a map, joined where they are one.
func parts(m *block.Map[manifest.Extent]) (out []manifest.Extent) {
	m.All(func(e block.Extent, x manifest.Extent) bool {
		x.Extent = e
		if n := len(out); n > 0 {
			if l := &out[n-1]; l.End() == x.Off && l.Zero == x.Zero &&
				(x.Zero || (l.Segment.ID == x.Segment.ID && l.Chunk == x.Chunk && l.Offset+l.Len == x.Offset)) {
				l.Len += x.Len
				return true
			}
		}
		out = append(out, x)
		return true
	})
	return out
}

// Merging says what laying the inputs over each other says, whatever overlaps
// what, wherever the pages lie, and however often it is merged again.
func TestMerge_IsTheOverlay(t *testing.T) {
	base := newShelf(t)
	rapid.Check(t, func(t *rapid.T) {
		s := &shelf{t: t, ring: base.ring, agent: base.agent, objects: map[string][]byte{}}
		volumes := rapid.IntRange(1, 2).Draw(t, "volumes")
		model := make([]*block.Map[manifest.Extent], volumes)
		for v := range model {
			model[v] = block.NewMap(manifest.Extent.Advance)
		}
		var inputs []manifest.Input
		for i := range rapid.IntRange(1, 5).Draw(t, "inputs") {
			b := manifest.NewBuilder(entriesHeader(uint64(i+1), uint64(i+1)), s.agent, crypttest.Keys())
			for v := range volumes {
				at := rapid.Int64Range(0, 400).Draw(t, "start") * 512
				count := rapid.SampledFrom([]int{0, 1, 5, 40, 200, 1100}).Draw(t, "extents")
				step := rapid.Int64Range(1, 6).Draw(t, "step")
				for k := range count {
					x := manifest.Extent{Extent: block.Extent{Off: at, Len: 512 * (1 + int64(k)%step)}}
					if k%4 == 3 {
						x.Zero = true
					} else {
						x.Segment, x.Chunk, x.Offset = row(k), i*10000+k/2, 512*int64(k%2)*x.Len
						x.ChunkLen, x.ChunkID = 1<<20, crypt.ChunkID{byte(i), byte(k)}
						x.Offset = min(x.Offset, 1<<19)
					}
					b.Add(block.VolumeIndex(v), x)
					model[v].Set(x.Extent, x)
					at = x.End() + 512*(int64(k)%step)
				}
			}
			inputs = append(inputs, s.input(b.Finish(), rapid.Bool().Draw(t, "inline")))
		}
		parting := rapid.SampledFrom([]int{0, 4000, 50000}).Draw(t, "part bytes")
		for len(inputs) > 1 || inputs[0].Manifest.Header.FromN == inputs[0].Manifest.Header.ToN {
			n := rapid.IntRange(1, len(inputs)).Draw(t, "merged at once")
			from := rapid.IntRange(0, len(inputs)-n).Draw(t, "from")
			merged, m := s.merge(parting, inputs[from:from+n]...)
			if m.LiveMax > n {
				t.Fatalf("%d pages were open at a time, of %d manifests", m.LiveMax, n)
			}
			inputs = slices.Replace(inputs, from, from+n, merged)
			if len(inputs) == 1 {
				break
			}
		}
		for v := range model {
			got, want := parts(s.content(inputs[0], block.VolumeIndex(v))), parts(model[v])
			if !slices.Equal(got, want) {
				t.Fatalf("volume %d: %d pieces, want %d", v, len(got), len(want))
			}
		}
	})
}

// grid is a manifest of n extents of 4 KiB, one every 8 KiB from first on.
func (s *shelf) grid(n uint64, first int64, count int, inline bool) manifest.Input {
	s.t.Helper()
	b := manifest.NewBuilder(entriesHeader(n, n), s.agent, crypttest.Keys())
	r := row(int(n))
	for i := range count {
		b.Add(1, manifest.Extent{
			Extent: block.Extent{Off: first + int64(i)*8192, Len: 4096}, Segment: r, Chunk: i, ChunkLen: 4096,
			ChunkID: crypt.ChunkID{byte(n), byte(i), byte(i >> 8), byte(i >> 16)},
		})
	}
	return s.input(b.Finish(), inline)
}

// What nothing overlaps is referred to where it lies, also if it lies in a
// third manifest, and is not even read.
func TestMerge_UnchangedPagesStayAtHome(t *testing.T) {
	s := newShelf(t)
	first, _ := s.merge(0, s.grid(1, 0, 100_000, false))
	second, _ := s.merge(0, first, s.grid(2, 1<<40, 10, true))
	s.opened = 0
	third, m := s.merge(0, second, s.grid(3, 8192*50_000, 5, true))
	if pages := len(third.Manifest.Directory.Pages); m.Referred < 97 || pages > 104 || s.opened > 4 {
		t.Fatalf("%d pages, %d referred to, %d opened", pages, m.Referred, s.opened)
	}
	if size := len(s.objects[third.Name]); size > 60<<10 {
		t.Errorf("%d bytes for five extents", size)
	}
	homes := map[string]int{}
	for _, p := range third.Manifest.Directory.Pages {
		homes[p.HomeName]++
	}
	if len(homes) != 3 || homes[""] == 0 || homes[second.Name] != 1 || homes[first.Name] != 0 {
		t.Fatalf("pages live in %v", homes)
	}
	if got := s.content(third, 1).Len(); got != 100_010 {
		t.Errorf("%d extents", got)
	}
}

// Small pages next to what is written anyway are taken along: otherwise the
// rests of pages that were cut through would pile up.
func TestMerge_SmallRestsArePutTogether(t *testing.T) {
	s := newShelf(t)
	in := s.grid(1, 0, 20_000, false)
	for n := uint64(2); n < 60; n++ {
		in, _ = s.merge(0, in, s.grid(n, int64(n%17)*4096*1001, 3, true))
	}
	if pages := len(in.Manifest.Directory.Pages); pages > 60 {
		t.Errorf("%d extents lie in %d pages", s.content(in, 1).Len(), pages)
	}
}

// Memory does not grow with the manifests: of four manifests that overlap
// everywhere, four pages are open at a time, and what is written leaves in
// parts. DRC_LONG_TESTS makes them ten times as long.
func TestMerge_HoldsOnePageOfEach(t *testing.T) {
	each := 50_000
	if os.Getenv("DRC_LONG_TESTS") != "" {
		each = 500_000
	}
	s := newShelf(t)
	var inputs []manifest.Input
	for n := range uint64(4) {
		inputs = append(inputs, s.grid(n+1, int64(n)*1024, each, false))
	}
	spilled, largest := 0, 0
	m := &manifest.Merge{Inputs: inputs, Ring: s.ring, PartBytes: 64 << 10, Spill: func(name string, raw []byte) error {
		spilled, largest = spilled+1, max(largest, len(raw))
		return nil
	}}
	_, raw, err := m.Into(manifest.NewBuilder(entriesHeader(1, 4), s.agent, crypttest.Keys()))
	s.must(err)
	if m.LiveMax > 4 || m.Opened < 4*each/1053 {
		t.Errorf("%d pages open at a time, %d opened", m.LiveMax, m.Opened)
	}
	if spilled < 5 || largest > 160<<10 || len(raw) > 2<<20 {
		t.Errorf("%d parts of up to %d bytes, and %d at the end", spilled, largest, len(raw))
	}
	out, err := manifest.OpenBytes(s.ring, "merged", raw)
	s.must(err)
	extents := 0
	for _, p := range out.Directory.Pages {
		extents += p.Extents
	}
	if extents < 4*each {
		t.Errorf("%d extents", extents)
	}
}

// A merged manifest brings the key sets that its inputs' pages and segments
// need, so it can be read alone.
func TestMerge_BringsItsKeySets(t *testing.T) {
	s := newShelf(t)
	id := crypttest.Identity(t)
	sets := make([]*crypt.KeySet, 4)
	for i := range sets {
		var err error
		sets[i], err = crypt.NewKeySet(s.agent, id.Recipients(), 1)
		s.must(err)
		_, err = s.ring.Add(sets[i].Raw)
		s.must(err)
	}
	var inputs []manifest.Input
	for i := range 2 {
		b := manifest.NewBuilder(entriesHeader(uint64(i+1), uint64(i+1)), s.agent, sets[i])
		r := row(1)
		r.ID, r.KeySet = block.SegmentID{byte(i + 1)}, sets[2+i].ID
		for k := range 200 {
			b.Add(1, manifest.Extent{Extent: block.Extent{Off: int64(i)<<30 + int64(k)*8192, Len: 4096}, Segment: r, Chunk: k, ChunkLen: 4096})
		}
		inputs = append(inputs, s.input(b.Finish(), false))
	}
	first, _ := s.merge(0, inputs...)
	second, m := s.merge(0, first)
	if m.Referred != 2 || m.Opened != 0 {
		t.Fatalf("%d pages referred to, %d opened", m.Referred, m.Opened)
	}
	alone := crypttest.Ring(t)
	got, err := manifest.OpenBytes(alone, "merged", s.objects[second.Name])
	s.must(err)
	for i, ks := range sets {
		if _, ok := alone.Set(ks.ID); !ok {
			t.Errorf("key set %d is missing", i)
		}
	}
	if len(got.Directory.KeySets) != 4 {
		t.Errorf("%d key sets", len(got.Directory.KeySets))
	}
}

// What would not fit into memory is refused before anything is written.
func TestMerge_RefusesTooManyPages(t *testing.T) {
	s := newShelf(t)
	m := &manifest.Merge{Inputs: []manifest.Input{s.grid(1, 0, 5000, false), s.grid(2, 4096, 5000, false)}, Ring: s.ring, PagesMax: 9}
	if _, _, err := m.Into(manifest.NewBuilder(entriesHeader(1, 2), s.agent, crypttest.Keys())); !errors.Is(err, manifest.ErrTooManyPages) || m.Opened > 0 {
		t.Errorf("ten pages where nine are allowed: %v, %d opened", err, m.Opened)
	}
}

// A store that fails while pages are read or spilled ends the merge.
func TestMerge_FailsAsAWhole(t *testing.T) {
	s := newShelf(t)
	broken := fmt.Errorf("no")
	a, b := s.grid(1, 0, 5000, false), s.grid(2, 4096, 5000, true)
	m := &manifest.Merge{Inputs: []manifest.Input{a, b}, Ring: s.ring, PartBytes: 1, Spill: func(string, []byte) error { return broken }}
	if _, _, err := m.Into(manifest.NewBuilder(entriesHeader(1, 2), s.agent, crypttest.Keys())); err == nil {
		t.Error("a page store was not put, and the merge succeeds")
	}
	b.Page = func(format.PageRow) ([]manifest.Extent, error) { return nil, broken }
	m = &manifest.Merge{Inputs: []manifest.Input{a, b}, Ring: s.ring}
	if _, _, err := m.Into(manifest.NewBuilder(entriesHeader(1, 2), s.agent, crypttest.Keys())); err == nil {
		t.Error("a page was not read, and the merge succeeds")
	}
}
