package restorer

import "sync"

const (
	// aheadMin and aheadMax bound how much is read ahead of a stream; it
	// doubles from one to the other while the stream goes on.
	aheadMin = 512 << 10
	aheadMax = 4 << 20
	// aheadStreams is how many streams through one image are told apart.
	aheadStreams = 8
)

// readAhead finds out who reads an image from one end to the other. What is
// read ahead is fetched together with the read that asks for it, into the
// image's frames: nothing is under way between reads, and nobody has to end it.
type readAhead struct {
	mu      sync.Mutex
	streams [aheadStreams]stream
	clock   int64
}

type stream struct {
	next    int64 // where it goes on
	fetched int64 // up to where it was read ahead
	ahead   int64 // how much was, the last time
	used    int64 // when, on the clock; 0: never
}

// extend returns how many bytes behind a read of n bytes at off are to be
// fetched with it.
func (r *readAhead) extend(off, n int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clock++
	oldest := &r.streams[0]
	for i := range r.streams {
		s := &r.streams[i]
		if s.used < oldest.used {
			oldest = s
		}
		if s.used == 0 || s.next != off {
			continue
		}
		s.next, s.used = off+n, r.clock
		if s.next <= s.fetched {
			return 0 // this read was fetched with an earlier one
		}
		s.ahead = min(max(2*s.ahead, aheadMin), aheadMax)
		s.fetched = s.next + s.ahead
		return s.ahead
	}
	*oldest = stream{next: off + n, fetched: off + n, used: r.clock}
	return 0
}
