package blocktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"drc/internal/block"
)

// suiteBytes is the part of the device that the suite uses.
const suiteBytes = 4 << 20

// Run checks that devices keep the contract of block.Device. newDevice returns a
// new one for each test: writable, at least 4 MiB long and all zeroes. It
// arranges for its own cleanup.
func Run(t *testing.T, newDevice func(t *testing.T) block.Device) {
	tests := []struct {
		name string
		run  func(*testing.T, *device)
	}{
		{"Geometry_IsSane", testGeometry},
		{"New_ReadsAsZeroes", testNew},
		{"Write_ReadsBack", testReadBack},
		{"Write_KeepsItsNeighbours", testNeighbours},
		{"Write_DoesNotKeepTheBuffer", testBuffer},
		{"Write_NewestWins", testNewestWins},
		{"Zero_ReadsAsZeroes", testZero},
		{"Zero_OfAllIsWhole", testZeroAll},
		{"Range_PastTheEndFailsWhole", testRange},
		{"Range_UpToTheEndWorks", testLastSector},
		{"Alignment_IsRequired", testAlignment},
		{"Flush_Succeeds", testFlush},
		{"Allocation_CoversWithoutGaps", testAllocation},
		{"Allocation_StopsWhenTold", testAllocationStops},
		{"Random_MatchesModel", testRandom},
		{"Concurrent_DisjointMatchesModel", testConcurrent},
		{"Concurrent_OverlappingTakeEffectWhole", testWhole},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := newDevice(t)
			g := d.Geometry()
			if g.SizeBytes < suiteBytes || g.ReadOnly {
				t.Fatalf("the suite needs a writable device of at least %d bytes, not %+v", suiteBytes, g)
			}
			test.run(t, &device{Device: d, sector: int64(g.SectorSize)})
		})
	}
}

// device is the device under test with helpers that must succeed.
type device struct {
	block.Device
	sector int64
}

func (d *device) read(t testing.TB, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xdb}, int(n)) // whatever is not filled shows
	if err := d.ReadAt(t.Context(), p, off); err != nil {
		t.Fatalf("read %d+%d: %v", off, n, err)
	}
	return p
}

func (d *device) write(t testing.TB, p []byte, off int64) {
	t.Helper()
	if err := d.WriteAt(t.Context(), p, off, block.WriteOptions{}); err != nil {
		t.Fatalf("write %d+%d: %v", off, len(p), err)
	}
}

func (d *device) zero(t testing.TB, e block.Extent) {
	t.Helper()
	if err := d.Zero(t.Context(), e, block.ZeroOptions{}); err != nil {
		t.Fatalf("zero %s: %v", e, err)
	}
}

// expect compares [off, off+len(want)) with want.
func (d *device) expect(t testing.TB, want []byte, off int64) {
	t.Helper()
	got := d.read(t, off, int64(len(want)))
	if i := mismatch(got, want); i >= 0 {
		t.Fatalf("byte %d is %#02x, want %#02x (read %d+%d)", off+int64(i), got[i], want[i], off, len(want))
	}
}

func mismatch(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// pattern is n bytes that tell their place and the seed.
func pattern(seed uint64, n int64) []byte {
	p := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64()|1)
	}
	return p
}

func testGeometry(t *testing.T, d *device) {
	g := d.Geometry()
	if g.SectorSize != 512 && g.SectorSize != 4096 || g.SizeBytes%int64(g.SectorSize) != 0 {
		t.Fatalf("geometry %+v", g)
	}
	if again := d.Geometry(); again != g {
		t.Fatalf("geometry changed from %+v to %+v", g, again)
	}
}

func testNew(t *testing.T, d *device) {
	d.expect(t, make([]byte, suiteBytes), 0)
	d.expect(t, make([]byte, d.sector), d.Geometry().SizeBytes-d.sector)
}

func testReadBack(t *testing.T, d *device) {
	for i, n := range []int64{d.sector, 4096, 12288, 65536, 1 << 20} {
		p := pattern(uint64(i), n)
		off := int64(i) * 4096 * 3
		d.write(t, p, off)
		d.expect(t, p, off)
	}
}

func testNeighbours(t *testing.T, d *device) {
	all := pattern(1, 64*d.sector)
	d.write(t, all, 0)
	for _, i := range []int64{0, 1, 7, 8, 31, 63} {
		p := pattern(100+uint64(i), d.sector)
		copy(all[i*d.sector:], p)
		d.write(t, p, i*d.sector)
	}
	d.expect(t, all, 0)
}

func testBuffer(t *testing.T, d *device) {
	p := pattern(1, 8192)
	want := bytes.Clone(p)
	d.write(t, p, 4096)
	clear(p)
	d.expect(t, want, 4096)
}

func testNewestWins(t *testing.T, d *device) {
	model := make([]byte, 32*d.sector)
	for i, e := range []block.Extent{{Off: 0, Len: 16}, {Off: 4, Len: 4}, {Off: 6, Len: 20}, {Off: 0, Len: 1}, {Off: 25, Len: 7}, {Off: 8, Len: 8}} {
		p := pattern(uint64(i), e.Len*d.sector)
		copy(model[e.Off*d.sector:], p)
		d.write(t, p, e.Off*d.sector)
		d.expect(t, model, 0)
	}
}

func testZero(t *testing.T, d *device) {
	model := pattern(1, 1<<20)
	d.write(t, model, 0)
	for _, o := range []block.ZeroOptions{{}, {FUA: true}, {NoHole: true}, {Fast: true}, {FUA: true, NoHole: true}} {
		for _, e := range []block.Extent{{Off: 0, Len: d.sector}, {Off: 3 * d.sector, Len: 17 * d.sector}, {Off: 65536, Len: 65536}} {
			err := d.Zero(t.Context(), e, o)
			if o.Fast && errors.Is(err, block.ErrUnsupported) {
				continue
			}
			if err != nil {
				t.Fatalf("zero %s %+v: %v", e, o, err)
			}
			clear(model[e.Off:e.End()])
			d.expect(t, model, 0)
			copy(model, pattern(2, e.End()))
			d.write(t, model[:e.End()], 0)
		}
	}
}

func testZeroAll(t *testing.T, d *device) {
	size := d.Geometry().SizeBytes
	d.write(t, pattern(1, 65536), 0)
	d.write(t, pattern(2, d.sector), size-d.sector)
	d.zero(t, block.Extent{Off: 0, Len: size})
	d.expect(t, make([]byte, suiteBytes), 0)
	d.expect(t, make([]byte, d.sector), size-d.sector)
}

func testRange(t *testing.T, d *device) {
	size := d.Geometry().SizeBytes
	last := pattern(1, d.sector)
	d.write(t, last, size-d.sector)
	for _, e := range []block.Extent{
		{Off: size, Len: d.sector},
		{Off: size - d.sector, Len: 2 * d.sector},
		{Off: 1<<62 - 1<<62%d.sector, Len: d.sector},
		{Off: -d.sector, Len: d.sector},
	} {
		check := func(what string, err error) {
			if !errors.Is(err, block.ErrOutOfRange) {
				t.Errorf("%s %s of %d: %v, want ErrOutOfRange", what, e, size, err)
			}
		}
		check("read", d.ReadAt(t.Context(), make([]byte, e.Len), e.Off))
		check("write", d.WriteAt(t.Context(), make([]byte, e.Len), e.Off, block.WriteOptions{}))
		check("zero", d.Zero(t.Context(), e, block.ZeroOptions{}))
		check("allocation", d.Allocation(t.Context(), e, func(block.Extent, bool) bool { return true }))
	}
	d.expect(t, last, size-d.sector)
}

func testLastSector(t *testing.T, d *device) {
	off := d.Geometry().SizeBytes - 2*d.sector
	p := pattern(1, 2*d.sector)
	d.write(t, p, off)
	d.expect(t, p, off)
	d.zero(t, block.Extent{Off: off + d.sector, Len: d.sector})
	clear(p[d.sector:])
	d.expect(t, p, off)
}

func testAlignment(t *testing.T, d *device) {
	whole := pattern(1, 4*d.sector)
	d.write(t, whole, 0)
	for _, e := range []block.Extent{{Off: 1, Len: d.sector}, {Off: 0, Len: d.sector - 1}, {Off: d.sector, Len: d.sector + 8}, {Off: d.sector / 2, Len: d.sector / 2}} {
		check := func(what string, err error) {
			if !errors.Is(err, block.ErrMisaligned) {
				t.Errorf("%s %s: %v, want ErrMisaligned", what, e, err)
			}
		}
		check("read", d.ReadAt(t.Context(), make([]byte, e.Len), e.Off))
		check("write", d.WriteAt(t.Context(), make([]byte, e.Len), e.Off, block.WriteOptions{}))
		check("zero", d.Zero(t.Context(), e, block.ZeroOptions{}))
	}
	d.expect(t, whole, 0)
}

func testFlush(t *testing.T, d *device) {
	p := pattern(1, 8192)
	if err := d.WriteAt(t.Context(), p, 0, block.WriteOptions{FUA: true}); err != nil {
		t.Fatal(err)
	}
	d.write(t, p, 8192)
	for range 3 {
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	d.expect(t, p, 0)
	d.expect(t, p, 8192)
}

func testAllocation(t *testing.T, d *device) {
	model := make([]byte, suiteBytes)
	for _, e := range []block.Extent{{Off: 65536, Len: 65536}, {Off: 1 << 20, Len: 4096}, {Off: 3 << 20, Len: 512 << 10}} {
		copy(model[e.Off:], pattern(uint64(e.Off), e.Len))
		d.write(t, model[e.Off:e.End()], e.Off)
	}
	hole := block.Extent{Off: 3<<20 + 65536, Len: 65536}
	clear(model[hole.Off:hole.End()])
	d.zero(t, hole)
	for _, e := range []block.Extent{{Off: 0, Len: suiteBytes}, {Off: 65536 + d.sector, Len: d.sector}, {Off: 4096, Len: 1 << 20}, {Off: d.sector, Len: 0}} {
		at := e.Off
		err := d.Allocation(t.Context(), e, func(piece block.Extent, hole bool) bool {
			if piece.Off != at || piece.Len <= 0 || piece.End() > e.End() {
				t.Errorf("allocation of %s: piece %s does not follow %d", e, piece, at)
			}
			at = piece.End()
			if hole && !allZero(model[piece.Off:piece.End()]) {
				t.Errorf("allocation of %s: %s is called a hole and has data", e, piece)
			}
			return true
		})
		if err != nil {
			t.Fatalf("allocation of %s: %v", e, err)
		}
		if at != e.End() {
			t.Errorf("allocation of %s ends at %d", e, at)
		}
	}
	d.expect(t, model, 0)
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

func testAllocationStops(t *testing.T, d *device) {
	d.write(t, pattern(1, 65536), 65536)
	calls := 0
	err := d.Allocation(t.Context(), block.Extent{Off: 0, Len: suiteBytes}, func(block.Extent, bool) bool {
		calls++
		return false
	})
	if err != nil || calls != 1 {
		t.Fatalf("%d calls after the first said stop, err %v", calls-1, err)
	}
}

// step does one random request within [base, base+len(model)) and keeps model
// in step.
func step(ctx context.Context, d *device, r *rand.Rand, model []byte, base int64) error {
	sectors := int64(len(model)) / d.sector
	n := 1 + r.Int64N(min(sectors, 64))
	off := r.Int64N(sectors-n+1) * d.sector
	n *= d.sector
	part := model[off : off+n]
	switch r.IntN(10) {
	case 0, 1, 2, 3:
		copy(part, pattern(r.Uint64(), n))
		return d.WriteAt(ctx, part, base+off, block.WriteOptions{FUA: r.IntN(16) == 0})
	case 4, 5:
		clear(part)
		return d.Zero(ctx, block.Extent{Off: base + off, Len: n}, block.ZeroOptions{NoHole: r.IntN(2) == 0})
	case 6:
		return d.Flush(ctx)
	default:
		got := bytes.Repeat([]byte{0xdb}, int(n))
		if err := d.ReadAt(ctx, got, base+off); err != nil {
			return err
		}
		if i := mismatch(got, part); i >= 0 {
			return fmt.Errorf("byte %d is %#02x, want %#02x", base+off+int64(i), got[i], part[i])
		}
		return nil
	}
}

func testRandom(t *testing.T, d *device) {
	r := rand.New(rand.NewPCG(7, 7))
	model := make([]byte, 1<<20)
	for i := range 500 {
		if err := step(t.Context(), d, r, model, 0); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	d.expect(t, model, 0)
}

func testConcurrent(t *testing.T, d *device) {
	const workers, share = 8, suiteBytes / 8
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 3))
			model, base := make([]byte, share), int64(w)*share
			for i := range 150 {
				if err := step(t.Context(), d, r, model, base); err != nil {
					t.Errorf("worker %d, step %d: %v", w, i, err)
					return
				}
			}
			got := make([]byte, share)
			if err := d.ReadAt(t.Context(), got, base); err != nil {
				t.Errorf("worker %d: %v", w, err)
			} else if i := mismatch(got, model); i >= 0 {
				t.Errorf("worker %d: in the end byte %d is %#02x, want %#02x", w, base+int64(i), got[i], model[i])
			}
		})
	}
	wg.Wait()
}

// testWhole lets writers of the same range race: a reader never sees a mixture.
func testWhole(t *testing.T, d *device) {
	const n = 128 << 10
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(w + 1)}, n)
			got := make([]byte, n)
			for i := range 40 {
				var err error
				if i%5 == 4 {
					err = d.Zero(t.Context(), block.Extent{Off: 4096, Len: n}, block.ZeroOptions{})
				} else {
					err = d.WriteAt(t.Context(), p, 4096, block.WriteOptions{})
				}
				if err == nil {
					err = d.ReadAt(t.Context(), got, 4096)
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
					return
				}
				if len(bytes.Trim(got, string(got[:1]))) != 0 {
					t.Errorf("worker %d read a mixture of two requests", w)
					return
				}
			}
		})
	}
	wg.Wait()
}
