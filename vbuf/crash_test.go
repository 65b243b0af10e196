package vbuf

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

var crashSeeds = flag.Int("crash.seeds", 40, "how many histories the crash tests try")

// history is what the world outside knows of a journal through many lives of the
// agent.
type history struct {
	salts    map[block.Seq]uint64 // what was enqueued last as this number
	next     block.Seq
	written  block.Seq // promised to survive a kill
	flushed  block.Seq // promised to survive a power cut
	released block.Seq

	recovered bool // since the files were damaged
}

var errPowerCut = errors.New("power cut")

// TestRecover_EveryPromiseThroughCrashes lets a journal live through kills and
// power cuts at random points, recovery included, and checks after each what
// was promised.
func TestRecover_EveryPromiseThroughCrashes(t *testing.T) {
	for seed := range uint64(*crashSeeds) {
		for _, disks := range []int{1, 2, 3} {
			t.Run(fmt.Sprintf("seed%d/disks%d", seed, disks), func(t *testing.T) {
				liveAndDie(t, seed, disks, nil)
			})
		}
	}
}

// TestRecover_MirrorHealsRotBetweenLives has one of two disks damaged at random
// places whenever the agent is down.
func TestRecover_MirrorHealsRotBetweenLives(t *testing.T) {
	for seed := range uint64(*crashSeeds) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			// Damage of the other disk is fair only after recovery could heal
			// that of the first.
			disk := 0
			liveAndDie(t, seed, 2, func(m *vfs.Mem, rng *rand.Rand, recovered bool) {
				if recovered {
					disk = rng.IntN(2)
				}
				rot(t, m, fmt.Sprintf("/disk%d/journal", disk), rng)
			})
		})
	}
}

// rot flips bits in the files below dir, or removes some.
func rot(t *testing.T, m *vfs.Mem, dir string, rng *rand.Rand) {
	entries, err := m.ReadDir(dir)
	if err != nil {
		return // not made yet
	}
	for _, e := range entries {
		name := dir + "/" + e.Name
		switch rng.IntN(6) {
		case 0:
			_ = m.Remove(name)
		case 1, 2:
			f, err := m.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			size, _ := f.Size()
			for range 1 + rng.IntN(5) {
				if size == 0 {
					break
				}
				off := rng.Int64N(size)
				p := make([]byte, 1)
				_, _ = f.ReadAt(p, off)
				p[0] ^= 1 << rng.IntN(8)
				_, _ = f.WriteAt(p, off)
			}
			_ = f.Sync()
		}
	}
	_ = m.SyncDir(dir)
}

func liveAndDie(t *testing.T, seed uint64, disks int, whileDown func(m *vfs.Mem, rng *rand.Rand, recovered bool)) {
	rng := rand.New(rand.NewPCG(seed, uint64(disks)))
	m := vfs.NewMem()
	o := testOptions(m, disks)
	for i := range o.Dirs {
		o.Dirs[i].SizeBytes = 600 << 10
	}
	o.MaxUnsyncedBytes = 64 << 10
	var trace []string
	defer func() {
		if t.Failed() {
			for _, l := range trace {
				t.Log(l)
			}
		}
	}()
	h := &history{salts: map[block.Seq]uint64{}, next: 1}
	for life := range 8 {
		// How many file operations this life has; some end in recovery.
		ops := rng.IntN(300)
		if rng.IntN(3) == 0 {
			ops = rng.IntN(30)
		}
		dead := false
		left := ops
		m.SetHook(func(op vfs.Op, name string) error {
			if left--; left < 0 {
				dead = true
				return errPowerCut
			}
			return nil
		})
		o.FS = m
		trace = append(trace, fmt.Sprintf("life %d of %d operations: next %d, written %d, flushed %d, released %d",
			life, ops, h.next, h.written, h.flushed, h.released))
		m.SetHook(func(op vfs.Op, name string) error {
			trace = append(trace, fmt.Sprint(op, " ", name))
			if left--; left < 0 {
				dead = true
				return errPowerCut
			}
			return nil
		})
		err := live(t, o, h, rng, uint64(life)+1)
		m.SetHook(nil)
		if err != nil && !dead {
			t.Fatalf("life %d: %v", life, err)
		}
		if rng.IntN(3) == 0 {
			m = m.Kill()
		} else {
			m = m.Crash(rng)
			h.written = h.flushed
		}
		if whileDown != nil {
			whileDown(m, rng, h.recovered)
			h.recovered = false
			// What was written and not flushed may have been on the other disk
			// only in parts.
			h.written = h.flushed
		}
	}
	o.FS = m
	if err := live(t, o, h, rng, 100); err != nil {
		t.Fatalf("last life: %v", err)
	}
}

// live opens the journal, checks it against h and works with it until an error
// comes or the life is over. Failed checks end the test.
func live(t *testing.T, o Options, h *history, rng *rand.Rand, salt uint64) error {
	ctx := context.Background()
	b, err := Open(ctx, o)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer b.Close()
	j, err := b.Journal(ctx, testGroup)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if j.Next() == 0 {
		if h.written > 0 {
			t.Fatalf("the journal is empty, %d was written", h.written)
		}
		if err := j.SetNext(1); err != nil {
			return err
		}
	}
	last := j.Next() - 1
	if last < h.written || last >= h.next {
		t.Fatalf("the journal ends at %d; promised %d, flushed %d, enqueued %d", last, h.written, h.flushed, h.next-1)
	}
	if j.Durable() != last {
		t.Fatalf("recovery left %d not durable of %d", j.Durable(), last)
	}
	h.next, h.written, h.flushed = last+1, last, last
	h.recovered = true
	first := j.First()
	if first == 0 {
		first = last + 1
	}
	if first > h.released+1 {
		t.Fatalf("the journal begins at %d, released is %d", first, h.released)
	}
	saltOf := func(s block.Seq) uint64 { return h.salts[s] }
	if err := compare(t, j, first, last, saltOf); err != nil {
		return err
	}
	for range rng.IntN(120) {
		switch rng.IntN(12) {
		case 0, 1:
			upTo := j.next - 1
			if err := j.Flush(ctx); err != nil {
				return err
			}
			h.flushed, h.written = max(h.flushed, upTo), max(h.written, upTo)
		case 2, 3:
			upTo := j.next - 1
			if err := j.WaitWritten(ctx, upTo); err != nil {
				return err
			}
			h.written = max(h.written, upTo)
		case 4:
			if d := j.Durable(); d > h.released {
				to := h.released + block.Seq(rng.Uint64N(uint64(d-h.released)+1))
				h.released = max(h.released, to)
				j.Release(to)
			}
		case 5:
			if _, err := b.Step(ctx); err != nil {
				return err
			}
		case 6:
			if from := max(j.First(), h.released+1); j.First() != 0 && from <= j.Durable() {
				if err := compare(t, j, from, j.Durable(), saltOf); err != nil {
					return err
				}
			}
		default:
			w := testWrite(h.next, salt)
			ctx, cancel := context.WithCancel(ctx)
			if b.Stats().UsedBytes > 300<<10 {
				if err := j.Flush(ctx); err != nil { // make room rather than wait
					cancel()
					return err
				}
				h.flushed, h.written, h.released = h.next-1, h.next-1, h.next-1
				j.Release(h.released)
			}
			err := j.Reserve(ctx, int64(len(w.Data)))
			cancel()
			if err != nil {
				return err
			}
			h.salts[w.Seq] = salt
			h.next++
			j.Enqueue(w)
		}
	}
	if rng.IntN(3) == 0 {
		if err := b.Close(); err != nil {
			return err
		}
		h.flushed, h.written = h.next-1, h.next-1
	}
	return nil
}

// compare reads a range back. Errors of the disk are returned, wrong data ends
// the test.
func compare(t *testing.T, j *Journal, from, to block.Seq, salt func(block.Seq) uint64) error {
	for want := from; want <= to; {
		_, err := j.Read(want, 50_000, func(w block.Write) error {
			if !sameWrite(w, testWrite(want, salt(want))) {
				t.Fatalf("write %d (as %d) reads back wrong", want, w.Seq)
			}
			want++
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
