package overlay_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/format"
	"drc/internal/overlay"
	"drc/internal/vfs"
)

const (
	file     = "/d/vol.img"
	sidecar  = file + overlay.SidecarSuffix
	bootA    = "boot a"
	bootB    = "boot b"
	oneBlock = 4096
)

// identity is that of a base of sizeBytes.
func identity(sizeBytes int64, sector int) overlay.Identity {
	return overlay.Identity{
		Repo: block.ID{1}, Group: block.GroupID{2}, Volume: block.VolumeID{3}, Branch: block.BranchID{4},
		Entry: 5, Hash: format.HashOf([]byte("entry")), Seq: 6, SizeBytes: sizeBytes, SectorSize: sector, VolumeName: "pgdata",
	}
}

// testBase is a base in memory that counts, and fails where it is told to.
type testBase struct {
	*blocktest.Memory
	content []byte
	reads   atomic.Int64
	bytes   atomic.Int64
	hook    atomic.Pointer[blocktest.Hook]
}

// newBase returns a base with data in about three of four stretches of 64 KiB.
func newBase(t testing.TB, g block.Geometry, seed uint64) *testBase {
	t.Helper()
	b := &testBase{content: make([]byte, g.SizeBytes)}
	b.Memory = blocktest.NewMemoryGeometry(g, func(ctx context.Context, r blocktest.Request) error {
		if r.Kind == blocktest.Read {
			b.reads.Add(1)
			b.bytes.Add(r.Extent.Len)
		}
		if h := b.hook.Load(); h != nil {
			return (*h)(ctx, r)
		}
		return nil
	})
	rng := rand.New(rand.NewPCG(seed, 99))
	for at := int64(0); at < g.SizeBytes; at += 65536 {
		if rng.IntN(4) == 0 {
			continue
		}
		// Not all of it: some pieces begin or end within a block.
		from := min(at+rng.Int64N(64)*int64(g.SectorSize), g.SizeBytes)
		end := min(at+65536-rng.Int64N(3)*int64(g.SectorSize), g.SizeBytes)
		if from < end {
			fill(b.content[from:end], rng.Uint64())
			if err := b.WriteAt(t.Context(), b.content[from:end], from, block.WriteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return b
}

// on has h called with each request to the base.
func (b *testBase) on(h blocktest.Hook) { b.hook.Store(&h) }

// fail has every valid request to the base fail.
func (b *testBase) fail(err error) {
	b.on(func(context.Context, blocktest.Request) error { return err })
}

// fill fills p with what tells its seed: no sector of it is zero.
func fill(p []byte, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64()|1)
	}
}

func filled(n int64, seed uint64) []byte {
	p := make([]byte, n)
	fill(p, seed)
	return p
}

func newMem(t testing.TB) *vfs.Mem {
	t.Helper()
	m := vfs.NewMem()
	if err := m.MkdirAll("/d"); err != nil {
		t.Fatal(err)
	}
	return m
}

func config(fsys vfs.FS, b *testBase, boot string) overlay.Config {
	g := b.Geometry()
	return overlay.Config{FS: fsys, File: file, Base: b, Identity: identity(g.SizeBytes, g.SectorSize), Boot: boot}
}

func open(t testing.TB, c overlay.Config) *overlay.Device {
	t.Helper()
	d, err := overlay.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() }) // of one that was killed it fails
	return d
}

func write(t testing.TB, d block.Device, p []byte, off int64) {
	t.Helper()
	if err := d.WriteAt(t.Context(), p, off, block.WriteOptions{}); err != nil {
		t.Fatalf("write %d+%d: %v", off, len(p), err)
	}
}

func zero(t testing.TB, d block.Device, e block.Extent) {
	t.Helper()
	if err := d.Zero(t.Context(), e, block.ZeroOptions{}); err != nil {
		t.Fatalf("zero %s: %v", e, err)
	}
}

func flush(t testing.TB, d block.Device) {
	t.Helper()
	if err := d.Flush(t.Context()); err != nil {
		t.Fatalf("flush: %v", err)
	}
}

func closeIt(t testing.TB, d *overlay.Device) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func read(t testing.TB, d block.Device, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xdb}, int(n))
	if err := d.ReadAt(t.Context(), p, off); err != nil {
		t.Fatalf("read %d+%d: %v", off, n, err)
	}
	return p
}

func expect(t testing.TB, d block.Device, want []byte, off int64) {
	t.Helper()
	same(t, read(t, d, off, int64(len(want))), want, off)
}

func same(t testing.TB, got, want []byte, off int64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d (block %d) is %#02x, want %#02x", off+int64(i), (off+int64(i))/oneBlock, got[i], want[i])
		}
	}
}

func hydrate(t testing.TB, d *overlay.Device) {
	t.Helper()
	if err := d.Hydrate(t.Context(), overlay.HydrateOptions{}); err != nil {
		t.Fatalf("hydrate: %v", err)
	}
	if !d.Complete() {
		t.Fatal("hydrated and not complete")
	}
}

// rawFile is FILE's content.
func rawFile(t testing.TB, fsys vfs.FS) []byte {
	t.Helper()
	p, err := vfs.ReadFile(fsys, file, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
