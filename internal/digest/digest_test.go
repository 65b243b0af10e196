package digest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/digest"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var group = block.GroupID{0: 0x6a}

// store holds digests by name.
type store struct {
	t       testing.TB
	objects map[string][]byte
	fetched atomic.Int64
}

func newStore(t testing.TB) *store { return &store{t: t, objects: map[string][]byte{}} }

func (s *store) fetch(_ context.Context, name string, off, n int64, check func([]byte) error) error {
	raw, ok := s.objects[name]
	if !ok {
		return fmt.Errorf("there is no %s", name)
	}
	if off < 0 || n < 0 || off+n > int64(len(raw)) {
		return fmt.Errorf("%s has no bytes %d+%d", name, off, n)
	}
	s.fetched.Add(1)
	return check(bytes.Clone(raw[off : off+n]))
}

func open(ring *crypt.Ring, name string, raw []byte) (*digest.Digest, error) {
	n, id, ok := format.ParseDigestName(group, name)
	if !ok {
		return nil, fmt.Errorf("%s is no name of a digest", name)
	}
	return digest.Open(ring, name, digest.Place{Group: group, N: n, ID: id}, int64(len(raw)), func(off, n int64) ([]byte, error) {
		if off < 0 || n < 0 || off+n > int64(len(raw)) {
			return nil, errors.New("read past its end")
		}
		return bytes.Clone(raw[off : off+n]), nil
	})
}

func (s *store) open(ring *crypt.Ring, name string) *digest.Digest {
	s.t.Helper()
	d, err := open(ring, name, s.objects[name])
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// entry is what entry n says: most only extend, a few say more.
func entry(n uint64) (format.DigestRow, [][]byte) {
	r := rand.New(rand.NewPCG(n, 1))
	it := &format.Items{Range: &format.Range{Branch: block.BranchID{0: 0xb0}, From: block.Seq(3*n - 2), To: block.Seq(3 * n), Time: int64(1e9*n) - r.Int64N(1e10), Dates: []format.StoreDate{{Time: 1}}}}
	if n == 1 {
		it.Group = &format.Group{Name: "g", Branch: block.BranchID{0: 0xb0}, MinChunk: 64, MaxChunk: 4096}
		it.Volumes = []format.Volume{{Index: 1, ID: block.VolumeID{0: 7}, Name: "v", SizeBytes: 4096, SectorSize: 512}}
	}
	switch r.IntN(12) {
	case 0:
		it.Checkpoints = []format.NamedCheckpoint{{Name: fmt.Sprint("c", n), Seq: it.Range.To, Time: 5}}
	case 1:
		it.Range = nil
	case 2:
		it.Partials = []format.Partial{{Volume: 1, Remaining: []block.Extent{{Off: 0, Len: 512}}}}
	case 3:
		it.Reference = &format.ManifestReference{ID: block.ID{byte(n)}, Bytes: 99}
	case 4:
		it.Manifest = []byte("a manifest")
		it.Segments = []format.InlineSegment{{ID: block.SegmentID{byte(n)}, Payload: []byte("a segment")}}
	}
	var sets [][]byte
	if r.IntN(20) == 0 || n == 1 {
		sets = append(sets, fmt.Appendf(nil, "key set of entry %d", n))
	}
	places := []format.DigestPlace{{Store: block.ID{1}, Index: n + n/100}, {Store: block.ID{2}, Index: n}}
	places = append([]format.DigestPlace(nil), places[:r.IntN(3)]...)
	return digest.Row(n, format.HashOf(fmt.Appendf(nil, "value %d", n)), format.Epoch{Number: n/100 + 1, Random: block.ID{3}}, it, places), sets
}

// check compares all that a digest says with what was added.
func check(t *testing.T, s *store, d *digest.Digest) {
	t.Helper()
	ctx := context.Background()
	var marks []format.DigestRow
	var sets [][]byte
	n := uint64(0)
	for page := range d.Pages() {
		rows, err := d.Entries(ctx, s.fetch, page)
		if err != nil {
			t.Fatal(err)
		}
		minTime, maxTime, last := int64(math.MaxInt64), int64(math.MinInt64), block.Seq(0)
		for _, r := range rows {
			n++
			want, keySets := entry(n)
			if !reflect.DeepEqual(r, want) {
				t.Fatalf("entry %d is %+v, and was %+v", n, r, want)
			}
			it := r.Items
			if it.Group != nil || len(it.Volumes)+len(it.Checkpoints)+len(it.GapBegins)+len(it.GapEnds) > 0 {
				marks = append(marks, r)
			}
			sets = append(sets, keySets...)
			if it.Range != nil {
				minTime, maxTime, last = min(minTime, it.Range.Time), max(maxTime, it.Range.Time), it.Range.To
			}
		}
		ref, full, err := d.Ref(ctx, s.fetch, page)
		if err != nil {
			t.Fatal(err)
		}
		if full != (len(rows) == format.DigestRows) || full && (ref.MinTime != minTime || ref.MaxTime != maxTime || ref.Last != last) {
			t.Fatalf("page %d of %d rows, from %d to %s, is described as %t, %+v", page, len(rows), minTime, last, full, ref)
		}
	}
	if n != d.Header.N {
		t.Fatalf("%d entries of %d", n, d.Header.N)
	}
	if have, err := d.Marks(ctx, s.fetch); err != nil || !reflect.DeepEqual(have, marks) {
		t.Fatalf("%d marks, and there were %d: %v", len(have), len(marks), err)
	}
	if have, err := d.KeySets(ctx, s.fetch); err != nil || !reflect.DeepEqual(have, sets) {
		t.Fatalf("%d key sets, and there were %d: %v", len(have), len(sets), err)
	}
}

func logs() []format.DigestLog {
	return []format.DigestLog{{Store: block.ID{1}, Next: 9, Last: format.Hash{1}, N: 5, Index: 7}}
}

// Digests made at any places, by one builder or by one after the other that each
// goes on from the newest digest, say what was added; and finding something out
// takes a few requests, however many entries there are.
func TestDigest_SaysWhatWasAdded(t *testing.T) {
	for _, seed := range []uint64{1, 2, 3} {
		r := rand.New(rand.NewPCG(seed, 0))
		s, ring, agent := newStore(t), crypttest.Ring(t), crypttest.Agent(t)
		b := digest.NewBuilder(group)
		var d *digest.Digest
		top := 400 + r.Uint64N(2000)
		for b.N() < top {
			for range 1 + r.IntN(900) {
				row, sets := entry(b.N() + 1)
				b.Add(row, sets)
			}
			name, raw := b.Finish(agent, crypttest.Keys(), logs())
			s.objects[name] = raw
			d = s.open(ring, name)
			check(t, s, d)
			if r.IntN(2) == 0 {
				b = d.Builder()
			}
		}
		if !reflect.DeepEqual(d.Logs, logs()) || d.Header.Hash != b.Hash() || b.Hash() != format.HashOf(fmt.Appendf(nil, "value %d", b.N())) {
			t.Errorf("the logs are %+v, the hash %s", d.Logs, d.Header.Hash)
		}
	}
}

// Beyond 65,536 entries references to pages are in pages, too.
func TestDigest_OfVeryManyEntries(t *testing.T) {
	s, ring, agent := newStore(t), crypttest.Ring(t), crypttest.Agent(t)
	b := digest.NewBuilder(group)
	const top = 256*256 + 3*256 + 17
	var name string
	sizes := map[uint64]int{}
	for b.N() < top {
		row, sets := entry(b.N() + 1)
		b.Add(row, sets)
		if n := b.N(); n%64 != 0 && n != top {
			continue
		}
		var raw []byte
		name, raw = b.Finish(agent, crypttest.Keys(), logs())
		s.objects[name] = raw
		sizes[b.N()] = len(raw)
	}
	d := s.open(ring, name)
	check(t, s, d)
	s.fetched.Store(0)
	for _, page := range []uint64{0, 100, 255, 256, 258} {
		if _, err := d.Entries(context.Background(), s.fetch, page); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.fetched.Load(); n > 10 {
		t.Errorf("%d requests for five pages", n)
	}
	if a, b := sizes[640], sizes[65472]; b > 4*a+64<<10 {
		t.Errorf("a digest of 640 entries has %d bytes, one of 65,472 %d", a, b)
	}
}

// small is a digest with pages and its name.
func small(t testing.TB) (s *store, name string) {
	s = newStore(t)
	b := digest.NewBuilder(group)
	for range 300 {
		row, sets := entry(b.N() + 1)
		b.Add(row, sets)
	}
	name, raw := b.Finish(crypttest.Agent(t), crypttest.Keys(), logs())
	s.objects[name] = raw
	return s, name
}

// A change of any byte is noticed, or changes nothing of what is said.
func TestDigest_ChangedBytesAreRefused(t *testing.T) {
	s, name := small(t)
	good := s.objects[name]
	turn := rand.IntN(8) // each run looks at other bytes
	formattest.Spots(good, func(at int, changed []byte) {
		if at%8 != turn && at > 400 && at < len(good)-400 {
			return
		}
		d, err := open(crypttest.Ring(t), name, changed)
		if err != nil {
			return
		}
		bad := &store{t: t, objects: map[string][]byte{name: changed}}
		ctx := context.Background()
		if _, err := d.Entries(ctx, bad.fetch, 0); err != nil {
			return
		}
		if sets, err := d.KeySets(ctx, bad.fetch); err != nil || len(sets) != len(keySetsOf(300)) {
			return
		}
		t.Errorf("a change at byte %d of %d goes unnoticed", at, len(good))
	})
	for n := range len(good) {
		if _, err := open(crypttest.Ring(t), name, good[:n]); err == nil {
			t.Fatalf("cut to %d of %d bytes it is accepted", n, len(good))
		}
	}
}

func keySetsOf(n uint64) (out [][]byte) {
	for i := range n {
		_, sets := entry(i + 1)
		out = append(out, sets...)
	}
	return out
}

// A digest counts only at its own place, signed by an agent of the repository.
func TestDigest_OfAnotherPlaceIsRefused(t *testing.T) {
	s, name := small(t)
	raw := s.objects[name]
	n, id, _ := format.ParseDigestName(group, name)
	read := func(off, n int64) ([]byte, error) { return raw[off : off+n], nil }
	for what, at := range map[string]digest.Place{
		"another group": {Group: block.GroupID{1}, N: n, ID: id}, "another entry": {Group: group, N: n + 1, ID: id}, "another id": {Group: group, N: n, ID: block.ID{1}},
	} {
		if _, err := digest.Open(crypttest.Ring(t), name, at, int64(len(raw)), read); err == nil {
			t.Errorf("it is accepted as that of %s", what)
		}
	}
	stranger, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(crypt.NewRing(stranger), name, raw); err == nil {
		t.Error("it is accepted in another repository")
	}
}

func TestDigest_GoldenVector(t *testing.T) {
	var name string
	raw := formattest.Frozen(t, "digest", func() []byte {
		s, name := small(t)
		return s.objects[name]
	}, func(raw []byte) (any, error) {
		h, _, err := format.DecodeDigestHeader("digest", raw)
		if err != nil {
			return nil, err
		}
		name = format.DigestName(group, h.N, h.ID)
		d, err := open(crypttest.Ring(t), name, raw)
		if err != nil {
			return nil, err
		}
		s := &store{t: t, objects: map[string][]byte{name: raw}}
		marks, err := d.Marks(context.Background(), s.fetch)
		return map[string]any{"name": name, "logs": d.Logs, "marks": marks}, err
	})
	s := &store{t: t, objects: map[string][]byte{name: raw}}
	check(t, s, s.open(crypttest.Ring(t), name))
}

func FuzzOpen(f *testing.F) {
	s, name := small(f)
	f.Add(s.objects[name])
	f.Fuzz(func(t *testing.T, raw []byte) {
		_, _ = open(crypttest.Ring(t), name, raw) // must not panic
	})
}

func BenchmarkFinish(b *testing.B) {
	agent := crypttest.Agent(b)
	x := digest.NewBuilder(group)
	for range 20_000 {
		row, sets := entry(x.N() + 1)
		x.Add(row, sets)
	}
	bytes := 0
	for b.Loop() {
		for range 64 {
			row, sets := entry(x.N() + 1)
			x.Add(row, sets)
		}
		_, raw := x.Finish(agent, crypttest.Keys(), logs())
		bytes += len(raw)
	}
	b.ReportMetric(float64(bytes)/float64(b.N)/64, "B/entry")
}
