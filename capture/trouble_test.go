package capture_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/vfs"
)

// dying is a machine whose disks fail as it is told. As a kernel does, a disk
// forgets what was written since the last sync when a sync fails, and lets the
// next one succeed.
type dying struct {
	capture.Machine
	mu            sync.Mutex
	fails         func(op string) bool
	syncs, writes int
	notRepeated   bool // a sync came after one that had failed, and not all was written again
}

func (m *dying) OpenDisk(path string, o capture.BackingOptions) (capture.Disk, error) {
	d, err := m.Machine.OpenDisk(path, o)
	if err != nil {
		return nil, err
	}
	return &dyingDisk{Disk: d, m: m}, nil
}

// set says when operations fail; nil: never.
func (m *dying) set(fails func(op string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fails = fails
}

type undo struct {
	off int64
	old []byte
}

type dyingDisk struct {
	capture.Disk
	m      *dying
	before []undo // since the last sync, oldest first
	lost   []block.Extent
}

func (d *dyingDisk) begin(op string) error {
	if d.m.fails != nil && d.m.fails(op) {
		return fmt.Errorf("%s: %w", op, unix.EIO)
	}
	return nil
}

func (d *dyingDisk) change(off, n int64) error {
	d.m.writes++
	if err := d.begin("write"); err != nil {
		return err
	}
	old := make([]byte, n)
	if _, err := d.Disk.ReadAt(old, off); err != nil {
		return err
	}
	d.before = append(d.before, undo{off, old})
	var left []block.Extent
	for _, l := range d.lost {
		if l.Off < off {
			left = append(left, block.Extent{Off: l.Off, Len: min(l.End(), off) - l.Off})
		}
		if l.End() > off+n {
			at := max(l.Off, off+n)
			left = append(left, block.Extent{Off: at, Len: l.End() - at})
		}
	}
	d.lost = left
	return nil
}

func (d *dyingDisk) ReadAt(p []byte, off int64) (int, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if err := d.begin("read"); err != nil {
		return 0, err
	}
	return d.Disk.ReadAt(p, off)
}

func (d *dyingDisk) WriteAt(p []byte, off int64) (int, error) {
	return d.WriteVec([][]byte{p}, off)
}

func (d *dyingDisk) WriteVec(parts [][]byte, off int64) (int, error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	all := bytes.Join(parts, nil)
	if err := d.change(off, int64(len(all))); err != nil {
		return 0, err
	}
	return d.Disk.WriteAt(all, off)
}

func (d *dyingDisk) Fallocate(mode uint32, e block.Extent) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if mode&^unix.FALLOC_FL_KEEP_SIZE != 0 {
		if err := d.change(e.Off, e.Len); err != nil {
			return err
		}
	}
	return d.Disk.Fallocate(mode, e)
}

func (d *dyingDisk) Sync() error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	d.m.syncs++
	if len(d.lost) > 0 {
		d.m.notRepeated = true
	}
	if err := d.begin("sync"); err != nil {
		for len(d.before) > 0 {
			u := d.before[len(d.before)-1]
			d.before = d.before[:len(d.before)-1]
			if _, err := d.Disk.WriteAt(u.old, u.off); err != nil {
				panic(err)
			}
			d.lost = append(d.lost, block.Extent{Off: u.off, Len: int64(len(u.old))})
		}
		return err
	}
	d.before = nil
	return d.Disk.Sync()
}

// TestBackingFails_NothingIsLost does random things to a volume whose disk fails
// now and then, and whose process dies. Reads see all that was written, no sync is
// trusted before what another one has lost is written again, and when the disk
// works the backing gets everything.
func TestBackingFails_NothingIsLost(t *testing.T) {
	failures := 0
	for seed := range uint64(5) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			ctx := context.Background()
			rng := rand.New(rand.NewPCG(seed, 77))
			m := &dying{Machine: capture.Kernel()}
			r := newRigOn(t, m, vfs.NewMem(), rigBytes)
			model := make([]byte, rigBytes)
			var from int64
			for i := range 200 {
				n := 512 * (1 + rng.Int64N(96))
				off := 512 * rng.Int64N((rigBytes-n)/512+1)
				var err error
				switch roll := rng.IntN(20); {
				case roll < 7:
					for k := range model[off : off+n] {
						model[off+int64(k)] = byte(rng.Uint32())
					}
					err = r.vol.WriteAt(ctx, model[off:off+n], off, block.WriteOptions{FUA: rng.IntN(4) == 0})
				case roll < 9:
					clear(model[off : off+n])
					err = r.vol.Zero(ctx, block.Extent{Off: off, Len: n}, block.ZeroOptions{NoHole: rng.IntN(2) == 0})
				case roll < 10:
					err = r.vol.Flush(ctx)
				case roll < 16:
					bad := pickOp(rng)
					m.set(func(op string) bool { return op == bad })
					before := r.vol.Applied()
					var step error
					if rng.IntN(2) == 0 {
						from, _, step = r.vol.Step(from)
					} else {
						step = r.vol.Settle(ctx)
					}
					m.set(nil)
					if step != nil {
						failures++
						from = 0
						if r.vol.Failed() == nil || !errors.Is(step, unix.EIO) {
							t.Fatalf("step %d: %v, and the volume has not failed", i, step)
						}
						if r.vol.Applied() != before {
							t.Fatalf("step %d: applied has moved although %v", i, step)
						}
					}
				case roll < 17:
					r.die()
					r.revive()
					from = 0
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
			if err := r.vol.Settle(ctx); err != nil || r.vol.Failed() != nil {
				t.Fatalf("the disk works again: %v, %v", err, r.vol.Failed())
			}
			r.expectFile(model)
			last := r.group.Captured()
			r.end()
			r.expectFile(model)
			finding, record := r.inspect()
			defer r.backing.Close()
			if finding != capture.FindingClean || record.Applied != last {
				t.Errorf("after the end: finding %d, applied %s; want clean, %s", finding, record.Applied, last)
			}
			if m.notRepeated {
				t.Error("a sync was tried again although what an earlier one had lost was not written again")
			}
		})
	}
	if failures < 40 {
		t.Errorf("only %d operations have failed", failures)
	}
}

func pickOp(rng *rand.Rand) string { return []string{"", "write", "sync"}[rng.IntN(3)] }

// TestBackingFails_GoesOnByItself lets a disk fail for minutes under a volume at
// work. Clients are told nothing while there is memory for what they write and for
// half a minute more; then they get an error and not a hang; and when the disk
// works all comes right without anybody's help, and nobody was busy meanwhile.
func TestBackingFails_GoesOnByItself(t *testing.T) {
	for _, bad := range []string{"write", "sync"} {
		t.Run(bad, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { goesOn(t, bad) }) })
	}
}

func goesOn(t *testing.T, bad string) {
	const size, part = 64 << 20, 1 << 20
	ctx, cancel := context.WithCancel(context.Background())
	m := &dying{Machine: capture.Kernel()}
	r := newRigOn(t, m, vfs.NewMem(), size)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() { _ = r.buf.Run(ctx) })
	work.Go(func() { // as the segmenter does
		for ctx.Err() == nil {
			_ = r.vol.Flush(ctx)
			time.Sleep(time.Second)
		}
	})
	work.Go(func() {
		if err := r.vol.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	want := make([]byte, size)
	put := func(i int) error {
		p := bytes.Repeat([]byte{byte(i%250 + 1)}, part)
		off := int64(i%60) * part
		err := r.vol.WriteAt(ctx, p, off, block.WriteOptions{FUA: i%7 == 0})
		if err == nil {
			copy(want[off:], p)
		}
		return err
	}
	for i := range 4 {
		if err := put(i); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(5 * time.Second)
	if a := r.vol.Applied(); a != 4 || r.vol.Failed() != nil {
		t.Fatalf("applied %s: %v", a, r.vol.Failed())
	}
	m.set(func(op string) bool { return op == bad })
	for i := 4; i < 12; i++ {
		if err := put(i); err != nil {
			t.Fatalf("a write while there is memory: %v", err)
		}
	}
	time.Sleep(10 * time.Second)
	if r.vol.Failed() == nil || r.vol.Applied() != 4 {
		t.Fatalf("%v, applied %s", r.vol.Failed(), r.vol.Applied())
	}
	began := time.Now()
	for i := 12; ; i++ {
		err := put(i)
		if err == nil && i < 200 {
			continue
		}
		if waited := time.Since(began); !errors.Is(err, unix.EIO) || waited > time.Minute {
			t.Fatalf("write %d: %v after %s", i, err, waited)
		}
		if i < 30 || i > 80 { // as many as fit into memory, whether they leave it or not
			t.Errorf("%d writes were taken", i)
		}
		break
	}
	check := func(when string) {
		t.Helper()
		got := make([]byte, size)
		if err := r.vol.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s something else is read than was written (%v)", when, err)
		}
	}
	check("while the disk fails")
	m.mu.Lock()
	writes := m.writes
	m.mu.Unlock()
	time.Sleep(time.Minute)
	check("after a minute more")
	m.mu.Lock()
	if tries := m.writes - writes; tries > 5*len(want)/part || tries == 0 {
		t.Errorf("%d writes were tried in a minute", tries)
	}
	m.mu.Unlock()
	m.set(nil)
	time.Sleep(2 * time.Minute)
	if err := r.vol.Failed(); err != nil || r.vol.Applied() != r.group.Captured() || r.vol.OverlayBytes() != 0 {
		t.Errorf("the disk works again: %v; applied %s of %s, %d bytes wait", err, r.vol.Applied(), r.group.Captured(), r.vol.OverlayBytes())
	}
	r.expectFile(want)
	if err := put(5); err != nil {
		t.Error(err)
	}
	time.Sleep(10 * time.Second)
	cancel()
	work.Wait()
	r.end()
	r.expectFile(want)
	if m.notRepeated {
		t.Error("a sync was tried again although what an earlier one had lost was not written again")
	}
}

// TestBackingFails_OverARestart: a process that dies while the disk fails leaves
// what the disk lacks in the journal, and a start that cannot write it either
// changes nothing.
func TestBackingFails_OverARestart(t *testing.T) {
	ctx := context.Background()
	m := &dying{Machine: capture.Kernel()}
	r := newRigOn(t, m, vfs.NewMem(), rigBytes)
	want := bytes.Repeat([]byte("acknowledged and not on the disk"), rigBytes/32)
	for off := int64(0); off < rigBytes; off += 64 << 10 {
		r.write(want[off:off+64<<10], off)
	}
	m.set(func(op string) bool { return op == "sync" })
	if err := r.vol.Settle(ctx); !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
	if err := r.vol.Flush(ctx); err != nil {
		t.Errorf("a client's flush needs the journal, not the backing: %v", err)
	}
	if err := r.vol.WriteAt(ctx, want[:512], 0, block.WriteOptions{FUA: true}); err != nil {
		t.Errorf("nor does FUA: %v", err)
	}
	r.die()
	for _, bad := range []string{"write", "sync"} {
		m.set(func(op string) bool { return op == bad })
		last := r.openBuffer()
		finding, record := r.inspect()
		if finding != capture.FindingReplay || record.Applied != 0 {
			t.Fatalf("finding %d, applied %s", finding, record.Applied)
		}
		if err := r.backing.SignLife(r.records); err != nil {
			t.Fatal(err)
		}
		if applied, err := capture.Replay(r.backing, 1, r.journal, record.Applied, last); !errors.Is(err, unix.EIO) || applied != 0 {
			t.Fatalf("replayed to %s: %v", applied, err)
		}
		if err := r.backing.Close(); err != nil {
			t.Fatal(err)
		}
		r.fs = r.fs.Kill()
		r.buf.Close()
	}
	m.set(nil)
	r.revive()
	r.expectFile(want)
	r.end()
}

// TestBackingFails_AReadOfIt gets the error, and what is in the overlay can be
// read all the same.
func TestBackingFails_AReadOfIt(t *testing.T) {
	ctx := context.Background()
	m := &dying{Machine: capture.Kernel()}
	r := newRigOn(t, m, vfs.NewMem(), rigBytes)
	r.write(bytes.Repeat([]byte{7}, 4096), 8192)
	m.set(func(op string) bool { return op == "read" })
	p := make([]byte, 4096)
	if err := r.vol.ReadAt(ctx, p, 8192); err != nil || p[0] != 7 {
		t.Errorf("of the overlay: %v", err)
	}
	err := r.vol.ReadAt(ctx, p, 4096)
	if !errors.Is(err, unix.EIO) || !bytes.Contains([]byte(err.Error()), []byte(r.path)) || !bytes.Contains([]byte(err.Error()), []byte("4096")) {
		t.Errorf("of the backing: %v", err)
	}
	m.set(nil)
	r.end()
}
