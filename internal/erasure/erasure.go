// Package erasure cuts a segment's payload into k data and m parity shards and
// brings lost ones back. Any k shards are enough. It corrects erasures only:
// whoever calls it has verified the shards that are given.
//
// The code is systematic and works byte by byte: byte i of every shard depends
// only on byte i of the data shards. So a range of a lost shard is rebuilt
// from the same range of k others, and big shards are done in stripes that fit
// the cache.
package erasure

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/reedsolomon"

	"drc/internal/format"
)

// ErrTooFew means: fewer than k shards are there.
var ErrTooFew = errors.New("too few shards are left to rebuild the data")

// stripeBytes is how much of each shard is done at a time: larger stripes fall
// out of the cache.
const stripeBytes = 256 << 10

var coders sync.Map // format.Profile -> reedsolomon.Encoder

func coder(p format.Profile) (reedsolomon.Encoder, error) {
	if c, ok := coders.Load(p); ok {
		return c.(reedsolomon.Encoder), nil
	}
	c, err := reedsolomon.New(p.Data, p.Parity, reedsolomon.WithMaxGoroutines(1))
	if err != nil {
		return nil, fmt.Errorf("erasure code %d+%d: %w", p.Data, p.Parity, err)
	}
	coders.Store(p, c)
	return c, nil
}

// Shrink returns the profile for a payload: k is lowered so that data shards
// have at least leastBytes, m stays.
func Shrink(p format.Profile, payload, leastBytes int64) format.Profile {
	k := (payload + leastBytes - 1) / leastBytes
	p.Data = int(min(max(k, 1), int64(p.Data)))
	return p
}

// Encode fills the parity shards. shards holds p.Total() slices of equal
// length; the first p.Data hold the data.
func Encode(p format.Profile, shards [][]byte) error {
	if p.Parity == 0 {
		return nil
	}
	c, err := coder(p)
	if err != nil {
		return err
	}
	part := make([][]byte, len(shards))
	for at := 0; at < len(shards[0]); at += stripeBytes {
		end := min(at+stripeBytes, len(shards[0]))
		for i := range shards {
			part[i] = shards[i][at:end]
		}
		if err := c.Encode(part); err != nil {
			return fmt.Errorf("encode parity: %w", err)
		}
	}
	return nil
}

// Reconstruct fills in the shards that are nil, data shards only if dataOnly.
// All others have equal length and have been verified. It returns ErrTooFew if
// fewer than k are there.
func Reconstruct(p format.Profile, shards [][]byte, dataOnly bool) error {
	have := 0
	for _, s := range shards {
		if s != nil {
			have++
		}
	}
	if have < p.Data {
		return fmt.Errorf("%w: %d of the %d needed", ErrTooFew, have, p.Data)
	}
	if p.Parity == 0 {
		return nil
	}
	c, err := coder(p)
	if err != nil {
		return err
	}
	if dataOnly {
		err = c.ReconstructData(shards)
	} else {
		err = c.Reconstruct(shards)
	}
	if err != nil {
		return fmt.Errorf("rebuild shards: %w", err)
	}
	return nil
}
