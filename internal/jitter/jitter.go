// Package jitter keeps many who wait for the same thing from trying again at the
// same moment.
package jitter

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// fixed is the seed of a simulation; nil: there is none.
var fixed atomic.Pointer[uint64]

// Fix has N depend on nothing but the seed and the time, until unfix is called: a
// simulation with a clock of its own can then be repeated. It is for the whole
// process.
func Fix(seed uint64) (unfix func()) {
	fixed.Store(&seed)
	return func() { fixed.Store(nil) }
}

// Of returns a pause between half of d and d.
func Of(d time.Duration) time.Duration {
	half := d / 2
	if seed := fixed.Load(); seed != nil {
		var b [24]byte
		binary.LittleEndian.PutUint64(b[:], *seed)
		binary.LittleEndian.PutUint64(b[8:], uint64(time.Now().UnixNano()))
		binary.LittleEndian.PutUint64(b[16:], uint64(d))
		h := fnv.New64a()
		_, _ = h.Write(b[:])
		return half + time.Duration(h.Sum64()%uint64(half+1))
	}
	return half + rand.N(half+1)
}
