package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/format"
	"drc/internal/overlay"
)

// TestHydrate_FromABaseOfItsOwn: what is brought is read from the device that was given
// for that, and what clients read meanwhile is not.
func TestHydrate_FromABaseOfItsOwn(t *testing.T) {
	clients, own := newBase(t, small(512), 1), newBase(t, small(512), 1)
	c := config(nil, clients, "")
	c.File = filepath.Join(t.TempDir(), "volume")
	d := open(t, c)
	expect(t, d, clients.content[:4096], 0)
	clients.fail(errors.New("this one is for clients"))
	if err := d.Hydrate(t.Context(), overlay.HydrateOptions{Base: own}); err != nil {
		t.Fatal(err)
	}
	expect(t, d, own.content, 0)
	closeIt(t, d)
}

// TestHydrate_TheFileIsTheVolume: byte for byte, with the base's holes, and the
// base is not needed any more.
func TestHydrate_TheFileIsTheVolume(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		b := newBase(t, small(sector), 1)
		c := config(nil, b, "")
		c.File = filepath.Join(t.TempDir(), "volume")
		d := open(t, c)
		want := bytes.Clone(b.content)
		copy(want[3<<20:], filled(70000/512*512/4096*4096, 1))
		write(t, d, want[3<<20:3<<20+65536], 3<<20)
		clear(want[9<<20 : 15<<20])
		zero(t, d, block.Extent{Off: 9 << 20, Len: 6 << 20})
		copy(want[3<<20+65536:], b.content[3<<20+65536:4<<20])
		var mu sync.Mutex
		b.on(func(_ context.Context, r blocktest.Request) error {
			mu.Lock()
			defer mu.Unlock()
			for _, e := range []block.Extent{{Off: 3 << 20, Len: 65536}, {Off: 9 << 20, Len: 6 << 20}} {
				if r.Kind == blocktest.Read && r.Extent.Overlaps(e) {
					t.Errorf("the base was asked for %s, and %s is written", r.Extent, e)
				}
			}
			if r.Kind == blocktest.Read && r.Extent.Len > 1<<20 {
				t.Errorf("a piece of %d bytes", r.Extent.Len)
			}
			return nil
		})
		last := int64(0)
		err := d.Hydrate(t.Context(), overlay.HydrateOptions{Workers: 3, Progress: func(p overlay.Progress) {
			if p.DoneBytes < last || p.TotalBytes != int64(len(want)) || p.Complete != (p.Complete && p.DoneBytes == p.TotalBytes) {
				t.Errorf("progress %+v after %d", p, last)
			}
			last = p.DoneBytes
		}})
		if err != nil || last != int64(len(want)) {
			t.Fatalf("%v, %d bytes", err, last)
		}
		b.fail(errors.New("nobody may ask the base"))
		expect(t, d, want, 0)
		if err := d.Hydrate(t.Context(), overlay.HydrateOptions{}); err != nil {
			t.Fatalf("again: %v", err)
		}
		closeIt(t, d)
		c.Base, c.Identity = nil, overlay.Identity{}
		if id, complete, err := overlay.Peek(osFS, c.File); err != nil || !complete || id != identity(int64(len(want)), sector) {
			t.Fatalf("peek: %s, %t, %v", id, complete, err)
		}
		d = open(t, c)
		expect(t, d, want, 0)
		holes := int64(0)
		if err := d.Allocation(t.Context(), block.Extent{Len: int64(len(want))}, func(piece block.Extent, hole bool) bool {
			if hole {
				holes += piece.Len
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if holes < 6<<20+1<<20 {
			t.Errorf("only %d bytes of holes are left", holes)
		}
		write(t, d, filled(4096, 5), 0)
		copy(want, filled(4096, 5))
		closeIt(t, d)
		raw, err := readOS(c.File)
		if err != nil {
			t.Fatal(err)
		}
		same(t, raw, want, 0)
	}
}

// TestHydrate_GoesOnWhereItWas: after a restart nothing is fetched twice, and
// after a power cut only what was not flushed.
func TestHydrate_GoesOnWhereItWas(t *testing.T) {
	b := newBase(t, small(512), 2)
	m := newMem(t)
	d := open(t, config(m, b, bootA))
	ctx, cancel := context.WithCancel(t.Context())
	var fetched []block.Extent
	b.on(func(ctx context.Context, r blocktest.Request) error {
		switch {
		case r.Kind != blocktest.Read:
		case len(fetched) == 8:
			cancel()
		default:
			fetched = append(fetched, r.Extent)
		}
		return ctx.Err()
	})
	if err := d.Hydrate(ctx, overlay.HydrateOptions{Workers: 1}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	done := d.Progress().DoneBytes
	if done < 2<<20 || done >= b.Geometry().SizeBytes {
		t.Fatalf("%d bytes in 8 pieces", done)
	}
	m = m.Kill()
	d = open(t, config(m, b, bootA))
	if p := d.Progress(); p.DoneBytes != done {
		t.Fatalf("%+v after a restart, %d before", p, done)
	}
	// What is there is durable since the restart.
	m = m.Crash(rand.New(rand.NewPCG(1, 2)))
	d = open(t, config(m, b, bootB))
	if p := d.Progress(); p.DoneBytes != done {
		t.Fatalf("%+v after a power cut, %d before", p, done)
	}
	b.on(func(_ context.Context, r blocktest.Request) error {
		for _, e := range fetched {
			if r.Kind == blocktest.Read && e.Overlaps(r.Extent) {
				t.Errorf("%s is fetched again", r.Extent)
			}
		}
		return nil
	})
	if err := d.Hydrate(t.Context(), overlay.HydrateOptions{Workers: 1}); err != nil {
		t.Fatal(err)
	}
	same(t, rawFile(t, m), b.content, 0)
}

// TestHydrate_BaseThatFails: hydration waits, longer each time, and goes on;
// clients get errors for what is not here, and nothing else.
func TestHydrate_BaseThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBase(t, small(512), 3)
		d := open(t, config(newMem(t), b, bootA))
		write(t, d, filled(oneBlock, 1), 0)
		gone := errors.New("the stores are gone")
		for _, kind := range []blocktest.Kind{blocktest.Allocation, blocktest.Read} {
			began := time.Now()
			b.on(func(_ context.Context, r blocktest.Request) error {
				if r.Kind == kind && time.Since(began) < 10*time.Minute {
					return gone
				}
				return nil
			})
			var pauses []time.Duration
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				ended <- d.Hydrate(ctx, overlay.HydrateOptions{Workers: 1, Trouble: func(err error, pause time.Duration) {
					if !errors.Is(err, gone) {
						t.Errorf("trouble: %v", err)
					}
					pauses = append(pauses, pause)
				}})
			}()
			time.Sleep(5 * time.Minute)
			expect(t, d, filled(oneBlock, 1), 0)
			write(t, d, filled(oneBlock, 2), 8*oneBlock)
			if kind == blocktest.Read {
				if err := d.ReadAt(t.Context(), make([]byte, 512), 20<<20); !errors.Is(err, gone) {
					t.Errorf("read of what is not here: %v", err)
				}
			}
			if kind == blocktest.Allocation {
				time.Sleep(7 * time.Minute) // it goes on
				if p := d.Progress(); p.DoneBytes < 8<<20 {
					t.Errorf("%+v after the stores are back", p)
				}
				// What is fetched meanwhile is not looked at here.
			}
			cancel()
			err := <-ended
			if kind == blocktest.Read && !errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
			if kind == blocktest.Allocation && err != nil {
				t.Errorf("ended with %v", err)
			}
			if kind == blocktest.Allocation {
				if n := len(pauses); n < 8 || n > 40 || pauses[0] > time.Second || pauses[7] < 20*time.Second || pauses[n-1] > time.Minute {
					t.Errorf("paused for %v", pauses)
				}
				// Once more with reads that fail: on a new overlay.
				closeIt(t, d)
				d = open(t, config(newMem(t), b, bootA))
				write(t, d, filled(oneBlock, 1), 0)
			}
		}
	})
}

// TestHydrate_DiskThatIsFull: it goes on when there is room.
func TestHydrate_DiskThatIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBase(t, small(512), 4)
		disk := newSmallDisk(newMem(t), 600)
		d := open(t, config(disk, b, bootA))
		full := 0
		err := d.Hydrate(t.Context(), overlay.HydrateOptions{Trouble: func(err error, _ time.Duration) {
			if !errors.Is(err, block.ErrNoSpace) {
				t.Errorf("trouble: %v", err)
			}
			if full++; full == 5 {
				disk.grow(100000)
			}
		}})
		if err != nil || full < 5 {
			t.Fatalf("%v, %d times full", err, full)
		}
		same(t, rawFile(t, disk), b.content, 0)
	})
}

// TestHydrate_WhileClientsWrite: whatever comes first, what clients wrote stays.
func TestHydrate_WhileClientsWrite(t *testing.T) {
	for seed := range uint64(6) {
		b := newBase(t, small(512), seed)
		m := newMem(t)
		d := open(t, config(m, b, bootA))
		want := bytes.Clone(b.content)
		var wg sync.WaitGroup
		const workers = 4
		size := int64(len(want)) / 512
		for w := range int64(workers) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(w)))
				for range 150 {
					// Its own sectors, of blocks that others write to as well.
					at := (rng.Int64N(size/workers)*workers + w) * 512
					p := want[at : at+512]
					if rng.IntN(4) == 0 {
						clear(p)
						if err := d.Zero(t.Context(), block.Extent{Off: at, Len: 512}, block.ZeroOptions{}); err != nil {
							t.Error(err)
						}
						continue
					}
					fill(p, rng.Uint64())
					if err := d.WriteAt(t.Context(), p, at, block.WriteOptions{}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		hydrate(t, d)
		wg.Wait()
		expect(t, d, want, 0)
		closeIt(t, d)
		same(t, rawFile(t, m), want, 0)
	}
}

// TestHydrate_SplitHoles: a base may tell of one hole in pieces that end within
// blocks.
func TestHydrate_SplitHoles(t *testing.T) {
	g := small(512)
	b := newBase(t, g, 5)
	c := config(newMem(t), b, bootA)
	c.Base = splitting{b}
	d := open(t, c)
	hydrate(t, d)
	expect(t, d, b.content, 0)
}

// splitting is a base that tells of each sector by itself.
type splitting struct{ *testBase }

func (s splitting) Allocation(ctx context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	return s.testBase.Allocation(ctx, e, func(piece block.Extent, hole bool) bool {
		for at := piece.Off; at < piece.End(); at += 512 {
			if !visit(block.Extent{Off: at, Len: 512}, hole) {
				return false
			}
		}
		return true
	})
}

func TestHydrate_WorkersAreBounded(t *testing.T) {
	b := newBase(t, small(512), 6)
	d := open(t, config(newMem(t), b, bootA))
	var now, most atomic.Int64
	b.on(func(_ context.Context, r blocktest.Request) error {
		if r.Kind != blocktest.Read {
			return nil
		}
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(time.Millisecond)
		now.Add(-1)
		return nil
	})
	if err := d.Hydrate(t.Context(), overlay.HydrateOptions{Workers: 3}); err != nil {
		t.Fatal(err)
	}
	if n := most.Load(); n < 2 || n > 3 {
		t.Errorf("%d fetched at once", n)
	}
}

// TestHydrate_DamageEndsIt: in the base it may be repaired, in the sidecar not.
func TestHydrate_DamageEndsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBase(t, small(512), 7)
		m := newMem(t)
		d := open(t, config(m, b, bootA))
		write(t, d, filled(oneBlock, 1), 0)
		closeIt(t, d)
		d = open(t, config(m, b, bootA))
		damaged := atomic.Bool{}
		b.on(func(_ context.Context, r blocktest.Request) error {
			if !damaged.Swap(true) {
				return format.Corrupt("a segment", "its checksum is wrong")
			}
			return nil
		})
		troubles := 0
		flip(t, m, pagesAt(t, m))
		err := d.Hydrate(t.Context(), overlay.HydrateOptions{Trouble: func(error, time.Duration) { troubles++ }})
		var corrupt *format.CorruptError
		if !errors.As(err, &corrupt) || corrupt.Object != sidecar {
			t.Fatalf("%v after %d troubles", err, troubles)
		}
		flip(t, m, pagesAt(t, m))
		hydrate(t, d)
	})
}
