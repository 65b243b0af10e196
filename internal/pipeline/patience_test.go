package pipeline

import (
	"testing"
	"time"
)

// TestPatience_BoundsTheBatchesOfALongOutage: a volume that is written all the time
// leaves a bounded number of batches in a month without a store, and those of the
// first hours are as short as ever.
func TestPatience_BoundsTheBatchesOfALongOutage(t *testing.T) {
	for _, rpo := range []time.Duration{50 * time.Millisecond, time.Second, time.Minute, time.Hour} {
		waiting, after := 0, time.Duration(0)
		for after < 30*24*time.Hour {
			d := patienceOf(waiting, rpo)
			if d < rpo/2 || waiting < manyBatches && d != rpo/2 {
				t.Fatalf("rpo %v: a batch is cut after %v while %d wait", rpo, d, waiting)
			}
			after += d
			waiting++
		}
		if waiting > 100_000 {
			t.Errorf("rpo %v: %d batches wait after a month", rpo, waiting)
		}
	}
}
