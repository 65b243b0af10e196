package restorer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
	"drc/restorer"
	"drc/restorer/replay"
)

// standby opens a standby of the world's volumes in a file system in memory.
func (w *world) standby(m *vfs.Mem, change func(*replay.Options)) (*replay.Standby, error) {
	o := replay.Options{Restorer: w.config(), Dir: "/standby", FS: m, Now: w.clock.now, Stamp: func(name string) (replay.Stamp, error) {
		_, err := m.Stat(name)
		if errors.Is(err, fs.ErrNotExist) {
			return replay.Stamp{}, nil
		}
		return replay.Stamp{Exists: err == nil}, err
	}}
	if change != nil {
		change(&o)
	}
	return replay.Open(w.ctx, o)
}

// checkCopies compares whole copies with what the volumes were at their points, and
// returns how many there are.
func (w *world) checkCopies(s *replay.Standby, read func(name string) []byte) (whole int) {
	w.t.Helper()
	for _, x := range s.Status() {
		if x.State != replay.Following {
			continue
		}
		whole++
		for _, v := range w.volumes {
			if v.Name == x.Volume && !bytes.Equal(read(x.File), w.model(v.Index, x.Seq)) {
				w.t.Fatalf("the copy of %s is not what the volume was at seq %s", x.Volume, x.Seq)
			}
		}
	}
	return whole
}

func readMem(t testing.TB, m *vfs.Mem) func(string) []byte {
	return func(name string) []byte {
		raw, err := vfs.ReadFile(m, name, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
}

// A standby follows from checkpoint to checkpoint, over restarts of both sides, gaps and
// names; the copies of a group are at the same entry where that is a checkpoint of both;
// and with small steps none is passed over that a step has room for.
func TestStandby_Follows(t *testing.T) {
	t.Parallel()
	for _, stepBytes := range []int64{0, 3000} {
		w := newWorld(t, options{stores: 1, volumes: []int64{256 << 10, 192 << 10}, digests: true})
		x := w.start()
		w.random(2 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		m := vfs.NewMem()
		set := func(o *replay.Options) { o.StepBytes = stepBytes }
		s, err := w.standby(m, set)
		w.must(err)
		for i := range 60 {
			for range w.rng.IntN(4) {
				w.random(4 << 10)
				w.cut()
			}
			switch w.rng.IntN(8) {
			case 0:
				w.must(s.Close())
				s, err = w.standby(m, set)
				w.must(err)
			case 1:
				w.resync(x)
			case 2:
				x.seg.Checkpoint(fmt.Sprint("name ", i), w.clock.now())
				w.random(4 << 10)
				w.cut()
			}
			w.must(x.up.AwaitIdle(w.ctx))
			if w.rng.IntN(2) == 0 {
				_, err := s.Step(w.ctx)
				w.must(err)
			} else {
				w.must(s.CatchUp(w.ctx))
				h := w.history()
				for _, x := range s.Status() {
					p, err := h.Resolve(w.ctx, x.Volume, "latest")
					w.must(err)
					if x.State != replay.Following || x.Entry != p.N || x.Lag != 0 || x.BehindBytes != 0 {
						t.Fatalf("caught up, and %+v; the newest checkpoint is %d", x, p.N)
					}
				}
			}
			w.checkCopies(s, readMem(t, m))
		}
		if n := w.checkCopies(s, readMem(t, m)); n != 2 {
			t.Fatalf("%d copies", n)
		}
		w.must(s.Close())
		x.stop()
	}
}

// Whatever a power cut or a kill leaves, at any operation on the disk, the next start
// finds or makes copies that are at a checkpoint, and goes on.
func TestStandby_SurvivesCrashes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{192 << 10, 64 << 10}})
	x := w.start()
	w.random(2 << 10)
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	m := vfs.NewMem()
	crashes, mid := 0, 0
	for range scaled(150, 600) {
		for range 1 + w.rng.IntN(3) {
			w.random(16 << 10)
			w.cut()
		}
		w.must(x.up.AwaitIdle(w.ctx))
		left := w.rng.IntN(60)
		where := ""
		m.SetHook(func(op vfs.Op, name string) error {
			if left--; left < 0 {
				if where == "" {
					where = fmt.Sprint(op, " ", filepath.Base(name))
				}
				return vfs.ErrDown
			}
			return nil
		})
		s, err := w.standby(m, nil)
		if err == nil {
			err = s.CatchUp(w.ctx)
			_ = s.Close()
		}
		if err != nil && where == "" {
			t.Fatal(err)
		}
		if w.rng.IntN(2) == 0 {
			m = m.Crash(w.rng)
		} else {
			m = m.Kill()
		}
		if where != "" {
			crashes++
			if strings.Contains(where, ".raw") || strings.Contains(where, ".redo") {
				mid++
			}
		}
		s, err = w.standby(m, nil)
		w.must(err)
		w.checkCopies(s, readMem(t, m))
		w.must(s.Close())
	}
	if crashes < 50 || mid < 20 {
		t.Errorf("%d crashes, %d of them in copies and redo files", crashes, mid)
	}
	x.stop()
}

// A disk that is full or fails stops the copies where they are, and they go on when it
// does not any more.
func TestStandby_FailingDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{192 << 10}})
	x := w.start()
	w.random(2 << 10)
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	m := vfs.NewMem()
	s, err := w.standby(m, nil)
	w.must(err)
	w.must(s.CatchUp(w.ctx))
	failed := 0
	for range 100 {
		w.random(16 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		skip := w.rng.IntN(30)
		m.SetHook(func(op vfs.Op, name string) error {
			if skip--; skip < 0 {
				return errors.New("this disk fails")
			}
			return nil
		})
		if err := s.CatchUp(w.ctx); err != nil {
			failed++
			dev, release, ok, verr := s.View(w.volumes[0].Name)
			if !ok || verr != nil {
				t.Fatal(ok, verr)
			}
			m.SetHook(nil)
			w.checkView(dev) // what the file holds now may be neither point
			release()
		}
		m.SetHook(nil)
		w.must(s.CatchUp(w.ctx))
		if w.checkCopies(s, readMem(t, m)) != 1 {
			t.Fatal("the copy is not whole")
		}
	}
	if failed < 30 {
		t.Errorf("%d failures", failed)
	}
	w.must(s.Close())
	x.stop()
}

// pointed is a device that knows its point.
type pointed interface {
	block.Device
	Point() restorer.Point
}

func (w *world) checkView(dev block.Device) {
	w.t.Helper()
	p := dev.(pointed).Point()
	got := make([]byte, p.Volume.SizeBytes)
	w.must(dev.ReadAt(w.ctx, got, 0))
	if !bytes.Equal(got, w.model(p.Volume.Index, p.Seq)) {
		w.t.Fatalf("a view of seq %s shows something else", p.Seq)
	}
}

// A view shows one point for as long as it is open, also while the copy moves.
func TestStandby_Views(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{1 << 20}})
	x := w.start()
	w.random(2 << 10)
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	dir := t.TempDir()
	s, err := replay.Open(w.ctx, replay.Options{Restorer: w.config(), Dir: dir, Now: w.clock.now})
	w.must(err)
	if _, _, ok, err := s.View(w.volumes[0].Name); !ok || !errors.As(err, new(*replay.NotReadyError)) {
		t.Fatalf("a copy that is not whole is shown: %v, %v", ok, err)
	}
	w.must(s.CatchUp(w.ctx))
	type open struct {
		dev     pointed
		release func()
	}
	var views []open
	for range 40 {
		dev, release, _, err := s.View(w.volumes[0].Name)
		w.must(err)
		views = append(views, open{dev.(pointed), release})
		for range 3 {
			w.random(64 << 10)
			w.cut()
		}
		w.must(x.up.AwaitIdle(w.ctx))
		var readers sync.WaitGroup
		moving, moved := context.WithCancel(w.ctx)
		for _, v := range views[max(0, len(views)-4):] {
			p := v.dev.Point()
			want := w.model(p.Volume.Index, p.Seq)
			readers.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(p.N), 1))
				for n := 0; n < 5 || moving.Err() == nil; n++ {
					off := 512 * rng.Int64N(p.Volume.SizeBytes/512)
					got := make([]byte, 512*(1+rng.Int64N(min(512, (p.Volume.SizeBytes-off)/512))))
					if err := v.dev.ReadAt(w.ctx, got, off); err != nil {
						t.Error(err)
					}
					if !bytes.Equal(got, want[off:off+int64(len(got))]) {
						t.Errorf("a view of seq %s shows something else at %d+%d", p.Seq, off, len(got))
					}
				}
			})
		}
		w.must(s.CatchUp(w.ctx))
		moved()
		readers.Wait()
		if len(views) > 6 {
			w.checkView(views[0].dev)
			views[0].release()
			views = views[1:]
		}
	}
	for _, v := range views {
		w.checkView(v.dev)
		v.release()
	}
	w.must(s.Close())
	x.stop()
}

// With a delay the copy stays behind, at the newest checkpoint that is old enough.
func TestStandby_Delay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{256 << 10}})
	x := w.start()
	const delay = 10 * time.Second // cut sets the clock one second forth
	m := vfs.NewMem()
	for range 5 {
		w.random(2 << 10)
		w.cut()
	}
	w.must(x.up.AwaitIdle(w.ctx))
	s, err := w.standby(m, func(o *replay.Options) { o.Delay = delay })
	w.must(err)
	w.must(s.CatchUp(w.ctx))
	if st := s.Status()[0]; st.State != replay.Waiting {
		t.Fatalf("no checkpoint is old enough, and %+v", st)
	}
	for range 30 {
		w.random(2 << 10)
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
		w.must(s.CatchUp(w.ctx))
		h := w.history()
		v, _ := h.Volume(w.volumes[0].Name)
		limit := w.clock.now().Add(-delay)
		p, ok, err := h.Last(w.ctx, v, h.N(), &limit)
		w.must(err)
		if st := s.Status()[0]; ok && (st.Entry != p.N || st.Lag != 0) {
			t.Fatalf("it should be at entry %d: %+v", p.N, st)
		}
		w.checkCopies(s, readMem(t, m))
	}
	if w.checkCopies(s, readMem(t, m)) != 1 {
		t.Fatal("there is no copy")
	}
	w.must(s.Close())
	x.stop()
}

// A raw file that is nearly the volume becomes the copy, and little is fetched for it;
// so does a copy that another program has changed. Nothing is touched unless it may be.
func TestStandby_AdoptsAFile(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{8 << 20}})
	x := w.start()
	for range 8 {
		w.write(0, w.rng.Int64N(7)<<20, fill(w.rng, make([]byte, 1<<20)))
		w.cut()
	}
	w.must(x.up.AwaitIdle(w.ctx))
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.img")
	w.must(os.WriteFile(file, w.model(0, w.journal.Captured()), 0o600))
	for range 5 {
		w.random(2 << 10)
		w.cut()
	}
	w.must(x.up.AwaitIdle(w.ctx))
	o := replay.Options{Restorer: w.config(), Dir: filepath.Join(dir, "standby"), Now: w.clock.now, Files: map[string]string{w.volumes[0].Name: file}}
	before, err := os.ReadFile(file)
	w.must(err)
	if _, err := replay.Open(w.ctx, o); err == nil || !strings.Contains(err.Error(), "--adopt") {
		t.Fatalf("a file that is there was taken: %v", err)
	}
	if after, _ := os.ReadFile(file); !bytes.Equal(before, after) {
		t.Fatal("a file that is there was changed")
	}
	read := func(name string) []byte {
		raw, err := os.ReadFile(name)
		w.must(err)
		return raw
	}
	o.Adopt = true
	s, err := replay.Open(w.ctx, o)
	w.must(err)
	w.must(s.CatchUp(w.ctx))
	st := s.Status()[0]
	if w.checkCopies(s, read) != 1 || st.FetchedBytes > 3<<20 {
		t.Fatalf("%d bytes were fetched of a file that is nearly the same: %+v", st.FetchedBytes, st)
	}
	w.must(s.Close())
	// Another program writes to it, while nobody looks.
	raw := read(file)
	copy(raw[5<<20:], "somebody was here")
	w.must(os.WriteFile(file, raw, 0o600))
	w.must(os.Chtimes(file, time.Time{}, time.Now().Add(time.Hour)))
	o.Adopt = false
	s, err = replay.Open(w.ctx, o)
	w.must(err)
	if st := s.Status()[0]; st.State == replay.Following {
		t.Fatal("the change was not noticed")
	}
	w.must(s.CatchUp(w.ctx))
	if st := s.Status()[0]; w.checkCopies(s, read) != 1 || st.FetchedBytes == 0 || st.FetchedBytes > 3<<20 {
		t.Fatalf("%d bytes were fetched: %+v", st.FetchedBytes, st)
	}
	// And it is removed.
	w.must(s.Close())
	w.must(os.Remove(file))
	s, err = replay.Open(w.ctx, o)
	w.must(err)
	w.must(s.CatchUp(w.ctx))
	if w.checkCopies(s, read) != 1 {
		t.Fatal("it was not made anew")
	}
	w.must(s.Close())
	x.stop()
}

// Of what was written over and over only the newest is fetched, each byte once.
func TestStandby_FetchesOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{4 << 20}})
	x := w.start()
	w.write(0, 0, fill(w.rng, make([]byte, 1<<20)))
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	s, err := w.standby(vfs.NewMem(), nil)
	w.must(err)
	w.must(s.CatchUp(w.ctx))
	before := s.FetchedFromStores()
	for range 20 {
		w.write(0, 512<<10, fill(w.rng, make([]byte, 256<<10)))
		w.cut()
		w.must(x.up.AwaitIdle(w.ctx))
	}
	w.must(s.CatchUp(w.ctx))
	if n := s.FetchedFromStores() - before; n < 256<<10 || n > 600<<10 {
		t.Errorf("%d bytes were read for 20 versions of 262144 bytes, of which one counts", n)
	}
	w.must(s.Close())
	x.stop()
}

// What cannot be is said, and changes nothing.
func TestStandby_BadInput(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{64 << 10}})
	x := w.start()
	w.random(2 << 10)
	w.cut()
	w.must(x.up.AwaitIdle(w.ctx))
	m := vfs.NewMem()
	s, err := w.standby(m, nil)
	w.must(err)
	var inUse *replay.InUseError
	if _, err := w.standby(m, nil); !errors.As(err, &inUse) {
		t.Errorf("a folder was opened twice: %v", err)
	}
	w.must(s.Close())
	if _, err := w.standby(m, func(o *replay.Options) { o.Volumes = []string{"nope"} }); !errors.Is(err, restorer.ErrNoSuchVolume) {
		t.Errorf("a volume that is not there: %v", err)
	}
	other := newWorld(t, options{stores: 1, volumes: []int64{64 << 10}})
	ox := other.start()
	other.random(2 << 10)
	other.cut()
	other.must(ox.up.AwaitIdle(w.ctx))
	if _, err := other.standby(m, nil); err == nil || !strings.Contains(err.Error(), other.repo.ID.String()) || !strings.Contains(err.Error(), w.repo.ID.String()) {
		t.Errorf("a folder of another repository: %v", err)
	}
	ox.stop()
	x.stop()
}
