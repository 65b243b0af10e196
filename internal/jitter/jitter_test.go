package jitter

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestOf_BetweenHalfAndAll(t *testing.T) {
	for range 2 {
		different := map[time.Duration]bool{}
		for range 1000 {
			d := Of(time.Second)
			if d < time.Second/2 || d > time.Second {
				t.Fatal(d)
			}
			different[d] = true
		}
		if len(different) < 2 {
			t.Error("always the same")
		}
		if Of(0) != 0 {
			t.Error("a pause of nothing")
		}
		defer Fix(7)()
	}
}

func TestFix_IsTheSameAgain(t *testing.T) {
	run := func(seed uint64) (out [3]time.Duration) {
		defer Fix(seed)()
		synctest.Test(t, func(*testing.T) {
			for i := range out {
				out[i] = Of(time.Hour)
				time.Sleep(time.Second)
			}
		})
		return out
	}
	if a, b := run(1), run(1); a != b || a[0] == a[1] {
		t.Errorf("%v and %v", a, b)
	}
	if run(1) == run(2) {
		t.Error("the seed changes nothing")
	}
}
