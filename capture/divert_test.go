package capture_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/vfs"
	"drc/vbuf"
)

// divertRig is a volume over a small buffer that has a bitmap.
type divertRig struct {
	*rig
	marks *vbuf.Bitmap
	held  chan struct{}
}

const divertBytes = 4 << 20

func newDivertRig(t testing.TB, fs *vfs.Mem) *divertRig {
	dir := t.TempDir()
	r := &divertRig{rig: &rig{t: t, path: filepath.Join(dir, "volume"), records: filepath.Join(dir, "records"), bufDir: "/buffer", fs: fs}, held: make(chan struct{}, 1)}
	fs.SetDevice(r.bufDir, r.bufDir)
	b, _, err := capture.OpenBacking(r.path, capture.BackingOptions{CreateBytes: divertBytes})
	if err != nil {
		t.Fatal(err)
	}
	r.backing = b
	r.openSmall()
	r.serve(0)
	return r
}

// openSmall opens the buffer and its bitmap.
func (r *divertRig) openSmall() block.Seq {
	r.t.Helper()
	ctx := context.Background()
	var err error
	r.buf, err = vbuf.Open(ctx, vbuf.Options{Repo: block.ID{1}, Host: block.ID{2}, FileBytes: 64 << 10, FS: r.fs,
		Dirs: []vbuf.DirOptions{{Path: r.bufDir, SizeBytes: 1 << 20}},
		Held: func(block.GroupID) {
			select {
			case r.held <- struct{}{}:
			default:
			}
		}})
	if err != nil {
		r.t.Fatal(err)
	}
	if r.journal, err = r.buf.Journal(ctx, testGroup); err != nil {
		r.t.Fatal(err)
	}
	if r.journal.Next() == 0 {
		if err := r.journal.SetNext(1); err != nil {
			r.t.Fatal(err)
		}
	}
	if r.marks, err = r.buf.Bitmap(ctx, testGroup); err != nil {
		r.t.Fatal(err)
	}
	if !r.marks.Active() {
		if err := r.marks.Prepare([]vbuf.BitmapVolume{{Index: 1, SizeBytes: divertBytes}}); err != nil {
			r.t.Fatal(err)
		}
	}
	return r.journal.Next() - 1
}

// divert takes the writes past the journal and gives the journal back.
func (r *divertRig) divert() error {
	last, err := r.group.Divert(context.Background(), r.marks, 0)
	if err == nil {
		r.journal.Release(last)
	}
	return err
}

// undivert brings the writes back into the journal, and returns what was marked.
func (r *divertRig) undivert() (regions []block.Extent, err error) {
	err = r.group.Undivert(context.Background(), func(last block.Seq) error {
		if r.journal.Durable() < last {
			_, err := r.buf.ResetJournal(context.Background(), testGroup, last+1)
			return err
		}
		r.journal.Release(last)
		return nil
	}, func() ([]*capture.Volume, error) {
		regions = r.marks.Regions(1)
		return []*capture.Volume{r.vol}, r.marks.Deactivate()
	})
	return regions, err
}

// stripes are writers, each of blocks of its own, that stamp each block with a
// number that grows.
type stripes struct {
	acked, flushed, tried [divertBytes / 4096]atomic.Uint64
	stamp                 atomic.Uint64
}

const writers = 4

func stampOf(p []byte) uint64 { return binary.LittleEndian.Uint64(p) }

// write writes n blocks of writer w, and flushes now and then.
func (s *stripes) write(v *capture.Volume, w, n int, rng *rand.Rand) error {
	ctx := context.Background()
	for range n {
		i := rng.IntN(len(s.acked)/writers)*writers + w
		p := make([]byte, 4096)
		stamp := s.stamp.Add(1)
		for at := 0; at < len(p); at += 8 {
			binary.LittleEndian.PutUint64(p[at:], stamp)
		}
		s.tried[i].Store(stamp)
		if err := v.WriteAt(ctx, p, int64(i)*4096, block.WriteOptions{FUA: rng.IntN(50) == 0}); err != nil {
			return err
		}
		s.acked[i].Store(stamp)
		if rng.IntN(20) == 0 {
			var before [len(s.acked)]uint64
			for k := range before {
				before[k] = s.acked[k].Load()
			}
			if err := v.Flush(ctx); err != nil {
				return err
			}
			for k, stamp := range before {
				for {
					old := s.flushed[k].Load()
					if old >= stamp || s.flushed[k].CompareAndSwap(old, stamp) {
						break
					}
				}
			}
		}
	}
	return nil
}

// check compares the volume with what was promised: with cut what was flushed,
// else what was acknowledged.
func (s *stripes) check(t testing.TB, got []byte, cut bool) {
	t.Helper()
	for i := range s.acked {
		p := got[i*4096:][:4096]
		stamp := stampOf(p)
		for at := 0; at < len(p); at += 8 {
			if stampOf(p[at:]) != stamp {
				t.Fatalf("block %d is a mixture", i)
			}
		}
		least := s.acked[i].Load()
		if cut {
			least = s.flushed[i].Load()
		}
		if stamp < least || stamp > s.tried[i].Load() {
			t.Fatalf("block %d has version %d; %d was promised, %d was tried last", i, stamp, least, s.tried[i].Load())
		}
	}
}

// covers fails the test if a block that is not zero is not in regions.
func covers(t testing.TB, got []byte, regions []block.Extent) {
	t.Helper()
	for i := 0; i < len(got); i += 4096 {
		if stampOf(got[i:]) == 0 {
			continue
		}
		in := false
		for _, e := range regions {
			in = in || e.Off <= int64(i) && int64(i) < e.End()
		}
		if !in {
			t.Fatalf("block %d was written and is not in %v", i/4096, regions)
		}
	}
}

// TestDivert_WritersGoOn has writers fill the buffer: they go on past it, and
// later through it again; nothing of what they were told is wrong.
func TestDivert_WritersGoOn(t *testing.T) {
	for _, why := range []string{"quota", "file system"} {
		t.Run(why, func(t *testing.T) {
			fs := vfs.NewMem()
			r := newDivertRig(t, fs)
			if why == "file system" {
				fs.SetLimit(r.bufDir, 300<<10)
			}
			runs := make(chan error, 1)
			ctx, cancel := context.WithCancel(context.Background())
			go func() { runs <- r.vol.Run(ctx) }()
			s := &stripes{}
			phase := func() *sync.WaitGroup {
				var wg sync.WaitGroup
				for w := range writers {
					wg.Go(func() {
						if err := s.write(r.vol, w, 600, rand.New(rand.NewPCG(uint64(w), s.stamp.Load()))); err != nil {
							t.Error(err)
						}
					})
				}
				return &wg
			}
			wg := phase()
			<-r.held
			if err := r.divert(); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			if !r.group.Diverted() {
				t.Fatal("not diverted")
			}
			if err := r.vol.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			s.check(t, r.file(), false)
			covers(t, r.file(), r.marks.Regions(1))
			wg = phase() // none of these has a Seq
			at := r.group.Captured()
			wg.Wait()
			if now := r.group.Captured(); now != at {
				t.Errorf("%d writes were numbered past the journal", now-at)
			}
			fs.SetLimit(r.bufDir, 1<<40)
			wg = phase()
			regions, err := r.undivert()
			if err != nil {
				t.Fatal(err)
			}
			covers(t, r.file(), regions)
			// The buffer may be full again: there is no segmenter here.
			written := make(chan struct{})
			go func() { wg.Wait(); close(written) }()
			for done := false; !done; {
				select {
				case <-r.held:
					if r.buf.Stats().Waiting > 0 && !r.group.Diverted() {
						if err := r.divert(); err != nil {
							t.Error(err)
						}
					}
				case <-written:
					done = true
				}
			}
			cancel()
			if err := <-runs; err != nil {
				t.Error(err)
			}
			got := make([]byte, divertBytes)
			if err := r.vol.ReadAt(context.Background(), got, 0); err != nil {
				t.Fatal(err)
			}
			s.check(t, got, false)
			r.marks.Close()
			r.end()
		})
	}
}

// TestDivert_CrashAtAnyStep kills the process, or cuts the power of the buffer's
// disk, at any of its operations while the way of the writes changes there and
// back: what was promised comes back, and what history does not have is marked
// or in the journal.
func TestDivert_CrashAtAnyStep(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 5))
			fs := vfs.NewMem()
			r := newDivertRig(t, fs)
			s := &stripes{}
			dead := errors.New("the machine is down")
			left := 20 + rng.IntN(400)
			var mu sync.Mutex
			fs.SetHook(func(vfs.Op, string) error {
				mu.Lock()
				defer mu.Unlock()
				if left--; left < 0 {
					return dead
				}
				return nil
			})
			var noted []block.Extent
			isNoted := false
			func() {
				for {
					if s.write(r.vol, 0, 10+rng.IntN(60), rng) != nil {
						return
					}
					if rng.IntN(4) == 0 {
						_, _, _ = r.vol.Step(0)
					}
					err := r.divert()
					if err != nil {
						return
					}
					if s.write(r.vol, 1, rng.IntN(60), rng) != nil {
						return
					}
					// Noted before the marks are given up, as the agent does.
					noted, isNoted = append(noted, r.marks.Regions(1)...), true
					if _, err := r.undivert(); err != nil {
						return
					}
					if r.vol.Settle(context.Background()) != nil {
						return
					}
					if s.write(r.vol, 2, rng.IntN(30), rng) != nil {
						return
					}
				}
			}()
			fs.SetHook(nil)
			r.marks.Close()
			if err := r.vol.Abandon(); err != nil {
				t.Fatal(err)
			}
			cut := rng.IntN(2) == 0
			if cut {
				r.fs = fs.Crash(rng)
			} else {
				r.fs = fs.Kill()
			}
			r.buf.Close()

			last := r.openSmall()
			finding, record := r.inspect()
			if finding != capture.FindingReplay {
				t.Fatalf("found %d", finding)
			}
			if err := r.backing.SignLife(r.records); err != nil {
				t.Fatal(err)
			}
			regions := noted
			if r.marks.Active() {
				regions = append(regions, r.marks.Regions(1)...)
			} else if !isNoted {
				regions = nil
			}
			last = max(last, record.Applied)
			if _, err := capture.Replay(r.backing, 1, r.journal, record.Applied, last); err != nil {
				t.Fatal(err)
			}
			// What the journal has is history to be; the rest must be marked.
			if first := r.journal.First(); first > 0 {
				if _, err := r.journal.Read(first, 1<<40, func(w block.Write) error {
					regions = append(regions, w.Extent)
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			got := r.file()
			s.check(t, got, cut)
			if !cut { // a power cut takes unflushed records that the backing has not
				covers(t, got, regions)
			}
			r.marks.Close()
			_ = r.backing.Close()
			_ = r.buf.Close()
		})
	}
}

// TestDivert_FailsAndWritersGoOn: if the marks cannot be made durable the writes
// go on through the journal.
func TestDivert_FailsAndWritersGoOn(t *testing.T) {
	fs := vfs.NewMem()
	r := newDivertRig(t, fs)
	s := &stripes{}
	rng := rand.New(rand.NewPCG(1, 1))
	if err := s.write(r.vol, 0, 50, rng); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	fs.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpWrite && filepath.Base(filepath.Dir(name)) == "bitmap" {
			return broken
		}
		return nil
	})
	if err := r.divert(); !errors.Is(err, broken) {
		t.Fatalf("diverted: %v", err)
	}
	fs.SetHook(nil)
	before := r.group.Captured()
	if err := s.write(r.vol, 1, 20, rng); err != nil {
		t.Fatal(err)
	}
	if n := r.group.Captured() - before; n != 20 {
		t.Errorf("%d of 20 writes have a Seq", n)
	}
	r.group.Refuse(block.ErrReadOnly)
	if err := s.write(r.vol, 1, 1, rng); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a write that is refused: %v", err)
	}
	r.group.Refuse(nil)
	if err := r.divert(); err != nil {
		t.Fatalf("tried again: %v", err)
	}
	r.group.Refuse(block.ErrReadOnly)
	if err := s.write(r.vol, 1, 1, rng); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a write past the journal that is refused: %v", err)
	}
	r.group.Refuse(nil)
	got := make([]byte, divertBytes)
	if err := r.vol.ReadAt(context.Background(), got, 0); err != nil {
		t.Fatal(err)
	}
	s.check(t, got, false)
	if err := r.vol.Zero(context.Background(), block.Extent{Len: divertBytes}, block.ZeroOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.vol.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := r.file(); !bytes.Equal(got, make([]byte, divertBytes)) {
		t.Error("zeroed past the journal, and not zero")
	}
	r.marks.Close()
	r.end()
}
