package overlay_test

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
)

// BenchmarkRandomWrites are writes of 4 KiB at random places of 1 GiB, without
// flushes: to a plain sparse file, to an overlay in which nothing is written yet,
// and to one that is all written.
func BenchmarkRandomWrites(b *testing.B) {
	const size = 1 << 30
	p := filled(oneBlock, 1)
	run := func(b *testing.B, write func(off int64) error) {
		rng := rand.New(rand.NewPCG(1, 1))
		b.SetBytes(oneBlock)
		b.ReportAllocs()
		for b.Loop() {
			if err := write(rng.Int64N(size/oneBlock) * oneBlock); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("plain", func(b *testing.B) {
		f, err := os.Create(b.TempDir() + "/volume")
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			b.Fatal(err)
		}
		run(b, func(off int64) error { _, err := f.WriteAt(p, off); return err })
	})
	for _, name := range []string{"overlay", "written"} {
		b.Run(name, func(b *testing.B) {
			base := &testBase{Memory: blocktest.NewMemoryGeometry(block.Geometry{SizeBytes: size, SectorSize: 4096}, nil)}
			c := config(nil, base, "")
			c.File = b.TempDir() + "/volume"
			d := open(b, c)
			if name == "written" {
				for at := int64(0); at < size; at += oneBlock {
					write(b, d, p, at)
				}
			}
			run(b, func(off int64) error { return d.WriteAt(context.Background(), p, off, block.WriteOptions{}) })
			closeIt(b, d)
		})
	}
}
