package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/realpart"
)

// fullBuffer is an agent whose buffer of 64 MiB is full because its only store
// does not answer, and which is in bitmap mode.
type fullBuffer struct {
	*host
	store  *realpart.Instance
	path   string
	args   []string
	agent  *agent
	want   []byte // what the volume must hold
	before []byte // and what it held when all was committed for the last time
}

const fullBufferBytes = 256 << 20

func inBitmapMode(t *testing.T) *fullBuffer {
	t.Helper()
	m := realpart.MinIO(t, 1)[0]
	b := &fullBuffer{host: newRepo(t, []string{m.URL("drc", "p")}, m.Env()), store: m, want: make([]byte, fullBufferBytes)}
	dir := t.TempDir()
	b.path = filepath.Join(dir, "v.img")
	b.args = []string{"--volume", "name=v,path=" + b.path + ",size=256MiB", "--rpo", "50ms", "--buffer", "path=" + filepath.Join(dir, "buffer") + ",size=64MiB"}
	b.agent = b.start(b.args...)
	c := b.device("v")
	put(t, c, b.want, 1, 0, 8<<20, block.WriteOptions{})
	put(t, c, b.want, 2, 100<<20, 4<<20, atOnce)
	b.await("all is committed", isContinuous)
	b.drc("checkpoint", "before", "--wait")
	b.before = bytes.Clone(b.want)
	m.Kill()
	b.overflow(3)
	return b
}

// overflow writes more than the buffer holds.
func (b *fullBuffer) overflow(seed uint64) {
	b.t.Helper()
	c := b.device("v")
	for off := 0; off < 160<<20; off += 8 << 20 {
		put(b.t, c, b.want, seed+uint64(off>>20), off, 8<<20, block.WriteOptions{})
	}
	if err := c.Zero(context.Background(), block.Extent{Off: 20 << 20, Len: 3 << 20}, block.ZeroOptions{}); err != nil {
		b.t.Fatal(err)
	}
	clear(b.want[20<<20 : 23<<20])
	must(b.t, c.Flush(context.Background()))
	b.await("it is in bitmap mode", isBitmap)
}

func isBitmap(s control.Status) bool { return s.State == "bitmap" }

// ends brings the store back and checks all that was promised.
func (b *fullBuffer) ends() {
	t := b.t
	t.Helper()
	must(t, b.store.Start())
	b.await("the gap has ended", isContinuous)
	s := b.status()
	if s.Groups[0].GapSince != "" || s.Groups[0].Volumes[0].MarkedBytes != 0 {
		t.Errorf("afterwards status says %+v", s.Groups[0])
	}
	b.sameAs("v", b.want)
	b.sameAs("v", b.before, "--at", "before")
	gaps := b.history("v").Gaps
	if len(gaps) == 0 || gaps[len(gaps)-1].Open || !strings.Contains(gaps[len(gaps)-1].Reason, "buffer") {
		t.Errorf("the history shows the gaps %+v", gaps)
	}
	b.agent.stop()
	raw := contentOf(t, b.path)
	if !bytes.Equal(raw, b.want) {
		t.Error("after a clean stop the backing is not what was written")
	}
}

// TestBitmapMode_WritersGoOnAndTheGapEnds fills the buffer while the store is
// down: no write waits or fails, the history gets a gap, and everything before
// and after it can be restored.
func TestBitmapMode_WritersGoOnAndTheGapEnds(t *testing.T) {
	t.Parallel()
	b := inBitmapMode(t)
	s := b.status().Groups[0]
	if s.GapSince == "" || s.Volumes[0].MarkedBytes == 0 || s.LagSeconds == 0 || !strings.Contains(s.Message, "gap") {
		t.Errorf("in bitmap mode status says %+v", s)
	}
	if at, err := time.Parse(time.RFC3339, s.GapSince); err != nil || time.Since(at) > time.Hour {
		t.Errorf("the gap is since %q", s.GapSince)
	}
	if out, err := b.command("checkpoint", "late").CombinedOutput(); err == nil || !strings.Contains(string(out), "bitmap mode") {
		t.Errorf("a checkpoint in a gap: %v, %s", err, out)
	}
	captured := s.Captured
	b.overflow(50) // at full speed: nothing of it is numbered
	if now := b.status().Groups[0].Captured; now != captured {
		t.Errorf("%d writes were numbered past the journal", now-captured)
	}
	c := b.device("v")
	p := make([]byte, 8<<20)
	must(t, c.ReadAt(context.Background(), p, 0))
	if !bytes.Equal(p, b.want[:8<<20]) {
		t.Error("a read in bitmap mode returns something else than was written")
	}
	b.ends()
}

// TestBitmapMode_Killed kills the agent in bitmap mode, before and after the
// store is back.
func TestBitmapMode_Killed(t *testing.T) {
	t.Parallel()
	b := inBitmapMode(t)
	b.agent.kill()
	b.agent = b.start(b.args...)
	b.overflow(60) // full again
	b.agent.kill()
	must(t, b.store.Start())
	b.agent = b.start(b.args...)
	c := b.device("v")
	put(t, c, b.want, 70, 30<<20, 4<<20, atOnce)
	b.await("the resync has begun", func(s control.Status) bool { return s.State == "resync" || s.State == "continuous" })
	b.agent.kill()
	b.agent = b.start(b.args...)
	b.ends()
}

// TestBitmapMode_Stopped stops the agent in bitmap mode, in order: the volume is
// whole without DRC, and the next start knows what to compare.
func TestBitmapMode_Stopped(t *testing.T) {
	t.Parallel()
	b := inBitmapMode(t)
	b.agent.stop()
	if !bytes.Equal(contentOf(t, b.path), b.want) {
		t.Error("after a clean stop the backing is not what was written")
	}
	b.agent = b.start(b.args...)
	b.ends()
}

func contentOf(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	return raw
}

// TestBitmapMode_FileSystemFull: the buffer's file system is full although its
// quota is not, while a volume with data is being read in, and later. Writes that
// wait for their journal record are let go, and the history is whole in the end,
// also if the agent is stopped or killed meanwhile: the journal then lacks
// records that were numbered.
func TestBitmapMode_FileSystemFull(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	buffer := filepath.Join(smallFileSystem(t, "24m"), "buffer")
	path := filepath.Join(t.TempDir(), "v.img")
	want := noise(5, 24<<20)
	must(t, os.WriteFile(path, want, 0o600))
	args := []string{"--volume", "name=v,path=" + path, "--buffer", "path=" + buffer + ",size=20MiB", "--rpo", "50ms", "--bandwidth", "12MiB"}
	a := h.start(args...)
	overflow := func(seed uint64) (junk string) {
		t.Helper()
		junk = fill(t, filepath.Dir(buffer))
		c := h.device("v")
		for off := 0; off < 20<<20; off += 4 << 20 {
			put(t, c, want, seed+uint64(off>>20), off, 4<<20, block.WriteOptions{})
		}
		must(t, c.Flush(context.Background()))
		h.await("it is in bitmap mode", isBitmap)
		return junk
	}
	whole := func() {
		t.Helper()
		h.await("all is committed", isContinuous)
		h.sameAs("v", want)
	}
	must(t, os.Remove(overflow(10)))
	whole()
	junk := overflow(40)
	a.stop()
	if !bytes.Equal(contentOf(t, path), want) {
		t.Error("after a clean stop the backing is not what was written")
	}
	must(t, os.Remove(junk))
	a = h.start(args...)
	whole()
	junk = overflow(70)
	a.kill()
	must(t, os.Remove(junk))
	a = h.start(args...)
	whole()
	a.stop()
}

// TestBufferLost_InBitmapMode: the buffer's only directory vanishes while writes go
// past it, with sealed batches in it that the store does not have. It is noticed
// although nothing is written there, no write fails, and the next start needs no
// decision, whether the agent was given another directory or not.
func TestBufferLost_InBitmapMode(t *testing.T) {
	t.Parallel()
	for name, anew := range map[string]bool{"killed": false, "given another one": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := inBitmapMode(t)
			dir := filepath.Dir(b.path)
			gone := filepath.Join(dir, "gone") // in one step, as files may be made there just now
			must(t, os.Rename(filepath.Join(dir, "buffer"), gone))
			must(t, os.RemoveAll(gone))
			b.await("it says that the buffer is lost", func(s control.Status) bool {
				return s.State == "error" && strings.Contains(s.Groups[0].Message, "drc buffer add")
			})
			c := b.device("v")
			put(t, c, b.want, 60, 170<<20, 4<<20, block.WriteOptions{FUA: true}) // where nothing is marked
			put(t, c, b.want, 61, 1<<20, 4<<20, block.WriteOptions{})
			must(t, c.Flush(context.Background()))
			if anew {
				other := filepath.Join(dir, "other")
				b.drc("buffer", "add", other, "--size", "64MiB")
				b.args[len(b.args)-1] = "path=" + other + ",size=64MiB"
				put(t, c, b.want, 62, 180<<20, 4<<20, block.WriteOptions{})
				must(t, c.Flush(context.Background()))
			}
			must(t, c.Close())
			b.agent.kill() // what was sealed is lost, and only a restart goes on from that
			b.agent = b.start(b.args...)
			b.ends()
		})
	}
}
