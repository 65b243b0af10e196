package vfs

import "io/fs"

var _ SparseFile = (*memFile)(nil)

// TryLock implements SparseFile. A process that is born again finds no locks.
func (f *memFile) TryLock() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.dead {
		return pathError(OpLock, f.name, ErrDown)
	}
	if err := f.fs.fault(OpLock, f.name); err != nil {
		return err
	}
	if f.node.locked {
		return pathError(OpLock, f.name, ErrLocked)
	}
	f.node.locked, f.locks = true, true
	return nil
}

// PunchHole implements SparseFile; the hook sees a write. The zeroes are as
// little on the disk as other data that was not synced.
func (f *memFile) PunchHole(off, n int64) error { return f.zero(OpWrite, off, n) }

// ZeroRange implements SparseFile; the hook sees OpPreallocate. There is always
// space: a limit counts sizes.
func (f *memFile) ZeroRange(off, n int64) error { return f.zero(OpPreallocate, off, n) }

func (f *memFile) zero(op Op, off, n int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.begin(op, f.name); err != nil {
		return err
	}
	end := min(off+n, int64(len(f.node.data)))
	if off < end {
		clear(f.node.data[off:end])
		f.node.touch(off, end)
	}
	return nil
}

// Reserve implements SparseFile; the hook sees OpPreallocate.
func (f *memFile) Reserve(_, _ int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return f.fs.begin(OpPreallocate, f.name)
}

// NextData implements SparseFile: data is what is not zero.
func (f *memFile) NextData(off int64) (int64, error) {
	return f.next(off, func(b byte) bool { return b != 0 })
}

// NextHole implements SparseFile.
func (f *memFile) NextHole(off int64) (int64, error) {
	return f.next(off, func(b byte) bool { return b == 0 })
}

func (f *memFile) next(off int64, is func(b byte) bool) (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.dead {
		return 0, pathError(OpRead, f.name, ErrDown)
	}
	if off < 0 {
		return 0, pathError(OpRead, f.name, fs.ErrInvalid)
	}
	for ; off < int64(len(f.node.data)); off++ {
		if is(f.node.data[off]) {
			return off, nil
		}
	}
	return int64(len(f.node.data)), nil
}
