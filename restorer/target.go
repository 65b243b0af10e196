package restorer

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// PartialSuffix ends the name of a file that is being restored.
const PartialSuffix = ".drc-partial"

// probeBytes is how much at each end of a device is looked at for data.
const probeBytes = 1 << 20

// target is what an image is written to. WriteAt and zero may be called from
// many goroutines.
type target struct {
	name   string // as the user knows it
	path   string // of what is written to
	file   *os.File
	device bool
	fresh  bool // reads as zeroes wherever nothing was written

	replaced *os.File // a file that is there and will be replaced, locked; nil if there is none

	writing sync.Mutex // held while a file is written to

	mu   sync.Mutex
	lost error // a sync failed: what was written before it may be lost
}

// openTarget opens what name says: a block device that is there, or a file
// that is to be made. resumable says whether the rest of an earlier restore may
// be gone on with.
func openTarget(name string, sizeBytes int64, o Options, resumable func(path string) bool) (*target, error) {
	if real, err := filepath.EvalSymlinks(name); err == nil {
		name = real
	}
	info, err := os.Stat(name)
	switch {
	case err == nil && info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0:
		return openDevice(name, sizeBytes, o, resumable)
	case err == nil && !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is neither a file nor a block device: choose another target", name)
	case err == nil && !o.Force:
		return nil, fmt.Errorf("%s exists: choose another target, or pass --force to replace it: %w", name, fs.ErrExist)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if err != nil {
		return openPartial(name, sizeBytes, resumable)
	}
	replaced, err := lockReplaced(name)
	if err != nil {
		return nil, err
	}
	t, err := openPartial(name, sizeBytes, resumable)
	if err != nil {
		if replaced != nil {
			_ = replaced.Close()
		}
		return nil, err
	}
	t.replaced = replaced
	return t, nil
}

// lockReplaced locks a file that is to be replaced, as an agent does with the
// volumes that it protects: what is written to a file that has lost its name is
// lost with the agent.
func lockReplaced(name string) (*os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, nil // nor can it be asked whether it is in use
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		_ = f.Close()
		return nil, fmt.Errorf("%s is in use by an agent or another program: stop that first, or choose another target", name)
	}
	return f, nil // where files cannot be locked nobody has a lock
}

func openPartial(name string, sizeBytes int64, resumable func(path string) bool) (*target, error) {
	path := name + PartialSuffix
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the target: %w", err)
	}
	t := &target{name: name, path: path, file: f}
	// The lock also keeps a second restore from the first one's file.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s is being written by another restore: wait for it, or choose another target", path)
	}
	if t.fresh = !resumable(path); t.fresh {
		err = f.Truncate(0)
	}
	if err == nil {
		err = f.Truncate(sizeBytes)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make the target: %w", err)
	}
	return t, nil
}

func openDevice(name string, sizeBytes int64, o Options, resumable func(path string) bool) (*target, error) {
	// O_EXCL on a block device fails if it is mounted or otherwise in use.
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_EXCL, 0)
	if errors.Is(err, syscall.EBUSY) {
		return nil, fmt.Errorf("%s is in use (mounted, or part of another device): unmount it first", name)
	}
	if err != nil {
		return nil, fmt.Errorf("open the target: %w", err)
	}
	t := &target{name: name, path: name, file: f, device: true}
	if err := t.checkDevice(sizeBytes, o.Force || resumable(name)); err != nil {
		_ = f.Close()
		return nil, err
	}
	return t, nil
}

func (t *target) checkDevice(sizeBytes int64, force bool) error {
	have, err := t.file.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("find the size of %s: %w", t.name, err)
	}
	if have < sizeBytes {
		return fmt.Errorf("%s has %d bytes, and the volume has %d: choose a larger device", t.name, have, sizeBytes)
	}
	if force {
		return nil
	}
	for _, at := range []int64{0, max(0, have-probeBytes)} {
		p := make([]byte, min(probeBytes, have-at))
		if _, err := t.file.ReadAt(p, at); err != nil {
			return fmt.Errorf("look for data on %s: %w", t.name, err)
		}
		for _, b := range p {
			if b != 0 {
				return fmt.Errorf("%s holds data: choose another device, or pass --force to overwrite it", t.name)
			}
		}
	}
	return nil
}

// write puts what is in row, in this order, at off.
func (t *target) write(row [][]byte, off int64) error {
	if !t.device {
		// The kernel lets one at a time write to a file. Who waits there keeps a
		// processor busy that could open frames.
		t.writing.Lock()
		defer t.writing.Unlock()
	}
	if len(row) > 1 {
		total := 0
		for _, p := range row {
			total += len(p)
		}
		if n, err := unix.Pwritev(int(t.file.Fd()), row, off); err == nil && n == total {
			return nil
		}
		// An error or a short write: each by itself finds out what it is.
	}
	for _, p := range row {
		if _, err := t.file.WriteAt(p, off); err != nil {
			return t.failed(err)
		}
		off += int64(len(p))
	}
	return nil
}

// failed makes an error of writing plain.
func (t *target) failed(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("there is no room for %s: free some space and run the same command again; it goes on where it stopped: %w", t.name, err)
	}
	return fmt.Errorf("write to the target: %w", err)
}

// zeroChunk is how much is zeroed by one write where nothing better works.
const zeroChunk = 1 << 20

var zeroes [zeroChunk]byte

// zero makes e read as zeroes, and counts what it had to write.
func (t *target) zero(e block.Extent) (written int64, err error) {
	if t.fresh || e.Empty() {
		return 0, nil
	}
	if !t.device {
		if unix.Fallocate(int(t.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Off, e.Len) == nil {
			return 0, nil
		}
		return t.writeZeroes(e)
	}
	arg := [2]uint64{uint64(e.Off), uint64(e.Len)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, t.file.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&arg))); errno == 0 {
		return e.Len, nil
	}
	return t.writeZeroes(e)
}

func (t *target) writeZeroes(e block.Extent) (written int64, err error) {
	for at := e.Off; at < e.End(); {
		n := min(zeroChunk, e.End()-at)
		if err := t.write([][]byte{zeroes[:n]}, at); err != nil {
			return written, err
		}
		at += n
		written += n
	}
	return written, nil
}

// fdatasync is a variable for tests.
var fdatasync = unix.Fdatasync

// sync makes durable what was written. Once it has failed it always does: the
// kernel tells of lost data once, and would say yes to the next sync.
func (t *target) sync() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost == nil {
		t.lost = t.failed(fdatasync(int(t.file.Fd())))
	}
	return t.lost
}

// close lets go of the files.
func (t *target) close() error {
	err := t.file.Close()
	if t.replaced != nil {
		_ = t.replaced.Close()
	}
	return err
}

// finish gives a file its name, durably, and closes the target.
func (t *target) finish() error {
	err := t.sync()
	if err == nil {
		err = t.failed(t.file.Sync()) // with its size and times
	}
	if err != nil {
		return errors.Join(err, t.close())
	}
	if t.device {
		return t.close()
	}
	if err := os.Rename(t.path, t.name); err != nil {
		return errors.Join(fmt.Errorf("give the target its name: %w", err), t.close())
	}
	if err := syncDir(filepath.Dir(t.name)); err != nil {
		return errors.Join(fmt.Errorf("make the target's name durable: %w", err), t.close())
	}
	return t.close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}
