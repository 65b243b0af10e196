package vbuf

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"drc/internal/vfs"
)

// A disk that fails says so; one that hangs says nothing, and who waits for it
// waits for ever. With another disk at hand nobody needs to: every operation on
// a disk is then done by a goroutine of its own, and given up when it has made no
// progress for Options.StallAfter while another disk has. The caller gets
// errStalled, which is a failure of the disk like any other: it is taken out of
// the set. What was given up may still happen one day, to files of a disk that is
// no member any more; its goroutine ends then.
//
// The only disk of a buffer is waited for, however long it takes: there is
// nothing else to go on with.

// defaultStallAfter is long enough for a disk that spins up, or a path that
// fails over.
const defaultStallAfter = 30 * time.Second

// stallSteps is how many waits in a row make up Options.StallAfter. A machine
// that was halted sees one of them pass at once, not all.
const stallSteps = 4

// stuckMax is how many operations may be given up on one disk before the next are
// refused at once, until one comes back.
const stuckMax = 4

// errStalled: the disk made no progress while another did.
var errStalled = errors.New("the disk does not answer")

// errOut: the disk is no member any more.
var errOut = errors.New("the disk was taken out of the buffer")

// job is one operation on a disk, done by one of its workers.
type job struct {
	op   func() error
	done chan error // capacity 1
}

// do runs op and returns what it returns, or errStalled if the disk hangs. After
// errStalled op may still be running: what it reads or writes is its own then.
func (d *disk) do(op func() error) error {
	if d.isAlone() {
		return op()
	}
	j, err := d.begin(op)
	if err != nil {
		return err
	}
	return d.await(j)
}

// isAlone reports whether d is the only disk, which is waited for.
func (d *disk) isAlone() bool { return !d.b.several.Load() && !d.out.Load() }

// begin has op done by a worker.
func (d *disk) begin(op func() error) (*job, error) {
	if d.out.Load() {
		return nil, fmt.Errorf("%s: %w", d.path, errOut)
	}
	if d.stuck.Load() >= stuckMax {
		return nil, fmt.Errorf("%s: %w", d.path, errStalled)
	}
	j := d.b.newJob()
	j.op = op
	if d.flying.Add(1) == 1 {
		d.since.Store(int64(time.Since(d.b.began)))
	}
	select {
	case d.jobs <- j: // somebody is waiting for one
	default:
		go d.work(j)
	}
	return j, nil
}

// work does j and then what else comes, until nothing has come for a while.
func (d *disk) work(j *job) {
	idle := time.NewTimer(workerIdle)
	defer idle.Stop()
	for {
		err := j.op()
		d.since.Store(int64(time.Since(d.b.began)))
		d.flying.Add(-1)
		j.done <- err
		idle.Reset(workerIdle)
		select {
		case j = <-d.jobs:
		case <-idle.C:
			return
		case <-d.b.quit:
			return
		}
	}
}

// workerIdle is how long a worker waits for the next operation before it ends.
const workerIdle = 100 * time.Millisecond

func (b *Buffer) newJob() *job {
	if j, ok := b.jobPool.Get().(*job); ok {
		return j
	}
	return &job{done: make(chan error, 1)}
}

func (b *Buffer) newTimer(after time.Duration) *time.Timer {
	if t, ok := b.timerPool.Get().(*time.Timer); ok {
		t.Reset(after)
		return t
	}
	return time.NewTimer(after)
}

// await waits for j.
func (d *disk) await(j *job) error {
	select {
	case err := <-j.done:
		j.op = nil
		d.b.jobPool.Put(j)
		return err
	default:
	}
	step := d.b.opt.StallAfter / stallSteps
	t := d.b.newTimer(step)
	defer func() {
		t.Stop()
		d.b.timerPool.Put(t)
	}()
	for steps := 0; ; {
		select {
		case err := <-j.done:
			j.op = nil
			d.b.jobPool.Put(j)
			return err
		case <-t.C:
		}
		if d.b.anotherAnswers(d) {
			steps++
		} else {
			steps = 0 // they may come back together
		}
		if steps >= stallSteps {
			d.stuck.Add(1)
			go func() {
				if err := <-j.done; err != nil {
					d.b.log.Warn("an operation that was given up has ended", "path", d.path, "err", err)
				}
				d.stuck.Add(-1)
			}()
			return fmt.Errorf("%s: no progress for %v: %w", d.path, d.b.opt.StallAfter, errStalled)
		}
		t.Reset(step)
	}
}

// anotherAnswers reports whether there is a disk to go on with that nobody waits
// for in vain.
func (b *Buffer) anotherAnswers(than *disk) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.disks, func(d *disk) bool {
		return d != than && d.failed == nil && !d.suspect && !d.isSlow()
	})
}

// isSlow reports whether operations are under way and none has ended for a while.
func (d *disk) isSlow() bool {
	return d.flying.Load() > 0 && int64(time.Since(d.b.began))-d.since.Load() >= int64(d.b.opt.StallAfter/stallSteps)
}

// countDisks notes whether there is more than one disk to go on with. Under mu.
func (b *Buffer) countDisks() {
	n := 0
	for _, d := range b.disks {
		if d.failed == nil {
			n++
		}
	}
	b.several.Store(n > 1)
}

// diskFS is the file system of one disk, with patience for it that ends.
type diskFS struct {
	d  *disk
	fs vfs.FS
}

// result runs op with the disk's patience and hands over what it returns; what
// comes too late goes to late.
func result[T any](d *disk, op func() (T, error), late func(T)) (T, error) {
	if d.isAlone() {
		return op()
	}
	var (
		mu   sync.Mutex
		v    T
		left bool
	)
	err := d.do(func() error {
		r, err := op()
		mu.Lock()
		defer mu.Unlock()
		if left && err == nil && late != nil {
			late(r)
		}
		v = r
		return err
	})
	mu.Lock()
	defer mu.Unlock()
	if err != nil {
		left = true
		var none T
		return none, err
	}
	return v, nil
}

func closeLate[T io.Closer](c T) { _ = c.Close() }

func (x diskFS) file(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &diskFile{d: x.d, f: f}, nil
}

func (x diskFS) Create(name string) (vfs.File, error) {
	return x.file(result(x.d, func() (vfs.File, error) { return x.fs.Create(name) }, closeLate[vfs.File]))
}

func (x diskFS) Open(name string) (vfs.File, error) {
	return x.file(result(x.d, func() (vfs.File, error) { return x.fs.Open(name) }, closeLate[vfs.File]))
}

func (x diskFS) Remove(name string) error {
	return x.d.do(func() error { return x.fs.Remove(name) })
}

func (x diskFS) Rename(oldName, newName string) error {
	return x.d.do(func() error { return x.fs.Rename(oldName, newName) })
}

func (x diskFS) MkdirAll(dir string) error {
	return x.d.do(func() error { return x.fs.MkdirAll(dir) })
}

func (x diskFS) ReadDir(dir string) ([]vfs.Entry, error) {
	return result(x.d, func() ([]vfs.Entry, error) { return x.fs.ReadDir(dir) }, nil)
}

func (x diskFS) SyncDir(dir string) error {
	return x.d.do(func() error { return x.fs.SyncDir(dir) })
}

func (x diskFS) Stat(name string) (vfs.Info, error) {
	return result(x.d, func() (vfs.Info, error) { return x.fs.Stat(name) }, nil)
}

func (x diskFS) StatFS(dir string) (vfs.Space, error) {
	return result(x.d, func() (vfs.Space, error) { return x.fs.StatFS(dir) }, nil)
}

func (x diskFS) Lock(name string) (io.Closer, error) {
	return result(x.d, func() (io.Closer, error) { return x.fs.Lock(name) }, closeLate[io.Closer])
}

// diskFile is an open file of a disk.
type diskFile struct {
	d *disk
	f vfs.File

	// Of beginWrite: owned by its caller until the job is done, and by the job for
	// ever if it is given up.
	bufs    [][]byte
	off     int64
	writeOp func() error
	syncOp  func() error
}

// beginWrite has bufs written at off by a worker. One write at a time.
func (x *diskFile) beginWrite(bufs [][]byte, off int64) (*job, error) {
	if x.writeOp == nil {
		x.writeOp = func() error { return x.f.WriteVecAt(x.bufs, x.off) }
	}
	x.bufs, x.off = bufs, off
	return x.d.begin(x.writeOp)
}

// beginSync has the file synced by a worker.
func (x *diskFile) beginSync() (*job, error) {
	if x.syncOp == nil {
		x.syncOp = x.sync
	}
	return x.d.begin(x.syncOp)
}

// ReadAt leaves p to the operation if it fails with errStalled.
func (x *diskFile) ReadAt(p []byte, off int64) (int, error) {
	return result(x.d, func() (int, error) { return x.f.ReadAt(p, off) }, nil)
}

func (x *diskFile) WriteAt(p []byte, off int64) (int, error) {
	return result(x.d, func() (int, error) { return x.f.WriteAt(p, off) }, nil)
}

func (x *diskFile) WriteVecAt(bufs [][]byte, off int64) error {
	if x.d.isAlone() { // no closure, which would be an allocation a write
		return x.f.WriteVecAt(bufs, off)
	}
	return x.d.do(func() error { return x.f.WriteVecAt(bufs, off) })
}

// Sync fails, too, if the file has no name any more: it was removed together with
// its directory, and nobody would find it again.
func (x *diskFile) Sync() error { return x.d.do(x.sync) }

func (x *diskFile) sync() error {
	err := x.f.Sync()
	if err != nil {
		return err
	}
	linked, err := x.f.Linked()
	if err == nil && !linked {
		err = errVanished
	}
	return err
}

func (x *diskFile) Preallocate(sizeBytes int64) error {
	return x.d.do(func() error { return x.f.Preallocate(sizeBytes) })
}

func (x *diskFile) Truncate(sizeBytes int64) error {
	return x.d.do(func() error { return x.f.Truncate(sizeBytes) })
}

func (x *diskFile) Size() (int64, error) { return result(x.d, x.f.Size, nil) }

func (x *diskFile) Linked() (bool, error) { return result(x.d, x.f.Linked, nil) }

// Close does not wait for a disk that hangs.
func (x *diskFile) Close() error {
	if x.d.stuck.Load() > 0 || x.d.out.Load() {
		go func() { _ = x.f.Close() }()
		return nil
	}
	return x.d.do(x.f.Close)
}

// errVanished: the directory was removed, or another file system is mounted there.
var errVanished = errors.New("the file was removed while it was in use: the directory is gone")
