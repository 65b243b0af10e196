package nbd

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
)

func BenchmarkWrite4K_Depth1(b *testing.B)  { benchmark(b, 1, true) }
func BenchmarkWrite4K_Depth32(b *testing.B) { benchmark(b, 32, true) }
func BenchmarkRead4K_Depth1(b *testing.B)   { benchmark(b, 1, false) }
func BenchmarkRead4K_Depth32(b *testing.B)  { benchmark(b, 32, false) }

// benchmark measures client and server together, in one process.
func benchmark(b *testing.B, depth int, write bool) {
	const size = 64 << 20
	m := blocktest.NewMemory(size, nil)
	for off := int64(0); off < size; off += 4096 {
		if err := m.WriteAt(context.Background(), make([]byte, 4096), off, block.WriteOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	s := serve(b, newShelf("v", m), Limits{})
	c := s.dial(b, "v")
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	var next atomic.Int64
	var wg sync.WaitGroup
	for i := range depth {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			p := make([]byte, 4096)
			for next.Add(1) <= int64(b.N) {
				off := r.Int64N(size/4096) * 4096
				var err error
				if write {
					err = c.WriteAt(context.Background(), p, off, block.WriteOptions{})
				} else {
					err = c.ReadAt(context.Background(), p, off)
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
