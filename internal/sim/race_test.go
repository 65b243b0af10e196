//go:build race

package sim

const (
	raceEnabled  = true
	replays      = 3
	defaultSeeds = 15 // each takes six times as long
	defaultPairs = 4
)
