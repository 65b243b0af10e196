package capture

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// ErrInUse means: another process holds the backing.
var ErrInUse = errors.New("in use by another process")

// ErrMissing means: there is no backing at the path.
var ErrMissing = errors.New("does not exist")

const (
	// reserveUnit is the unit in which space on a sparse backing is reserved.
	reserveUnit = 64 << 10
	// sweepBytes bounds what one call reserves or zeroes: writers may have to
	// wait for the end of that call, and a signal has it begin anew.
	sweepBytes = 32 << 20
)

// Backing is the raw file or device behind a volume, locked for this process.
type Backing struct {
	path    string // absolute
	disk    Disk
	machine Machine
	device  bool
	size    int64
	sector  int

	sparse   atomic.Bool // whether space must be reserved at all
	mu       sync.Mutex
	reserved []uint64 // bit i: unit i is known to be allocated

	life life

	resting sync.Mutex
	left    *int64 // the time of modification that it was left with, until it is touched
	written bool   // somebody else has written to it
}

// BackingOptions says what OpenBacking may do.
type BackingOptions struct {
	// CreateBytes is the size of the file to create, sparse, if there is none,
	// or none but an empty one, which an interrupted start may have left; 0
	// means that it must exist.
	CreateBytes int64
	// ReadOnly opens it without the right to write.
	ReadOnly bool
	// Machine is where it is; nil is the real one.
	Machine Machine
}

// OpenBacking opens and locks a backing. created reports that it got its size
// just now, so that it holds nothing.
func OpenBacking(path string, o BackingOptions) (b *Backing, created bool, err error) {
	if o.Machine == nil {
		o.Machine = Kernel()
	}
	disk, err := o.Machine.OpenDisk(path, o)
	if err != nil {
		return nil, false, err
	}
	i := disk.Info()
	b = &Backing{path: i.Path, disk: disk, machine: o.Machine, device: i.IsDevice, size: i.SizeBytes, sector: i.SectorSize}
	if !b.device {
		b.sparse.Store(true)
		b.reserved = make([]uint64, (b.size/reserveUnit+64)/64)
	}
	return b, i.Created, nil
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
func (b *Backing) Close() error { return errors.Join(b.life.close(), b.disk.Close()) }

// Discard is Close of a backing that is not used after all: a file that
// OpenBacking made is removed, while it is still locked.
func (b *Backing) Discard() error { return errors.Join(b.disk.Remove(), b.Close()) }

// ReadAt fills p.
func (b *Backing) ReadAt(p []byte, off int64) error {
	if _, err := b.disk.ReadAt(p, off); err != nil {
		return fmt.Errorf("read %s at %d: %w", b.path, off, err)
	}
	return nil
}

// WriteAt writes p.
func (b *Backing) WriteAt(p []byte, off int64) error {
	if err := b.touch(); err != nil {
		return err
	}
	if _, err := b.disk.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %s at %d: %w", b.path, off, err)
	}
	return nil
}

// Zero makes e read as zeroes: as a hole if it may become one, else allocated.
// It takes as long as e is large: see sweepBytes.
func (b *Backing) Zero(e block.Extent, noHole bool) error {
	for ; e.Len > 0; e = rest(e, sweepBytes) {
		if err := b.touch(); err != nil {
			return err
		}
		part := block.Extent{Off: e.Off, Len: min(e.Len, sweepBytes)}
		var err error
		switch {
		case b.device:
			err = uninterrupted(func() error { return b.disk.ZeroOut(part) })
		case noHole:
			err = b.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, part)
		default:
			err = b.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, part)
			b.forgetReserved(part)
		}
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
			err = b.writeZeroes(part)
		}
		if err != nil {
			return fmt.Errorf("zero %s at %s: %w", b.path, part, err)
		}
	}
	return nil
}

// rest is e without its first n bytes.
func rest(e block.Extent, n int64) block.Extent {
	n = min(n, e.Len)
	return block.Extent{Off: e.Off + n, Len: e.Len - n}
}

func (b *Backing) fallocate(mode uint32, e block.Extent) error {
	return uninterrupted(func() error { return b.disk.Fallocate(mode, e) })
}

var zeroPage [1 << 20]byte

func (b *Backing) writeZeroes(e block.Extent) error {
	for ; e.Len > 0; e = rest(e, int64(len(zeroPage))) {
		if err := b.WriteAt(zeroPage[:min(e.Len, int64(len(zeroPage)))], e.Off); err != nil {
			return err
		}
	}
	return nil
}

// writeVec writes adjacent parts, the first at off.
func (b *Backing) writeVec(parts [][]byte, off int64) error {
	if err := b.touch(); err != nil {
		return err
	}
	total := 0
	for _, p := range parts {
		total += len(p)
	}
	if n, err := b.disk.WriteVec(parts, off); err == nil && n == total {
		return nil
	}
	// An error, a signal, or a short write: write each by itself.
	for _, p := range parts {
		if err := b.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// Sync makes what was written durable, and the time of it. After an error
// nothing is known about what was written since the last success, and a later
// success proves nothing.
func (b *Backing) Sync() error {
	// A signal came before anything was synced; no other error is tried again.
	if err := uninterrupted(b.disk.Sync); err != nil {
		return fmt.Errorf("sync %s: %w", b.path, err)
	}
	return nil
}

// Reserve sees to it that a write of e will find space, or returns
// block.ErrNoSpace. It takes as long as e is large. Nobody may punch in e
// meanwhile.
func (b *Backing) Reserve(e block.Extent) error {
	if !b.sparse.Load() || e.Empty() {
		return nil
	}
	for u, last := e.Off/reserveUnit, (e.End()-1)/reserveUnit; u <= last; {
		from, to := b.unreserved(u, last)
		if from > last {
			return nil
		}
		if err := b.touch(); err != nil {
			return err
		}
		off := from * reserveUnit
		err := b.fallocate(unix.FALLOC_FL_KEEP_SIZE, block.Extent{Off: off, Len: min(to*reserveUnit, b.size) - off})
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			b.sparse.Store(false)
			return nil
		case isNoSpace(err) && b.fallocate(unix.FALLOC_FL_KEEP_SIZE, e) == nil:
			return nil // there is room for e, and none around it
		case isNoSpace(err):
			return fmt.Errorf("%w: the file system of %s is full", block.ErrNoSpace, b.path)
		case err != nil:
			return fmt.Errorf("reserve space in %s: %w", b.path, err)
		}
		b.mu.Lock()
		for u = from; u < to; u++ {
			b.reserved[u/64] |= 1 << (u % 64)
		}
		b.mu.Unlock()
	}
	return nil
}

// unreserved finds the first run of units from u to last that are not known to
// be allocated, as far as one call may reserve; from is behind last if there is
// none.
func (b *Backing) unreserved(u, last int64) (from, to int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	has := func(u int64) bool { return b.reserved[u/64]&(1<<(u%64)) != 0 }
	for from = u; from <= last && has(from); from++ {
	}
	for to = from; to <= last && to-from < sweepBytes/reserveUnit && !has(to); to++ {
	}
	return from, to
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
		data, err := b.disk.Seek(at, unix.SEEK_DATA)
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
		hole, err := b.disk.Seek(data, unix.SEEK_HOLE)
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
	CTime int64  `json:"ctime_ns"` // of the last change of content or attributes: programs cannot set it
}

// last is the time of the last change of any kind.
func (s stamp) last() int64 { return max(s.MTime, s.CTime) }

func (b *Backing) stamp() (stamp, error) {
	st, err := b.disk.Stat()
	if err != nil {
		return stamp{}, fmt.Errorf("stat %s: %w", b.path, err)
	}
	return stamp{Inode: st.Inode, Size: b.size, MTime: st.MTime, CTime: st.CTime}, nil
}
