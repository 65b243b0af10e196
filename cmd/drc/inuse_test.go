package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/control"
)

// TestVolume_WrittenToInUse has another program write to the file behind a volume
// at work. The agent says so, and the next start compares, whatever the times say.
func TestVolume_WrittenToInUse(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	args := []string{"--volume", "name=v,path=" + path + ",size=8MiB", "--rpo", "50ms"}
	a := h.start(args...)
	c := h.device("v")
	want := make([]byte, 8<<20)
	put(t, c, want, 1, 0, 1<<20, atOnce)
	h.await("all is committed", isContinuous)
	must(t, c.Close())
	a.stop()
	a = h.start(args...) // it has not written anything yet: what it does itself is not in the way
	putBehind(t, path, want, 20, 4<<20, 64<<10)
	noticed := func(s control.Status) bool {
		return s.Groups[0].State == "error" && strings.Contains(s.Groups[0].Message, "written to by another program")
	}
	h.await("the agent says so", noticed)
	c = h.device("v")
	put(t, c, want, 2, 2<<20, 64<<10, atOnce) // it goes on
	h.await("what clients write is committed", func(s control.Status) bool { return s.Groups[0].Committed == s.Groups[0].Captured })
	must(t, c.Close())
	a.kill()
	a = h.start(args...)
	h.await("it is compared", isContinuous)
	h.sameAs("v", want)
	if gaps := h.history("v").Gaps; len(gaps) != 1 || gaps[0].Open {
		t.Errorf("the gaps are %+v", gaps)
	}
	a.stop()
	if raw, err := os.ReadFile(path); err != nil || !bytes.Equal(raw, want) {
		t.Errorf("the volume is something else (%v)", err)
	}
}

// TestVolume_CutShortInUse cuts off the end of the file behind a volume at work,
// while the stores are away. Nothing that was acknowledged is lost: not what was
// in the part that is gone, nor what was written after.
func TestVolume_CutShortInUse(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	dir := t.TempDir()
	path := filepath.Join(dir, "v.img")
	args := []string{"--volume", "name=v,path=" + path + ",size=8MiB", "--rpo", "50ms"}
	a := h.start(args...)
	c := h.device("v")
	want := make([]byte, 8<<20)
	put(t, c, want, 1, 0, 8<<20, atOnce)
	h.await("all is committed", isContinuous)
	back := unreachable(t, h.urls)
	put(t, c, want, 2, 6<<20, 1<<20, atOnce)
	must(t, os.Truncate(path, 1<<20))
	put(t, c, want, 3, 3<<20, 64<<10, atOnce)
	h.await("the agent says so", func(s control.Status) bool {
		return s.Groups[0].State == "error" && strings.Contains(s.Groups[0].Message, "was cut short") && strings.Contains(s.Groups[0].Message, "--with-buffer")
	})
	put(t, c, want, 4, 5<<20, 64<<10, block.WriteOptions{})
	put(t, c, want, 5, 0, 4096, atOnce)
	must(t, c.Close())
	a.kill()
	back()
	if said := h.refuses(1, append([]string{"agent"}, args...)...); !strings.Contains(said, "cut short") {
		t.Errorf("the next start says: %s", said)
	}
	h.restoreBeyond(filepath.Join(dir, "again.img"))
	if raw, err := os.ReadFile(filepath.Join(dir, "again.img")); err != nil || !bytes.Equal(raw, want) {
		t.Errorf("the restored volume is not what was acknowledged (%v)", err)
	}
}

// TestVolumes_OfOneFile are refused, whatever path leads there.
func TestVolumes_OfOneFile(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	dir := t.TempDir()
	path := filepath.Join(dir, "v.img")
	must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	must(t, os.Symlink(path, filepath.Join(dir, "symlink")))
	must(t, os.Link(path, filepath.Join(dir, "hardlink")))
	for _, other := range []string{"symlink", "hardlink"} {
		said := h.refuses(1, "agent", "--volume", "name=a,path="+path, "--volume", "name=b,path="+dir+"/"+other)
		if !strings.Contains(said, "volumes a and b have the same file") {
			t.Errorf("%s: %s", other, said)
		}
	}
}
