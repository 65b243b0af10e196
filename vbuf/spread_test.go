package vbuf

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// TestDrain_TakesABitmapThatCounts: a bitmap that counts goes to the disks that
// stay, whether or not somebody works with it, before the one that has it leaves.
func TestDrain_TakesABitmapThatCounts(t *testing.T) {
	for _, open := range []bool{true, false} {
		mem := vfs.NewMem()
		o := testOptions(mem, 1)
		b, j, s := stocked(t, o)
		m := mustBitmap(t, b)
		if err := m.Prepare(bitmapVolumes); err != nil {
			t.Fatal(err)
		}
		if err := m.Activate(time.Unix(7, 0)); err != nil {
			t.Fatal(err)
		}
		e := block.Extent{Off: 1 << 30, Len: 4096}
		if err := m.Mark(context.Background(), 1, e); err != nil {
			t.Fatal(err)
		}
		if !open {
			m.Close()
		}
		mem.SetDevice("/new", "/new")
		o.Dirs = []DirOptions{{Path: "/new", SizeBytes: 4 << 20}}
		if err := b.Add(context.Background(), o.Dirs[0]); err != nil {
			t.Fatal(err)
		}
		if err := b.Drain("/disk0"); err != nil {
			t.Fatal(err)
		}
		settle(t, b)
		if left, _ := mem.ReadDir("/disk0"); len(left) != 1 {
			t.Errorf("left over: %v", left)
		}
		checkStock(t, j, s)
		o.FS = mem.Crash(rand.New(rand.NewPCG(1, 1)))
		b = mustOpen(t, o)
		m = mustBitmap(t, b)
		if !m.Active() || !marked(m, 1, e) || !m.Since().Equal(time.Unix(7, 0)) {
			t.Errorf("open %v: the bitmap is lost: active %v", open, m.Active())
		}
		m.Close()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
