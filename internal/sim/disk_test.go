package sim

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/vfs"
)

// errPower is what a machine that is down answers.
var errPower = fmt.Errorf("the simulated machine is down: %w", vfs.ErrDown)

// machine is one computer in one boot, as its agent sees it: a file system and the
// disks of volumes. A death of the process or of the power makes another one of it.
type machine struct {
	mem    *vfs.Mem
	files  vfs.FS // mem, or what was planted in front of it
	disks  map[string]*rawDisk
	bootID string
	bootAt time.Time
	plant  *plant
}

func newMachine(boot string, p *plant) *machine {
	m := &machine{mem: vfs.NewMem(), disks: map[string]*rawDisk{}, bootID: boot, bootAt: time.Now(), plant: p}
	m.files = p.fs(m.mem)
	return m
}

func (m *machine) Files() vfs.FS                   { return m.files }
func (m *machine) Boot() (id string, at time.Time) { return m.bootID, m.bootAt }

// kill is what the next process finds.
func (m *machine) kill() *machine { return m.reborn(nil, m.bootID) }

// crash is what is there after a power cut.
func (m *machine) crash(rng *rand.Rand, boot string) *machine { return m.reborn(rng, boot) }

func (m *machine) reborn(rng *rand.Rand, boot string) *machine {
	n := &machine{disks: map[string]*rawDisk{}, bootID: boot, bootAt: m.bootAt, plant: m.plant}
	if rng != nil {
		n.mem, n.bootAt = m.mem.Crash(rng), time.Now()
	} else {
		n.mem = m.mem.Kill()
	}
	n.files = m.plant.fs(n.mem)
	for _, path := range slices.Sorted(maps.Keys(m.disks)) {
		n.disks[path] = m.disks[path].reborn(rng)
	}
	return n
}

// OpenDisk implements capture.Machine.
func (m *machine) OpenDisk(path string, o capture.BackingOptions) (capture.Disk, error) {
	d := m.disks[path]
	created := false
	if d == nil {
		if o.CreateBytes == 0 {
			return nil, fmt.Errorf("%s %w", path, capture.ErrMissing)
		}
		d, created = newRawDisk(o.CreateBytes, false, uint64(len(m.disks)+1)), true
		m.disks[path] = d
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return nil, errPower
	}
	if d.locked {
		return nil, fmt.Errorf("%s: %w", path, capture.ErrInUse)
	}
	d.locked = true
	info := capture.DiskInfo{Path: path, IsDevice: d.device, Created: created, SizeBytes: int64(len(d.data)), SectorSize: 512}
	if d.device {
		info.SectorSize = 4096
	}
	return m.plant.disk(&openDisk{rawDisk: d, info: info}), nil
}

const (
	diskSector = 512
	// allocUnit is the unit in which a file has space.
	allocUnit = 4096
)

// rawDisk is the file or device behind a volume: what programs read, what is
// surely on the disk, and where they differ.
type rawDisk struct {
	mu     sync.Mutex
	dead   bool
	locked bool
	device bool
	inode  uint64
	data   []byte
	base   []byte
	dirty  map[int64]struct{}
	alloc  []bool // of a file
	free   int64  // units that the file system has left; less than 0: no end
	mtime  int64
	synced int64                 // the mtime that is surely on the disk
	fault  func(op string) error // nil: none

	// Until brokenUntil it fails with EIO for what is in broken.
	broken      []string
	brokenUntil time.Time
	drops       bool // what a failed sync has lost cannot be read back
}

func newRawDisk(size int64, device bool, inode uint64) *rawDisk {
	now := time.Now().UnixNano()
	return &rawDisk{
		device: device, inode: inode, data: make([]byte, size), base: make([]byte, size), dirty: map[int64]struct{}{},
		alloc: make([]bool, (size+allocUnit-1)/allocUnit), free: -1, mtime: now, synced: now,
	}
}

// reborn is what is left after the death of the process, or with rng of the power.
func (d *rawDisk) reborn(rng *rand.Rand) *rawDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	n := &rawDisk{
		device: d.device, inode: d.inode, data: slices.Clone(d.data), base: slices.Clone(d.base), dirty: maps.Clone(d.dirty),
		alloc: slices.Clone(d.alloc), free: d.free, mtime: d.mtime, synced: d.synced,
	}
	if rng == nil {
		return n
	}
	copy(n.data, d.base)
	keep := rng.IntN(5)
	for _, s := range slices.Sorted(maps.Keys(d.dirty)) {
		if rng.IntN(4) < keep {
			lo, hi := s*diskSector, min((s+1)*diskSector, int64(len(d.data)))
			copy(n.data[lo:hi], d.data[lo:hi])
		}
	}
	for u := range n.alloc { // a hole that was not synced may be none
		lo, hi := u*allocUnit, min((u+1)*allocUnit, len(n.data))
		n.alloc[u] = n.alloc[u] || !allZero(n.data[lo:hi])
	}
	copy(n.base, n.data)
	n.dirty = map[int64]struct{}{}
	if rng.IntN(2) == 0 {
		n.mtime = d.synced
	}
	n.synced = n.mtime
	return n
}

func allZero(p []byte) bool { return !slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) }

// openDisk implements capture.Disk.
type openDisk struct {
	*rawDisk
	info capture.DiskInfo
}

func (d *openDisk) Info() capture.DiskInfo { return d.info }

// begin is what each call does first, under the lock.
func (d *rawDisk) begin(op string) error {
	if d.dead {
		return errPower
	}
	if d.fault != nil {
		if err := d.fault(op); err != nil {
			return err
		}
	}
	if d.isBroken() && slices.Contains(d.broken, op) {
		return syscall.EIO
	}
	return nil
}

func (d *rawDisk) isBroken() bool { return time.Now().Before(d.brokenUntil) }

// fail has some operations fail for some time.
func (d *rawDisk) fail(long time.Duration, ops ...string) {
	d.mu.Lock()
	d.broken, d.brokenUntil = ops, time.Now().Add(long)
	d.mu.Unlock()
}

// mend ends what a disk does wrong.
func (d *rawDisk) mend() {
	d.mu.Lock()
	d.brokenUntil = time.Time{}
	d.mu.Unlock()
}

func (d *openDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("read"); err != nil {
		return 0, err
	}
	n := copy(p, d.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *openDisk) WriteAt(p []byte, off int64) (int, error) { return d.WriteVec([][]byte{p}, off) }

func (d *openDisk) WriteVec(parts [][]byte, off int64) (n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err = d.begin("write")
	if errors.Is(err, syscall.EIO) && len(parts) > 0 && len(parts[0]) > diskSector { // some of it was
		half := parts[0][:len(parts[0])/2/diskSector*diskSector]
		if d.allocate(block.Extent{Off: off, Len: int64(len(half))}) == nil {
			copy(d.data[off:], half)
			d.touch(block.Extent{Off: off, Len: int64(len(half))})
		}
	}
	if err != nil {
		return 0, err
	}
	for _, p := range parts {
		if err := d.allocate(block.Extent{Off: off, Len: int64(len(p))}); err != nil {
			return n, err
		}
		copy(d.data[off:], p)
		d.touch(block.Extent{Off: off, Len: int64(len(p))})
		off += int64(len(p))
		n += len(p)
	}
	return n, nil
}

func (d *rawDisk) touch(e block.Extent) {
	for s := e.Off / diskSector; s*diskSector < e.End(); s++ {
		d.dirty[s] = struct{}{}
	}
	d.mtime = time.Now().UnixNano()
}

func (d *rawDisk) allocate(e block.Extent) error {
	for u := e.Off / allocUnit; u*allocUnit < e.End() && !d.device; u++ {
		if d.alloc[u] {
			continue
		}
		if d.free == 0 {
			return syscall.ENOSPC
		}
		d.free = max(d.free-1, -1)
		d.alloc[u] = true
	}
	return nil
}

func (d *openDisk) Fallocate(mode uint32, e block.Extent) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("fallocate"); err != nil {
		return err
	}
	switch {
	case mode&unix.FALLOC_FL_PUNCH_HOLE != 0:
		for u := (e.Off + allocUnit - 1) / allocUnit; (u+1)*allocUnit <= e.End(); u++ {
			if d.alloc[u] && d.free >= 0 {
				d.free++
			}
			d.alloc[u] = false
		}
		d.clear(e)
	case mode&unix.FALLOC_FL_ZERO_RANGE != 0:
		if err := d.allocate(e); err != nil {
			return err
		}
		d.clear(e)
	default:
		if err := d.allocate(e); err != nil {
			return err
		}
		d.mtime = time.Now().UnixNano() // the kernel changes it too
	}
	return nil
}

func (d *rawDisk) clear(e block.Extent) {
	clear(d.data[e.Off:e.End()])
	d.touch(e)
}

func (d *openDisk) ZeroOut(e block.Extent) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("write"); err != nil {
		return err
	}
	d.clear(e)
	return nil
}

func (d *openDisk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.begin("sync")
	if errors.Is(err, errPower) { // who has gone down knows nothing, and the kernel still has what it wrote
		return err
	}
	if err != nil {
		for s := range d.dirty { // lost for good
			if lo, hi := s*diskSector, min((s+1)*diskSector, int64(len(d.data))); d.drops {
				copy(d.data[lo:hi], d.base[lo:hi])
			}
		}
		clear(d.dirty)
		return err
	}
	for s := range d.dirty {
		lo, hi := s*diskSector, min((s+1)*diskSector, int64(len(d.data)))
		copy(d.base[lo:hi], d.data[lo:hi])
	}
	clear(d.dirty)
	d.synced = d.mtime
	return nil
}

func (d *openDisk) Seek(off int64, whence int) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("seek"); err != nil {
		return 0, err
	}
	size := int64(len(d.data))
	for at := off; at < size; at = (at/allocUnit + 1) * allocUnit {
		if d.alloc[at/allocUnit] == (whence == unix.SEEK_DATA) {
			return at, nil
		}
	}
	if whence == unix.SEEK_DATA {
		return 0, syscall.ENXIO
	}
	return size, nil
}

func (d *openDisk) Stat() (capture.DiskStat, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("stat"); err != nil {
		return capture.DiskStat{}, err
	}
	return capture.DiskStat{Inode: d.inode, MTime: d.mtime, CTime: d.mtime}, nil
}

func (d *openDisk) Remove() error { return nil } // a start that fails is tried again

func (d *openDisk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.locked = false
	return nil
}

// content is what programs read.
func (d *rawDisk) content() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.data)
}
