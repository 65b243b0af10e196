package diskcache

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"sync"
	"time"

	"drc/internal/vfs"
)

const (
	// MaxValueBytes bounds a value. One that is larger, or has more than an eighth
	// of the limit, is not kept.
	MaxValueBytes = 8 << 20
	// MinLimitBytes is the smallest limit of a cache.
	MinLimitBytes = 1 << 20
	// IndexBytes is more than a value costs in memory while it is only on the disk.
	IndexBytes = 100

	queueBytesDefault = 16 << 20
	// storingPause is how long nothing is stored after the disk was full or failed.
	storingPause = time.Minute
)

// Options of Open.
type Options struct {
	Dir        string // made if it is not there; one process at a time
	LimitBytes int64  // of all that is on the disk; at least MinLimitBytes
	// QueueBytes bounds the values that wait to be written; 0 means 16 MiB. What
	// is put while they are more is not kept.
	QueueBytes int64
	FS         vfs.FS       // nil: the machine's
	Logger     *slog.Logger // nil: nobody is told
}

// InUseError says that another process has the directory open. Whoever gets it can
// go without a cache or use another directory.
type InUseError struct{ Dir string }

func (e *InUseError) Error() string {
	return fmt.Sprintf("the cache folder %s is in use by another process: stop that one, or use another folder", e.Dir)
}

// Unwrap makes it a vfs.ErrLocked.
func (e *InUseError) Unwrap() error { return vfs.ErrLocked }

// Cache is an open cache. It is safe for concurrent use.
type Cache struct {
	fs         vfs.FS
	dir        string
	logger     *slog.Logger
	limitBytes int64
	slabBytes  int64 // a slab that reaches this is complete
	queueMax   int64

	lock     io.Closer
	written  chan struct{} // closed when the writer has ended
	closing  sync.Once
	closeErr error

	// The writer's own.
	nextNumber uint64
	nextID     uint32
	failing    bool // it was said that nothing can be stored

	mu         sync.Mutex
	work       sync.Cond // the queue has become longer, or closed is set
	index      map[uint64]place
	slabs      []*slab          // oldest first, changed by the writer only
	byID       map[uint32]*slab // the same
	queue      []*waiting
	queued     map[uint64]*waiting // the same, and the one that is being written
	queueBytes int64
	clock      uint32    // goes on with each slab that is begun
	pausedTill time.Time // nothing is stored until then
	closed     bool
	stats      Stats
}

// place is where the index says that a value is.
type place struct {
	slab uint32
	n    uint32 // of its entry
}

// waiting is a value that is not written yet.
type waiting struct {
	key   key
	value []byte
}

// Open opens the cache in a directory and finds again what is in it. If another
// process uses it the error is an *InUseError; other errors say that the directory
// can not be used at all. The caller closes the cache when nobody uses it any more.
func Open(o Options) (*Cache, error) {
	if o.LimitBytes < MinLimitBytes {
		return nil, fmt.Errorf("open the cache in %s: a limit of %d bytes is too small: give it %d or more", o.Dir, o.LimitBytes, MinLimitBytes)
	}
	if o.FS == nil {
		o.FS = vfs.OS()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.QueueBytes <= 0 {
		o.QueueBytes = queueBytesDefault
	}
	c := &Cache{
		fs: o.FS, dir: o.Dir, logger: o.Logger, limitBytes: o.LimitBytes, slabBytes: slabBytesOf(o.LimitBytes), queueMax: o.QueueBytes,
		written: make(chan struct{}), index: map[uint64]place{}, byID: map[uint32]*slab{}, queued: map[uint64]*waiting{}, clock: 1,
	}
	c.work.L = &c.mu
	if err := c.open(); err != nil {
		return nil, err
	}
	go c.write()
	return c, nil
}

// slabBytesOf is how large slabs are below a limit: see the package comment.
func slabBytesOf(limitBytes int64) int64 {
	return min(max(min(limitBytes/16, 64<<20), limitBytes/1024), slabBytesMax)
}

func (c *Cache) open() (err error) {
	if err := c.fs.MkdirAll(c.dir); err != nil {
		return fmt.Errorf("make the cache folder: %w", err)
	}
	if c.lock, err = c.fs.Lock(path.Join(c.dir, lockName)); errors.Is(err, vfs.ErrLocked) {
		return &InUseError{c.dir}
	}
	if err != nil {
		return fmt.Errorf("lock the cache folder: %w", err)
	}
	names, err := c.fs.ReadDir(c.dir)
	if err != nil {
		_ = c.lock.Close()
		return fmt.Errorf("list the cache folder: %w", err)
	}
	var numbers []uint64
	for _, e := range names {
		if n, ok := parseSlabName(e.Name); ok {
			numbers = append(numbers, n)
			c.nextNumber = max(c.nextNumber, n+1) // also if it is not ours: no name is used twice
		}
	}
	slices.Sort(numbers)
	var found []*slab
	held := int64(0)
	for _, n := range slices.Backward(numbers) { // the youngest ones first: the limit may have been larger
		if s := c.adopt(n, c.limitBytes-held); s != nil {
			found = append(found, s)
			held += s.heldBytes()
		}
	}
	for _, s := range slices.Backward(found) {
		c.add(s)
		for n, e := range s.entries {
			c.index[e.hash] = place{s.id, uint32(n)} // a younger one wins
		}
	}
	for i, s := range c.slabs {
		if s.tabled {
			continue
		}
		// What is behind the last good record is of no use. If it stays it counts.
		if s.cut() == nil && i < len(c.slabs)-1 {
			_ = s.finish(s.entries)
		}
	}
	c.stats.Bytes = c.heldBytes()
	return nil
}

// adopt takes over a slab of an earlier process, or removes it if it holds more than
// limitBytes. It returns nil if there is nothing to be used. What cannot be read is
// left alone.
func (c *Cache) adopt(number uint64, limitBytes int64) *slab {
	name := path.Join(c.dir, slabName(number))
	s, err := openSlab(c.fs, c.dir, number)
	if errors.Is(err, errUnbegun) {
		err = c.fs.Remove(name)
	} else if err == nil {
		if s.fileBytes <= limitBytes {
			s.load()
		}
		if s.heldBytes() <= limitBytes {
			return s
		}
		_ = s.file.Close()
		err = c.removeFile(s)
	}
	if err != nil {
		c.logger.Warn("a cache file is not used", "file", name, "reason", err)
	}
	return nil
}

// add makes s the youngest slab.
func (c *Cache) add(s *slab) {
	s.id = c.nextID
	c.nextID++
	c.slabs = append(c.slabs, s)
	c.byID[s.id] = s
}

// heldBytes is what the cache has on the disk.
func (c *Cache) heldBytes() (sum int64) {
	for _, s := range c.slabs {
		sum += s.heldBytes()
	}
	return sum
}

// Get returns the value of a name, or false. The bytes are shared and must not be
// changed. They are what was put but for malice; see Drop.
func (c *Cache) Get(kind uint8, name [32]byte) ([]byte, bool) {
	k := key{kind, name}
	hash := k.hash()
	c.mu.Lock()
	if w := c.queued[hash]; w != nil && w.key == k {
		defer c.mu.Unlock()
		c.stats.hit(len(w.value))
		return w.value, true
	}
	at, ok := c.index[hash]
	if !ok {
		defer c.mu.Unlock()
		c.stats.Misses++
		return nil, false
	}
	s := c.byID[at.slab]
	e := s.entries[at.n]
	s.refs++
	c.mu.Unlock()

	var found key
	var value []byte
	raw, err := s.readRecord(e)
	if err == nil {
		found, value, err = decodeRecord(raw)
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	c.release(s)
	if err == nil && found == k {
		s.entries[at.n].used = c.clock
		c.stats.hit(len(value))
		return value, true
	}
	c.stats.Misses++
	if c.index[hash] == at {
		delete(c.index, hash) // the room comes back with the slab
		if err != nil {
			c.stats.Damaged++
		}
	}
	return nil, false
}

// release ends the use of a slab by a reader, under the mutex.
func (c *Cache) release(s *slab) {
	s.refs--
	if s.gone && s.refs == 0 {
		_ = s.file.Close() // it was only read
	}
}

// Put keeps a value for a name, if there is time and room for it. It copies the
// value, which is written later, by another goroutine; Get finds it at once. What a
// name stands for must never change: a name that is there already is left as it is.
func (c *Cache) Put(kind uint8, name [32]byte, value []byte) {
	k := key{kind, name}
	hash := k.hash()
	n := int64(len(value))
	c.mu.Lock()
	defer c.mu.Unlock()
	_, there := c.index[hash]
	if there || c.queued[hash] != nil || n == 0 || c.closed {
		return
	}
	if n > MaxValueBytes || n > c.limitBytes/8 || c.queueBytes+n > c.queueMax || time.Now().Before(c.pausedTill) {
		c.stats.Dropped++
		return
	}
	w := &waiting{k, slices.Clone(value)}
	c.queue = append(c.queue, w)
	c.queued[hash] = w
	c.queueBytes += n
	c.work.Signal()
}

// Drop forgets a value that turned out to be no good, so that another can be put.
func (c *Cache) Drop(kind uint8, name [32]byte) {
	k := key{kind, name}
	hash := k.hash()
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.index[hash]; ok {
		delete(c.index, hash)
		c.stats.Damaged++
	}
	if w := c.queued[hash]; w != nil {
		delete(c.queued, hash) // the writer passes it over, or does not list it
		c.stats.Damaged++
	}
}

// Close writes what waits to be written and lets go of the directory. Get finds
// nothing any more then, and Put keeps nothing.
func (c *Cache) Close() error {
	c.closing.Do(func() {
		c.mu.Lock()
		c.closed = true
		c.work.Signal()
		c.mu.Unlock()
		<-c.written
		c.closeErr = c.lock.Close()
	})
	return c.closeErr
}

// removeFile removes a slab's file; it is no error if somebody else has.
func (c *Cache) removeFile(s *slab) error {
	err := c.fs.Remove(path.Join(c.dir, slabName(s.number)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
