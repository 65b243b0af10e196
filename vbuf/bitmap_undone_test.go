package vbuf

import (
	"context"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// TestBitmap_MarkAfterADeactivationThatFailed: the sync that was to say that a
// bitmap does not count any more fails, and that may be on the disk all the same.
// A mark that is promised after it must not be lost.
func TestBitmap_MarkAfterADeactivationThatFailed(t *testing.T) {
	for _, end := range []string{"killed", "power cut"} {
		t.Run(end, func(t *testing.T) {
			mem := vfs.NewMem()
			o := testOptions(mem, 1)
			b := mustOpen(t, o)
			m := mustBitmap(t, b)
			if err := m.Prepare(bitmapVolumes); err != nil {
				t.Fatal(err)
			}
			if err := m.Activate(time.Unix(5, 0)); err != nil {
				t.Fatal(err)
			}
			mem.SetHook(func(op vfs.Op, name string) error {
				if op == vfs.OpSync && name == m.name(b.aliveDisks()[0]) {
					return syscall.EIO
				}
				return nil
			})
			if err := m.Deactivate(); err == nil {
				t.Fatal("a bitmap was deactivated without a sync")
			}
			mem.SetHook(nil)
			e := block.Extent{Off: 1 << 30, Len: 4096}
			promised := m.Mark(context.Background(), 1, e) == nil
			m.Close()
			next := mem.Kill()
			if end == "power cut" {
				next = mem.Crash(rand.New(rand.NewPCG(1, 1)))
			}
			_ = b.Close()
			o.FS = next
			m = mustBitmap(t, mustOpen(t, o))
			if promised && (!m.Active() || !marked(m, 1, e)) {
				t.Fatalf("a mark that was promised is lost: active is %v", m.Active())
			}
		})
	}
}
