package vbuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

var bitmapVolumes = []BitmapVolume{{Index: 1, SizeBytes: 3 << 30}, {Index: 4, SizeBytes: 1<<20 + 512}}

func mustBitmap(t testing.TB, b *Buffer) *Bitmap {
	t.Helper()
	m, err := b.Bitmap(context.Background(), testGroup)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// marked reports whether all of an extent is in a bitmap's regions.
func marked(m *Bitmap, v block.VolumeIndex, e block.Extent) bool {
	for _, r := range m.Regions(v) {
		if r.Off <= e.Off && e.End() <= r.End() {
			return true
		}
	}
	return false
}

// TestBitmap_NothingMarkedIsLostInCrashes lets bitmaps live through kills and
// power cuts at any of their steps: what was promised is there, and a bitmap that
// was left does not count.
func TestBitmap_NothingMarkedIsLostInCrashes(t *testing.T) {
	for seed := range uint64(*crashSeeds) {
		for disks := 1; disks <= 2; disks++ {
			t.Run(fmt.Sprintf("seed%d/disks%d", seed, disks), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 77))
				mem := vfs.NewMem()
				o := testOptions(mem, disks)
				b := mustOpen(t, o)
				m := mustBitmap(t, b)
				type mark struct {
					v block.VolumeIndex
					e block.Extent
				}
				var promised []mark // since the last activation began
				active := 0         // 0 no, 1 yes, 2 either: a crash came in between
				for life := range 12 {
					if m.Active() { // found so: it is read, and given up
						if err := m.Mark(context.Background(), 1, block.Extent{Len: 1}); err == nil {
							t.Fatal("a bitmap that was found active takes marks")
						}
						if err := m.Deactivate(); err != nil {
							t.Fatal(err)
						}
						active, promised = 0, nil
					}
					if err := m.Prepare(bitmapVolumes); err != nil {
						t.Fatal(err)
					}
					left := rng.IntN(40)
					o.FS.(*vfs.Mem).SetHook(func(vfs.Op, string) error {
						if left--; left < 0 {
							return errPowerCut
						}
						return nil
					})
					for range 1 + rng.IntN(20) {
						var err error
						x := mark{v: bitmapVolumes[rng.IntN(2)].Index}
						x.e.Len = 1 + rng.Int64N(200<<10)
						x.e.Off = rng.Int64N(1 << 20)
						if x.v == 1 && rng.IntN(2) == 0 {
							x.e.Off = 2<<30 - 100<<10 + rng.Int64N(200<<10)
						} else if x.v == 4 {
							x.e.Len = min(x.e.Len, 1<<20+512-x.e.Off)
						}
						switch {
						case !m.Active() && rng.IntN(2) == 0:
							m.Forget()
							m.Add(x.v, x.e)
							before := promised
							promised = append(promised, x)
							if active == 0 {
								promised = []mark{x}
							}
							if err = m.Activate(time.Unix(5, 0)); err == nil {
								active = 1
							} else if active == 0 {
								active, promised = 2, before
							}
						case m.Active() && rng.IntN(8) == 0:
							if err = m.Deactivate(); err == nil {
								active, promised = 0, nil
							} else {
								active = 2
							}
						case m.Active():
							if err = m.Mark(context.Background(), x.v, x.e); err == nil {
								promised = append(promised, x)
							}
						}
						if err != nil && left >= 0 {
							t.Fatalf("life %d: %v", life, err)
						}
						if left < 0 {
							break
						}
					}
					m.Close()
					old := o.FS.(*vfs.Mem)
					old.SetHook(nil)
					var next *vfs.Mem
					if rng.IntN(3) == 0 {
						next = old.Kill()
					} else {
						next = old.Crash(rng)
					}
					_ = b.Close()
					o.FS = next
					b = mustOpen(t, o)
					m = mustBitmap(t, b)
					if err := m.Damaged(); err != nil {
						t.Fatalf("life %d: a crash damaged all copies: %v", life, err)
					}
					if active != 2 && m.Active() != (active == 1) {
						t.Fatalf("life %d: active is %v", life, m.Active())
					}
					if m.Active() {
						for _, x := range promised {
							if active == 1 && !marked(m, x.v, x.e) {
								t.Fatalf("life %d: %d %s was marked and is not in %v", life, x.v, x.e, m.Regions(x.v))
							}
						}
						active = 1
					} else {
						active, promised = 0, nil
					}
				}
				m.Close()
				_ = b.Close()
			})
		}
	}
}

// TestBitmap_ManyMarkersShareSyncs: concurrent markers find their marks durable,
// with fewer syncs than marks.
func TestBitmap_ManyMarkersShareSyncs(t *testing.T) {
	mem := vfs.NewMem()
	b := mustOpen(t, testOptions(mem, 2))
	defer b.Close()
	m := mustBitmap(t, b)
	if err := m.Prepare(bitmapVolumes); err != nil {
		t.Fatal(err)
	}
	if err := m.Activate(time.Now()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 200 {
				off := int64(w*200+i) * 3 * format.BitmapRegionBytes % (3 << 30)
				if err := m.Mark(context.Background(), 1, block.Extent{Off: off, Len: 512}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	m.Close()
	after := mem.Crash(rand.New(rand.NewPCG(1, 1)))
	o := testOptions(after, 2)
	_ = b.Close()
	b2 := mustOpen(t, o)
	defer b2.Close()
	m2 := mustBitmap(t, b2)
	for i := range int64(1600) {
		if e := (block.Extent{Off: i * 3 * format.BitmapRegionBytes % (3 << 30), Len: 512}); !marked(m2, 1, e) {
			t.Fatalf("%s was marked and is not", e)
		}
	}
	if n := m2.MarkedBytes(1); n >= 1<<30 {
		t.Errorf("%d bytes are marked for 1600 regions of %d", n, format.BitmapRegionBytes)
	}
	m2.Close()
}

// TestBitmap_SequentialWritesSyncRarely: who writes on where it has written does
// not wait for a sync at each region.
func TestBitmap_SequentialWritesSyncRarely(t *testing.T) {
	mem := vfs.NewMem()
	b := mustOpen(t, testOptions(mem, 1))
	defer b.Close()
	m := mustBitmap(t, b)
	if err := m.Prepare(bitmapVolumes); err != nil {
		t.Fatal(err)
	}
	if err := m.Activate(time.Now()); err != nil {
		t.Fatal(err)
	}
	syncs := 0
	mem.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpSync && strings.HasSuffix(name, bitmapSuffix) {
			syncs++
		}
		return nil
	})
	for off := int64(0); off < 64<<20; off += 32 << 10 {
		if err := m.Mark(context.Background(), 1, block.Extent{Off: off, Len: 32 << 10}); err != nil {
			t.Fatal(err)
		}
	}
	if syncs > 1024/markAhead+2 {
		t.Errorf("%d syncs for 64 MiB in sequence", syncs)
	}
	m.Close()
}

// TestBitmap_Disks: a copy that fails is left behind, a copy that rots marks too
// much, and with none left nothing can be marked.
func TestBitmap_Disks(t *testing.T) {
	mem := vfs.NewMem()
	o := testOptions(mem, 2)
	b := mustOpen(t, o)
	m := mustBitmap(t, b)
	if err := m.Prepare(bitmapVolumes); err != nil {
		t.Fatal(err)
	}
	m.Add(4, block.Extent{Off: 0, Len: 1})
	if err := m.Activate(time.Unix(7, 0)); err != nil {
		t.Fatal(err)
	}
	fails := "/disk0/bitmap"
	mem.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpSync && strings.Contains(name, fails) {
			return syscall.EIO
		}
		return nil
	})
	if err := m.Mark(context.Background(), 4, block.Extent{Off: 512 << 10, Len: 1}); err != nil {
		t.Fatalf("with one disk of two: %v", err)
	}
	if s := b.Stats().Disks[0].State; s == "ok" {
		t.Error("a disk whose sync has failed is still in use")
	}
	fails = "/bitmap"
	if err := m.Mark(context.Background(), 4, block.Extent{Off: 900 << 10, Len: 1}); err == nil {
		t.Fatal("a mark on no disk succeeded")
	}
	if err := m.Mark(context.Background(), 4, block.Extent{Off: 900 << 10, Len: 1}); err == nil || m.Err() == nil {
		t.Fatal("a mark was tried again after a failed sync")
	}
	if err := m.Mark(context.Background(), 4, block.Extent{Off: 512 << 10, Len: 1}); err != nil {
		t.Errorf("what is marked already needs no disk: %v", err)
	}
	m.Close()
	_ = b.Close()

	// The survivor's copy counts; rot in it marks all of the page.
	after := mem.Crash(rand.New(rand.NewPCG(2, 2)))
	o = testOptions(after, 2)
	o.Dirs = o.Dirs[1:]
	name := "/disk1/bitmap/" + testGroup.String() + bitmapSuffix
	f, err := after.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	var p [1]byte
	off := pageOffset(bitmapVolumes[0].Pages()) + 1000
	_, _ = f.ReadAt(p[:], off)
	p[0] ^= 4
	_, _ = f.WriteAt(p[:], off)
	_ = f.Sync()
	_ = f.Close()
	b = mustOpen(t, o)
	defer b.Close()
	m = mustBitmap(t, b)
	if !m.Active() || !m.Since().Equal(time.Unix(7, 0)) {
		t.Fatalf("active %v since %v", m.Active(), m.Since())
	}
	if n := m.MarkedBytes(4); n != 1<<20+512 {
		t.Errorf("of a damaged page %d bytes count as marked", n)
	}
	if n := m.MarkedBytes(1); n != 0 {
		t.Errorf("%d bytes of the other volume count as marked", n)
	}
	if err := m.Deactivate(); err != nil {
		t.Fatal(err)
	}

	// Both headers gone: nobody knows whether it counted.
	f, err = after.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteAt(bytes.Repeat([]byte{0x5a}, 2*format.BitmapPageBytes), 0)
	_ = f.Close()
	m = mustBitmap(t, b)
	if m.Damaged() == nil || m.Active() {
		t.Errorf("without a header: damaged %v, active %v", m.Damaged(), m.Active())
	}
	if err := m.Prepare(bitmapVolumes); err != nil || m.Damaged() != nil {
		t.Errorf("prepared: %v, damaged %v", err, m.Damaged())
	}
}

// TestBitmap_PreparedNeedsNoRoom: a bitmap that was prepared works on a file
// system that is full; one that was not says so.
func TestBitmap_PreparedNeedsNoRoom(t *testing.T) {
	mem := vfs.NewMem()
	o := testOptions(mem, 1)
	b := mustOpen(t, o)
	defer b.Close()
	m := mustBitmap(t, b)
	mem.SetLimit("/disk0", 4096)
	if err := m.Prepare(bitmapVolumes); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("prepared without room: %v", err)
	}
	mem.SetLimit("/disk0", 1<<20)
	if err := m.Prepare(bitmapVolumes); err != nil {
		t.Fatal(err)
	}
	mem.SetLimit("/disk0", 1)
	if err := m.Activate(time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := m.Mark(context.Background(), 1, block.Extent{Off: 2 << 30, Len: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	if n := m.MarkedBytes(1); n != 1<<30 {
		t.Errorf("%d bytes are marked", n)
	}
	if err := m.Deactivate(); err != nil {
		t.Fatal(err)
	}
}

// TestBitmap_NotWhereADiskWas: a directory that has vanished is not made again for
// the bitmap.
func TestBitmap_NotWhereADiskWas(t *testing.T) {
	mem := vfs.NewMem()
	b := mustOpen(t, testOptions(mem, 1))
	defer b.Close()
	m := mustBitmap(t, b)
	if err := m.Prepare(bitmapVolumes); err != nil {
		t.Fatal(err)
	}
	mem.Vanish("/disk0")
	if err := m.Activate(time.Now()); err == nil {
		t.Fatal("activated where there is nothing")
	}
	if _, err := mem.ReadDir("/disk0/bitmap"); err == nil {
		t.Error("the directory was made again")
	}
}
