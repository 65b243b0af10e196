package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/control"
)

// groupFile is a file of the host's only group.
func (h *host) groupFile(name string) string {
	h.t.Helper()
	found, err := filepath.Glob(filepath.Join(h.state, "groups", "*", name))
	if err != nil || len(found) != 1 {
		h.t.Fatalf("group files %s: %v, %v", name, found, err)
	}
	return found[0]
}

// unreachable takes the stores of a host away until the function that it returns
// is called.
func unreachable(t *testing.T, urls []string) (back func()) {
	t.Helper()
	for _, u := range urls {
		dir := strings.TrimPrefix(u, "file://")
		must(t, os.Rename(dir, dir+".away"))
	}
	return func() {
		for _, u := range urls {
			dir := strings.TrimPrefix(u, "file://")
			must(t, os.Rename(dir+".away", dir))
		}
	}
}

// TestInitialSync_KilledBeforeItsFirstEntry kills an agent, or stops it, before
// anything of an initial sync is in the log. What the volume held must not be
// forgotten.
func TestInitialSync_KilledBeforeItsFirstEntry(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"kill", "stop"} {
		t.Run(end, func(t *testing.T) {
			h := onFolders(t, 1)
			path := filepath.Join(t.TempDir(), "v.img")
			want := noise(5, 8<<20)
			must(t, os.WriteFile(path, want, 0o600))
			a := h.start("--volume", "name=v,path="+path, "--bandwidth", "1KiB") // the first entry waits for its shards
			c := h.device("v")
			put(t, c, want, 6, 0, 4096, atOnce)
			must(t, c.Close())
			if end == "kill" {
				a.kill()
			} else {
				a.stop()
			}
			a = h.start("--volume", "name=v,path="+path, "--rpo", "50ms")
			h.await("all is committed", isContinuous)
			h.sameAs("v", want)
			a.stop()
		})
	}
}

// TestForeignChange_KilledBeforeItsFirstEntry kills an agent that has noticed a
// foreign change before the log says so. The next one must not take the change
// for history.
func TestForeignChange_KilledBeforeItsFirstEntry(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	want := noise(7, 8<<20)
	must(t, os.WriteFile(path, want, 0o600))
	args := []string{"--volume", "name=v,path=" + path, "--rpo", "50ms"}
	a := h.start(args...)
	h.await("all is committed", isContinuous)
	h.drc("checkpoint", "ours", "--wait")
	a.stop()
	ours := bytes.Clone(want)
	putBehind(t, path, want, 8, 3<<20, 100<<10)

	a = h.start(append(args, "--bandwidth", "1KiB")...) // the first entry waits for its shards
	c := h.device("v")
	put(t, c, want, 9, 0, 4096, atOnce)
	must(t, c.Close())
	a.kill()
	a = h.start(args...)
	h.await("the volume has been compared", isContinuous)
	h.sameAs("v", want)
	h.sameAs("v", ours, "--at", "ours")
	hist := h.history("v")
	if n := len(hist.Gaps); n == 0 || hist.Gaps[n-1].Open || !strings.Contains(hist.Gaps[n-1].Reason, "without DRC") {
		t.Errorf("the history shows %+v, not a closed gap for the change", hist.Gaps)
	}
	a.stop()
	gaps := len(h.history("v").Gaps)
	a = h.start(args...)
	if s := h.status(); s.State != "continuous" {
		t.Errorf("the resync has ended, and the next start is %s", s.State)
	}
	a.stop()
	if n := len(h.history("v").Gaps); n != gaps {
		t.Errorf("%d gaps, after %d", n, gaps)
	}
}

// TestPowerCut_ProgressLost gives an agent that was killed progress of long ago,
// or none, as a power cut may: it is not synced. The history must stay whole,
// and each checkpoint what it was.
func TestPowerCut_ProgressLost(t *testing.T) {
	t.Parallel()
	for _, lost := range []string{"old", "old but for the tails", "all"} {
		t.Run(lost, func(t *testing.T) {
			v := onSparse(t, 64<<20)
			v.put(1, 0, 4096, atOnce)
			v.await("the first write is committed", isContinuous)
			progress := v.groupFile("progress.json")
			old, err := os.ReadFile(progress)
			must(t, err)
			// More than one batch can hold, written once more, so that older
			// batches laid over newer ones show. The journal keeps it all: the
			// backing is settled only when its writers pause.
			for round := range 2 {
				for off := 0; off < 32<<20; off += 1 << 20 {
					v.put(uint64(100*round+off>>20+2), off, 1<<20, block.WriteOptions{})
				}
				must(t, v.dev.Flush(context.Background()))
			}
			v.drc("checkpoint", "here", "--wait")
			must(t, v.dev.Close())
			v.agent.kill()
			if lost == "all" {
				must(t, os.WriteFile(progress, nil, 0o600))
			} else {
				must(t, os.WriteFile(progress, old, 0o600))
			}
			if lost == "old" {
				must(t, os.RemoveAll(filepath.Join(filepath.Dir(progress), "tails.json")))
			}
			v.again()
			v.await("all is committed", isContinuous)
			v.isWhole()
			v.isWhole("--at", "here")
			v.put(500, 40<<20, 4096, atOnce)
			must(t, v.dev.Close())
			v.await("the last write is committed", isContinuous)
			v.isWhole()
			v.agent.stop()
		})
	}
}

// TestStateFolder_CannotBeWritten has the state folder refuse what is kept of
// the progress, as a full disk does, while the agent runs: everything is
// protected all the same, status says so, and the next start tells no lies.
func TestStateFolder_CannotBeWritten(t *testing.T) {
	t.Parallel()
	v := onSparse(t, 16<<20)
	v.put(1, 0, 4096, atOnce)
	v.await("the first write is committed", isContinuous)
	folder := filepath.Dir(v.groupFile("progress.json"))
	for _, name := range []string{"progress.json", "tails.json"} {
		must(t, os.Mkdir(filepath.Join(folder, name+".new"), 0o700)) // in the way
	}
	for _, name := range []string{"entries.hash", "entries.named"} {
		must(t, os.Remove(filepath.Join(folder, name)))
		must(t, os.Mkdir(filepath.Join(folder, name), 0o700))
	}
	for i := range 20 {
		v.put(uint64(i+2), i*65536, 65536, atOnce)
		v.drc("checkpoint", fmt.Sprint("c", i), "--wait")
	}
	if s := v.status(); s.State != "continuous" || !strings.Contains(s.Groups[0].Message, "state folder cannot be written") {
		t.Errorf("state %s, %q", s.State, s.Groups[0].Message)
	}
	must(t, v.dev.Close())
	v.agent.kill()
	v.isWhole()
	for _, name := range []string{"progress.json.new", "tails.json.new", "entries.hash", "entries.named"} {
		must(t, os.Remove(filepath.Join(folder, name)))
	}
	v.again()
	if left := v.status().Groups[0].Volumes[0].ResyncRemainingBytes; left != 0 {
		t.Errorf("after the restart %d bytes are to be compared", left)
	}
	v.await("all is committed", isContinuous)
	v.isWhole()
	v.put(100, 8<<20, 65536, atOnce)
	v.drc("checkpoint", "last", "--wait")
	must(t, v.dev.Close())
	v.isWhole()
	v.agent.stop()
	var tails struct{ N uint64 }
	raw, err := os.ReadFile(filepath.Join(folder, "tails.json"))
	must(t, err)
	must(t, json.Unmarshal(raw, &tails))
	if tails.N < 20 {
		t.Errorf("the ends of the logs are saved as of entry %d", tails.N)
	}
	hist := v.history("v")
	if len(hist.Gaps) != 0 {
		t.Errorf("gaps: %+v", hist.Gaps)
	}
}

// TestBuffer_NotTheOneThatWasUsedLast starts with an empty buffer in place of the
// one that holds acknowledged writes.
func TestBuffer_NotTheOneThatWasUsedLast(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	dir := t.TempDir()
	path := filepath.Join(dir, "v.img")
	args := func(buffer string) []string {
		return []string{"--volume", "name=v,path=" + path + ",size=8MiB", "--rpo", "50ms", "--buffer", "path=" + filepath.Join(dir, buffer) + ",size=64MiB"}
	}
	a := h.start(args("right")...)
	c := h.device("v")
	want := make([]byte, 8<<20)
	write := func(seed uint64, off int) { put(t, c, want, seed, off, 4096, atOnce) }
	write(1, 0)
	h.await("the first write is committed", isContinuous)
	back := unreachable(t, h.urls)
	write(2, 4096)
	must(t, c.Close())
	a.kill()
	back()

	// Killed: writes may be in that buffer only.
	before := contentOf(t, path)
	a = h.start(args("wrong")...)
	s := h.status()
	if s.State != "needs-decision" || len(s.Groups) != 1 || len(s.Groups[0].Volumes) != 1 || len(s.Groups[0].Volumes[0].Exports) != 0 {
		t.Errorf("without the buffer that holds acknowledged writes status says %+v", s)
	}
	for _, part := range []string{"not the one that was used last", "nothing was changed", "start again with it in place of this one (--buffer)", "--rewind v", "--resync v"} {
		if said := s.Groups[0].Message; !strings.Contains(said, part) {
			t.Errorf("%q is missing in what it says: %s", part, said)
		}
	}
	a.stop()
	if !bytes.Equal(contentOf(t, path), before) {
		t.Error("the volume was changed before anything was decided")
	}
	a = h.start(args("right")...)
	h.await("all is committed", isContinuous)
	h.sameAs("v", want)

	// Stopped in order while the stores were away: the volume has everything, the
	// history has not. It is found by comparing.
	c = h.device("v")
	back = unreachable(t, h.urls)
	write(3, 8192)
	must(t, c.Close())
	a.stop()
	back()
	a = h.start(args("wrong")...)
	h.await("the volume has been compared", isContinuous)
	h.sameAs("v", want)
	a.stop()
}

// TestBuffer_LostAndTheStartFails begins a new buffer in place of one that was
// lost with writes that the stores lack, and the start fails after it has found
// that out. The next start must not take the history for whole.
func TestBuffer_LostAndTheStartFails(t *testing.T) {
	t.Parallel()
	for what, obstacle := range map[string]string{
		"before the loss is noted":                "resyncs.json.tmp",
		"after the loss is noted":                 "keysets",
		"after it and another volume cannot join": "keysets",
	} {
		t.Run(what, func(t *testing.T) {
			h := onFolders(t, 1)
			dir := t.TempDir()
			path := filepath.Join(dir, "v.img")
			args := func(buffer string) []string {
				return []string{"--volume", "name=v,group=g,path=" + path + ",size=8MiB", "--rpo", "50ms", "--buffer", "path=" + filepath.Join(dir, buffer) + ",size=64MiB"}
			}
			a := h.start(args("lost")...)
			c := h.device("v")
			want := make([]byte, 8<<20)
			put(t, c, want, 1, 0, 4096, atOnce)
			h.await("the first write is committed", isContinuous)
			back := unreachable(t, h.urls)
			put(t, c, want, 2, 4096, 4096, atOnce)
			must(t, c.Close())
			a.stop()
			back()

			inTheWay := filepath.Join(filepath.Dir(h.groupFile("group.json")), obstacle)
			_ = os.Rename(inTheWay, inTheWay+".away")
			if obstacle == "keysets" {
				must(t, os.WriteFile(inTheWay, nil, 0o600))
			} else {
				must(t, os.MkdirAll(filepath.Join(inTheWay, "full"), 0o700))
			}
			failing := args("new")
			if strings.Contains(what, "join") {
				failing = append(failing, "--volume", "name=w,group=g,size=1MiB,path="+filepath.Join(dir, "w.img"))
			}
			if a, err := h.tryStart(failing...); err == nil {
				a.kill()
				t.Fatal("the start does not fail")
			}
			must(t, os.RemoveAll(inTheWay))
			_ = os.Rename(inTheWay+".away", inTheWay)

			a = h.start(args("new")...)
			h.await("the volume has been compared", isContinuous)
			h.sameAs("v", want)
			if gaps := h.history("v").Gaps; len(gaps) != 1 || gaps[0].Open {
				t.Errorf("the history shows %+v, not one closed gap", gaps)
			}
			a.stop()
		})
	}
}

// TestVolume_JoinedAndKilledAtOnce kills an agent after a second volume has
// joined its group and before the log could say so.
func TestVolume_JoinedAndKilledAtOnce(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	dir := t.TempDir()
	volume := func(name string) []string {
		return []string{"--volume", "name=" + name + ",group=g,size=4MiB,path=" + filepath.Join(dir, name)}
	}
	a := h.start(append(volume("a"), "--rpo", "50ms")...)
	h.await("the group is there", func(s control.Status) bool { return s.Groups[0].Committed == s.Groups[0].Captured })
	a.stop()
	both := append(volume("a"), volume("b")...)
	content := noise(1, 4<<20)
	must(t, os.WriteFile(filepath.Join(dir, "b"), content, 0o600))
	a = h.start(append(both, "--bandwidth", "1KiB")...) // the first entry waits for its shards
	a.kill()
	a = h.start(append(both, "--rpo", "50ms")...)
	c := h.device("b")
	want := content
	put(t, c, want, 2, 0, 4096, atOnce)
	must(t, c.Close())
	h.await("all is committed", isContinuous)
	h.sameAs("b", want)
	a.stop()
}

// TestGroup_WithoutAnEntryHindersNobody kills an agent between taking office and
// its first entry. The repository is not damaged for that.
func TestGroup_WithoutAnEntryHindersNobody(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 3)
	a := h.start("--volume", "name=v,size=1MiB,path="+filepath.Join(t.TempDir(), "v"))
	a.kill()
	for name := range storeFiles(t, h.urls, "/log/") {
		if filepath.Base(name) != strings.Repeat("0", 16) { // the promise
			must(t, os.Remove(name))
		}
	}
	h = h.other()
	h.drc("volume", "list")
	a = h.start("--volume", "name=w,size=1MiB,path="+filepath.Join(t.TempDir(), "w"))
	h.drc("checkpoint", "first", "--wait")
	h.sameAs("w", make([]byte, 1<<20))
	a.stop()
}

// TestVolume_MovedAfterAKill renames the file of a volume whose agent was killed.
// It is the same volume: the journal is replayed onto it, and there is no gap.
func TestVolume_MovedAfterAKill(t *testing.T) {
	t.Parallel()
	v := onSparse(t, 8<<20)
	for i := range 2 {
		for k := range 50 {
			v.put(uint64(100*i+k), k*65536, 4096, block.WriteOptions{})
		}
		_ = v.dev.Close()
		v.agent.kill()
		must(t, os.Rename(v.path, v.path+".moved"))
		v.path += ".moved"
		v.args[1] = "name=v,path=" + v.path
		v.again()
	}
	v.await("all is committed", isContinuous)
	v.isWhole()
	if gaps := v.history("v").Gaps; len(gaps) != 0 {
		t.Errorf("the history has gaps: %+v", gaps)
	}
	v.agent.stop()
	if got, err := os.ReadFile(v.path); err != nil || !bytes.Equal(got, v.want) {
		t.Errorf("the volume's file is not what its clients saw (%v)", err)
	}
}

// TestVolumeAdd_ClientGoesAway adds a volume that was changed without DRC while
// the buffer is full, and has the command killed while it waits: the volume is
// the agent's all the same, and is compared and served when there is room.
func TestVolumeAdd_ClientGoesAway(t *testing.T) {
	t.Parallel()
	urls, env := folders(1)(t)
	h := newRepo(t, urls, env)
	dir := t.TempDir()
	path := filepath.Join(dir, "v.img")
	want := noise(31, 4<<20)
	must(t, os.WriteFile(path, want, 0o600))
	buffer := []string{"--buffer", "path=" + filepath.Join(dir, "buffer") + ",size=64MiB", "--rpo", "50ms"}
	a := h.start(append(buffer, "--volume", "name=v,path="+path)...)
	h.await("v is committed", isContinuous)
	a.stop()
	copy(want, noise(32, 8192))
	must(t, os.WriteFile(path, want, 0o600))

	a = h.start(append(buffer, "--volume", "name=w,path="+filepath.Join(dir, "w.img")+",size=256MiB")...)
	back := unreachable(t, urls)
	c := h.device("w")
	wrote := make(chan error, 1)
	go func() {
		wrote <- c.WriteAt(context.Background(), noise(33, 128<<20), 0, block.WriteOptions{})
	}()
	h.await("writers are held back", func(s control.Status) bool { return s.State == "stalled" && s.Groups[0].WritersWaiting })
	add := h.command("volume", "add", "v", "--path", path)
	add.Stdout, add.Stderr = h, h
	must(t, add.Start())
	h.await("the volume has joined", func(s control.Status) bool { return len(s.Groups) == 2 })
	must(t, add.Process.Kill())
	_ = add.Wait()
	back()
	must(t, <-wrote)
	must(t, c.Close())
	h.await("both are committed", func(s control.Status) bool {
		for _, g := range s.Groups {
			if g.State != "continuous" || g.Committed != g.Captured || g.Captured == 0 {
				return false
			}
		}
		return len(s.Groups) == 2
	})
	must(t, h.device("v").Close())
	h.sameAs("v", want)
	a.stop()
}
