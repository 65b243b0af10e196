package capture_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/vfs"
	"drc/vbuf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testGroup = block.GroupID{3}

// rig is one volume over a real journal, which can die and live again.
type rig struct {
	t       testing.TB
	path    string // of the backing
	records string
	bufDir  string
	fs      *vfs.Mem // nil: the buffer is on the real file system
	ack     capture.Ack
	machine capture.Machine // nil: the real one

	buf     *vbuf.Buffer
	journal *vbuf.Journal
	backing *capture.Backing
	group   *capture.Group
	vol     *capture.Volume
}

const rigBytes = 1 << 20

func newRig(t testing.TB, fs *vfs.Mem, size int64) *rig { return newRigOn(t, nil, fs, size) }

// newRigOn is newRig with the backing on a machine.
func newRigOn(t testing.TB, m capture.Machine, fs *vfs.Mem, size int64) *rig {
	dir := t.TempDir()
	r := &rig{t: t, path: filepath.Join(dir, "volume"), records: filepath.Join(dir, "records"), bufDir: filepath.Join(dir, "buffer"), fs: fs, machine: m}
	if fs != nil {
		r.bufDir = "/buffer"
		fs.SetDevice(r.bufDir, r.bufDir)
	}
	b, created, err := capture.OpenBacking(r.path, capture.BackingOptions{CreateBytes: size, Machine: m})
	if err != nil || !created {
		t.Fatalf("created %v: %v", created, err)
	}
	r.openBuffer()
	r.backing = b
	r.serve(0)
	return r
}

func (r *rig) openBuffer() block.Seq {
	r.t.Helper()
	o := vbuf.Options{Repo: block.ID{1}, Host: block.ID{2}, FileBytes: 256 << 10, Dirs: []vbuf.DirOptions{{Path: r.bufDir, SizeBytes: 256 << 20}}}
	if r.fs != nil {
		o.FS = r.fs
	}
	var err error
	if r.buf, err = vbuf.Open(context.Background(), o); err != nil {
		r.t.Fatal(err)
	}
	if r.journal, err = r.buf.Journal(context.Background(), testGroup); err != nil {
		r.t.Fatal(err)
	}
	if r.journal.Next() == 0 {
		if err := r.journal.SetNext(1); err != nil {
			r.t.Fatal(err)
		}
	}
	return r.journal.Next() - 1
}

func (r *rig) serve(applied block.Seq) {
	r.t.Helper()
	r.group = capture.NewGroup(r.journal, r.journal.Next()-1, nil)
	v, err := capture.New(r.group, capture.Options{Name: "v", Index: 1, Backing: r.backing, SectorSize: 512, Ack: r.ack, RecordDir: r.records, Record: capture.Record{Volume: "volume"}}, applied)
	if err != nil {
		r.t.Fatal(err)
	}
	r.vol = v
}

// inspect opens the backing as a new process would.
func (r *rig) inspect() (capture.Finding, *capture.Record) {
	r.t.Helper()
	b, _, err := capture.OpenBacking(r.path, capture.BackingOptions{Machine: r.machine})
	if err != nil {
		r.t.Fatal(err)
	}
	finding, record, err := capture.Inspect(r.records, "volume", b)
	if err != nil {
		r.t.Fatal(err)
	}
	r.backing = b
	return finding, record
}

// die ends the process without a word.
func (r *rig) die() {
	r.t.Helper()
	if err := r.vol.Abandon(); err != nil {
		r.t.Fatal(err)
	}
	if r.fs != nil {
		r.fs = r.fs.Kill()
		r.buf.Close() // of the dead file system
		return
	}
	if err := r.buf.Close(); err != nil {
		r.t.Fatal(err)
	}
}

// revive reopens everything, replays, and serves again.
func (r *rig) revive() {
	r.t.Helper()
	last := r.openBuffer()
	finding, record := r.inspect()
	if finding != capture.FindingReplay {
		r.t.Fatalf("after the process's death the backing is found %d, want replay", finding)
	}
	if err := r.backing.SignLife(r.records); err != nil {
		r.t.Fatal(err)
	}
	applied, err := capture.Replay(r.backing, 1, r.journal, record.Applied, last)
	if err != nil {
		r.t.Fatal(err)
	}
	r.serve(applied)
}

// end closes what is open.
func (r *rig) end() {
	r.t.Helper()
	if err := r.vol.Close(context.Background()); err != nil {
		r.t.Error(err)
	}
	if err := r.buf.Close(); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) write(p []byte, off int64) {
	r.t.Helper()
	if err := r.vol.WriteAt(context.Background(), p, off, block.WriteOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) file() []byte {
	r.t.Helper()
	p, err := os.ReadFile(r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

func (r *rig) expectFile(want []byte) {
	r.t.Helper()
	got := r.file()
	if len(got) != len(want) {
		r.t.Fatalf("the backing has %d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			r.t.Fatalf("byte %d of the backing is %#02x, want %#02x", i, got[i], want[i])
		}
	}
}

func TestVolume_Conforms(t *testing.T) {
	for name, background := range map[string]bool{"idle": false, "applying": true} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				var fs *vfs.Mem // idle: on real files
				if background {
					fs = vfs.NewMem()
				}
				r := newRig(t, fs, 8<<20)
				stop := func() {}
				if background {
					stop = r.applyAllTheTime()
				}
				t.Cleanup(func() { stop(); r.end() })
				return r.vol
			})
		})
	}
}

// applyAllTheTime flushes and applies as fast as it can until stop is called.
func (r *rig) applyAllTheTime() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		var done block.Seq
		for r.group.WaitCaptured(ctx, done) == nil {
			done = r.group.Captured()
			if err := r.journal.Flush(ctx); err != nil {
				if ctx.Err() == nil {
					r.t.Error(err)
				}
				return
			}
			if _, _, err := r.vol.Step(0); err != nil {
				r.t.Error(err)
				return
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// TestVolume_MatchesModelThroughDeaths does random things to a volume, kills
// its process at random, and compares the backing with a model after each
// replay and after the end.
func TestVolume_MatchesModelThroughDeaths(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			ctx := context.Background()
			rng := rand.New(rand.NewPCG(seed, 1))
			r := newRig(t, vfs.NewMem(), rigBytes)
			model := make([]byte, rigBytes)
			var from int64
			for i := range 120 {
				n := 512 * (1 + rng.Int64N(96))
				if rng.IntN(8) == 0 {
					n = 512 * (1 + rng.Int64N(rigBytes/1024))
				}
				off := 512 * rng.Int64N((rigBytes-n)/512+1)
				var err error
				switch rng.IntN(20) {
				case 0, 1, 2, 3, 4, 5, 6:
					for k := range model[off : off+n] {
						model[off+int64(k)] = byte(rng.Uint32())
					}
					err = r.vol.WriteAt(ctx, model[off:off+n], off, block.WriteOptions{FUA: rng.IntN(4) == 0})
				case 7, 8, 9, 10:
					clear(model[off : off+n])
					err = r.vol.Zero(ctx, block.Extent{Off: off, Len: n}, block.ZeroOptions{NoHole: rng.IntN(2) == 0})
				case 11:
					err = r.vol.Flush(ctx)
				case 12, 13:
					from, _, err = r.vol.Step(from)
				case 14:
					err = r.vol.Settle(ctx)
				case 15:
					r.die()
					r.revive()
					from = 0
					r.expectFile(model)
				default:
					got := make([]byte, n)
					if err = r.vol.ReadAt(ctx, got, off); err == nil && !bytes.Equal(got, model[off:off+n]) {
						t.Fatalf("step %d: what is read at %d+%d is not what was written", i, off, n)
					}
				}
				if err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
			}
			last := r.group.Captured()
			r.end()
			r.expectFile(model)
			finding, record := r.inspect()
			defer r.backing.Close()
			if finding != capture.FindingClean || record.Applied != last {
				t.Errorf("after the end: finding %d, applied %s; want clean, %s", finding, record.Applied, last)
			}
		})
	}
}

// TestInspect_FindsForeignChanges changes a backing behind DRC's back, after a
// clean end and after a death.
func TestInspect_FindsForeignChanges(t *testing.T) {
	later := time.Now().Add(time.Hour) // behind any sign of life
	touch := func(t *testing.T, path string) {
		if err := os.Chtimes(path, later, later); err != nil {
			t.Fatal(err)
		}
	}
	changes := map[string]func(t *testing.T, path string){
		"written": func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("other"), 4096); err != nil {
				t.Fatal(err)
			}
			touch(t, path)
		},
		"replaced": func(t *testing.T, path string) {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			copied := path + ".copy"
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(copied, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(copied, st.ModTime(), st.ModTime()); err != nil { // as cp -p does
				t.Fatal(err)
			}
			if err := os.Rename(copied, path); err != nil {
				t.Fatal(err)
			}
		},
		"shrunk": func(t *testing.T, path string) {
			if err := os.Truncate(path, rigBytes/2); err != nil {
				t.Fatal(err)
			}
		},
		"grown": func(t *testing.T, path string) {
			if err := os.Truncate(path, 2*rigBytes); err != nil {
				t.Fatal(err)
			}
		},
	}
	for _, clean := range []bool{true, false} {
		for name, change := range changes {
			t.Run(fmt.Sprintf("%s/clean_%v", name, clean), func(t *testing.T) {
				r := newRig(t, vfs.NewMem(), rigBytes)
				r.write(bytes.Repeat([]byte{7}, 65536), 0)
				if clean {
					r.end()
				} else {
					if err := r.vol.Settle(t.Context()); err != nil {
						t.Fatal(err)
					}
					r.die()
				}
				change(t, r.path)
				finding, _ := r.inspect()
				defer r.backing.Close()
				if finding != capture.FindingForeign {
					t.Errorf("found %d, want foreign", finding)
				}
			})
		}
	}
}

// cutJournal has something happen behind its first flush, and fails every later
// one: the power goes.
type cutJournal struct {
	*vbuf.Journal
	flushes int
	behind  func()
}

var errCut = errors.New("power cut")

func (j *cutJournal) Flush(ctx context.Context) error {
	if j.flushes++; j.flushes > 1 {
		return errCut
	}
	err := j.Journal.Flush(ctx)
	j.behind()
	return err
}

// TestSettle_KeepsAnOlderVersionUntilTheNewerIsDurable overwrites durable blocks
// while they are being settled and cuts the power before the newer versions are
// durable: one of the two versions must come back.
func TestSettle_KeepsAnOlderVersionUntilTheNewerIsDurable(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			ctx := context.Background()
			rng := rand.New(rand.NewPCG(seed, 2))
			fs := vfs.NewMem()
			r := newRig(t, fs, rigBytes)
			cut := &cutJournal{Journal: r.journal}
			r.group = capture.NewGroup(cut, 0, nil)
			var err error
			if r.vol, err = capture.New(r.group, capture.Options{Name: "v", Index: 1, Backing: r.backing, SectorSize: 512, RecordDir: r.records}, 0); err != nil {
				t.Fatal(err)
			}
			older, newer := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
			for i := range int64(16) {
				r.write(older, i*4096)
			}
			cut.behind = func() {
				for i := range int64(16) {
					r.write(newer, i*4096)
				}
			}
			if err := r.vol.Settle(ctx); !errors.Is(err, errCut) {
				t.Errorf("settle: %v, want the error of the flush that the newer versions need", err)
			}
			if got := r.vol.Applied(); got != 0 {
				t.Errorf("applied is %s though what superseded it is not durable", got)
			}
			if err := r.vol.Abandon(); err != nil {
				t.Fatal(err)
			}
			r.fs = fs.Crash(rng)
			r.buf.Close()
			r.revive()
			defer r.end()
			got := r.file()
			for i := range int64(16) {
				if b := got[i*4096 : (i+1)*4096]; !bytes.Equal(b, older) && !bytes.Equal(b, newer) {
					t.Fatalf("block %d has neither version after the power cut", i)
				}
			}
		})
	}
}

// TestReadAt_NeverSeesWhatWasOverwritten has readers race with writers and with
// what applies: once a version is acknowledged no reader sees an older one.
func TestReadAt_NeverSeesWhatWasOverwritten(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, vfs.NewMem(), rigBytes)
	stop := r.applyAllTheTime()
	const blocks, versions = 8, 120
	var acked [blocks]atomic.Int64
	var writers, readers sync.WaitGroup
	done := make(chan struct{})
	for b := range int64(blocks) {
		writers.Go(func() {
			for v := int64(1); v <= versions; v++ {
				if err := r.vol.WriteAt(ctx, bytes.Repeat([]byte{byte(v)}, 4096), b*4096, block.WriteOptions{}); err != nil {
					t.Error(err)
					return
				}
				acked[b].Store(v)
			}
		})
	}
	for range 2 {
		readers.Go(func() {
			p := make([]byte, 512)
			for {
				for b := range int64(blocks) {
					least := acked[b].Load()
					if err := r.vol.ReadAt(ctx, p, b*4096+512); err != nil {
						t.Error(err)
						return
					}
					if int64(p[0]) < least {
						t.Errorf("block %d: read version %d after %d was acknowledged", b, p[0], least)
						return
					}
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	stop()
	r.end()
	if got := r.file()[:blocks*4096]; !bytes.Equal(got, bytes.Repeat([]byte{versions}, len(got))) {
		t.Error("the backing has not the last version")
	}
}

func TestRefuse_TakesNothing(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, vfs.NewMem(), rigBytes)
	defer r.end()
	r.write(bytes.Repeat([]byte{5}, 512), 0)
	r.group.Refuse(fmt.Errorf("%w: fenced", block.ErrReadOnly))
	if err := r.vol.WriteAt(ctx, make([]byte, 512), 0, block.WriteOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if err := r.vol.Zero(ctx, block.Extent{Len: 512}, block.ZeroOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("zero: %v", err)
	}
	p := make([]byte, 512)
	if err := r.vol.ReadAt(ctx, p, 0); err != nil || p[0] != 5 {
		t.Errorf("read %d, %v; want 5", p[0], err)
	}
	if err := r.vol.Settle(ctx); err != nil || r.group.Captured() != 1 {
		t.Errorf("captured %s, settle: %v", r.group.Captured(), err)
	}
	r.group.Refuse(nil)
	r.write(p, 512)
	if got := r.group.Captured(); got != 2 {
		t.Errorf("captured %s after a refusal that was lifted, want 2", got)
	}
}

func TestOpenBacking_Refuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "v")
	if _, _, err := capture.OpenBacking(path, capture.BackingOptions{}); err == nil {
		t.Error("opened a file that does not exist, with no size")
	}
	if _, _, err := capture.OpenBacking(dir, capture.BackingOptions{CreateBytes: 4096}); err == nil {
		t.Error("opened a folder")
	}
	b, created, err := capture.OpenBacking(path, capture.BackingOptions{CreateBytes: 4096})
	if err != nil || !created || b.Size() != 4096 || b.Sector() != 512 {
		t.Fatalf("created %v: %v", created, err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	hard := filepath.Join(dir, "hard")
	if err := os.Link(path, hard); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link, hard} {
		for _, o := range []capture.BackingOptions{{}, {ReadOnly: true}, {CreateBytes: 8192}} {
			if _, _, err := capture.OpenBacking(p, o); !errors.Is(err, capture.ErrInUse) {
				t.Errorf("open %s again with %+v: %v, want ErrInUse", p, o, err)
			}
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b, created, err = capture.OpenBacking(link, capture.BackingOptions{CreateBytes: 8192})
	if err != nil || created || b.Size() != 4096 || b.Path() != path {
		t.Fatalf("a file that exists keeps its size: created %v, %v", created, err)
	}
	b.Close()
}
