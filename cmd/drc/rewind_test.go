package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/block"
)

// segmentFiles are the shards on a store that is a folder.
func segmentFiles(t *testing.T, root string) map[string]bool {
	t.Helper()
	files := map[string]bool{}
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(path, "/segments/") {
			files[path] = true
		}
		return err
	}))
	return files
}

// TestBufferLost_RewindCutShort: a rewind that does not come to its end leaves a
// mixture of two states. Should the right buffer turn up after all, its journal,
// which is applied from where the volume was before, does not make it whole again:
// so it is asked for a decision once more, and what was acknowledged can be restored.
func TestBufferLost_RewindCutShort(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := &lostBuffer{host: onFolders(t, 1), path: filepath.Join(dir, "v.img"), buffer: filepath.Join(dir, "buffer"), want: make([]byte, 16<<20)}
	b.args = []string{"--volume", "name=v,path=" + b.path + ",size=16MiB", "--rpo", "50ms", "--buffer", "path=" + b.buffer + ",size=64MiB"}
	root := strings.TrimPrefix(b.urls[0], "file://")
	a := b.start(b.args...)
	c := b.device("v")
	put(t, c, b.want, 1, 0, 4<<20, atOnce)
	b.await("all is committed", isContinuous)
	first := segmentFiles(t, root)
	put(t, c, b.want, 2, 8<<20, 1<<20, atOnce)
	b.await("all is committed", isContinuous)
	b.committed = bytes.Clone(b.want)
	var second []string
	for name := range segmentFiles(t, root) {
		if !first[name] {
			second = append(second, name)
		}
	}
	back := unreachable(t, b.urls)
	put(t, c, b.want, 10, 1<<20, 64<<10, block.WriteOptions{})
	put(t, c, b.want, 11, 8<<20, 64<<10, block.WriteOptions{})
	must(t, c.Close())
	a.kill()
	a = b.start(b.args...) // replays, and the volume's record says so
	a.kill()
	if !bytes.Equal(contentOf(t, b.path), b.want) {
		t.Fatal("the volume lacks writes that were replayed")
	}
	back()
	must(t, os.Rename(b.buffer, b.buffer+".aside"))
	for _, name := range second { // the rewind comes as far as the first of these
		must(t, os.Rename(name, name+".away"))
	}
	if _, err := b.tryStart(append(b.args, "--rewind", "v")...); err == nil {
		t.Fatal("the rewind does not need what it cannot read")
	}
	if p := contentOf(t, b.path); bytes.Equal(p, b.want) || bytes.Equal(p, b.committed) {
		t.Fatal("the rewind has changed nothing, or all")
	}
	for _, name := range second {
		must(t, os.Rename(name+".away", name))
	}
	must(t, os.RemoveAll(b.buffer))
	must(t, os.Rename(b.buffer+".aside", b.buffer))

	a = b.start(b.args...)
	b.await("a decision is needed", needsDecision)
	if m := b.status().Groups[0].Message; !strings.Contains(m, "a rewind of it was begun") || !strings.Contains(m, "--with-buffer") {
		t.Errorf("it says %s", m)
	}
	a.stop()
	target := filepath.Join(dir, "whole.img")
	b.drc("restore", "v", target, "--with-buffer", b.buffer)
	if !bytes.Equal(contentOf(t, target), b.want) {
		t.Error("what is restored with the buffer is not what was acknowledged")
	}
	a = b.start(append(b.args, "--rewind", "v")...)
	b.wholeAfterGap(a, b.committed, "lost with writes")
}
