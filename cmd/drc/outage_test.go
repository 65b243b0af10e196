package main

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
)

// TestOutage_CostsCompressedSpace takes all stores away, and writes more than the
// buffer can hold as it is. Nobody waits for ever: what is sealed takes up what it
// takes compressed. The agent is killed and started while there is no store; then
// they come back, and all of it becomes history, without a gap.
func TestOutage_CostsCompressedSpace(t *testing.T) {
	t.Parallel()
	const size, buffer = 64 << 20, 32 << 20
	h := onFolders(t, 3)
	args := []string{"--volume", "name=v,path=" + filepath.Join(t.TempDir(), "v.img") + ",size=64MiB,when-full=hold", "--rpo", "200ms",
		"--buffer", "path=" + filepath.Join(h.state, "buffer") + ",size=32MiB"}
	a := h.start(args...)
	dev := h.device("v")
	want := make([]byte, size)
	put(t, dev, want, 1, 0, 64<<10, atOnce)
	h.await("all is committed", isContinuous)
	back := unreachable(t, h.urls)
	write := func(from, to int) { // a tenth of it cannot be compressed
		for off := from; off < to; off += 1 << 20 {
			p := bytes.Repeat(noise(uint64(off)+7, 1<<20/10), 11)[:1<<20]
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if err := dev.WriteAt(ctx, p, int64(off), block.WriteOptions{}); err != nil {
				t.Fatalf("the write at %d MiB waits for ever: %v\n%+v\n%s", off>>20, err, h.status(), h.said())
			}
			cancel()
			copy(want[off:], p)
		}
	}
	write(0, 48<<20)
	h.await("what was written is safe in segments, and it is said what is wrong", func(s control.Status) bool {
		g := s.Groups[0]
		for _, st := range s.Stores {
			if st.State != "down" || st.Since == "" || st.LastError == "" {
				return false
			}
		}
		// With more than half of the buffer used a batch waits for a quarter of it, in the
		// journal; each write has a MiB.
		return int64(g.Captured-g.Sealed)<<20 <= buffer/4 && g.Waiting.Objects > 0 && g.LagSeconds > 0 && s.Buffer.UsedBytes <= buffer
	})
	a.kill()
	a = h.start(args...)
	dev = h.device("v")
	write(48<<20, 56<<20)
	got := make([]byte, size)
	must(t, dev.ReadAt(context.Background(), got, 0))
	if !bytes.Equal(got, want) {
		t.Fatal("after a restart without a store the volume is not what was written")
	}
	if s := h.status(); s.Groups[0].Committed >= s.Groups[0].Captured {
		t.Fatalf("committed without a store: %+v", s.Groups[0])
	}
	back()
	h.await("all is committed", isContinuous)
	h.await("nothing waits any more", func(s control.Status) bool {
		return s.Groups[0].Waiting.Objects == 0 && s.Stores[0].State == "up" && s.Stores[1].State == "up" && s.Stores[2].State == "up"
	})
	if gaps := h.history("v").Gaps; len(gaps) != 0 {
		t.Errorf("the history has gaps: %+v", gaps)
	}
	h.sameAs("v", want)
	a.stop()
}
