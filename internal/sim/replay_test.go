package sim

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"drc/capture"
	"drc/internal/block"
)

// written is a journal of writes that are there already.
type written struct {
	capture.Journal
	writes []block.Write
}

func (j *written) Read(from block.Seq, _ int64, visit func(block.Write) error) (block.Seq, error) {
	for _, w := range j.writes[from-1:] {
		if err := visit(w); err != nil {
			return w.Seq, err
		}
	}
	return block.Seq(len(j.writes) + 1), nil
}

// TestReplay_NeedsNoMoreRoomThanItHad: what was acknowledged had room on the file
// system of the volume, and a start finds that room again, however full it is: also
// where the room of data that was zeroed was given to another write.
func TestReplay_NeedsNoMoreRoomThanItHad(t *testing.T) {
	const size = 256 * allocUnit
	spared := 0
	for seed := range uint64(500) {
		rng := rand.New(rand.NewPCG(seed, 7))
		m := newMachine("boot", &plant{})
		b, _, err := capture.OpenBacking("/v", capture.BackingOptions{CreateBytes: size, Machine: m})
		if err != nil {
			t.Fatal(err)
		}
		m.disks["/v"].free = int64(20 + rng.IntN(150))
		j := &written{}
		want := make([]byte, size)
		applied := block.Seq(0)
		for n := range 10 + rng.IntN(60) {
			e := block.Extent{Off: 512 * rng.Int64N(size/512)}
			e.Len = min(512*(1+rng.Int64N(40*allocUnit/512)), size-e.Off)
			w := block.Write{Seq: block.Seq(len(j.writes) + 1), Extent: e, Kind: block.KindZero}
			if rng.IntN(2) == 0 {
				w.Kind, w.Data = block.KindData, slices.Repeat([]byte{byte(n + 1)}, int(e.Len))
				if err := b.Reserve(e); errors.Is(err, block.ErrNoSpace) {
					continue // it is not acknowledged
				} else if err != nil {
					t.Fatal(err)
				}
			}
			j.writes = append(j.writes, w)
			if w.Kind == block.KindZero {
				clear(want[e.Off:e.End()])
				err = b.Zero(e, false)
			} else {
				copy(want[e.Off:], w.Data)
				err = b.WriteAt(w.Data, e.Off)
			}
			if err == nil && rng.IntN(20) == 0 {
				applied, err = w.Seq, b.Sync()
			}
			if err != nil {
				t.Fatalf("seed %d: write %d: %v", seed, w.Seq, err)
			}
		}
		if m = m.kill(); rng.IntN(2) == 0 {
			m = m.crash(rng, "next boot")
		}
		left := m.disks["/v"].free
		if b, _, err = capture.OpenBacking("/v", capture.BackingOptions{Machine: m}); err != nil {
			t.Fatal(err)
		}
		last := block.Seq(len(j.writes))
		if at, err := capture.Replay(b, 0, j, applied, last); err != nil || at != last {
			t.Errorf("seed %d: replay from %d to %d with room for %d units: %d, %v", seed, applied, last, left, at, err)
			continue
		}
		got := make([]byte, size)
		if err := b.ReadAt(got, 0); err != nil || !slices.Equal(got, want) {
			t.Errorf("seed %d: not what was written, %v", seed, err)
		}
		if left < 4 && last > applied {
			spared++
		}
	}
	if spared < 25 {
		t.Errorf("only %d of the file systems were nearly full", spared)
	}
}
