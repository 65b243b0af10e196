package uploader_test

import (
	"testing"
)

// The images of all checkpoints are what the volumes were, read by way of
// merged manifests.
func TestMerge_EveryCheckpointIsItsPrefix(t *testing.T) {
	w := newWorld(t, options{stores: 2, volumes: []int64{1 << 20, 256 << 10}, seed: 7})
	x := w.start()
	for range 100 {
		w.random(16 << 10)
		w.cut()
	}
	x.stop()
	t.Logf("%+v", x.up.MergeStats())
	if st := x.up.MergeStats(); st.Merges < 12+1 || st.Failures > 0 {
		t.Fatalf("%+v", st)
	}
	w.check(w.history())
}
