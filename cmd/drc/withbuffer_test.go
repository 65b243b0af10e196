package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/control"
)

// restoreBeyond restores volume v with the buffer of the host.
func (h *host) restoreBeyond(target string, args ...string) (out restoreJSON) {
	h.t.Helper()
	raw := h.drc(append([]string{"restore", "v", target, "--json", "--with-buffer", filepath.Join(h.state, "buffer")}, args...)...)
	must(h.t, json.Unmarshal([]byte(raw), &out))
	if out.WithBuffer == nil {
		h.t.Fatalf("the summary says nothing of the buffer: %s", raw)
	}
	return out
}

// refuses has drc fail, and returns what it said.
func (h *host) refuses(code int, args ...string) string {
	h.t.Helper()
	out, err := h.command(args...).CombinedOutput()
	if got := exitOf(err); err == nil || got != code {
		h.t.Fatalf("drc %s ended with %v, not with exit code %d\n%s", strings.Join(args, " "), err, code, out)
	}
	return string(out)
}

// filesOf is what is in a folder: every file with its content, but for the lock,
// which names the process that had it last.
func filesOf(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			all[path] = "folder"
			return err
		}
		raw, err := os.ReadFile(path)
		if e.Name() != "lock" {
			all[path] = string(raw)
		}
		return err
	}))
	return all
}

func sameTree(t testing.TB, before, after map[string]string) {
	t.Helper()
	for name, content := range before {
		if after[name] != content {
			t.Errorf("%s was changed", name)
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			t.Errorf("%s is new", name)
		}
	}
}

// TestWithBuffer_NothingAcknowledgedIsLost loses the volume's file, while the
// stores lag, and the agent with it. What is restored with the buffer is all that
// was acknowledged, and the next agent goes on from there as if nothing had been.
func TestWithBuffer_NothingAcknowledgedIsLost(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		stores int
		args   []string
		mib    int // written during the outage
	}{
		{"all in the journal", 1, nil, 2},
		{"batches and the journal", 1, []string{"--buffer", "size=8MiB"}, 12},
		{"all in the journal while three stores lag", 3, nil, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const size = 16 << 20
			h := onFolders(t, c.stores)
			path := filepath.Join(t.TempDir(), "v.img")
			args := []string{"--volume", "name=v,path=" + path + ",size=16MiB,when-full=hold", "--rpo", "50ms"}
			for _, a := range c.args {
				if strings.HasPrefix(a, "size=") {
					a = "path=" + filepath.Join(h.state, "buffer") + "," + a
				}
				args = append(args, a)
			}
			a := h.start(args...)
			dev := h.device("v")
			want := make([]byte, size)
			put(t, dev, want, 1, 0, 4<<20, atOnce)
			h.await("all is committed", isContinuous)
			back := unreachable(t, h.urls)
			// Compressible, so that batches take less than the journal: the same page
			// many times, with a number that makes each another.
			for i := range c.mib * 4 {
				p := bytes.Repeat(noise(uint64(1000+i), 4096), 64)
				off := (i * 7 % 60) * (256 << 10)
				must(t, dev.WriteAt(context.Background(), p, int64(off), block.WriteOptions{}))
				copy(want[off:], p)
				if i%8 == 3 {
					e := block.Extent{Off: int64(i%50) * 8192, Len: 24 << 10}
					must(t, dev.Zero(context.Background(), e, block.ZeroOptions{}))
					clear(want[e.Off:e.End()])
				}
			}
			h.await("what was written is sealed", func(s control.Status) bool { return s.Groups[0].Sealed == s.Groups[0].Captured })
			put(t, dev, want, 3, 5<<20+512, 3000*512, block.WriteOptions{}) // not flushed
			captured := h.status().Groups[0].Captured
			a.kill()
			back()
			must(t, os.Remove(path))

			before := filesOf(t, filepath.Join(h.state, "buffer"))
			got := h.restoreBeyond(path)
			sameTree(t, before, filesOf(t, filepath.Join(h.state, "buffer")))
			if raw, err := os.ReadFile(path); err != nil || !bytes.Equal(raw, want) {
				t.Fatalf("the restored volume is not what was written (%v): %+v", err, got)
			}
			if got.WithBuffer.Seq < captured || got.Point.Seq >= got.WithBuffer.Seq {
				t.Errorf("restored to seq %s of %s, from a history that ends at %s", got.WithBuffer.Seq, captured, got.Point.Seq)
			}
			if len(c.args) > 0 && got.WithBuffer.Batches == 0 {
				t.Errorf("no batch was needed: %+v", got.WithBuffer)
			}
			again := filepath.Join(t.TempDir(), "again.img")
			h.restoreBeyond(again) // the buffer is as it was
			if raw, err := os.ReadFile(again); err != nil || !bytes.Equal(raw, want) {
				t.Errorf("restored once more it is something else (%v)", err)
			}

			a = h.start(args...)
			dev = h.device("v")
			put(t, dev, want, 4, 9<<20, 100<<10, atOnce)
			h.await("all is committed", isContinuous)
			must(t, dev.Close())
			if said := h.refuses(5, "restore", "v", again+"2", "--with-buffer", filepath.Join(h.state, "buffer")); !strings.Contains(said, "stop it first") {
				t.Errorf("beside a running agent: %s", said)
			}
			a.stop()
			h.sameAs("v", want)
			if gaps := h.history("v").Gaps; len(gaps) != 0 {
				t.Errorf("the history has gaps: %+v", gaps)
			}
			if raw, err := os.ReadFile(path); err != nil || !bytes.Equal(raw, want) {
				t.Errorf("the volume is something else (%v)", err)
			}
			// With nothing in the buffer it is the newest checkpoint.
			last := filepath.Join(t.TempDir(), "last.img")
			if got := h.restoreBeyond(last); got.WithBuffer.Seq != got.Point.Seq {
				t.Errorf("all is committed, and the buffer goes on: %+v", got)
			}
			if raw, err := os.ReadFile(last); err != nil || !bytes.Equal(raw, want) {
				t.Errorf("restored from the stores it is something else (%v)", err)
			}
		})
	}
}

// TestWithBuffer_RefusesWhatIsNotWhole: what the buffer holds is not put on top of
// a history that it does not belong to, nor if something is missing.
func TestWithBuffer_RefusesWhatIsNotWhole(t *testing.T) {
	t.Parallel()
	t.Run("writes went past the buffer", func(t *testing.T) {
		t.Parallel()
		h := onFolders(t, 1)
		buffer := filepath.Join(h.state, "buffer")
		path := filepath.Join(t.TempDir(), "v.img")
		a := h.start("--volume", "name=v,path="+path+",size=16MiB", "--rpo", "50ms", "--buffer", "path="+buffer+",size=8MiB")
		dev := h.device("v")
		want := make([]byte, 16<<20)
		put(t, dev, want, 1, 0, 1<<20, atOnce)
		h.await("all is committed", isContinuous)
		back := unreachable(t, h.urls)
		for i := range 14 {
			put(t, dev, want, uint64(10+i), i<<20, 1<<20, block.WriteOptions{})
		}
		h.await("the buffer is full", func(s control.Status) bool { return s.Groups[0].State == "bitmap" })
		a.kill()
		back()
		must(t, os.Remove(path))
		h.fails(1, "the buffer was full", "restore", "v", path, "--with-buffer", buffer)
		if exists(path) || exists(path+".drc-partial") {
			t.Error("a refused restore has left something")
		}
		h.drc("restore", "v", path)
	})
	t.Run("another agent has taken over", func(t *testing.T) {
		t.Parallel()
		h := onFolders(t, 1)
		path := filepath.Join(t.TempDir(), "v.img")
		a := h.start("--volume", "name=v,path="+path+",size=4MiB", "--rpo", "50ms")
		dev := h.device("v")
		want := make([]byte, 4<<20)
		put(t, dev, want, 1, 0, 1<<20, atOnce)
		h.await("all is committed", isContinuous)
		b := h.other()
		image := filepath.Join(t.TempDir(), "b.img")
		b.drc("restore", "v", image)
		second := b.start("--volume", "name=v,path="+image, "--rpo", "50ms", "--takeover")
		cb := b.device("v")
		put(t, cb, bytes.Clone(want), 2, 1<<20, 1<<20, atOnce)
		b.await("the new agent has committed", isContinuous)
		put(t, dev, want, 3, 2<<20, 64<<10, atOnce)
		h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
		must(t, dev.Close())
		a.stop()
		must(t, os.Remove(path))
		h.fails(1, "another agent has gone on with the group", "restore", "v", path, "--with-buffer", filepath.Join(h.state, "buffer"))
		second.stop()
	})
	t.Run("another buffer was used last", func(t *testing.T) {
		t.Parallel()
		h := onFolders(t, 1)
		dir := t.TempDir()
		path, older, last := filepath.Join(dir, "v.img"), filepath.Join(dir, "older"), filepath.Join(dir, "last")
		args := []string{"--volume", "name=v,path=" + path + ",size=4MiB", "--rpo", "50ms", "--buffer"}
		a := h.start(append(args, "path="+older)...)
		dev := h.device("v")
		want := make([]byte, 4<<20)
		put(t, dev, want, 1, 0, 1<<20, atOnce)
		h.await("all is committed", isContinuous)
		must(t, dev.Close())
		a.stop()
		a = h.start(append(args, "path="+last)...)
		back := unreachable(t, h.urls)
		dev = h.device("v")
		put(t, dev, want, 2, 1<<20, 1<<20, atOnce)
		must(t, dev.Close())
		a.stop()
		back()
		must(t, os.Remove(path))
		h.fails(1, "which is in "+last, "restore", "v", path, "--with-buffer", older)
		must(t, os.Rename(last, last+".away")) // then the records tell
		h.fails(1, "not the one that was used last", "restore", "v", path, "--with-buffer", older)
		if exists(path) || exists(path+".drc-partial") {
			t.Error("a refused restore has left something")
		}
		h.drc("restore", "v", path, "--with-buffer", last+".away")
		if !bytes.Equal(contentOf(t, path), want) {
			t.Error("what is restored is not what was written")
		}
		h.fails(2, "is empty", "restore", "v", path, "--with-buffer", "")
	})
	t.Run("a resync had not ended", func(t *testing.T) {
		t.Parallel()
		h := onFolders(t, 1)
		path := filepath.Join(t.TempDir(), "v.img")
		want := noise(5, 8<<20)
		must(t, os.WriteFile(path, want, 0o600))
		args := []string{"--volume", "name=v,path=" + path, "--rpo", "50ms"}
		a := h.start(args...)
		h.await("all is committed", isContinuous)
		a.stop()
		putBehind(t, path, want, 8, 3<<20, 1<<20)
		a = h.start(append(args, "--bandwidth", "1KiB")...)
		dev := h.device("v")
		put(t, dev, want, 9, 0, 4096, atOnce)
		must(t, dev.Close())
		a.kill()
		must(t, os.Remove(path))
		h.fails(1, "a resync had not ended", "restore", "v", path, "--with-buffer", filepath.Join(h.state, "buffer"))
	})
}

// TestWithBuffer_GroupOnTwoDisks loses one volume of a group of two, whose buffer is
// on two disks; the other volume is left as it is, and both go on together.
func TestWithBuffer_GroupOnTwoDisks(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	dirs := []string{filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")}
	paths := map[string]string{"v": filepath.Join(t.TempDir(), "v.img"), "w": filepath.Join(t.TempDir(), "w.img")}
	args := []string{"--rpo", "50ms", "--buffer", "path=" + dirs[0] + ",size=8MiB", "--buffer", "path=" + dirs[1] + ",size=8MiB"}
	want := map[string][]byte{}
	for name, path := range paths {
		args = append(args, "--volume", "name="+name+",path="+path+",size=8MiB,group=g,when-full=hold")
		want[name] = make([]byte, 8<<20)
	}
	a := h.start(args...)
	write := func(seed uint64) {
		for name := range paths {
			dev := h.device(name)
			put(t, dev, want[name], seed, int(seed%7)<<20, 1<<20, block.WriteOptions{})
			must(t, dev.Close())
		}
	}
	write(1)
	h.await("all is committed", isContinuous)
	back := unreachable(t, h.urls)
	write(2)
	write(3)
	a.kill()
	back()
	must(t, os.Remove(paths["v"]))
	must(t, os.Rename(dirs[1], dirs[1]+".away"))
	h.fails(1, dirs[1], "restore", "v", paths["v"], "--with-buffer", dirs[0])
	must(t, os.Rename(dirs[1]+".away", dirs[1]))
	h.drc("restore", "v", paths["v"], "--with-buffer", dirs[0]) // the other one is found by the label
	if raw, err := os.ReadFile(paths["v"]); err != nil || !bytes.Equal(raw, want["v"]) {
		t.Fatalf("the restored volume is not what was written (%v)", err)
	}
	h.start(args...)
	write(4)
	h.await("all is committed", isContinuous)
	for name := range paths {
		h.sameAs(name, want[name])
		if gaps := h.history(name).Gaps; len(gaps) != 0 {
			t.Errorf("volume %s has gaps: %+v", name, gaps)
		}
	}
}

// TestWithBuffer_NothingOnTheStoresYet loses a volume of which no store has ever had
// anything.
func TestWithBuffer_NothingOnTheStoresYet(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	args := []string{"--volume", "name=v,path=" + path + ",size=4MiB", "--rpo", "50ms"}
	a := h.start(append(args, "--bandwidth", "1KiB")...)
	dev := h.device("v")
	want := make([]byte, 4<<20)
	put(t, dev, want, 1, 1<<20, 1<<20, atOnce)
	must(t, dev.Close())
	a.kill()
	must(t, os.Remove(path))
	h.restoreBeyond(path)
	if raw, err := os.ReadFile(path); err != nil || !bytes.Equal(raw, want) {
		t.Fatalf("the restored volume is not what was written (%v)", err)
	}
	h.start(args...)
	h.await("all is committed", isContinuous)
	h.sameAs("v", want)
}
