package segment_test

import (
	"bytes"
	"errors"
	"math/bits"
	"slices"
	"testing"

	"drc/internal/crypt/crypttest"
	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/segment"
)

// A shard that is made again must have the bytes that it had: under its name a store
// may hold the other one already.
func TestRepair_TheSameBytes(t *testing.T) {
	keys := crypttest.Keys()
	for _, p := range []format.Profile{{Data: 1}, {Data: 1, Parity: 2}, {Data: 2, Parity: 1}, {Data: 4, Parity: 2}} {
		for _, n := range []int{1, 5000, 3 << 20} {
			w := segment.NewWriter(keys)
			w.Add(random(byte(n), n))
			sealed := w.Finish()
			made, err := sealed.Shards(p)
			if err != nil {
				t.Fatal(err)
			}
			parity := sealed.Profile(p).Parity
			for there := range uint64(1) << len(made) {
				objects := make([][]byte, len(made))
				for i := range made {
					if there&(1<<i) != 0 {
						objects[i] = made[i]
					}
				}
				missing := len(made) - bits.OnesCount64(there)
				err := segment.Repair(keys, sealed.ID, objects, ^uint64(0))
				if missing > parity {
					if !errors.Is(err, erasure.ErrTooFew) {
						t.Errorf("profile %v, %d bytes, %b are there: %v", p, n, there, err)
					}
					continue
				}
				if err != nil {
					t.Fatalf("profile %v, %d bytes, %b are there: %v", p, n, there, err)
				}
				if !slices.EqualFunc(objects, made, bytes.Equal) {
					t.Errorf("profile %v, %d bytes, %b are there: other shards came out", p, n, there)
				}
			}
		}
	}
}

func TestRepair_MakesWhatIsWantedOnly(t *testing.T) {
	keys := crypttest.Keys()
	w := segment.NewWriter(keys)
	w.Add(random(3, 3<<20))
	sealed := w.Finish()
	made, err := sealed.Shards(format.Profile{Data: 2, Parity: 2})
	if err != nil {
		t.Fatal(err)
	}
	objects := [][]byte{made[0], nil, nil, made[3]}
	if err := segment.Repair(keys, sealed.ID, objects, 1<<2); err != nil {
		t.Fatal(err)
	}
	if objects[1] != nil || !bytes.Equal(objects[2], made[2]) {
		t.Error("shard 2 was wanted, and not shard 1")
	}
}

func TestRepair_RefusesWhatIsDamaged(t *testing.T) {
	keys := crypttest.Keys()
	w := segment.NewWriter(keys)
	w.Add(random(4, 1<<20))
	sealed := w.Finish()
	made, err := sealed.Shards(format.Profile{Data: 2, Parity: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, format.ShardHeaderSize - 1, format.ShardHeaderSize + 7, len(made[1]) - 1} {
		bad := bytes.Clone(made[1])
		bad[at] ^= 1
		if err := segment.Repair(keys, sealed.ID, [][]byte{made[0], bad, nil}, 1<<2); !damaged(err) {
			t.Errorf("byte %d is another one: %v", at, err)
		}
	}
	if err := segment.Repair(keys, sealed.ID, [][]byte{made[1], made[0], nil}, 1<<2); !damaged(err) {
		t.Errorf("two shards changed places: %v", err)
	}
}

func damaged(err error) bool {
	var c *format.CorruptError
	return errors.As(err, &c)
}
