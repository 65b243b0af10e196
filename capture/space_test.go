package capture_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/vfs"
)

// TestWriteAt_SaysNoSpaceAndTakesNothing fills the file system of a sparse
// backing. It needs root, to mount a small one.
func TestWriteAt_SaysNoSpaceAndTakesNothing(t *testing.T) {
	ctx := context.Background()
	small := t.TempDir()
	if err := unix.Mount("drc-test", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatalf("mount a small file system (this test needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	r := newRig(t, vfs.NewMem(), rigBytes)
	if err := r.vol.Close(ctx); err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	r.path = filepath.Join(small, "volume")
	b, _, err := capture.OpenBacking(r.path, capture.BackingOptions{CreateBytes: size})
	if err != nil {
		t.Fatal(err)
	}
	r.backing = b
	model := make([]byte, size)
	const n = 64 << 10
	const alone = 7<<20 + n/2 // what is there has holes around it
	copy(model[alone:], bytes.Repeat([]byte{0xa1}, 4096))
	copy(model[6<<20:], model[alone:alone+4096])
	for _, off := range []int64{alone, 6 << 20} {
		if err := b.WriteAt(model[off:off+4096], off); err != nil {
			t.Fatal(err)
		}
	}
	r.serve(0)
	taken, refused := 0, 0
	for off := int64(0); off < 2<<20; off += n {
		p := bytes.Repeat([]byte{byte(1 + off/n)}, n)
		before := r.group.Captured()
		err := r.vol.WriteAt(ctx, p, off, block.WriteOptions{})
		switch {
		case err == nil:
			taken++
			copy(model[off:], p)
		case errors.Is(err, block.ErrNoSpace):
			refused++
		default:
			t.Fatal(err)
		}
		if got := r.group.Captured() - before; (err == nil) != (got == 1) || got > 1 {
			t.Fatalf("write at %d: %d seqs taken, error %v", off, got, err)
		}
	}
	if taken == 0 || refused == 0 {
		t.Fatalf("%d writes taken, %d refused; want some of each", taken, refused)
	}
	if err := r.vol.Zero(ctx, block.Extent{Off: 4 << 20, Len: 1 << 20}, block.ZeroOptions{NoHole: true}); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("allocating zeroes: %v, want ErrNoSpace", err)
	}
	// What was taken can be overwritten and applied though the disk is full, and
	// what is trimmed can be used again.
	if err := r.vol.WriteAt(ctx, model[n:2*n], 0, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	copy(model, model[n:2*n])
	if err := r.vol.WriteAt(ctx, model[n:n+4096], alone, block.WriteOptions{}); err != nil {
		t.Errorf("overwrite what has holes around it: %v", err)
	}
	copy(model[alone:], model[n:n+4096])
	if err := r.vol.Touch(ctx); err != nil {
		t.Errorf("a write that changes nothing, in a hole: %v", err)
	}
	if err := r.vol.Zero(ctx, block.Extent{Len: n}, block.ZeroOptions{}); err != nil {
		t.Fatal(err)
	}
	clear(model[:n])
	if err := r.vol.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.vol.WriteAt(ctx, model[n:2*n], 4<<20, block.WriteOptions{}); err != nil {
		t.Fatalf("write into the space that a trim gave back: %v", err)
	}
	copy(model[4<<20:], model[n:2*n])
	if got, want := r.group.Captured(), r.journal.Next()-1; got != want {
		t.Errorf("captured %s, the journal ends at %s", got, want)
	}
	r.end()
	r.expectFile(model)
	if st, err := os.Stat(r.path); err != nil || st.Size() != size {
		t.Errorf("size: %v, %v", st, err)
	}
}
