package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
)

// lostBuffer is a volume whose agent has ended while the stores were away, with
// writes that only its buffer and perhaps the volume have.
type lostBuffer struct {
	*host
	path, buffer string
	args         []string
	committed    []byte // as of the newest checkpoint
	want         []byte // with the writes that followed
}

func loseBuffer(t *testing.T, end func(*agent)) *lostBuffer {
	t.Helper()
	dir := t.TempDir()
	b := &lostBuffer{host: onFolders(t, 1), path: filepath.Join(dir, "v.img"), buffer: filepath.Join(dir, "buffer"), want: make([]byte, 16<<20)}
	b.args = []string{"--volume", "name=v,path=" + b.path + ",size=16MiB", "--rpo", "50ms", "--buffer", "path=" + b.buffer + ",size=64MiB"}
	a := b.start(b.args...)
	c := b.device("v")
	put(t, c, b.want, 1, 0, 4<<20, block.WriteOptions{})
	put(t, c, b.want, 2, 8<<20, 1<<20, atOnce)
	b.await("all is committed", isContinuous)
	b.committed = bytes.Clone(b.want)
	back := unreachable(t, b.urls)
	for i := range 5 {
		put(t, c, b.want, uint64(i)+10, i<<20+4096, 64<<10, atOnce)
	}
	must(t, c.Close())
	end(a)
	back()
	return b
}

func needsDecision(s control.Status) bool { return s.State == "needs-decision" }

// wholeAfterGap checks that history, volume and want are one, and that there was
// one gap for the reason.
func (b *lostBuffer) wholeAfterGap(a *agent, want []byte, reason string) {
	b.t.Helper()
	b.await("the volume has been compared", isContinuous)
	b.sameAs("v", want)
	gaps := b.history("v").Gaps
	if len(gaps) != 1 || gaps[0].Open || !strings.Contains(gaps[0].Reason, reason) {
		b.t.Errorf("the history shows %+v, not one closed gap because of %q", gaps, reason)
	}
	// It goes on as ever.
	c := b.device("v")
	put(b.t, c, want, 99, 12<<20, 1<<20, atOnce)
	must(b.t, c.Close())
	b.await("all is committed", isContinuous)
	b.sameAs("v", want)
	a.stop()
	if !bytes.Equal(contentOf(b.t, b.path), want) {
		b.t.Error("after a clean stop the backing is not what was written")
	}
}

// TestBufferLost_Rewind: the volume goes back to its newest checkpoint.
func TestBufferLost_Rewind(t *testing.T) {
	t.Parallel()
	b := loseBuffer(t, (*agent).kill)
	must(t, os.RemoveAll(b.buffer))
	a := b.start(b.args...)
	b.await("a decision is needed", needsDecision)
	a.stop()
	a = b.start(append(b.args, "--rewind", "v")...)
	if !strings.Contains(b.said(), "rewinding the volume to its newest checkpoint") {
		t.Errorf("it does not say what it does:\n%s", b.said())
	}
	b.wholeAfterGap(a, b.committed, "lost with writes")
}

// TestBufferLost_Resync: the volume stays as it is.
func TestBufferLost_Resync(t *testing.T) {
	t.Parallel()
	b := loseBuffer(t, (*agent).kill)
	must(t, os.RemoveAll(b.buffer))
	kept := contentOf(t, b.path)
	a := b.start(append(b.args, "--resync", "v")...)
	b.wholeAfterGap(a, kept, "lost with writes")
}

// damageJournal destroys a record in the middle of the journal.
func (b *lostBuffer) damageJournal() {
	b.t.Helper()
	files, err := filepath.Glob(filepath.Join(b.buffer, "journal", "*.jrn"))
	must(b.t, err)
	marker := noise(12, 64<<10)[:512] // of the third of the last writes
	for _, name := range files {
		raw := contentOf(b.t, name)
		if at := bytes.Index(raw, marker); at >= 0 {
			raw[at] ^= 1
			must(b.t, os.WriteFile(name, raw, 0o600))
			return
		}
	}
	b.t.Fatal("the journal does not hold the write")
}

// TestJournalDamaged_VolumeHasIt: what the journal has lost is on the volume: only
// its history is lost.
func TestJournalDamaged_VolumeHasIt(t *testing.T) {
	t.Parallel()
	b := loseBuffer(t, (*agent).stop)
	b.damageJournal()
	a := b.start(b.args...)
	b.wholeAfterGap(a, b.want, "buffer was full or lost")
}

// TestJournalDamaged_VolumeLacksIt: a durable write that the volume may lack is
// lost. Nobody but a human goes on; what can be read is applied first.
func TestJournalDamaged_VolumeLacksIt(t *testing.T) {
	t.Parallel()
	b := loseBuffer(t, (*agent).kill)
	b.damageJournal()
	a := b.start(b.args...)
	b.await("a decision is needed", needsDecision)
	if s := b.status(); !strings.Contains(s.Groups[0].Message, "lost durable writes") {
		t.Errorf("it says %s", s.Groups[0].Message)
	}
	a.stop()
	a = b.start(append(b.args, "--resync", "v")...)
	// All others are intact; the lost one is there or is not.
	const off, end = 2<<20 + 4096, 2<<20 + 4096 + 64<<10
	if lost := contentOf(t, b.path)[off:end]; !bytes.Equal(lost, b.want[off:end]) {
		if !bytes.Equal(lost, b.committed[off:end]) {
			t.Error("in place of the lost write there is something else than what was there before")
		}
		copy(b.want[off:], lost)
	}
	b.wholeAfterGap(a, b.want, "lost with writes")
}

// TestBufferLost_WhileTheAgentLives: the buffer's only directory vanishes under a
// running agent with writes that the stores do not have. No write fails, and
// nothing acknowledged is lost, however the agent ends; the next one needs no
// decision.
func TestBufferLost_WhileTheAgentLives(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*agent){"stopped": (*agent).stop, "killed": (*agent).kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			b := &lostBuffer{host: onFolders(t, 1), path: filepath.Join(dir, "v.img"), buffer: filepath.Join(dir, "buffer"), want: make([]byte, 16<<20)}
			b.args = []string{"--volume", "name=v,path=" + b.path + ",size=16MiB", "--rpo", "50ms", "--buffer", "path=" + b.buffer + ",size=64MiB"}
			a := b.start(b.args...)
			c := b.device("v")
			put(t, c, b.want, 1, 0, 4<<20, atOnce)
			b.await("all is committed", isContinuous)
			before := bytes.Clone(b.want)
			back := unreachable(t, b.urls)
			for i := range 5 {
				put(t, c, b.want, uint64(i)+10, i<<20+4096, 64<<10, block.WriteOptions{})
			}
			must(t, os.RemoveAll(b.buffer))
			for i := range 20 {
				put(t, c, b.want, uint64(i)+30, i<<19+512, 64<<10, block.WriteOptions{FUA: i%3 == 0})
			}
			must(t, c.Flush(t.Context()))
			b.await("it says that the buffer is lost", func(s control.Status) bool {
				return s.State == "error" && strings.Contains(s.Groups[0].Message, "nothing acknowledged is lost")
			})
			p := make([]byte, len(b.want))
			must(t, c.ReadAt(t.Context(), p, 0))
			if !bytes.Equal(p, b.want) {
				t.Error("a read returns something else than was written")
			}
			must(t, c.Close())
			end(a)
			back()
			if !bytes.Equal(contentOf(t, b.path), b.want) {
				t.Error("the volume's file is not what was written")
			}
			b.sameAs("v", before)
			a = b.start(b.args...)
			b.wholeAfterGap(a, b.want, "buffer was full or lost")
		})
	}
}

// TestBufferLost_BeginsAnewAtWork: the buffer's only directory vanishes under a
// running agent with two groups, one of which is idle. It is given another one. No
// write fails, the exports stay, and both groups are protected again without a
// restart; only what differs is stored. The next start needs no more than the new
// directory.
func TestBufferLost_BeginsAnewAtWork(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := &lostBuffer{host: onFolders(t, 1), path: filepath.Join(dir, "v.img"), buffer: filepath.Join(dir, "buffer"), want: make([]byte, 16<<20)}
	volumes := []string{"--volume", "name=v,path=" + b.path + ",size=16MiB", "--volume", "name=idle,path=" + filepath.Join(dir, "idle.img") + ",size=4MiB", "--rpo", "50ms"}
	a := b.start(append(volumes, "--buffer", "path="+b.buffer+",size=64MiB")...)
	c, idle := b.device("v"), b.device("idle")
	idleWant := make([]byte, 4<<20)
	put(t, idle, idleWant, 3, 4096, 1<<20, atOnce)
	put(t, c, b.want, 1, 0, 4<<20, atOnce)
	caughtUp := func(s control.Status) bool {
		for _, g := range s.Groups {
			if g.State != "continuous" || g.Committed != g.Captured {
				return false
			}
		}
		return true
	}
	b.await("all is committed", caughtUp)
	before := bytes.Clone(b.want)
	must(t, os.RemoveAll(b.buffer))
	for i := range 20 {
		put(t, c, b.want, uint64(i)+30, i<<19+512, 64<<10, block.WriteOptions{FUA: i%3 == 0})
	}
	must(t, c.Flush(t.Context()))
	b.await("it says that the buffer is lost", func(s control.Status) bool {
		return s.State == "error" && strings.Contains(s.Groups[0].Message, "drc buffer add") || strings.Contains(s.Groups[1].Message, "drc buffer add")
	})
	other := filepath.Join(dir, "other")
	var load sync.WaitGroup
	stop := make(chan struct{})
	load.Go(func() { // writes go on all the time
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			put(t, c, b.want, uint64(i)+300, i%200<<16+1024, 32<<10, block.WriteOptions{FUA: i%5 == 0})
			time.Sleep(5 * time.Millisecond)
		}
	})
	b.drc("buffer", "add", other, "--size", "64MiB")
	b.await("both groups are protected again", func(s control.Status) bool {
		return s.Groups[0].State == "continuous" && s.Groups[1].State == "continuous"
	})
	close(stop)
	load.Wait()
	put(t, idle, idleWant, 4, 2<<20, 1<<20, atOnce)
	b.await("all is committed", caughtUp)
	b.sameAs("v", b.want)
	b.sameAs("idle", idleWant)
	b.sameAs("v", before, "--at", "seq:1")
	if gaps := b.history("v").Gaps; len(gaps) != 1 || gaps[0].Open {
		t.Errorf("gaps: %+v", gaps)
	}
	put(t, c, b.want, 5, 12<<20, 64<<10, block.WriteOptions{})
	must(t, c.Close())
	must(t, idle.Close())
	a.kill()
	a = b.start(append(volumes, "--buffer", "path="+other+",size=64MiB")...)
	b.await("all is committed", caughtUp)
	b.sameAs("v", b.want)
	a.stop()
	if !bytes.Equal(contentOf(t, b.path), b.want) {
		t.Error("the volume's file is not what was written")
	}
}
