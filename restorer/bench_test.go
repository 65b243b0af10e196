package restorer_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"drc/internal/object"
	"drc/internal/object/dir"
	"drc/restorer"
)

// onDisk copies the stores into folders and opens the history from there.
func (w *world) onDisk(b testing.TB) *restorer.History {
	b.Helper()
	var list []object.Store
	for i, s := range w.stores {
		list = append(list, w.onDiskAt(filepath.Join(b.TempDir(), fmt.Sprint(i)), s))
	}
	return w.history(list...)
}

// onDiskAt copies a store into a folder.
func (w *world) onDiskAt(folder string, s object.Store) object.Store {
	w.t.Helper()
	d, err := dir.Open(folder, dir.Options{Create: true})
	w.must(err)
	for _, name := range names(w.t, s, "") {
		raw, _, err := s.Get(w.ctx, name, 1<<30, nil)
		w.must(err)
		_, err = d.Put(w.ctx, name, raw)
		w.must(err)
	}
	return d
}

func benchWorld(b *testing.B, stores int) *world {
	w := newWorld(b, options{stores: stores, volumes: []int64{256 << 20}, seed: 1})
	x := w.start()
	for i := range int64(16) {
		w.write(0, i*16<<20, fill(w.rng, make([]byte, 12<<20)))
		w.cut()
	}
	x.stop()
	return w
}

func BenchmarkImage_SequentialRead(b *testing.B) {
	w := benchWorld(b, 1)
	h := w.onDisk(b)
	p := make([]byte, 1<<20)
	b.SetBytes(256 << 20)
	for b.Loop() {
		im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
		w.must(err)
		for off := int64(0); off < 256<<20; off += int64(len(p)) {
			w.must(im.ReadAt(w.ctx, p, off))
		}
	}
}

func BenchmarkRestore(b *testing.B) {
	for _, c := range []struct {
		name   string
		stores int
		given  []int
	}{{"one store", 1, []int{0}}, {"three stores", 3, []int{0, 1, 2}}, {"one of three lost", 3, []int{0, 1}}} {
		b.Run(c.name, func(b *testing.B) {
			w := benchWorld(b, c.stores)
			h := w.history(w.given(c.given...)...)
			if c.stores == 1 {
				h = w.onDisk(b)
			}
			name := filepath.Join(b.TempDir(), "volume")
			b.SetBytes(256 << 20)
			for b.Loop() {
				im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
				w.must(err)
				_, err = restorer.Restore(w.ctx, im, name, restorer.Options{})
				w.must(err)
				w.must(os.Remove(name))
			}
		})
	}
}

// Nothing is known but the stores and the key; the first byte of a volume that is
// larger by a thousand times, and has fifty times the history, takes about as long.
func BenchmarkFirstByte(b *testing.B) {
	for _, c := range []struct {
		name    string
		size    int64
		commits int
	}{{"1 GiB, 200 commits", 1 << 30, 200}, {"1 TiB, 10,000 commits", 1 << 40, 10_000}} {
		b.Run(c.name, func(b *testing.B) {
			w := newWorld(b, options{stores: 1, volumes: []int64{c.size}, seed: 1, digests: true})
			x := w.start()
			for i := range c.commits {
				w.write(0, 4096*w.rng.Int64N(c.size/4096), fill(w.rng, make([]byte, 4096)))
				w.cut()
				if i%100 == 0 {
					w.must(x.up.AwaitIdle(w.ctx))
				}
			}
			x.stop()
			h := w.onDisk(b)
			last := w.journal.writes[len(w.journal.writes)-1].Extent.Off
			for b.Loop() {
				all, err := restorer.OpenCatalog(w.ctx, h.Config())
				w.must(err)
				again, p, err := all.FindAt(w.ctx, "v0")
				w.must(err)
				im, err := restorer.OpenImageAt(w.ctx, again, p)
				w.must(err)
				w.must(im.ReadAt(w.ctx, make([]byte, 512), last))
				all.Close()
			}
		})
	}
}
