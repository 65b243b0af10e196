package restorer_test

import (
	"testing"
)

// Every checkpoint equals the volume after exactly its first seq writes.
func TestImage_EveryCheckpointIsItsPrefix(t *testing.T) {
	for stores := 1; stores <= 3; stores++ {
		t.Run(string(rune('0'+stores)), func(t *testing.T) {
			w := newWorld(t, options{stores: stores, volumes: []int64{1 << 20, 512 << 10, 4096}})
			x := w.start()
			for range 60 {
				most := int64(8 << 10)
				if w.rng.IntN(4) == 0 {
					most = 300 << 10
				}
				for range 1 + w.rng.IntN(5) {
					w.random(most)
				}
				w.cut()
			}
			x.stop()
			h := w.history()
			if h.Unconfirmed() || len(h.Warnings) != 0 || len(h.Damage()) != 0 {
				t.Fatalf("unconfirmed %v, warnings %v, damage %v", h.Unconfirmed(), h.Warnings, h.Damage())
			}
			w.check(h)
		})
	}
}
