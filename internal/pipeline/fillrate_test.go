package pipeline

import (
	"math"
	"testing"
	"time"
)

// TestFillRate tells how long a buffer lasts that fills by steps, as one does
// whose journal comes in files, and says nothing of one that does not fill.
func TestFillRate(t *testing.T) {
	var f fillRate
	at := time.Unix(1_700_000_000, 0)
	capacity, used := int64(10_000_000), int64(1_000_000)
	if _, ok := f.lasts(at, used, capacity-used); ok {
		t.Error("a rate from nothing")
	}
	for i := range 600 { // 1000 bytes a second, in steps of 10 s
		at = at.Add(time.Second)
		if i%10 == 9 {
			used += 10_000
		}
		f.note(at, used)
		s, ok := f.lasts(at, used, capacity-used)
		if want := float64(capacity-used) / 1000; i > 100 && (!ok || math.Abs(s-want) > want/5) {
			t.Fatalf("after %d s it lasts %.0f s (%v), want about %.0f", i, s, ok, want)
		}
	}
	if n := len(f.samples); n > 60 {
		t.Errorf("%d measurements are kept", n)
	}
	for range 100 { // it stands still, then empties
		at = at.Add(2 * time.Second)
		f.note(at, used)
	}
	if s, ok := f.lasts(at, used, capacity-used); ok {
		t.Errorf("a buffer that does not fill lasts %.0f s", s)
	}
	f.note(at.Add(2*time.Second), used-500_000)
	if s, ok := f.lasts(at.Add(2*time.Second), used-500_000, capacity); ok {
		t.Errorf("a buffer that empties lasts %.0f s", s)
	}
	// An agent that nobody has asked for a day knows nothing of now.
	if s, ok := f.lasts(at.Add(24*time.Hour), used+1_000_000, capacity); ok {
		t.Errorf("it lasts %.0f s, by what was measured a day ago", s)
	}
}
