package restorer_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"drc/internal/object/fault"
	"drc/restorer"
)

// restorable makes a history whose newest point has data, holes and zeroed
// data, in many segments.
func restorable(t testing.TB, sizeBytes int64) (*world, []byte) {
	t.Helper()
	w := newWorld(t, options{stores: 2, volumes: []int64{sizeBytes}})
	x := w.start()
	w.write(0, sizeBytes/8, fill(w.rng, make([]byte, sizeBytes/3&^511)))
	w.cut()
	for range 6 {
		w.random(sizeBytes / 32)
		w.random(64 << 10)
		w.cut()
	}
	x.stop()
	return w, w.model(0, w.journal.Captured())
}

func (w *world) image() *restorer.Image {
	w.t.Helper()
	im, err := restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	return im
}

func (w *world) sameFile(name string, want []byte) {
	w.t.Helper()
	got, err := os.ReadFile(name)
	w.must(err)
	w.same(name, got, want)
}

func listDir(t testing.TB, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// A restored file equals the volume, is sparse where the volume is zero, and
// leaves nothing beside it. Each needed byte is fetched once.
func TestRestore_File(t *testing.T) {
	w, want := restorable(t, 16<<20)
	dir := t.TempDir()
	name := filepath.Join(dir, "volume")
	var last restorer.Progress
	sum, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{Progress: func(p restorer.Progress) { last = p }})
	w.must(err)
	w.sameFile(name, want)
	if list := listDir(t, dir); len(list) != 1 {
		t.Fatalf("left in the folder: %v", list)
	}
	if sum.WrittenBytes+sum.ZeroBytes != sum.VolumeBytes || last.DoneBytes != sum.VolumeBytes || len(sum.Damage) != 0 {
		t.Fatalf("summary %+v, progress %+v", sum, last)
	}
	if sum.FetchedBytes > sum.WrittenBytes+sum.WrittenBytes/4+(1<<20) {
		t.Fatalf("%d bytes fetched for %d", sum.FetchedBytes, sum.WrittenBytes)
	}
	info, err := os.Stat(name)
	w.must(err)
	if used := info.Sys().(*syscall.Stat_t).Blocks * 512; used > sum.WrittenBytes+(1<<20) {
		t.Fatalf("the file takes %d bytes for %d written", used, sum.WrittenBytes)
	}
}

// A target that exists is replaced only with Force, and in one step.
func TestRestore_FileExists(t *testing.T) {
	w, want := restorable(t, 2<<20)
	dir := t.TempDir()
	name := filepath.Join(dir, "volume")
	w.must(os.WriteFile(name, []byte("precious"), 0o600))
	if _, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{}); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "--force") {
		t.Fatal(err)
	}
	w.sameFile(name, []byte("precious"))
	// A failing restore leaves the old file alone.
	im := w.image()
	for _, f := range w.faults {
		f.Add(fault.Rule{Op: fault.GetRange, Before: fault.ErrInjected})
		f.Add(fault.Rule{Op: fault.Get, Before: fault.ErrInjected})
	}
	if _, err := restorer.Restore(w.ctx, im, name, restorer.Options{Force: true}); err == nil {
		t.Fatal("restored from nothing")
	}
	w.sameFile(name, []byte("precious"))
	for _, f := range w.faults {
		f.Clear()
	}
	// Nor is one replaced that an agent has: who writes there would write to
	// what nobody finds again.
	used, err := os.Open(name)
	w.must(err)
	w.must(unix.Flock(int(used.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	if _, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{Force: true}); err == nil || !strings.Contains(err.Error(), name+" is in use") {
		t.Fatalf("a file in use was to be replaced: %v", err)
	}
	w.must(used.Close())
	w.sameFile(name, []byte("precious"))
	_, err = restorer.Restore(w.ctx, w.image(), name, restorer.Options{Force: true})
	w.must(err)
	w.sameFile(name, want)
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := restorer.Restore(w.ctx, w.image(), filepath.Join(dir, "folder"), restorer.Options{Force: true}); err == nil {
		t.Fatal("restored into a folder")
	}
}

// An interrupted restore goes on where it was: what is done is not fetched
// again. For another point it starts afresh.
func TestRestore_Resume(t *testing.T) {
	w := newWorld(t, options{stores: 1, volumes: []int64{32 << 20}})
	x := w.start()
	for i := range int64(8) { // each in a segment of its own
		w.write(0, i*4<<20, fill(w.rng, make([]byte, 3<<20)))
		w.cut()
	}
	x.stop()
	want := w.model(0, w.journal.Captured())
	dir := t.TempDir()
	name := filepath.Join(dir, "volume")
	h := w.history()
	im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
	w.must(err)
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	// It is interrupted when the fifth segment is asked for.
	var shards atomic.Int64
	remove := w.faults[0].Add(fault.Rule{Op: fault.GetRange, Hook: func(context.Context, fault.Call) error {
		if shards.Add(1) == 30 {
			cancel()
		}
		return nil
	}})
	_, err = restorer.Restore(ctx, im, name, restorer.Options{Concurrency: 1})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	remove()
	if list := strings.Join(listDir(t, dir), " "); list != "volume.drc-partial volume.drc-resume" {
		t.Fatalf("in the folder: %s", list)
	}
	rest, err := os.ReadFile(name + restorer.ResumeSuffix)
	w.must(err)
	partial, err := os.ReadFile(name + restorer.PartialSuffix)
	w.must(err)
	// Another point does not go on from this one.
	older, err := restorer.OpenImage(w.ctx, h, "v0", "seq:5")
	w.must(err)
	sum, err := restorer.Restore(w.ctx, older, name, restorer.Options{})
	w.must(err)
	if sum.ResumedBytes != 0 {
		t.Fatalf("another point resumed %d bytes", sum.ResumedBytes)
	}
	w.sameFile(name, w.model(0, 5))
	w.must(os.Remove(name))
	// A note that is damaged is not believed; one about another file neither.
	for range 5 {
		w.must(os.WriteFile(name+restorer.PartialSuffix, partial, 0o600))
		bad := bytes.Clone(rest)
		bad[w.rng.IntN(len(bad))] ^= 1 << w.rng.IntN(8)
		w.must(os.WriteFile(name+restorer.ResumeSuffix, bad, 0o600))
		sum, err := restorer.Restore(w.ctx, im, name, restorer.Options{})
		w.must(err)
		if sum.ResumedBytes != 0 {
			t.Fatalf("a damaged note resumed %d bytes", sum.ResumedBytes)
		}
		w.must(os.Remove(name))
	}
	// The real thing, by another process.
	shards.Store(0)
	ctx, cancel = context.WithCancel(w.ctx)
	defer cancel()
	remove = w.faults[0].Add(fault.Rule{Op: fault.GetRange, Hook: func(context.Context, fault.Call) error {
		if shards.Add(1) == 30 {
			cancel()
		}
		return nil
	}})
	im, err = restorer.OpenImage(w.ctx, w.history(), "v0", "latest")
	w.must(err)
	if _, err = restorer.Restore(ctx, im, name, restorer.Options{Concurrency: 1}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	remove()
	sum, err = restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
	w.must(err)
	w.sameFile(name, want)
	data := int64(24 << 20)
	if sum.ResumedBytes < 8<<20 || sum.FetchedBytes > data-(4<<20) {
		t.Fatalf("resumed %d bytes, fetched %d", sum.ResumedBytes, sum.FetchedBytes)
	}
	if list := listDir(t, dir); len(list) != 1 {
		t.Fatalf("left in the folder: %v", list)
	}
}

// Progress that is saved under way, by many workers, is true: whenever the
// process ends, the next one goes on to a whole volume.
func TestRestore_ResumeFromAnywhere(t *testing.T) {
	defer restorer.SaveEvery(1 << 20)()
	w, want := restorable(t, 16<<20)
	dir := t.TempDir()
	name := filepath.Join(dir, "volume")
	for stop := int64(1); ; stop += 7 {
		ctx, cancel := context.WithCancel(w.ctx)
		im := w.image()
		var n atomic.Int64
		for _, f := range w.faults {
			f.Add(fault.Rule{Op: fault.GetRange, Hook: func(context.Context, fault.Call) error {
				if n.Add(1) == stop {
					cancel()
				}
				return nil
			}})
		}
		_, err := restorer.Restore(ctx, im, name, restorer.Options{Concurrency: 4})
		cancel()
		for _, f := range w.faults {
			f.Clear()
		}
		if err == nil {
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal("a target that is not whole has its name")
		}
	}
	w.sameFile(name, want)
}

// run runs a tool of the host; a test that needs one fails without it.
func run(t testing.TB, tool string, args ...string) string {
	t.Helper()
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s (this test needs root and loop devices)", tool, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a block device of a file.
func loopDevice(t testing.TB, sizeBytes int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, sizeBytes); err != nil {
		t.Fatal(err)
	}
	dev := run(t, "losetup", "--find", "--show", name)
	t.Cleanup(func() { run(t, "losetup", "--detach", dev) })
	return dev
}

// A full disk at the target is one clear error, and with more room the same
// command goes on.
func TestRestore_TargetIsFull(t *testing.T) {
	w, want := restorable(t, 32<<20)
	dev := loopDevice(t, 64<<20)
	run(t, "mkfs.ext4", "-q", "-F", dev)
	dir := t.TempDir()
	run(t, "mount", dev, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	ballast := filepath.Join(dir, "ballast")
	var st syscall.Statfs_t
	w.must(syscall.Statfs(dir, &st))
	w.must(os.WriteFile(ballast, make([]byte, int64(st.Bfree)*st.Bsize-(6<<20)), 0o600))
	name := filepath.Join(dir, "volume")
	_, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "free some space") || strings.Contains(err.Error(), "\n") {
		t.Fatalf("%v", err)
	}
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("a target that is not whole has its name")
	}
	if _, err := os.Stat(name + restorer.PartialSuffix); err != nil {
		t.Fatal(err)
	}
	w.must(os.Remove(ballast))
	_, err = restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
	w.must(err)
	w.sameFile(name, want)
}

// A device must be large enough, not in use, and empty unless Force is given;
// zeroes of the volume are zeroes on it afterwards, whatever was there.
func TestRestore_Device(t *testing.T) {
	w, want := restorable(t, 16<<20)
	small := loopDevice(t, 8<<20)
	if _, err := restorer.Restore(w.ctx, w.image(), small, restorer.Options{Force: true}); err == nil ||
		!strings.Contains(err.Error(), "8388608") || !strings.Contains(err.Error(), "16777216") {
		t.Fatal(err)
	}
	dev := loopDevice(t, 24<<20)
	old := fill(w.rng, make([]byte, 24<<20))
	write := func() {
		f, err := os.OpenFile(dev, os.O_WRONLY, 0)
		w.must(err)
		_, err = f.Write(old)
		w.must(err)
		w.must(f.Sync())
		w.must(f.Close())
	}
	write()
	if _, err := restorer.Restore(w.ctx, w.image(), dev, restorer.Options{}); err == nil || !strings.Contains(err.Error(), "holds data") {
		t.Fatal(err)
	}
	sum, err := restorer.Restore(w.ctx, w.image(), dev, restorer.Options{Force: true})
	w.must(err)
	if sum.ZeroBytes == 0 || sum.WrittenBytes != sum.VolumeBytes {
		t.Fatalf("%+v", sum)
	}
	w.sameFile(dev, append(bytes.Clone(want), old[16<<20:]...))
	// An empty device needs no Force; interrupted, it is gone on with.
	empty := loopDevice(t, 16<<20)
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	im := w.image()
	var reads atomic.Int64
	for _, f := range w.faults {
		f.Add(fault.Rule{Op: fault.GetRange, Hook: func(context.Context, fault.Call) error {
			if reads.Add(1) == 4 {
				cancel()
			}
			return nil
		}})
	}
	if _, err := restorer.Restore(ctx, im, empty, restorer.Options{Concurrency: 1}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	for _, f := range w.faults {
		f.Clear()
	}
	_, err = restorer.Restore(w.ctx, w.image(), empty, restorer.Options{})
	w.must(err)
	w.sameFile(empty, want)
	if _, err := os.Stat(empty + restorer.ResumeSuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("the note was left behind")
	}
	// In use.
	dir := t.TempDir()
	run(t, "mkfs.ext4", "-q", "-F", dev)
	run(t, "mount", dev, dir)
	defer run(t, "umount", dir)
	if _, err := restorer.Restore(w.ctx, w.image(), dev, restorer.Options{Force: true}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Fatal(err)
	}
}

// With shards missing everywhere a restore is whole and names what is damaged.
func TestRestore_Damaged(t *testing.T) {
	w, want := restorable(t, 16<<20)
	for _, s := range w.stores {
		for i, name := range names(t, s, "groups/"+w.groupID.String()+"/segments/") {
			if strings.HasSuffix(name, ".00") && i%2 == 0 {
				s.Tamper(name, func(p []byte) []byte { p[100] ^= 1; return p })
			}
		}
	}
	name := filepath.Join(t.TempDir(), "volume")
	sum, err := restorer.Restore(w.ctx, w.image(), name, restorer.Options{})
	w.must(err)
	w.sameFile(name, want)
	if len(sum.Damage) == 0 {
		t.Fatal("no damage was found")
	}
	for _, d := range sum.Damage {
		if !strings.HasSuffix(d.Object, ".00") || d.Reason == "" {
			t.Fatalf("damage %v", d)
		}
	}
}
