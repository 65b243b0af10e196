package restorer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"drc/internal/block"
	"drc/internal/object/fault"
	"drc/restorer"
)

// inSegments makes a history of a volume with a hole in each region, each
// region in a segment of its own.
func inSegments(t testing.TB, regions int64) (*world, []byte) {
	t.Helper()
	w := forked(t, fmt.Sprint("in segments ", regions), func() *world {
		w := newWorld(t, options{stores: 1, volumes: []int64{regions * 4 << 20}})
		x := w.start()
		for i := range regions {
			w.write(0, i*4<<20, fill(w.rng, make([]byte, 1<<20)))
			w.cut()
		}
		x.stop()
		return w
	})
	return w, w.model(0, w.journal.Captured())
}

// interrupt begins a restore and ends it at some request.
func (w *world) interrupt(im *restorer.Image, name string, request int64, o restorer.Options) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	var requests atomic.Int64
	remove := w.faults[0].Add(fault.Rule{Op: fault.GetRange, Hook: func(context.Context, fault.Call) error {
		if requests.Add(1) == request {
			cancel()
		}
		return nil
	}})
	defer remove()
	o.Concurrency = 1
	if _, err := restorer.Restore(ctx, im, name, o); !errors.Is(err, context.Canceled) {
		w.t.Fatal(err)
	}
}

// Whatever happens to the part between two runs, what comes out is the volume:
// what an earlier run did is believed only where it is still there.
func TestRestore_PartIsChangedInBetween(t *testing.T) {
	w, want := inSegments(t, 8)
	changes := map[string]func(part string){
		"overwritten": func(part string) {
			f, err := os.OpenFile(part, os.O_WRONLY, 0)
			w.must(err)
			_, err = f.WriteAt([]byte("mkfs was here"), 512<<10)
			w.must(errors.Join(err, f.Close()))
		},
		"data in a hole that is done": func(part string) {
			f, err := os.OpenFile(part, os.O_WRONLY, 0)
			w.must(err)
			_, err = f.WriteAt([]byte("mkfs was here"), 3<<20)
			w.must(errors.Join(err, f.Close()))
		},
		"data in a hole that is not done": func(part string) {
			f, err := os.OpenFile(part, os.O_WRONLY, 0)
			w.must(err)
			_, err = f.WriteAt([]byte("mkfs was here"), 31<<20)
			w.must(errors.Join(err, f.Close()))
		},
		// As if it were another file that got the same inode.
		"emptied":   func(part string) { w.must(os.Truncate(part, 0)) },
		"shortened": func(part string) { w.must(os.Truncate(part, 5<<20)) },
		"longer":    func(part string) { w.must(os.Truncate(part, 64<<20)) },
	}
	for what, change := range changes {
		t.Run(what, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "volume")
			w.interrupt(w.image(), name, 26, restorer.Options{})
			change(name + restorer.PartialSuffix)
			_, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
			w.must(err)
			w.sameFile(name, want)
		})
	}
	// And what was not changed is not fetched again.
	name := filepath.Join(t.TempDir(), "volume")
	w.interrupt(w.image(), name, 26, restorer.Options{})
	changes["overwritten"](name + restorer.PartialSuffix)
	sum, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
	w.must(err)
	if sum.ResumedBytes < 8<<20 || sum.ResumedBytes%(4<<20) != 0 {
		t.Fatalf("resumed %d bytes", sum.ResumedBytes)
	}
}

// A device that is not as the interrupted restore left it may be another one:
// it is not overwritten unasked, and with Force it becomes the volume.
func TestRestore_DeviceIsChangedInBetween(t *testing.T) {
	w, want := inSegments(t, 4)
	dev := loopDevice(t, 16<<20)
	w.interrupt(w.image(), dev, 6, restorer.Options{})
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	w.must(err)
	for off := int64(0); off < 16<<20; off += 1 << 20 {
		_, err = f.WriteAt([]byte("precious"), off+512)
		w.must(err)
	}
	w.must(errors.Join(f.Sync(), f.Close()))
	before, err := os.ReadFile(dev)
	w.must(err)
	if _, err := restorer.Restore(w.ctx, w.image(), dev, restorer.Options{}); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Fatalf("%v", err)
	}
	w.sameFile(dev, before)
	_, err = restorer.Restore(w.ctx, w.image(), dev, restorer.Options{Force: true})
	w.must(err)
	w.sameFile(dev, want)
}

// A device that is not restored whole does not look as if it were: its first
// bytes, by which a file system is known, are written last.
func TestRestore_DeviceGetsItsBeginningLast(t *testing.T) {
	w, want := inSegments(t, 4)
	dev := loopDevice(t, 16<<20)
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	w.must(err)
	_, err = f.WriteAt(bytes.Repeat([]byte("old file system "), 4096), 0)
	w.must(errors.Join(err, f.Sync(), f.Close()))
	for request := int64(3); request < 9; request++ {
		w.interrupt(w.image(), dev, request, restorer.Options{Force: true})
		got, err := os.ReadFile(dev)
		w.must(err)
		if i := bytes.IndexFunc(got[:4<<20], func(r rune) bool { return r != 0 }); i >= 0 {
			t.Fatalf("interrupted at request %d, the device has something at byte %d", request, i)
		}
		w.must(os.Remove(dev + restorer.ResumeSuffix))
	}
	_, err = restorer.Restore(w.ctx, w.image(), dev, restorer.Options{Force: true})
	w.must(err)
	w.sameFile(dev, want)
}

// After a sync that failed, nothing that was written before it is trusted: the
// kernel reports the loss once, and a second sync would succeed.
func TestRestore_FailedSyncIsNotForgotten(t *testing.T) {
	w, want := inSegments(t, 8)
	defer restorer.SaveEvery(2 << 20)()
	name := filepath.Join(t.TempDir(), "volume")
	note := []byte(nil)
	syncs := 0
	restore := restorer.SetSync(func(int) error {
		if syncs++; syncs == 2 {
			var err error
			note, err = os.ReadFile(name + restorer.ResumeSuffix)
			w.must(err)
			return syscall.EIO
		}
		return nil
	})
	defer restore()
	if _, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{Concurrency: 1}); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if now, err := os.ReadFile(name + restorer.ResumeSuffix); err != nil || !bytes.Equal(now, note) {
		t.Fatalf("the note says more than before the sync that failed (%v)", err)
	}
	_, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
	w.must(err)
	w.sameFile(name, want)
}

// An interrupted restore of one point, gone on with for another one, in every
// order, ends as the point that was asked for last.
func TestRestore_AnotherPointTheSecondTime(t *testing.T) {
	w, _ := inSegments(t, 6)
	h := w.history()
	name := filepath.Join(t.TempDir(), "volume")
	for _, seq := range []block.Seq{6, 3, 5, 6} {
		im, err := restorer.OpenImage(w.ctx, h, "v0", "seq:"+seq.String())
		w.must(err)
		w.interrupt(im, name, 4, restorer.Options{})
	}
	im, err := restorer.OpenImage(w.ctx, h, "v0", "seq:4")
	w.must(err)
	sum, err := restorer.Restore(w.ctx, im, name, restorer.Options{})
	w.must(err)
	w.sameFile(name, w.model(0, 4))
	if sum.ResumedBytes != 0 {
		t.Fatalf("another point resumed %d bytes", sum.ResumedBytes)
	}
}
