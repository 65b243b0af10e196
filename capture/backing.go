package capture

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// ErrInUse means: another process holds the backing.
var ErrInUse = errors.New("in use by another process")

// reserveUnit is the unit in which space on a sparse backing is reserved.
const reserveUnit = 64 << 10

// Backing is the raw file or device behind a volume, locked for this process.
type Backing struct {
	path   string // absolute
	f      *os.File
	device bool
	size   int64
	sector int

	mu       sync.Mutex
	reserved []uint64 // bit i: unit i is known to be allocated
	sparse   bool     // whether space must be reserved at all

	life life
}

// BackingOptions says what OpenBacking may do.
type BackingOptions struct {
	// CreateBytes is the size of the file to create, sparse, if there is none;
	// 0 means that it must exist.
	CreateBytes int64
	// ReadOnly opens it without the right to write.
	ReadOnly bool
}

// OpenBacking opens and locks a backing. created reports that it was made
// just now, so that it holds nothing.
func OpenBacking(path string, o BackingOptions) (b *Backing, created bool, err error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, false, fmt.Errorf("volume path %s: %w", path, err)
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real
	}
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	made := false // not the result, which an error sets back
	st, err := os.Stat(abs)
	if errors.Is(err, os.ErrNotExist) && o.CreateBytes > 0 && !o.ReadOnly {
		if link, err := os.Readlink(abs); err == nil {
			return nil, false, fmt.Errorf("%s is a symbolic link to %s, which does not exist: correct the path, or remove the link", abs, link)
		}
		made = true
		mode |= os.O_CREATE | os.O_EXCL
	} else if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, false, fmt.Errorf("%s does not exist: give size=… to create it, or correct the path", abs)
		}
		return nil, false, fmt.Errorf("open volume: %w", err)
	} else if st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
		mode |= unix.O_EXCL // fails while the device is mounted
	} else if !st.Mode().IsRegular() {
		return nil, false, fmt.Errorf("%s is neither a file nor a block device", abs)
	}
	f, err := os.OpenFile(abs, mode, 0o600)
	if errors.Is(err, unix.EBUSY) {
		return nil, false, fmt.Errorf("%s: %w (mounted, or part of another device): unmount it first", abs, ErrInUse)
	}
	if err != nil {
		return nil, false, fmt.Errorf("open volume: %w", err)
	}
	b = &Backing{path: abs, f: f, sector: 512}
	defer func() {
		if err != nil {
			f.Close()
			if made {
				os.Remove(abs)
			}
		}
	}()
	how := unix.LOCK_EX
	if o.ReadOnly {
		how = unix.LOCK_SH
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		return nil, false, fmt.Errorf("%s: %w: stop the other agent or program that holds it", abs, ErrInUse)
	}
	if made {
		if err := f.Truncate(o.CreateBytes); err != nil {
			if errors.Is(err, unix.EFBIG) {
				return nil, false, fmt.Errorf("create %s: %d bytes are more than a file can have on this file system: choose a smaller size, or another place", abs, o.CreateBytes)
			}
			return nil, false, fmt.Errorf("create %s with %d bytes: %w", abs, o.CreateBytes, err)
		}
		if err := syncDir(filepath.Dir(abs)); err != nil {
			return nil, false, err
		}
	}
	if st, err = f.Stat(); err != nil {
		return nil, false, fmt.Errorf("open volume: %w", err)
	}
	b.device = st.Mode()&os.ModeDevice != 0
	if b.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return nil, false, fmt.Errorf("find the size of %s: %w", abs, err)
	}
	if b.device {
		if n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err == nil && n == 4096 {
			b.sector = n
		}
	} else {
		b.sparse = true
		b.reserved = make([]uint64, (b.size/reserveUnit+64)/64)
	}
	return b, made, nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", path, err)
	}
	return nil
}

// Path is the backing's absolute path.
func (b *Backing) Path() string { return b.path }

// Size is its size in bytes.
func (b *Backing) Size() int64 { return b.size }

// Sector is the logical sector size: the device's, or 512 for a file.
func (b *Backing) Sector() int { return b.sector }

// IsDevice reports whether it is a block device.
func (b *Backing) IsDevice() bool { return b.device }

// Close unlocks and closes it.
func (b *Backing) Close() error { return errors.Join(b.life.close(), b.f.Close()) }

// ReadAt fills p.
func (b *Backing) ReadAt(p []byte, off int64) error {
	if _, err := b.f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read %s at %d: %w", b.path, off, err)
	}
	return nil
}

// WriteAt writes p.
func (b *Backing) WriteAt(p []byte, off int64) error {
	if err := b.life.extend(); err != nil {
		return err
	}
	if _, err := b.f.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %s at %d: %w", b.path, off, err)
	}
	return nil
}

// Zero makes e read as zeroes: as a hole if it may become one, else allocated.
func (b *Backing) Zero(e block.Extent, noHole bool) error {
	if err := b.life.extend(); err != nil {
		return err
	}
	var err error
	switch {
	case b.device:
		err = zeroOut(b.f, e)
	case noHole:
		err = unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, e.Off, e.Len)
	default:
		err = unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Off, e.Len)
		b.forgetReserved(e)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		err = b.writeZeroes(e)
	}
	if err != nil {
		return fmt.Errorf("zero %s at %s: %w", b.path, e, err)
	}
	return nil
}

var zeroPage [1 << 20]byte

func (b *Backing) writeZeroes(e block.Extent) error {
	for e.Len > 0 {
		n := min(e.Len, int64(len(zeroPage)))
		if _, err := b.f.WriteAt(zeroPage[:n], e.Off); err != nil {
			return err
		}
		e.Off, e.Len = e.Off+n, e.Len-n
	}
	return nil
}

// writeVec writes adjacent parts, the first at off.
func (b *Backing) writeVec(parts [][]byte, off int64) error {
	if err := b.life.extend(); err != nil {
		return err
	}
	total := 0
	for _, p := range parts {
		total += len(p)
	}
	if n, err := unix.Pwritev(int(b.f.Fd()), parts, off); err == nil && n == total {
		return nil
	}
	// An error, or a short write, which pwritev may do: write each by itself.
	for _, p := range parts {
		if err := b.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// Sync makes what was written durable.
func (b *Backing) Sync() error {
	if err := unix.Fdatasync(int(b.f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", b.path, err)
	}
	return nil
}

// Reserve sees to it that a write of e will find space, or returns
// block.ErrNoSpace.
func (b *Backing) Reserve(e block.Extent) error {
	if !b.sparse || e.Empty() {
		return nil
	}
	first, last := e.Off/reserveUnit, (e.End()-1)/reserveUnit
	b.mu.Lock()
	defer b.mu.Unlock()
	for u := first; u <= last; u++ {
		if b.reserved[u/64]&(1<<(u%64)) != 0 {
			continue
		}
		end := u
		for end < last && b.reserved[(end+1)/64]&(1<<((end+1)%64)) == 0 {
			end++
		}
		if err := b.life.extend(); err != nil {
			return err
		}
		off := u * reserveUnit
		n := min((end+1)*reserveUnit, b.size) - off
		err := unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_KEEP_SIZE, off, n)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			b.sparse = false
			return nil
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			return fmt.Errorf("%w: the file system of %s is full", block.ErrNoSpace, b.path)
		case err != nil:
			return fmt.Errorf("reserve space in %s: %w", b.path, err)
		}
		for ; u <= end; u++ {
			b.reserved[u/64] |= 1 << (u % 64)
		}
	}
	return nil
}

func (b *Backing) forgetReserved(e block.Extent) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.reserved == nil || e.Empty() {
		return
	}
	for u := e.Off / reserveUnit; u <= (e.End()-1)/reserveUnit; u++ {
		b.reserved[u/64] &^= 1 << (u % 64)
	}
}

// Allocation visits data and holes of e in order; where the file system cannot
// tell, all is data.
func (b *Backing) Allocation(e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if b.device {
		visit(e, false)
		return nil
	}
	for at := e.Off; at < e.End(); {
		data, err := unix.Seek(int(b.f.Fd()), at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			data = e.End() // only a hole is left
		case err != nil:
			visit(block.Extent{Off: at, Len: e.End() - at}, false)
			return nil
		}
		data = min(data, e.End())
		if data > at && !visit(block.Extent{Off: at, Len: data - at}, true) {
			return nil
		}
		if data >= e.End() {
			return nil
		}
		hole, err := unix.Seek(int(b.f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			hole = e.End()
		}
		hole = min(hole, e.End())
		if !visit(block.Extent{Off: data, Len: hole - data}, false) {
			return nil
		}
		at = hole
	}
	return nil
}

// Empty reports whether the backing holds no data at all, as far as the file
// system can tell without reading it.
func (b *Backing) Empty() (bool, error) {
	empty := true
	err := b.Allocation(block.Extent{Len: b.size}, func(_ block.Extent, hole bool) bool {
		empty = empty && hole
		return empty
	})
	return empty, err
}

// stamp is what tells whether a file is the one that was left, unchanged.
type stamp struct {
	Inode uint64 `json:"inode"`
	Size  int64  `json:"size_bytes"`
	MTime int64  `json:"mtime_ns"`
}

func (b *Backing) stamp() (stamp, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(b.f.Fd()), &st); err != nil {
		return stamp{}, fmt.Errorf("stat %s: %w", b.path, err)
	}
	return stamp{Inode: st.Ino, Size: b.size, MTime: st.Mtim.Nano()}, nil
}
