package sim

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// dice draws what is left to chance by what it is for, so that the order in which
// goroutines ask does not matter.
type dice uint64

// of returns the source of chance for one thing.
func (d dice) of(what ...any) *rand.Rand {
	h := uint64(d)*0x9e3779b97f4a7c15 + 0xcbf29ce484222325
	for _, x := range what {
		switch x := x.(type) {
		case int:
			h = mix(h, uint64(x))
		case string:
			h = mixText(h, x)
		default:
			panic(fmt.Sprintf("sim: no chance for a %T", x))
		}
	}
	return rand.New(rand.NewPCG(uint64(d), h))
}

func mix(h, x uint64) uint64 {
	h = (h ^ x) * 0xbf58476d1ce4e5b9
	return h ^ h>>29
}

func mixText(h uint64, s string) uint64 {
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 0x100000001b3
	}
	return mix(h, uint64(len(s)))
}

// between draws from lo to hi.
func between(rng *rand.Rand, lo, hi time.Duration) time.Duration {
	return lo + time.Duration(rng.Int64N(int64(hi-lo)+1))
}

// oneIn is true once in n.
func oneIn(rng *rand.Rand, n int) bool { return rng.IntN(n) == 0 }

// pick draws one of several.
func pick[T any](rng *rand.Rand, from ...T) T { return from[rng.IntN(len(from))] }
