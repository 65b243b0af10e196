package formattest

import (
	"bytes"
	"testing"
)

// Flips calls check with raw changed in each of its bits.
func Flips(raw []byte, check func(bit int, changed []byte)) {
	for bit := range len(raw) * 8 {
		changed := bytes.Clone(raw)
		changed[bit/8] ^= 1 << (bit % 8)
		check(bit, changed)
	}
}

// Stable checks that what decode finds in raw encodes to bytes that decode and
// encode to themselves. A decoder that refuses raw is fine.
func Stable[V any](t *testing.T, raw []byte, decode func([]byte) (V, error), encode func(V) []byte) (v V, ok bool) {
	t.Helper()
	v, err := decode(bytes.Clone(raw))
	if err != nil {
		return v, false
	}
	once := encode(v)
	again, err := decode(bytes.Clone(once))
	if err != nil {
		t.Fatalf("%x decodes, is encoded as %x, and that does not decode: %v", raw, once, err)
	}
	if twice := encode(again); !bytes.Equal(once, twice) {
		t.Fatalf("%x is encoded as %x, and that as %x", raw, once, twice)
	}
	return v, true
}

// Bounded checks that a decoder made no more than one thing of each least bytes
// of its input.
func Bounded(t *testing.T, raw []byte, what string, count, least int) {
	t.Helper()
	if count*least > len(raw) {
		t.Fatalf("%d %s out of %d bytes", count, what, len(raw))
	}
}

// Spots calls check with raw changed in one bit of each byte, another one each
// time: for checks that are too slow for Flips.
func Spots(raw []byte, check func(at int, changed []byte)) {
	for at := range raw {
		changed := bytes.Clone(raw)
		changed[at] ^= 1 << (at % 8)
		check(at, changed)
	}
}
