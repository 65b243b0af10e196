package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
)

// stamper writes blocks of its own one after the other, each once.
type stamper struct {
	first int64 // number of its first block
	n     int64 // how many it may write
	acked atomic.Int64
	err   error // what ended it
}

const stampedBytes = 512

// stampedBlock is what block b holds.
func stampedBlock(b int64) []byte { return noise(uint64(b)%60000+1, stampedBytes) }

func (s *stamper) run(ctx context.Context, dev block.Device) {
	for i := range s.n {
		if s.err = dev.WriteAt(ctx, stampedBlock(s.first+i), (s.first+i)*stampedBytes, block.WriteOptions{FUA: i%64 == 0}); s.err != nil {
			return
		}
		s.acked.Add(1)
		time.Sleep(time.Millisecond) // else it has no more blocks before the other agent is up
	}
	s.err = errors.New("it has no more blocks")
}

// prefix is how many blocks of s an image has. It fails if they are not the first.
func (s *stamper) prefix(t testing.TB, what string, image []byte) (n int64) {
	t.Helper()
	for n < s.n && bytes.Equal(image[(s.first+n)*stampedBytes:(s.first+n+1)*stampedBytes], stampedBlock(s.first+n)) {
		n++
	}
	rest := image[(s.first+n)*stampedBytes : (s.first+s.n)*stampedBytes]
	if !bytes.Equal(rest, make([]byte, len(rest))) {
		t.Fatalf("%s: the blocks from %d on are not a prefix of what was written: %d are, and something follows", what, s.first, n)
	}
	return n
}

// TestTakeover_OfABusyGroup takes a group from an agent whose clients write all the
// time. They get no error until it is fenced; what it has said to be committed stays
// in the one history; and what it had acknowledged and could not commit is listed,
// all of it and nothing else.
func TestTakeover_OfABusyGroup(t *testing.T) {
	t.Parallel()
	for _, stores := range []int{1, 3} {
		t.Run(fmt.Sprint(stores, " stores"), func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			const size = 96 << 20
			h := onFolders(t, stores)
			image := filepath.Join(t.TempDir(), "v.img")
			args := []string{"--volume", "name=v,path=" + image + ",size=96MiB", "--rpo", "100ms"}
			first := h.start(args...)
			c := h.device("v")
			writers := make([]*stamper, 3)
			var busy sync.WaitGroup
			for i := range writers {
				writers[i] = &stamper{first: int64(i) * (size / stampedBytes / 3), n: size / stampedBytes / 3}
				busy.Go(func() { writers[i].run(ctx, c) })
			}
			h.await("something is committed", func(s control.Status) bool { return s.Groups[0].Committed > 100 })
			b := h.other()
			b.drc("restore", "v", image+".b")

			var promised [3]int64
			for i, w := range writers {
				promised[i] = w.acked.Load()
			}
			h.drc("checkpoint", "committed", "--wait")
			second := b.start("--volume", "name=v,path="+image+".b", "--rpo", "50ms", "--takeover")
			h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
			busy.Wait()
			for i, w := range writers {
				if !errors.Is(w.err, block.ErrReadOnly) {
					t.Errorf("writer %d ended with %v", i, w.err)
				}
			}
			wantB := seen(t, b.device("v"), size)
			put(t, b.device("v"), wantB, 7, 90<<20, 1<<20, atOnce)
			b.await("the second agent has committed", isContinuous)

			// What was said to be committed is there, whoever is in office.
			checkpoint := b.restored("v", "--at", "committed")
			for i, w := range writers {
				if n := w.prefix(t, "the checkpoint", checkpoint); n < promised[i] {
					t.Errorf("writer %d: %d blocks are in the checkpoint, and %d were acknowledged before", i, n, promised[i])
				}
			}
			b.sameAs("v", wantB)

			// What the first agent holds beyond the history is what it lists.
			k := h.kept(h.state).Groups[0]
			mine := seen(t, c, size)
			end := b.restored("v", "--at", fmt.Sprint("seq:", k.Logged))
			var regions []control.KeptRegion
			for i, w := range writers {
				if n := w.prefix(t, "the fenced volume", mine); n < w.acked.Load() || n > w.acked.Load()+1 {
					t.Errorf("writer %d: %d blocks are on the volume, and %d were acknowledged", i, n, w.acked.Load())
				}
				_ = w.prefix(t, "the end of its history", end)
			}
			for off := int64(0); off < size; off += stampedBytes {
				if bytes.Equal(mine[off:off+stampedBytes], end[off:off+stampedBytes]) {
					continue
				}
				if n := len(regions); n > 0 && regions[n-1].Off+regions[n-1].Len == off {
					regions[n-1].Len += stampedBytes
				} else {
					regions = append(regions, control.KeptRegion{Off: off, Len: stampedBytes})
				}
			}
			if fmt.Sprint(k.Volumes[0].Regions) != fmt.Sprint(regions) || !k.Fenced {
				t.Errorf("kept is %v, and what the history lacks %v (fenced %v)", k.Volumes[0].Regions, regions, k.Fenced)
			}
			if k.Writes == 0 || k.From != k.Logged+1 {
				t.Errorf("writes %s to %s are kept behind %s", k.From, k.To, k.Logged)
			}
			must(t, c.Close())
			first.stop()
			second.stop()
		})
	}
}

// TestTakeover_FromAHostInBitmapMode takes a group from an agent whose buffer was
// full: what it wrote past it is on its volume only. The history stays one, the
// fenced host can still be read, says what it keeps, and gets all of it back in
// when it is ordered to take over again.
func TestTakeover_FromAHostInBitmapMode(t *testing.T) {
	t.Parallel()
	const size = 16 << 20
	h := onFolders(t, 1)
	dir := t.TempDir()
	image := filepath.Join(dir, "v.img")
	args := []string{"--volume", "name=v,path=" + image + ",size=16MiB", "--rpo", "50ms", "--buffer", "path=" + filepath.Join(h.state, "buffer") + ",size=8MiB"}
	first := h.start(args...)
	c := h.device("v")
	want := make([]byte, size)
	put(t, c, want, 1, 0, 1<<20, atOnce)
	h.await("all is committed", isContinuous)
	back := unreachable(t, h.urls)
	for i := range 14 {
		put(t, c, want, uint64(10+i), i<<20, 1<<20, block.WriteOptions{})
	}
	h.await("the buffer is full", isBitmap)
	put(t, c, want, 40, 15<<20, 64<<10, atOnce)
	must(t, first.cmd.Process.Signal(syscall.SIGSTOP))
	back()
	b := h.other()
	b.drc("restore", "v", image+".b")
	second := b.start("--volume", "name=v,path="+image+".b", "--rpo", "50ms", "--takeover")
	cb := b.device("v")
	wantB := seen(t, cb, size)
	put(t, cb, wantB, 50, 2<<20, 64<<10, atOnce)
	b.await("the second agent has committed", isContinuous)
	must(t, first.cmd.Process.Signal(syscall.SIGCONT))
	h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
	if err := c.WriteAt(context.Background(), noise(60, 4096), 0, block.WriteOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a client of the fenced agent is told %v", err)
	}
	if !bytes.Equal(seen(t, c, size), want) {
		t.Error("the fenced volume is not what was written to it")
	}
	k := h.kept(h.state).Groups[0]
	if k.MarkedFrom == "" || k.Volumes[0].MarkedBytes == 0 || !k.Fenced {
		t.Errorf("what went past the buffer is not listed: %+v", k)
	}
	b.sameAs("v", wantB)
	b.drc("checkpoint", "of-b", "--wait")
	must(t, cb.Close())
	second.stop()
	must(t, c.Close())
	first.stop()
	if said := h.refused(args...); said == "" {
		t.Error("the refusal says nothing")
	}
	first = h.start(append(args, "--takeover")...)
	c = h.device("v")
	if !bytes.Equal(seen(t, c, size), want) {
		t.Error("after the takeover the volume is not what was written to it")
	}
	h.await("all is committed", isContinuous)
	must(t, c.Close())
	first.stop()
	h.sameAs("v", want)
	h.sameAs("v", wantB, "--at", "of-b")
}
