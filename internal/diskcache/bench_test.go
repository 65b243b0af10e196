package diskcache_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"drc/internal/diskcache"
)

// BenchmarkOpen opens a cache of 10 GiB of values of 128 KiB, of which there are only
// the tables: no more is read.
func BenchmarkOpen(b *testing.B) {
	folder := b.TempDir()
	const slabs, each, bytes = 160, 500, 128 << 10
	for n := range slabs {
		if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("drc-cache-%016x.slab", n)), diskcache.SlabHead, 0o600); err != nil {
			b.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(folder, fmt.Sprintf("drc-cache-%016x.slab", n)), os.O_RDWR, 0)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := f.WriteAt(diskcache.Table(uint64(n), each, bytes), 16+each*bytes); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	for b.Loop() {
		c, err := diskcache.Open(diskcache.Options{Dir: folder, LimitBytes: 12 << 30})
		if err != nil || c.Stats().Values != slabs*each {
			b.Fatal(err, c.Stats())
		}
		c.Close()
	}
}

func BenchmarkGet(b *testing.B) {
	c, err := diskcache.Open(diskcache.Options{Dir: b.TempDir(), LimitBytes: 1 << 30, QueueBytes: 1 << 30})
	if err != nil {
		b.Fatal(err)
	}
	const n, size = 200, 128 << 10
	for i := range n {
		c.Put(1, name(i), value(i, size))
	}
	for c.Stats().Queued > 0 { // not a test: what waits would be quicker
	}
	b.SetBytes(size)
	names := make([][32]byte, n)
	for i := range names {
		names[i] = name(i)
	}
	for i := 0; b.Loop(); i++ {
		if _, ok := c.Get(1, names[i%n]); !ok {
			b.Fatal("not found")
		}
	}
	c.Close()
}
