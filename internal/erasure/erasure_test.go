package erasure_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"testing"

	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

func shards(p format.Profile, n int, seed byte) [][]byte {
	r := rand.NewChaCha8([32]byte{seed})
	out := make([][]byte, p.Total())
	for i := range out {
		out[i] = make([]byte, n)
		if i < p.Data {
			_, _ = r.Read(out[i])
		}
	}
	return out
}

var profiles = []format.Profile{
	{Data: 1, Parity: 0}, {Data: 1, Parity: 1}, {Data: 1, Parity: 2}, {Data: 2, Parity: 2}, {Data: 3, Parity: 1},
	{Data: 4, Parity: 1}, {Data: 4, Parity: 2}, {Data: 5, Parity: 3}, {Data: 8, Parity: 4},
}

// TestReconstruct_AnyErasuresWithinParity loses every set of shards there is.
func TestReconstruct_AnyErasuresWithinParity(t *testing.T) {
	for _, p := range profiles {
		want := shards(p, 320, byte(p.Data))
		if err := erasure.Encode(p, want); err != nil {
			t.Fatal(err)
		}
		for lost := range uint(1) << p.Total() {
			have := make([][]byte, p.Total())
			for i := range have {
				if lost>>i&1 == 0 {
					have[i] = bytes.Clone(want[i])
				}
			}
			err := erasure.Reconstruct(p, have, false)
			if n := bits.OnesCount(lost); n > p.Parity {
				if !errors.Is(err, erasure.ErrTooFew) {
					t.Fatalf("%+v without %b: %v", p, lost, err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%+v without %b: %v", p, lost, err)
			}
			for i := range want {
				if !bytes.Equal(have[i], want[i]) {
					t.Fatalf("%+v without %b: shard %d differs", p, lost, i)
				}
			}
		}
	}
}

// TestReconstruct_RangeFromTheSameRange: readers rebuild only what they want.
func TestReconstruct_RangeFromTheSameRange(t *testing.T) {
	p := format.Profile{Data: 4, Parity: 2}
	want := shards(p, 600<<10, 1)
	if err := erasure.Encode(p, want); err != nil {
		t.Fatal(err)
	}
	part := make([][]byte, p.Total())
	for i := range part {
		if i != 0 && i != 3 {
			part[i] = want[i][1000:1100]
		}
	}
	if err := erasure.Reconstruct(p, part, true); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(part[0], want[0][1000:1100]) || !bytes.Equal(part[3], want[3][1000:1100]) {
		t.Error("the range differs")
	}
}

func TestShrink_KeepsParity(t *testing.T) {
	for _, c := range []struct {
		payload int64
		want    int
	}{{1, 1}, {64 << 10, 1}, {64<<10 + 1, 2}, {128 << 10, 2}, {200 << 10, 4}, {8 << 20, 4}, {0, 1}} {
		got := erasure.Shrink(format.Profile{Data: 4, Parity: 2}, c.payload, 64<<10)
		if got.Data != c.want || got.Parity != 2 {
			t.Errorf("payload of %d bytes: %+v", c.payload, got)
		}
	}
}

func TestShardBytes_MultiplesThatHoldAll(t *testing.T) {
	for payload := int64(1); payload < 5000; payload += 7 {
		for k := 1; k <= 8; k++ {
			s := format.ShardBytes(payload, k)
			if s%64 != 0 || s*int64(k) < payload || (s-64)*int64(k) >= payload {
				t.Fatalf("payload of %d in %d shards of %d", payload, k, s)
			}
		}
	}
}

// field is GF(2^8) as docs/FORMAT.md describes it, done slowly.
type field struct{}

func (field) mul(a, b byte) byte {
	p := 0
	for i := range 8 {
		if b>>i&1 != 0 {
			p ^= int(a) << i
		}
	}
	for i := 15; i >= 8; i-- {
		if p>>i&1 != 0 {
			p ^= 0x11d << (i - 8)
		}
	}
	return byte(p)
}

func (f field) inv(a byte) byte {
	for b := range 256 {
		if f.mul(a, byte(b)) == 1 {
			return byte(b)
		}
	}
	panic("0 has no inverse")
}

func (f field) pow(a byte, n int) byte {
	out := byte(1)
	for range n {
		out = f.mul(out, a)
	}
	return out
}

// matrix is the Vandermonde matrix times the inverse of its upper square.
func (f field) matrix(p format.Profile) [][]byte {
	k := p.Data
	square := make([][]byte, k) // the upper square, and the identity at its right
	for r := range k {
		square[r] = make([]byte, 2*k)
		for c := range k {
			square[r][c] = f.pow(byte(r), c)
		}
		square[r][k+r] = 1
	}
	for c := range k {
		for r := c; ; r++ {
			if square[r][c] != 0 {
				square[c], square[r] = square[r], square[c]
				break
			}
		}
		scale := f.inv(square[c][c])
		for j := range square[c] {
			square[c][j] = f.mul(square[c][j], scale)
		}
		for r := range k {
			if by := square[r][c]; r != c && by != 0 {
				for j := range square[r] {
					square[r][j] ^= f.mul(by, square[c][j])
				}
			}
		}
	}
	out := make([][]byte, p.Total())
	for r := range out {
		out[r] = make([]byte, k)
		for c := range k {
			for i := range k {
				out[r][c] ^= f.mul(f.pow(byte(r), i), square[i][k+c])
			}
		}
	}
	return out
}

// TestEncode_IsTheCodeInTheReference computes parity from the matrix that
// docs/FORMAT.md gives.
func TestEncode_IsTheCodeInTheReference(t *testing.T) {
	for _, p := range append(profiles, format.Profile{Data: 20, Parity: 6}) {
		have := shards(p, 64, 3)
		if err := erasure.Encode(p, have); err != nil {
			t.Fatal(err)
		}
		m := field{}.matrix(p)
		for r := range p.Total() {
			for j := range 64 {
				want := byte(0)
				for c := range p.Data {
					want ^= field{}.mul(m[r][c], have[c][j])
				}
				if have[r][j] != want {
					t.Fatalf("%+v: byte %d of shard %d is %#x, not %#x", p, j, r, have[r][j], want)
				}
			}
		}
	}
}

func TestEncode_GoldenVectors(t *testing.T) {
	for _, p := range []format.Profile{{Data: 4, Parity: 1}, {Data: 2, Parity: 2}, {Data: 4, Parity: 2}} {
		s := make([][]byte, p.Total())
		for i := range s {
			s[i] = make([]byte, 64)
			for j := range s[i] {
				if i < p.Data {
					s[i][j] = byte(i*64 + j)
				}
			}
		}
		if err := erasure.Encode(p, s); err != nil {
			t.Fatal(err)
		}
		formattest.Exact(t, fmt.Sprintf("erasure-%d+%d", p.Data, p.Parity), bytes.Join(s, nil), func(raw []byte) (any, error) {
			have := make([][]byte, p.Total())
			for i := p.Parity; i < p.Total(); i++ { // the first m shards are lost
				have[i] = raw[i*64 : (i+1)*64]
			}
			err := erasure.Reconstruct(p, have, false)
			var text []string
			for _, h := range have {
				text = append(text, fmt.Sprintf("%x", h))
			}
			return text, err
		})
	}
}
