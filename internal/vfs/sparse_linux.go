package vfs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

var _ SparseFile = (*osFile)(nil)

func (f *osFile) TryLock() error {
	err := unix.Flock(int(f.fd), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("lock %s: %w", f.Name(), ErrLocked)
	}
	if err != nil {
		return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return nil
}

// sweepBytes bounds what one call changes: a signal has the call begin anew on
// some file systems.
const sweepBytes = 1 << 30

func (f *osFile) fallocate(op string, mode uint32, off, n int64) error {
	for n > 0 {
		part := min(n, sweepBytes)
		err := unix.Fallocate(int(f.fd), mode, off, part)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return &os.PathError{Op: op, Path: f.Name(), Err: ErrNoHoles}
		case err != nil:
			return &os.PathError{Op: op, Path: f.Name(), Err: err}
		}
		off += part
		n -= part
	}
	return nil
}

func (f *osFile) PunchHole(off, n int64) error {
	return f.fallocate("punch", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *osFile) ZeroRange(off, n int64) error {
	// The space comes first: the kernel zeroes what is in the way before it finds
	// out that there is too little.
	if err := f.Reserve(off, n); err != nil {
		return err
	}
	return f.fallocate("zero", unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *osFile) Reserve(off, n int64) error {
	return f.fallocate("reserve", unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *osFile) NextData(off int64) (int64, error) {
	at, err := unix.Seek(int(f.fd), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return f.Size()
	case err != nil:
		return off, nil // it cannot be told
	}
	return at, nil
}

func (f *osFile) NextHole(off int64) (int64, error) {
	at, err := unix.Seek(int(f.fd), off, unix.SEEK_HOLE)
	if err != nil {
		return f.Size() // it cannot be told, or off is the end
	}
	return at, nil
}
