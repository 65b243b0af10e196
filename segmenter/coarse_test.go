package segmenter_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/segmenter"
)

// TestCoarse_OverwrittenDataIsDropped: while room is short a batch takes more
// writes, and holds each place once; what it holds is right, and its memory stays
// bounded.
func TestCoarse_OverwrittenDataIsDropped(t *testing.T) {
	const size, batch = 2 << 20, 1 << 20
	for _, short := range []bool{false, true} {
		j, out := &journal{}, &batches{}
		cfg := config(batch)
		cfg.Coarse = func() int64 {
			if short {
				return 64 << 20
			}
			return 0
		}
		s := segmenter.New(cfg, j, out, nothing{})
		want := make([]byte, size)
		rng := rand.New(rand.NewPCG(3, 4))
		seed := uint64(100)
		for range 400 { // 12 MiB to 768 KiB
			off, n := int64(rng.IntN(24))*(32<<10), 32<<10
			if rng.IntN(8) == 0 { // and some that cut others in two
				off, n = off+8<<10, 4<<10
			}
			seed++
			p := data(seed, n)
			if rng.IntN(16) == 0 {
				clear(p)
			}
			copy(want[off:], p)
			j.add(0, off, p)
		}
		for step(t, s) {
		}
		image := make([]byte, size)
		replay(t, out.all, image)
		if !bytes.Equal(image, want) {
			t.Fatalf("short of room %v: the batches do not hold the newest", short)
		}
		if n := len(out.all); short && n > 5 || !short && n < 8 {
			t.Errorf("short of room %v: %d batches", short, n)
		}
	}

	// What is written once each does not fill the memory.
	j, out := &journal{}, &batches{}
	cfg := config(batch)
	cfg.Coarse = func() int64 { return 64 << 20 }
	s := segmenter.New(cfg, j, out, nothing{})
	for i := range int64(128) {
		j.add(0, i*(64<<10), data(uint64(i)+1, 64<<10))
	}
	for step(t, s) {
	}
	for _, b := range out.all {
		if b.Bytes > batch+64<<10 {
			t.Errorf("a batch of seqs %d to %d holds %d bytes", b.From, b.To, b.Bytes)
		}
	}
	if last := out.all[len(out.all)-1]; last.To != block.Seq(128) {
		t.Errorf("the last batch ends at %d", last.To)
	}
}

// polled is a journal that tells of writes by being asked again and again.
type polled struct{ *journal }

func (j polled) WaitCaptured(ctx context.Context, after block.Seq) error {
	for j.Captured() <= after {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// TestRun_PatienceMakesBatchesLonger: while too many wait a batch waits as well, and
// no longer once there are few, but what was asked for does not.
func TestRun_PatienceMakesBatchesLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, sink := &journal{}, &safeBatches{}
		var patience atomic.Int64
		cfg := config(1 << 20)
		cfg.RPO = time.Second
		cfg.Patience = func() time.Duration { return time.Duration(patience.Load()) }
		s := segmenter.New(cfg, polled{j}, sink, nothing{})
		runs(t, s)
		seed := uint64(1)
		cut := func(minutes int) int {
			before := len(sink.all)
			for range minutes * 60 {
				seed++
				j.add(1, 0, data(seed, 4096))
				time.Sleep(time.Second)
			}
			sink.mu.Lock()
			defer sink.mu.Unlock()
			return len(sink.all) - before
		}
		if n := cut(1); n < 50 {
			t.Errorf("%d batches in a minute", n)
		}
		patience.Store(int64(time.Minute))
		if n := cut(10); n < 8 || n > 12 {
			t.Errorf("%d batches in ten minutes", n)
		}
		j.add(1, 0, data(1, 4096))
		s.Announce(func(*format.Items) {})
		time.Sleep(time.Second)
		if b := sink.last(); b.To != j.Captured() {
			t.Error("what was asked for waits")
		}
		patience.Store(0)
		if n := cut(1); n < 50 {
			t.Errorf("%d batches in a minute when there is no more need to wait", n)
		}
	})
}
