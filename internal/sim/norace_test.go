//go:build !race

package sim

const (
	raceEnabled  = false
	replays      = 25 // seeds that are run twice
	defaultSeeds = 500
	defaultPairs = 100
)
