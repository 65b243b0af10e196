package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/overlay"
	"drc/internal/vfs"
)

// TestSync_FailedIsTheEndOfWrites: a sync that failed is not tried again, the
// device says so, and whoever opens it next believes nothing that was not
// flushed.
func TestSync_FailedIsTheEndOfWrites(t *testing.T) {
	for _, failing := range []string{file, sidecar} {
		t.Run(failing, func(t *testing.T) {
			b := newBase(t, small(512), 1)
			m := newMem(t)
			closeIt(t, open(t, config(m, b, bootA))) // so that the sidecar has its name
			d := open(t, config(m, b, bootA))
			want := bytes.Clone(b.content)
			copy(want, filled(8*oneBlock, 1))
			write(t, d, want[:8*oneBlock], 0)
			flush(t, d)
			write(t, d, filled(8*oneBlock, 2), 1<<20)
			var syncs atomic.Int64
			m.SetHook(func(op vfs.Op, name string) error {
				if op == vfs.OpSync && name == failing {
					syncs.Add(1)
					return syscall.EIO
				}
				return nil
			})
			var failed *overlay.SyncError
			if err := d.Flush(t.Context()); !errors.As(err, &failed) || failed.File != failing || !errors.Is(err, syscall.EIO) {
				t.Fatalf("flush: %v", err)
			}
			if err := d.Flush(t.Context()); !errors.As(err, &failed) {
				t.Fatalf("second flush: %v", err)
			}
			for what, err := range map[string]error{
				"write": d.WriteAt(t.Context(), make([]byte, 512), 0, block.WriteOptions{}),
				"zero":  d.Zero(t.Context(), block.Extent{Len: 512}, block.ZeroOptions{}),
			} {
				if !errors.Is(err, block.ErrReadOnly) || !errors.As(err, &failed) || !strings.Contains(err.Error(), "check the disk") {
					t.Errorf("%s: %v", what, err)
				}
			}
			if err := d.Hydrate(t.Context(), overlay.HydrateOptions{}); !errors.As(err, &failed) {
				t.Errorf("hydrate: %v", err)
			}
			if !errors.As(d.Failed(), &failed) {
				t.Error("it does not say that it failed")
			}
			expect(t, d, want[:8*oneBlock], 0)
			if err := d.Close(); !errors.As(err, &failed) {
				t.Errorf("close: %v", err)
			}
			if n := syncs.Load(); n != 1 {
				t.Errorf("%d syncs of a file of which one had failed", n)
			}
			m.SetHook(nil)
			// The machine has not restarted, and the writes are not believed all the same.
			d = open(t, config(m, b, bootA))
			if failing == file {
				expect(t, d, want, 0)
			} else {
				// FILE was synced: there the bits may count or not.
				expect(t, d, want[:1<<20], 0)
				expect(t, d, want[1<<20+8*oneBlock:], 1<<20+8*oneBlock)
			}
			write(t, d, filled(oneBlock, 3), 2<<20)
			flush(t, d)
			copy(want[2<<20:], filled(oneBlock, 3))
			got := read(t, d, 0, int64(len(want)))
			d = open(t, config(m.Crash(rand.New(rand.NewPCG(1, 1))), b, bootB))
			expect(t, d, got[:1<<20], 0)
			expect(t, d, got[2<<20:], 2<<20)
		})
	}
}

// TestSync_AtOpenThatFails: what another process wrote may be lost, so it does not
// count next time either.
func TestSync_AtOpenThatFails(t *testing.T) {
	b := newBase(t, small(512), 2)
	m := newMem(t)
	d := open(t, config(m, b, bootA))
	flush(t, d)
	write(t, d, filled(8*oneBlock, 2), 1<<20)
	m = m.Kill()
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpSync && name == file {
			return syscall.EIO
		}
		return nil
	})
	var failed *overlay.SyncError
	if _, err := openErr(t, config(m, b, bootA)); !errors.As(err, &failed) {
		t.Fatal(err)
	}
	m.SetHook(nil)
	d = open(t, config(m, b, bootA))
	expect(t, d, b.content, 0)
}

// TestSync_FUAIsDurable without any flush, and what was not flushed may be lost.
func TestSync_FUAIsDurable(t *testing.T) {
	lost := false
	b := newBase(t, small(512), 3)
	for seed := range uint64(12) {
		m := newMem(t)
		d := open(t, config(m, b, bootA))
		p := filled(5*512, seed)
		if err := d.WriteAt(t.Context(), p, 512, block.WriteOptions{FUA: true}); err != nil {
			t.Fatal(err)
		}
		if err := d.Zero(t.Context(), block.Extent{Off: 8 << 20, Len: 1 << 20}, block.ZeroOptions{FUA: true}); err != nil {
			t.Fatal(err)
		}
		write(t, d, filled(oneBlock, 9), 4<<20)
		d = open(t, config(m.Crash(rand.New(rand.NewPCG(seed, 1))), b, bootB))
		expect(t, d, p, 512)
		expect(t, d, make([]byte, 1<<20), 8<<20)
		lost = lost || bytes.Equal(read(t, d, 4<<20, oneBlock), b.content[4<<20:4<<20+oneBlock])
	}
	if !lost {
		t.Error("no power cut took anything: the test looks in the wrong place")
	}
}

// syncsFS calls f before each sync of a file.
type syncsFS struct {
	vfs.FS
	f func(name string)
}

type syncsFile struct {
	vfs.SparseFile
	name string
	f    func(name string)
}

func (s syncsFS) Create(name string) (vfs.File, error) { return s.file(name)(s.FS.Create(name)) }
func (s syncsFS) Open(name string) (vfs.File, error)   { return s.file(name)(s.FS.Open(name)) }

func (s syncsFS) file(name string) func(vfs.File, error) (vfs.File, error) {
	return func(f vfs.File, err error) (vfs.File, error) {
		if err != nil {
			return nil, err
		}
		return syncsFile{f.(vfs.SparseFile), name, s.f}, nil
	}
}

func (f syncsFile) Sync() error {
	f.f(f.name)
	return f.SparseFile.Sync()
}

// TestSync_IsShared: who flushes while another sync runs waits for the next one,
// which is one for all of them; and that one is not the one that ran already.
func TestSync_IsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBase(t, small(512), 4)
		m := newMem(t)
		var syncs atomic.Int64
		hang := make(chan struct{})
		close(hang)
		d := open(t, config(syncsFS{m, func(name string) {
			if name == file {
				syncs.Add(1)
				<-hang
			}
		}}, b, bootA))
		hang = make(chan struct{})
		before := syncs.Load()
		write(t, d, filled(oneBlock, 1), 0)
		var wg sync.WaitGroup
		wg.Go(func() { flush(t, d) })
		synctest.Wait()
		write(t, d, filled(oneBlock, 2), oneBlock)
		for range 10 {
			wg.Go(func() { flush(t, d) })
		}
		synctest.Wait()
		if n := syncs.Load() - before; n != 1 {
			t.Errorf("%d syncs at once", n)
		}
		close(hang)
		wg.Wait()
		if n := syncs.Load() - before; n != 2 {
			t.Errorf("%d syncs for eleven flushes, ten of which came together", n)
		}
		d = open(t, config(m.Crash(rand.New(rand.NewPCG(1, 1))), b, bootB))
		expect(t, d, filled(oneBlock, 1), 0)
		expect(t, d, filled(oneBlock, 2), oneBlock)
	})
}

// TestSync_BitsThatWaitAreBounded: a client that never flushes makes nobody keep
// all that it wrote in mind.
func TestSync_BitsThatWaitAreBounded(t *testing.T) {
	const size = 128 << 30
	b := blank(block.Geometry{SizeBytes: size, SectorSize: 4096})
	var syncs atomic.Int64
	c := config(nil, b, "")
	c.File = t.TempDir() + "/volume"
	c.FS = syncsFS{vfs.OS(), func(name string) {
		if name == c.File {
			syncs.Add(1)
		}
	}}
	d := open(t, c)
	before, pages := syncs.Load(), int64(0)
	for at := int64(0); at < size; at += 1920 * oneBlock {
		zero(t, d, block.Extent{Off: at, Len: oneBlock})
		pages++
	}
	if n := syncs.Load() - before; n != pages/8193 {
		t.Errorf("%d syncs for %d pages", n, pages)
	}
	closeIt(t, d)
	d = open(t, c)
	if p := d.Progress(); p.DoneBytes != pages*oneBlock {
		t.Errorf("%+v", p)
	}
}

// TestModel_ManyReopens: random requests against a byte slice, with processes that
// are killed in between, on the real file system.
func TestModel_ManyReopens(t *testing.T) {
	g := block.Geometry{SizeBytes: 16<<20 + 1536, SectorSize: 512}
	b := newBase(t, g, 5)
	c := config(nil, b, "")
	c.File = t.TempDir() + "/volume"
	want := bytes.Clone(b.content)
	rng := rand.New(rand.NewPCG(5, 5))
	d := open(t, c)
	for i := range 1500 {
		n := 1 + rng.Int64N(300)
		off := rng.Int64N(g.SizeBytes/512-n+1) * 512
		e := block.Extent{Off: off, Len: n * 512}
		switch rng.IntN(8) {
		case 0, 1, 2:
			fill(want[e.Off:e.End()], rng.Uint64())
			write(t, d, want[e.Off:e.End()], e.Off)
		case 3:
			clear(want[e.Off:e.End()])
			if err := d.Zero(t.Context(), e, block.ZeroOptions{NoHole: rng.IntN(2) == 0}); err != nil {
				t.Fatal(err)
			}
		default:
			expect(t, d, want[e.Off:e.End()], e.Off)
		}
		if i%100 == 99 {
			closeIt(t, d)
			d = open(t, c)
			expect(t, d, want, 0)
		}
		if i == 1200 {
			hydrate(t, d)
			b.on(func(_ context.Context, r blocktest.Request) error { return errors.New("the base is not needed") })
		}
	}
	expect(t, d, want, 0)
}
