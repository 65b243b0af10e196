package capture

import (
	"bytes"
	"context"
	"os"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// TestRun_BackingWithoutRoomGoesOnWhenThereIsSome refuses room when the backing
// is brought up to date, as a file system that copies on write may. Acknowledged
// writes are nobody's errors, later writers wait, and all comes right.
func TestRun_BackingWithoutRoomGoesOnWhenThereIsSome(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	v, b := newVolume(t, 2*overlayLimit)
	var full atomic.Bool
	full.Store(true)
	sysOf(b).fallocate = func(fd int, mode uint32, off, n int64) error {
		if mode&unix.FALLOC_FL_PUNCH_HOLE != 0 && full.Load() {
			return unix.ENOSPC
		}
		return unix.Fallocate(fd, mode, off, n)
	}
	ran := make(chan error, 1)
	go func() { ran <- v.Run(ctx) }()
	if err := v.Zero(ctx, block.Extent{Len: 4096}, block.ZeroOptions{}); err != nil {
		t.Fatal(err)
	}
	for v.Full() == nil {
		select {
		case err := <-ran:
			t.Fatalf("Run has ended: %v", err)
		default:
			runtime.Gosched()
		}
	}
	want := make([]byte, 2*overlayLimit)
	written := make(chan error, 1)
	go func() {
		const n = 1 << 20
		for off := int64(n); off < overlayLimit+4*n; off += n {
			p := want[off : off+n]
			copy(p, bytes.Repeat([]byte{byte(off / n)}, n))
			if err := v.WriteAt(ctx, p, off, block.WriteOptions{}); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	for v.OverlayBytes() < overlayLimit*3/4 {
		runtime.Gosched()
	}
	full.Store(false)
	if err := <-written; err != nil {
		t.Fatalf("a write while the backing had no room: %v", err)
	}
	for v.OverlayBytes() > 0 {
		runtime.Gosched()
	}
	if err := v.Full(); err != nil || v.Failed() != nil {
		t.Errorf("there is room again: %v, %v", err, v.Failed())
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if err := v.Settle(context.Background()); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(b.path); err != nil || !bytes.Equal(raw, want) {
		t.Errorf("the backing is not what was written (%v)", err)
	}
}
