package manifest_test

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/format/formattest"
	"drc/internal/manifest"
)

func header() format.ManifestHeader {
	return format.ManifestHeader{Group: block.GroupID{0: 0x6a}, Branch: block.BranchID{0: 0xb0}, FromN: 3, ToN: 3, From: 11, To: 29}
}

// row is the row of one of ten segments, some of them inline.
func row(i int) format.SegmentRow {
	r := format.SegmentRow{
		ID: block.SegmentID{byte(i % 10), 9}, KeySet: crypttest.Keys().ID, Profile: format.Profile{Data: 4, Parity: 2},
		Payload: 8 << 20, IndexBytes: 1000,
	}
	if i%10 == 7 {
		r.Profile, r.Payload, r.IndexBytes, r.Inline = format.Profile{}, 900, 60, 3
	}
	return r
}

// extents are n extents with gaps, zeroes and parts of chunks.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func extents(n int, seed int) []manifest.Extent {
	var out []manifest.Extent
	at := int64(seed * 4096)
	for i := range n {
		x := manifest.Extent{Extent: block.Extent{Off: at, Len: int64(4096 + i%7*512)}}
		if i%5 == 4 {
			x.Zero = true
		} else {
			x.Segment, x.Chunk, x.Offset = row(i), i, int64(i%3*512)
			x.ChunkLen = int(x.Len + x.Offset + 512)
			x.ChunkID = crypt.ChunkID{byte(i), byte(i >> 8), byte(seed)}
		}
		out = append(out, x)
		at = x.End() + int64(i%4*512)
	}
	return out
}

func build(t testing.TB, volumes map[block.VolumeIndex][]manifest.Extent, more func(*manifest.Builder)) []byte {
	t.Helper()
	b := manifest.NewBuilder(header(), crypttest.Agent(t), crypttest.Keys())
	if more != nil {
		more(b)
	}
	var order []block.VolumeIndex
	for v := range volumes {
		order = append(order, v)
	}
	slices.Sort(order)
	for _, v := range order {
		for _, x := range volumes[v] {
			b.Add(v, x)
		}
	}
	return b.Finish()
}

// load opens all pages of a volume.
func load(m *manifest.Manifest, v block.VolumeIndex, e block.Extent, raw []byte) ([]manifest.Extent, error) {
	var out []manifest.Extent
	for _, p := range m.Pages(v, e) {
		if p.Offset < 0 || p.Offset+int64(p.StoredBytes) > int64(len(raw)) {
			return nil, fmt.Errorf("a page at %d of %d bytes in %d", p.Offset, p.StoredBytes, len(raw))
		}
		page, err := m.OpenPage(p, raw[p.Offset:p.Offset+int64(p.StoredBytes)])
		if err != nil {
			return nil, err
		}
		out = append(out, page...)
	}
	return out, nil
}

var everything = block.Extent{Len: format.MaxVolumeBytes}

func TestManifest_RoundTrip(t *testing.T) {
	for name, volumes := range map[string]map[block.VolumeIndex][]manifest.Extent{
		"empty":           {},
		"one extent":      {1: extents(1, 1)},
		"many pages":      {1: extents(5000, 2)},
		"several volumes": {0: extents(3, 0), 1: extents(3000, 1), 7: extents(1025, 5), 65535: extents(2, 9)},
		"page borders":    {1: extents(1024, 0), 2: extents(2048, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			raw := build(t, volumes, nil)
			m, err := manifest.OpenBytes(crypttest.Ring(t), "manifest", raw)
			if err != nil {
				t.Fatal(err)
			}
			if h := m.Header; h.FromN != 3 || h.From != 11 || h.To != 29 || h.KeySet != crypttest.Keys().ID {
				t.Errorf("header %+v", h)
			}
			for v, want := range volumes {
				got, err := load(m, v, everything, raw)
				if err != nil || !slices.Equal(got, want) {
					t.Fatalf("volume %d: %d extents of %d, %v", v, len(got), len(want), err)
				}
			}
			if got, _ := load(m, 3, everything, raw); len(got) != 0 {
				t.Errorf("volume 3 has %d extents", len(got))
			}
		})
	}
}

// TestPages_OnlyThoseThatTouch looks at every border of every page.
func TestPages_OnlyThoseThatTouch(t *testing.T) {
	raw := build(t, map[block.VolumeIndex][]manifest.Extent{1: extents(4000, 3), 2: extents(1500, 0)}, nil)
	m, err := manifest.OpenBytes(crypttest.Ring(t), "manifest", raw)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range m.Directory.Pages {
		for _, off := range []int64{p.First - 1, p.First, p.End - 1, p.End} {
			for _, length := range []int64{1, 4096, 1 << 30} {
				e := block.Extent{Off: max(off, 0), Len: length}
				got := m.Pages(p.Volume, e)
				for _, q := range m.Directory.Pages {
					touches := q.Volume == p.Volume && q.First < e.End() && q.End > e.Off
					if slices.Contains(got, q) != touches {
						t.Fatalf("%s of volume %d: page [%d,%d) listed %t", e, p.Volume, q.First, q.End, !touches)
					}
				}
			}
		}
	}
}

// TestOpen_ReadsLittle: the directory of a large manifest does not need its
// pages.
func TestOpen_ReadsLittle(t *testing.T) {
	raw := build(t, map[block.VolumeIndex][]manifest.Extent{1: extents(30000, 3)}, nil)
	whole := manifest.BytesReader("manifest", raw)
	var read int64
	_, err := manifest.Open(crypttest.Ring(t), "manifest", int64(len(raw)), func(off, n int64) ([]byte, error) {
		read += n
		return whole(off, n)
	})
	if err != nil || read > 70<<10 || len(raw) < 150<<10 {
		t.Errorf("%d bytes read of %d, %v", read, len(raw), err)
	}
}

// TestManifest_PagesOfAnotherHome: a second manifest refers to pages of the
// first, under another key set, and brings that key set.
func TestManifest_PagesOfAnotherHome(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	sealed, err := crypt.NewKeySet(agent, id.Recipients(), 1)
	if err != nil {
		t.Fatal(err)
	}
	home := manifest.NewBuilder(header(), agent, sealed)
	want := extents(2000, 1)
	for _, x := range want {
		home.Add(1, x)
	}
	homeRaw := home.Finish()
	ring := crypttest.Ring(t)
	if _, err := manifest.OpenBytes(ring, "home", homeRaw); !errors.Is(err, crypt.ErrWrongKey) {
		t.Fatalf("without its key set: %v", err)
	}
	both := crypttest.Ring(t)
	if _, err := both.Add(sealed.Raw); err != nil {
		t.Fatal(err)
	}
	first, err := manifest.OpenBytes(both, "home", homeRaw)
	if err != nil {
		t.Fatal(err)
	}
	raw := build(t, map[block.VolumeIndex][]manifest.Extent{2: extents(10, 0)}, func(b *manifest.Builder) {
		b.AddKeySet(sealed.Raw)
		for _, p := range first.Directory.Pages {
			p.Home, p.HomeName, p.HomeKeySet = first.Header.ID, "groups/g/manifests/home", first.Header.KeySet
			b.AddPage(p)
		}
	})
	m, err := manifest.OpenBytes(ring, "base", raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Directory.KeySets) != 1 {
		t.Errorf("%d key sets", len(m.Directory.KeySets))
	}
	got, err := load(m, 1, everything, homeRaw)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%d extents of %d, %v", len(got), len(want), err)
	}
	if own, err := load(m, 2, everything, raw); err != nil || !slices.Equal(own, extents(10, 0)) {
		t.Errorf("own page: %v", err)
	}
	// A page taken for another one, or for one of another home, does not open.
	p := m.Pages(1, everything)[0]
	page := homeRaw[p.Offset : p.Offset+int64(p.StoredBytes)]
	p.Part++
	if _, err := m.OpenPage(p, page); err == nil {
		t.Error("a page opens as another part")
	}
	p.Part--
	p.Home[0] ^= 1
	if _, err := m.OpenPage(p, page); err == nil {
		t.Error("a page opens as another manifest's")
	}
}

func TestOpen_NotWithTheWrongRing(t *testing.T) {
	raw := build(t, map[block.VolumeIndex][]manifest.Extent{1: extents(10, 1)}, nil)
	id := crypttest.Identity(t)
	if _, err := manifest.OpenBytes(crypt.NewRing(id), "manifest", raw); !errors.Is(err, crypt.ErrWrongKey) {
		t.Errorf("a ring without the key set: %v", err)
	}
	wrong := crypttest.Keys()
	wrong.Index[0] ^= 1
	ring := crypt.NewRing(id)
	ring.AddOwn(wrong)
	if _, err := manifest.OpenBytes(ring, "manifest", raw); err == nil || !strings.Contains(err.Error(), "authentication") {
		t.Errorf("another index key: %v", err)
	}
	other, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	ring = crypt.NewRing(other)
	ring.AddOwn(crypttest.Keys())
	if _, err := manifest.OpenBytes(ring, "manifest", raw); err == nil {
		t.Error("another repository's identity opens it")
	}
	// An agent's ring has the index keys: it may merge manifests.
	agent := crypt.NewAgentRing(crypttest.Agent(t), id.RootPublic)
	agent.AddOwn(&crypt.KeySet{ID: crypttest.Keys().ID, Index: crypttest.Keys().Index})
	if _, err := manifest.OpenBytes(agent, "manifest", raw); err != nil {
		t.Errorf("an agent: %v", err)
	}
}

func TestOpen_EveryChangedBitIsFound(t *testing.T) {
	ring := crypttest.Ring(t)
	want := extents(20, 1)
	raw := build(t, map[block.VolumeIndex][]manifest.Extent{1: want}, nil)
	formattest.Flips(raw, func(bit int, changed []byte) {
		m, err := manifest.OpenBytes(ring, "manifest", changed)
		if err == nil {
			_, err = load(m, 1, everything, changed)
		}
		if err == nil {
			t.Fatalf("bit %d changed and not found", bit)
		}
	})
	for n := range len(raw) {
		if _, err := manifest.OpenBytes(ring, "manifest", raw[:n]); err == nil {
			t.Fatalf("cut to %d bytes and not found", n)
		}
	}
}

func TestManifest_GoldenVector(t *testing.T) {
	formattest.Frozen(t, "manifest", func() []byte {
		return build(t, map[block.VolumeIndex][]manifest.Extent{1: extents(6, 1), 2: extents(3, 0)}, func(b *manifest.Builder) {
			b.AddKeySet(formattest.Bytes(t, "keyset"))
			b.AddPage(format.PageRow{Volume: 0, First: 0, End: 4096, Extents: 1, Home: block.ID{1}, HomeName: "elsewhere", HomeKeySet: block.ID{2}, Offset: 100, StoredBytes: 200, PlainBytes: 300, Part: 4})
		})
	}, func(raw []byte) (any, error) {
		m, err := manifest.OpenBytes(crypttest.Ring(t), "manifest", raw)
		if err != nil {
			return nil, err
		}
		one, err1 := load(m, 1, everything, raw)
		two, err2 := load(m, 2, everything, raw)
		return map[string]any{"header": m.Header, "directory": m.Directory, "volume_1": one, "volume_2": two}, errors.Join(err1, err2)
	})
}

// FuzzOpen gives Open hostile bytes, and signs and seals them so that they get
// behind signature and seal.
func FuzzOpen(f *testing.F) {
	f.Add(formattest.Bytes(f, "manifest"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := manifest.OpenBytes(crypttest.Ring(t), "manifest", raw)
		if err != nil {
			return
		}
		for _, p := range m.Directory.Pages {
			_, _ = load(m, p.Volume, everything, raw)
		}
	})
}

func FuzzOpenDirectory(f *testing.F) {
	dir := format.Directory{Pages: []format.PageRow{{Volume: 1, First: 0, End: 10, Extents: 1, StoredBytes: 10, PlainBytes: 10}}}
	plain := dir.Encode()
	f.Add(append([]byte{0, byte(len(plain)), 0, 0, 0}, plain...))
	f.Fuzz(func(t *testing.T, body []byte) {
		agent, keys := crypttest.Agent(t), crypttest.Keys()
		h := header()
		h.ID, h.KeySet, h.Cert = block.ID{1}, keys.ID, agent.CertRaw
		head := h.Encode()
		ad := append(append([]byte("drc manifest part v1"), h.ID[:]...), 0xff, 0xff, 0xff, 0xff)
		sealed := crypt.NewSealer(keys.Index.Derive(h.ID[:], crypt.LabelManifest)).Seal(nil, format.DirectoryPart, body, ad)
		signed := append(slices.Clone(head), sealed...)
		tail := format.ManifestTail{HeaderBytes: uint32(len(head)), DirectoryBytes: uint32(len(sealed))}
		copy(tail.Signature[:], agent.Sign(crypt.ContextManifest, signed))
		m, err := manifest.OpenBytes(crypttest.Ring(t), "manifest", tail.Append(signed))
		if err != nil {
			return
		}
		for _, p := range m.Directory.Pages {
			_, _ = load(m, p.Volume, everything, signed)
		}
	})
}

// A directory may name any place, and its author need not be honest: what is
// not in the manifest is damage.
func TestBytesReader_RefusesWhatIsNotThere(t *testing.T) {
	read := manifest.BytesReader("m", make([]byte, 100))
	for _, x := range [][2]int64{{0, 101}, {101, 0}, {100, 1}, {-1, 1}, {1, -1}, {math.MaxInt64, 1}, {math.MaxInt64 - 5, 1000}, {1, math.MaxInt64}} {
		if p, err := read(x[0], x[1]); err == nil {
			t.Errorf("%d bytes from %d: %d bytes", x[1], x[0], len(p))
		}
	}
	for _, x := range [][2]int64{{0, 0}, {0, 100}, {100, 0}, {40, 60}} {
		if p, err := read(x[0], x[1]); err != nil || int64(len(p)) != x[1] {
			t.Errorf("%d bytes from %d: %d bytes, %v", x[1], x[0], len(p), err)
		}
	}
}
