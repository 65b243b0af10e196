package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/nbd"
)

func lostBatchArgs(h *host, path string) []string {
	return []string{"--volume", "name=v,path=" + path + ",size=32MiB,when-full=hold", "--rpo", "200ms",
		"--buffer", "path=" + filepath.Join(h.state, "buffer") + ",size=16MiB"}
}

// sealInOutage writes to an agent of lostBatchArgs while its stores are away, until all
// of it is sealed in the buffer. want is what the volume holds then, and before what it
// held at seq 1, which is committed. back ends the outage.
func sealInOutage(t *testing.T, h *host) (dev *nbd.Client, want, before []byte, back func()) {
	t.Helper()
	dev = h.device("v")
	want = make([]byte, 32<<20)
	put(t, dev, want, 1, 0, 64<<10, atOnce)
	h.await("all is committed", isContinuous)
	before = bytes.Clone(want)
	back = unreachable(t, h.urls)
	for off := 0; off < 24<<20; off += 1 << 20 {
		p := bytes.Repeat(noise(uint64(off)+7, 1<<20/10), 11)[:1<<20]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		must(t, dev.WriteAt(ctx, p, int64(off), block.WriteOptions{}))
		cancel()
		copy(want[off:], p)
	}
	h.await("what was written is sealed", func(s control.Status) bool {
		return s.Groups[0].Sealed == s.Groups[0].Captured && s.Buffer.Disks[0].SegmentBytes > 0
	})
	return dev, want, before, back
}

// TestLostBatches takes sealed batches out of the buffer of an agent that was killed
// in an outage, as the loss of more disks than the buffer has copies on does. The
// next start needs nobody: what the journal still has is cut again, and where it
// was given back only the history of that is lost.
func TestLostBatches(t *testing.T) {
	t.Parallel()
	for _, lose := range []string{"all batches", "the newest batch"} {
		t.Run(lose, func(t *testing.T) {
			t.Parallel()
			h := onFolders(t, 1)
			path := filepath.Join(t.TempDir(), "v.img")
			args := lostBatchArgs(h, path)
			a := h.start(args...)
			dev, want, before, back := sealInOutage(t, h)
			put(t, dev, want, 2, 30<<20, 4096, atOnce)
			a.kill()
			shards, err := filepath.Glob(filepath.Join(h.state, "buffer", "spool", "*", "*.shard"))
			must(t, err)
			if lose == "the newest batch" {
				newest := ""
				var at time.Time
				for _, name := range shards {
					info, err := os.Stat(name)
					must(t, err)
					if info.ModTime().After(at) {
						newest, at = name, info.ModTime()
					}
				}
				segment := filepath.Base(newest)[:32]
				shards, err = filepath.Glob(filepath.Join(h.state, "buffer", "spool", "*", segment+".*.shard"))
				must(t, err)
			}
			if len(shards) < 2 {
				t.Fatalf("there are only %d shards", len(shards))
			}
			for _, name := range shards {
				must(t, os.Remove(name))
			}
			back()
			a = h.start(args...)
			dev = h.device("v")
			got := make([]byte, len(want))
			must(t, dev.ReadAt(context.Background(), got, 0))
			if !bytes.Equal(got, want) {
				t.Fatal("the volume is not what was written")
			}
			h.await("all is committed", isContinuous)
			put(t, dev, want, 3, 31<<20, 4096, atOnce)
			h.await("all is committed", isContinuous)
			h.sameAs("v", want)
			h.sameAs("v", before, "--at", "seq:1")
			t.Logf("gaps: %+v", h.history("v").Gaps)
			a.stop()
		})
	}
}

// TestLostBatches_AtWork damages the files of sealed batches under an agent that waits
// for its stores. When they are back it needs nobody: it gives the batches up, and what
// it protects is whole again behind a gap.
func TestLostBatches_AtWork(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	a := h.start(lostBatchArgs(h, path)...)
	dev, want, before, back := sealInOutage(t, h)
	shards, err := filepath.Glob(filepath.Join(h.state, "buffer", "spool", "*", "*.shard"))
	must(t, err)
	if len(shards) < 4 {
		t.Fatalf("there are only %d shards", len(shards))
	}
	for _, name := range shards {
		must(t, os.Truncate(name, 100))
	}
	put(t, dev, want, 2, 30<<20, 4096, atOnce)
	back()
	h.await("all is committed", isContinuous)
	put(t, dev, want, 3, 31<<20, 4096, atOnce)
	h.await("all is committed", isContinuous)
	h.sameAs("v", want)
	h.sameAs("v", before, "--at", "seq:1")
	hist := h.history("v")
	if n := len(hist.Gaps); n == 0 || hist.Gaps[n-1].Open || hist.Gaps[n-1].After == 0 {
		t.Errorf("the history shows %+v, not a closed gap for what is lost", hist.Gaps)
	}
	a.stop()
	got, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the volume is not what was written")
	}
}
