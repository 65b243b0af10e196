package pipeline

import (
	"sync"
	"time"
)

const (
	// fillWindow is the time over which the buffer's rate of filling is measured:
	// long enough that the coming and going of journal files does not show.
	fillWindow = 90 * time.Second
	// fillMin is the least time between two measurements that says anything.
	fillMin = 10 * time.Second
	// fillEvery is how often it is measured while it is asked for or more waits.
	fillEvery = 2 * time.Second
)

// fillRate measures how fast the buffer fills.
type fillRate struct {
	mu      sync.Mutex
	samples []fillSample // oldest first
}

type fillSample struct {
	at   time.Time
	used int64
}

// note takes a measurement, unless there is one that is as good as new.
func (f *fillRate) note(now time.Time, used int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.samples); n > 0 && now.Sub(f.samples[n-1].at) < fillEvery {
		return
	}
	f.samples = append(f.samples, fillSample{now, used})
	for len(f.samples) > 2 && now.Sub(f.samples[1].at) >= fillWindow {
		f.samples = f.samples[1:]
	}
}

// lasts says how long room of so many bytes lasts at the rate of the last
// minute or so; ok is false if the buffer has not grown, or that is not known
// yet. A measurement that is older than two windows says nothing of now.
func (f *fillRate) lasts(now time.Time, used, room int64) (seconds float64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.samples {
		d := now.Sub(s.at)
		if d > 2*fillWindow {
			continue
		}
		if d < fillMin || used <= s.used {
			return 0, false
		}
		rate := float64(used-s.used) / d.Seconds()
		return max(0, float64(room)/rate), true
	}
	return 0, false
}
