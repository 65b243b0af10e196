package restorer_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"drc/restorer"
)

// A restored file equals the volume, is sparse where the volume is zero, and
// leaves nothing beside it.
func TestRestore_File(t *testing.T) {
	w := newWorld(t, options{stores: 2, volumes: []int64{40 << 20}})
	x := w.start()
	for range 10 {
		w.random(3 << 20)
		w.cut()
	}
	x.stop()
	im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	dir := t.TempDir()
	name := filepath.Join(dir, "volume")
	sum, err := restorer.Restore(w.ctx, im, name, restorer.Options{})
	w.must(err)
	got, err := os.ReadFile(name)
	w.must(err)
	if !bytes.Equal(got, w.model(0, im.Point().Seq)) {
		t.Fatal("the restored file differs from the volume")
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Fatalf("left in the folder: %v, %v", list, err)
	}
	if sum.WrittenBytes+sum.ZeroBytes != sum.VolumeBytes {
		t.Fatalf("%d bytes written and %d zero of %d", sum.WrittenBytes, sum.ZeroBytes, sum.VolumeBytes)
	}
}
