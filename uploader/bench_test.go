package uploader_test

import (
	"strings"
	"testing"
	"time"

	"drc/internal/object/fault"
	"drc/restorer"
)

// BenchmarkOpenImage opens the newest image of a history of 5,000 small entries
// and reads its map, with and without merged manifests.
func BenchmarkOpenImage(b *testing.B) {
	const entries = 5000
	w := newWorld(b, options{volumes: []int64{64 << 20}, seed: 1})
	x := w.start()
	for range entries {
		for range 3 {
			w.write(0, 4096*w.rng.Int64N(16<<10), []byte(strings.Repeat(string(rune('a'+w.rng.IntN(26))), 4096)))
		}
		w.cut()
	}
	x.stop()
	st := x.up.MergeStats()
	b.Logf("%+v", st)
	with := fault.New(w.stores[0].Clone())
	w.unmerge()
	for _, c := range []struct {
		name  string
		store *fault.Store
	}{{"merged", with}, {"unmerged", fault.New(w.stores[0])}} {
		b.Run(c.name, func(b *testing.B) {
			var open, first time.Duration
			requests := 0
			for b.Loop() {
				b.StopTimer()
				h := w.history(c.store)
				c.store.Forget()
				b.StartTimer()
				began := time.Now()
				im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
				w.must(err)
				open += time.Since(began)
				p := make([]byte, 4096)
				w.must(im.ReadAt(w.ctx, p, 8192))
				first += time.Since(began)
				requests += len(c.store.Calls())
				b.StopTimer()
				w.must(h.Close())
				b.StartTimer()
			}
			b.ReportMetric(float64(open.Microseconds())/1000/float64(b.N), "ms/open")
			b.ReportMetric(float64(first.Microseconds())/1000/float64(b.N), "ms/first-read")
			b.ReportMetric(float64(requests)/float64(b.N), "requests")
		})
	}
}
