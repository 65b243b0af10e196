package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"drc/internal/block"
	"drc/internal/overlay"
	"drc/internal/vfs"
)

const sectorBytes = 512

// value stands for a sector's content: a seed, zeroes, or the base's.
type value uint64

const (
	zeroes   value = 0
	fromBase value = 1
)

func (v value) content(base []byte) []byte {
	switch v {
	case zeroes:
		return make([]byte, sectorBytes)
	case fromBase:
		return base
	}
	return filled(sectorBytes, uint64(v))
}

// sector is what a sector may hold.
type sector struct {
	now     value   // what was answered last
	maybe   []value // what a power cut may leave, besides
	unknown []value // what requests tried that were not answered
}

// stretch is a run of sectors that one worker alone works on. Blocks are shared:
// their sectors belong to several stretches.
type stretch struct {
	off     int64
	sectors []sector
}

// worker does requests in its stretches and knows what they must hold.
type worker struct {
	base      []byte
	stretches []*stretch
	rng       *rand.Rand
}

var errStopped = errors.New("stopped")

// step does one request. It returns errStopped when the process has died.
func (w *worker) step(ctx context.Context, d *overlay.Device) error {
	s := w.stretches[w.rng.IntN(len(w.stretches))]
	n := 1 + w.rng.IntN(len(s.sectors))
	at := w.rng.IntN(len(s.sectors) - n + 1)
	part, e := s.sectors[at:at+n], block.Extent{Off: s.off + int64(at)*sectorBytes, Len: int64(n) * sectorBytes}
	var err error
	var change func(i int) value
	fua := w.rng.IntN(12) == 0
	switch w.rng.IntN(10) {
	case 0, 1, 2, 3:
		seed := value(w.rng.Uint64() &^ 0xffff)
		change = func(i int) value { return seed + value(i) + 2 }
		var p []byte
		for i := range part {
			p = append(p, change(i).content(nil)...)
		}
		err = d.WriteAt(ctx, p, e.Off, block.WriteOptions{FUA: fua})
	case 4, 5:
		change = func(int) value { return zeroes }
		err = d.Zero(ctx, e, block.ZeroOptions{FUA: fua, NoHole: w.rng.IntN(3) == 0})
	case 6:
		if w.rng.IntN(3) != 0 {
			return nil
		}
		if err = d.Flush(ctx); err == nil {
			for _, s := range w.stretches {
				settle(s.sectors)
			}
		}
	default:
		got := make([]byte, e.Len)
		if err = d.ReadAt(ctx, got, e.Off); err == nil {
			for i := range part {
				at := e.Off + int64(i)*sectorBytes
				if !bytes.Equal(got[i*sectorBytes:(i+1)*sectorBytes], part[i].now.content(w.base[at:at+sectorBytes])) {
					return fmt.Errorf("sector at %d is not what was written last", at)
				}
			}
		}
	}
	if change != nil {
		for i := range part {
			x := &part[i]
			if err != nil {
				x.unknown = append(x.unknown, change(i))
				continue
			}
			x.maybe = append(x.maybe, x.now)
			x.now = change(i)
		}
		if err == nil && fua {
			settle(part)
		}
	}
	if errors.Is(err, vfs.ErrDown) {
		return errStopped
	}
	return err
}

func settle(sectors []sector) {
	for i := range sectors {
		sectors[i].maybe = nil
	}
}

// end is how a process ends.
type end int

const (
	cleanly end = iota
	killed
	powerCut
	cleanlyThenPowerCut
)

// check compares all stretches with what d has, and takes that for settled: what
// is there at the start of a process is durable.
func (w *worker) check(t *testing.T, d *overlay.Device, how end) {
	t.Helper()
	for _, s := range w.stretches {
		got := read(t, d, s.off, int64(len(s.sectors))*sectorBytes)
		for i := range s.sectors {
			x, at := &s.sectors[i], s.off+int64(i)*sectorBytes
			allowed := append([]value{x.now}, x.unknown...)
			if how == powerCut {
				allowed = append(allowed, x.maybe...)
			}
			found := slices.IndexFunc(allowed, func(v value) bool {
				return bytes.Equal(got[i*sectorBytes:(i+1)*sectorBytes], v.content(w.base[at:at+sectorBytes]))
			})
			if found < 0 {
				t.Fatalf("sector at %d (block %d) is none of the %d contents that it may have; it begins %x", at, at/oneBlock, len(allowed), got[i*sectorBytes:i*sectorBytes+8])
			}
			*x = sector{now: allowed[found]}
		}
	}
}

// TestCrash_NothingButOldAndNew: concurrent writers, zeroes, flushes and
// hydration, and processes that end in all ways at any operation on the files.
// What was answered is there unless the power was cut; what was flushed is there
// whatever happens; nothing else ever is.
func TestCrash_NothingButOldAndNew(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 12
	}
	var completed atomic.Int64
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { crashes(t, seed, &completed) })
	}
	if completed.Load() == 0 {
		t.Error("no run got as far as a complete overlay")
	}
}

func crashes(t *testing.T, seed uint64, completed *atomic.Int64) {
	rng := rand.New(rand.NewPCG(seed, 5))
	const page = 1920 * oneBlock
	g := block.Geometry{SizeBytes: page + 1<<20 + 3*sectorBytes, SectorSize: sectorBytes}
	b := newBase(t, g, seed)
	m := newMem(t)
	workers := make([]*worker, 3)
	for i := range workers {
		workers[i] = &worker{base: b.content, rng: rand.New(rand.NewPCG(seed, uint64(i)+100))}
	}
	// Around the border between two pages, and at the end of the volume.
	for _, e := range []block.Extent{{Off: page - 100*oneBlock, Len: 200 * oneBlock}, {Off: g.SizeBytes - 20*oneBlock, Len: 20 * oneBlock}} {
		e.Off = e.Off / sectorBytes * sectorBytes
		for at := e.Off; at < e.End(); {
			n := min(1+rng.Int64N(40), (e.End()-at)/sectorBytes)
			s := &stretch{off: at, sectors: make([]sector, n)}
			for i := range s.sectors {
				s.sectors[i].now = fromBase
			}
			w := workers[rng.IntN(len(workers))]
			w.stretches = append(w.stretches, s)
			at += n * sectorBytes
		}
	}
	boot := 0
	for range 6 {
		c := config(m, b, fmt.Sprint("boot ", boot))
		d := open(t, c)
		stopAfter := int64(1 + rng.IntN(600))
		var done atomic.Int64
		m.SetHook(func(vfs.Op, string) error {
			if done.Add(1) > stopAfter {
				return vfs.ErrDown
			}
			return nil
		})
		hydrates := rng.IntN(2) == 0
		run(t, d, workers, hydrates, 1+rng.IntN(120))
		how := end(rng.IntN(4))
		if how == cleanly || how == cleanlyThenPowerCut {
			if err := d.Close(); err != nil {
				if !errors.Is(err, vfs.ErrDown) {
					t.Fatal(err)
				}
				how = map[end]end{cleanly: killed, cleanlyThenPowerCut: powerCut}[how] // it died while it closed
			}
		}
		m.SetHook(nil)
		if how == powerCut || how == cleanlyThenPowerCut {
			m = m.Crash(rng)
			boot++
		} else {
			m = m.Kill()
		}
		_, complete, err := overlay.Peek(m, file)
		if err != nil {
			t.Fatal(err)
		}
		c = config(m, b, fmt.Sprint("boot ", boot))
		if complete {
			completed.Add(1)
			c.Base, c.Identity = nil, overlay.Identity{}
		}
		d = open(t, c)
		for _, w := range workers {
			w.check(t, d, how)
		}
		expect(t, d, b.content[:page-100*oneBlock], 0)
		if complete {
			same(t, read(t, d, 0, g.SizeBytes), rawFile(t, m), 0)
		}
		// It must be as durable as check takes it for.
		if rng.IntN(2) == 0 {
			m = m.Crash(rng)
			boot++
			c.FS, c.Boot = m, fmt.Sprint("boot ", boot)
			d = open(t, c)
			for _, w := range workers {
				w.check(t, d, cleanly)
			}
		}
		closeIt(t, d)
	}
}

// run has the workers work until the process has died, or for so many steps.
func run(t *testing.T, d *overlay.Device, workers []*worker, hydrates bool, steps int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var background, wg sync.WaitGroup
	defer background.Wait()
	defer cancel()
	if hydrates {
		background.Go(func() {
			// It ends with the process: what cannot be written is tried again.
			_ = d.Hydrate(ctx, overlay.HydrateOptions{Workers: 2})
		})
	}
	for i, w := range workers {
		wg.Go(func() {
			for range steps {
				err := w.step(ctx, d)
				if errors.Is(err, errStopped) {
					return
				}
				// A sync that failed because the process died is a failure to those who come
				// later: nothing of theirs was taken.
				var failed *overlay.SyncError
				if errors.As(err, &failed) && errors.Is(err, vfs.ErrDown) {
					return
				}
				if err != nil {
					t.Errorf("worker %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestCreate_StoppedAnywhere: whatever was made when the first start ended, the
// next one goes on.
func TestCreate_StoppedAnywhere(t *testing.T) {
	b := newBase(t, block.Geometry{SizeBytes: 1 << 20, SectorSize: 512}, 1)
	for stop := range int64(40) {
		for seed := range uint64(5) {
			m := newMem(t)
			var done atomic.Int64
			m.SetHook(func(vfs.Op, string) error {
				if done.Add(1) > stop {
					return vfs.ErrDown
				}
				return nil
			})
			d, err := overlay.Open(t.Context(), config(m, b, bootA))
			if err == nil && done.Load() <= stop {
				if stop < 10 {
					t.Fatalf("made with %d operations: the test looks in the wrong place", done.Load())
				}
				closeIt(t, d)
			}
			m.SetHook(nil)
			boot := bootA
			if seed%2 == 0 {
				m = m.Kill()
			} else {
				m, boot = m.Crash(rand.New(rand.NewPCG(seed, uint64(stop)))), bootB
			}
			d = open(t, config(m, b, boot))
			expect(t, d, b.content, 0)
			write(t, d, filled(oneBlock, 3), 0)
			closeIt(t, d)
			if names, err := m.ReadDir("/d"); err != nil || len(names) != 2 {
				t.Fatalf("stop %d seed %d: %v is left, %v", stop, seed, names, err)
			}
		}
	}
}
