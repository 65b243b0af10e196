package vfs

import (
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"path"
	"sort"
	"strings"
	"sync"
	"syscall"
)

// sectorBytes is the unit that a disk writes whole or not at all.
const sectorBytes = 512

// Op is a kind of operation on a Mem file system, for injected errors.
type Op string

// The operations.
const (
	OpCreate      Op = "create"
	OpOpen        Op = "open"
	OpRemove      Op = "remove"
	OpRename      Op = "rename"
	OpMkdir       Op = "mkdir"
	OpReadDir     Op = "readdir"
	OpSyncDir     Op = "syncdir"
	OpRead        Op = "read"
	OpWrite       Op = "write"
	OpSync        Op = "sync"
	OpPreallocate Op = "preallocate"
	OpTruncate    Op = "truncate"
	OpStat        Op = "stat" // and sizes and space; not shown to the hook
	OpLock        Op = "lock" // not shown to the hook
)

// Mem is a file system in memory that knows what a power cut would take. Crash
// and Kill give what a machine finds when it comes up again; the old Mem goes
// dead with them: all its operations fail from then on, as those of a process
// that is no more.
type Mem struct {
	mu      sync.Mutex
	root    *node
	dead    bool
	locks   map[string]bool
	hook    func(op Op, name string) error
	faults  map[string]*Fault // directory to what is wrong with it
	limits  map[string]int64  // directory to bytes
	devices map[string]string // directory to device
}

// node is a file or a directory.
type node struct {
	isDir bool

	// A file: the present content, what the disk surely has, and the sectors in
	// which they may differ.
	data  []byte
	base  []byte
	dirty map[int64]struct{}

	locked bool // by TryLock of a file that is open

	// A directory: the present names, those surely on the disk, and what was
	// done since then, in order.
	names   map[string]*node
	durable map[string]*node
	pending []change
}

// change is one un-synced step of a directory; both halves of a rename happen
// together.
type change struct {
	remove string
	add    string
	node   *node
}

// NewMem returns an empty file system whose root is "/".
func NewMem() *Mem {
	return &Mem{root: newDir(), locks: map[string]bool{}, faults: map[string]*Fault{}, limits: map[string]int64{}, devices: map[string]string{}}
}

func newDir() *node {
	return &node{isDir: true, names: map[string]*node{}, durable: map[string]*node{}}
}

// ErrDown is what a process gets that was killed. A hook that returns it says that the
// process is killed by then.
var ErrDown = errors.New("the machine of this file system is down")

// SetHook has f called before each operation, under the lock of the file
// system, with the file's name; an error it returns is what the operation
// returns. A sync that fails so loses what was not synced for good, as Linux
// does: the bytes can be read until a crash and no later sync writes them. After
// ErrDown they are what a process leaves in the page cache.
func (m *Mem) SetHook(f func(op Op, name string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = f
}

// SetLimit gives the directory dir, with all below, room for limitBytes.
func (m *Mem) SetLimit(dir string, limitBytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limits[clean(dir)] = limitBytes
}

// SetDevice puts the directory dir, with all below, on a device of its own.
func (m *Mem) SetDevice(dir, device string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices[clean(dir)] = device
}

// Kill returns what a new process finds after this one was killed: all that was
// written. Limits and devices stay, hooks and locks do not.
func (m *Mem) Kill() *Mem { return m.reborn(nil) }

// Crash returns what is there after a power cut. Of what was not synced, each
// sector and each change of a directory is kept or lost as rng says.
func (m *Mem) Crash(rng *rand.Rand) *Mem { return m.reborn(rng) }

// Clone returns a copy that stands as m stands; m lives on.
func (m *Mem) Clone() *Mem {
	n := m.reborn(nil)
	m.mu.Lock()
	m.dead = false
	m.mu.Unlock()
	return n
}

func (m *Mem) reborn(rng *rand.Rand) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dead = true
	n := NewMem()
	for k, v := range m.limits {
		n.limits[k] = v
	}
	for k, v := range m.devices {
		n.devices[k] = v
	}
	n.root = m.root.after(rng, map[*node]*node{})
	return n
}

// after copies what a crash leaves of n; without rng, all. A node that two
// names lead to (a rename half lost) stays one.
func (n *node) after(rng *rand.Rand, done map[*node]*node) *node {
	if c, ok := done[n]; ok {
		return c
	}
	c := &node{isDir: n.isDir}
	done[n] = c
	if n.isDir {
		names := n.names
		if rng != nil {
			names = map[string]*node{}
			for k, v := range n.durable {
				names[k] = v
			}
			for _, p := range n.pending {
				if rng.IntN(2) == 0 {
					continue
				}
				p.apply(names)
			}
		}
		c.names, c.durable = map[string]*node{}, map[string]*node{}
		for _, k := range sortedNames(names) {
			c.names[k] = names[k].after(rng, done)
			c.durable[k] = c.names[k]
		}
		if rng == nil { // the process died, the disk still lags behind
			c.durable = map[string]*node{}
			for k, v := range n.durable {
				c.durable[k] = v.after(rng, done)
			}
			for _, p := range n.pending {
				if p.node != nil {
					p.node = p.node.after(rng, done)
				}
				c.pending = append(c.pending, p)
			}
		}
		return c
	}
	if rng == nil {
		c.data = append([]byte(nil), n.data...)
		c.base = append([]byte(nil), n.base...)
		c.dirty = map[int64]struct{}{}
		for s := range n.dirty {
			c.dirty[s] = struct{}{}
		}
		return c
	}
	size := len(n.base)
	if len(n.data) != size && rng.IntN(2) == 0 {
		size = len(n.data)
	}
	content := make([]byte, size)
	copy(content, n.base)
	sectors := make([]int64, 0, len(n.dirty))
	for s := range n.dirty {
		sectors = append(sectors, s)
	}
	sort.Slice(sectors, func(i, j int) bool { return sectors[i] < sectors[j] })
	// Whole runs tend to be kept or lost together; single sectors too.
	keepOf := rng.IntN(5)
	for _, s := range sectors {
		if rng.IntN(4) < keepOf && s*sectorBytes < int64(size) {
			lo, hi := s*sectorBytes, min((s+1)*sectorBytes, int64(size))
			sector := make([]byte, hi-lo)
			if lo < int64(len(n.data)) {
				copy(sector, n.data[lo:])
			}
			copy(content[lo:hi], sector)
		}
	}
	c.data = content
	c.base = append([]byte(nil), content...)
	c.dirty = map[int64]struct{}{}
	return c
}

func (p change) apply(names map[string]*node) {
	if p.remove != "" {
		delete(names, p.remove)
	}
	if p.add != "" {
		names[p.add] = p.node
	}
}

func sortedNames(names map[string]*node) []string {
	list := make([]string, 0, len(names))
	for k := range names {
		list = append(list, k)
	}
	sort.Strings(list)
	return list
}

func clean(name string) string { return path.Clean("/" + name) }

// find returns the node of a clean name.
func (m *Mem) find(name string) (*node, error) {
	n := m.root
	for _, part := range strings.Split(strings.TrimPrefix(name, "/"), "/") {
		if part == "" {
			continue
		}
		if !n.isDir {
			return nil, syscall.ENOTDIR
		}
		next, ok := n.names[part]
		if !ok {
			return nil, fs.ErrNotExist
		}
		n = next
	}
	return n, nil
}

// begin is what each operation does first, under the lock.
func (m *Mem) begin(op Op, name string) error {
	if m.dead {
		return pathError(op, name, ErrDown)
	}
	if m.hook != nil {
		if err := m.hook(op, name); err != nil {
			return pathError(op, name, err)
		}
	}
	return m.fault(op, name)
}

func pathError(op Op, name string, err error) error {
	return &fs.PathError{Op: string(op), Path: name, Err: err}
}

// room fails with ENOSPC if name may not grow by more bytes.
func (m *Mem) room(name string, more int64) error {
	for dir, limit := range m.limits {
		if !within(name, dir) {
			continue
		}
		n, err := m.find(dir)
		if err == nil && n.sizeBytes()+more > limit {
			return syscall.ENOSPC
		}
	}
	return nil
}

func within(name, dir string) bool {
	return dir == "/" || name == dir || strings.HasPrefix(name, dir+"/")
}

func (n *node) sizeBytes() int64 {
	if !n.isDir {
		return int64(len(n.data))
	}
	var sum int64
	for _, c := range n.names {
		sum += c.sizeBytes()
	}
	return sum
}

func (m *Mem) Create(name string) (File, error) {
	name = clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpCreate, name); err != nil {
		return nil, err
	}
	dir, err := m.find(path.Dir(name))
	if err != nil {
		return nil, pathError(OpCreate, name, err)
	}
	if _, ok := dir.names[path.Base(name)]; ok {
		return nil, pathError(OpCreate, name, fs.ErrExist)
	}
	n := &node{dirty: map[int64]struct{}{}}
	dir.change(change{add: path.Base(name), node: n})
	return &memFile{fs: m, node: n, name: name}, nil
}

func (n *node) change(p change) {
	p.apply(n.names)
	n.pending = append(n.pending, p)
}

func (m *Mem) Open(name string) (File, error) {
	name = clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpOpen, name); err != nil {
		return nil, err
	}
	n, err := m.find(name)
	if err != nil {
		return nil, pathError(OpOpen, name, err)
	}
	if n.isDir {
		return nil, pathError(OpOpen, name, syscall.EISDIR)
	}
	return &memFile{fs: m, node: n, name: name}, nil
}

func (m *Mem) Remove(name string) error {
	name = clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpRemove, name); err != nil {
		return err
	}
	n, err := m.find(name)
	if err != nil {
		return pathError(OpRemove, name, err)
	}
	if n.isDir && len(n.names) != 0 {
		return pathError(OpRemove, name, syscall.ENOTEMPTY)
	}
	dir, _ := m.find(path.Dir(name))
	dir.change(change{remove: path.Base(name)})
	return nil
}

func (m *Mem) Rename(oldName, newName string) error {
	oldName, newName = clean(oldName), clean(newName)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpRename, newName); err != nil {
		return err
	}
	if path.Dir(oldName) != path.Dir(newName) {
		return pathError(OpRename, newName, syscall.EXDEV)
	}
	n, err := m.find(oldName)
	if err != nil {
		return pathError(OpRename, oldName, err)
	}
	dir, _ := m.find(path.Dir(oldName))
	dir.change(change{remove: path.Base(oldName), add: path.Base(newName), node: n})
	return nil
}

func (m *Mem) MkdirAll(dir string) error {
	dir = clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpMkdir, dir); err != nil {
		return err
	}
	n := m.root
	for _, part := range strings.Split(strings.TrimPrefix(dir, "/"), "/") {
		if part == "" {
			continue
		}
		next, ok := n.names[part]
		if !ok {
			next = newDir()
			n.names[part] = next
			n.durable[part] = next
		}
		if !next.isDir {
			return pathError(OpMkdir, dir, syscall.ENOTDIR)
		}
		n = next
	}
	return nil
}

func (m *Mem) ReadDir(dir string) ([]Entry, error) {
	dir = clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpReadDir, dir); err != nil {
		return nil, err
	}
	n, err := m.find(dir)
	if err != nil {
		return nil, pathError(OpReadDir, dir, err)
	}
	if !n.isDir {
		return nil, pathError(OpReadDir, dir, syscall.ENOTDIR)
	}
	var list []Entry
	for _, k := range sortedNames(n.names) {
		list = append(list, Entry{Name: k, IsDir: n.names[k].isDir})
	}
	return list, nil
}

func (m *Mem) SyncDir(dir string) error {
	dir = clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(OpSyncDir, dir); err != nil {
		return err
	}
	n, err := m.find(dir)
	if err != nil {
		return pathError(OpSyncDir, dir, err)
	}
	n.durable = map[string]*node{}
	for k, v := range n.names {
		n.durable[k] = v
	}
	n.pending = nil
	return nil
}

func (m *Mem) Stat(name string) (Info, error) {
	name = clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return Info{}, pathError(OpStat, name, ErrDown)
	}
	if err := m.fault(OpStat, name); err != nil {
		return Info{}, err
	}
	n, err := m.find(name)
	if err != nil {
		return Info{}, pathError(OpStat, name, err)
	}
	info := Info{IsDir: n.isDir, SizeBytes: int64(len(n.data))}
	longest := -1
	for dir, device := range m.devices {
		if within(name, dir) && len(dir) > longest {
			info.Device, longest = device, len(dir)
		}
	}
	return info, nil
}

// memTotalBytes is what a directory without a limit claims to have.
const memTotalBytes = 1 << 40

func (m *Mem) StatFS(dir string) (Space, error) {
	dir = clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return Space{}, pathError(OpStat, dir, ErrDown)
	}
	if err := m.fault(OpStat, dir); err != nil {
		return Space{}, err
	}
	space := Space{TotalBytes: memTotalBytes, FreeBytes: memTotalBytes}
	for d, limit := range m.limits {
		if !within(dir, d) {
			continue
		}
		if n, err := m.find(d); err == nil && limit < space.TotalBytes {
			space = Space{TotalBytes: limit, FreeBytes: max(0, limit-n.sizeBytes())}
		}
	}
	return space, nil
}

func (m *Mem) Lock(name string) (io.Closer, error) {
	name = clean(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return nil, pathError(OpLock, name, ErrDown)
	}
	if err := m.fault(OpLock, name); err != nil {
		return nil, err
	}
	if m.locks[name] {
		return nil, pathError(OpLock, name, ErrLocked)
	}
	dir, err := m.find(path.Dir(name))
	if err != nil {
		return nil, pathError(OpLock, name, err)
	}
	if _, ok := dir.names[path.Base(name)]; !ok {
		dir.change(change{add: path.Base(name), node: &node{dirty: map[int64]struct{}{}}})
	}
	m.locks[name] = true
	return &memLock{m, name}, nil
}

type memLock struct {
	fs   *Mem
	name string
}

func (l *memLock) Close() error {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	delete(l.fs.locks, l.name)
	return nil
}

type memFile struct {
	fs    *Mem
	node  *node
	name  string
	locks bool // it has the lock of TryLock
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.begin(OpRead, f.name); err != nil {
		return 0, err
	}
	if off >= int64(len(f.node.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.node.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.WriteVecAt([][]byte{p}, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *memFile) WriteVecAt(bufs [][]byte, off int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.begin(OpWrite, f.name); err != nil {
		return err
	}
	end := off
	for _, b := range bufs {
		end += int64(len(b))
	}
	if err := f.grow(OpWrite, end); err != nil {
		return err
	}
	for _, b := range bufs {
		copy(f.node.data[off:], b)
		f.node.touch(off, off+int64(len(b)))
		off += int64(len(b))
	}
	return nil
}

// grow makes the file at least size bytes long.
func (f *memFile) grow(op Op, size int64) error {
	have := int64(len(f.node.data))
	if size <= have {
		return nil
	}
	if err := f.fs.room(f.name, size-have); err != nil {
		return pathError(op, f.name, err)
	}
	f.node.data = append(f.node.data, make([]byte, size-have)...)
	f.node.touch(have, size)
	return nil
}

func (n *node) touch(from, to int64) {
	if from >= to {
		return
	}
	for s := from / sectorBytes; s <= (to-1)/sectorBytes; s++ {
		n.dirty[s] = struct{}{}
	}
}

func (f *memFile) Sync() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	n := f.node
	if err := f.fs.begin(OpSync, f.name); err != nil {
		if !errors.Is(err, ErrDown) {
			clear(n.dirty) // lost for good, see SetHook
		}
		return err
	}
	size := len(n.data)
	if len(n.base) > size {
		n.base = n.base[:size]
	} else {
		n.base = append(n.base, make([]byte, size-len(n.base))...)
	}
	for s := range n.dirty {
		lo := s * sectorBytes
		if lo < int64(size) {
			hi := min(lo+sectorBytes, int64(size))
			copy(n.base[lo:hi], n.data[lo:hi])
		}
	}
	clear(n.dirty)
	return nil
}

func (f *memFile) Preallocate(sizeBytes int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.begin(OpPreallocate, f.name); err != nil {
		return err
	}
	return f.grow(OpPreallocate, sizeBytes)
}

func (f *memFile) Truncate(sizeBytes int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.begin(OpTruncate, f.name); err != nil {
		return err
	}
	have := int64(len(f.node.data))
	if sizeBytes >= have {
		return f.grow(OpTruncate, sizeBytes)
	}
	f.node.data = f.node.data[:sizeBytes:sizeBytes]
	f.node.touch(sizeBytes, have)
	return nil
}

func (f *memFile) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.dead {
		return 0, pathError(OpStat, f.name, ErrDown)
	}
	if err := f.fs.fault(OpStat, f.name); err != nil {
		return 0, err
	}
	return int64(len(f.node.data)), nil
}

func (f *memFile) Linked() (bool, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.dead {
		return false, pathError(OpStat, f.name, ErrDown)
	}
	if err := f.fs.fault(OpStat, f.name); err != nil {
		return false, err
	}
	dir, err := f.fs.find(path.Dir(f.name))
	if err != nil {
		return false, nil
	}
	for _, n := range dir.names { // it may have been renamed
		if n == f.node {
			return true, nil
		}
	}
	return false, nil
}

func (f *memFile) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.locks {
		f.node.locked, f.locks = false, false
	}
	return nil
}
