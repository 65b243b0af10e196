// Package dedup is a group's dedup index: which chunk is where in the history.
// It lives on disk with bounded memory and is a cache: whatever is missing
// from it costs space on the stores and nothing else, so it is neither synced
// nor mirrored, and a damaged one is thrown away.
//
// An index that cannot be written, because its disk is full or gone, is given
// up: it answers nothing more, its files are removed, and the next start makes
// a new one. Pebble would try again without a pause, and end the process when
// it cannot write its manifest.
//
// What is never allowed is a wrong answer. So only chunks of logged segments
// are added, an index belongs to one group and one branch, and it is thrown
// away when the log turns out to end before what was added.
package dedup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	lru "github.com/hashicorp/golang-lru/v2"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
)

const (
	memTableBytes = 4 << 20
	cacheBytes    = 8 << 20
	rowCache      = 4096
)

var (
	keyMark   = []byte("m")
	valueSize = 16 + 4 + 4
)

// Location says where a chunk is.
type Location struct {
	Segment format.SegmentRow
	Chunk   int
	Len     int
}

// Index is an open index. It is safe for concurrent use.
type Index struct {
	db   *pebble.DB
	rows *lru.Cache[block.SegmentID, format.SegmentRow]

	known  filter
	loaded chan struct{} // closed when nothing reads the keys any more
	stop   chan struct{} // closed to stop that
	closed atomic.Bool

	dir   string
	log   *slog.Logger
	once  sync.Once
	given chan struct{} // closed when the index was given up
}

// ErrGivenUp means: the index could not be written and is out of use.
var ErrGivenUp = errors.New("the dedup index could not be written and is out of use until the next start")

// Open opens or makes the index in dir, for a group's branch whose log ends
// at or behind entry n. An index of another group or branch, one that is ahead
// of the log, and one that cannot be read is made anew.
func Open(dir string, g block.GroupID, b block.BranchID, n uint64, logger *slog.Logger) (*Index, error) {
	x, err := open(dir, logger)
	if err == nil {
		if mark, ok := x.mark(); ok && mark.group == g && mark.branch == b && mark.n <= n {
			return x, nil
		}
		if err := x.Close(); err != nil {
			logger.Warn("close the old dedup index", "error", err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("remove the old dedup index: %w", err)
	}
	if x, err = open(dir, logger); err != nil {
		return nil, err
	}
	return x, x.db.Set(keyMark, mark{g, b, 0}.encode(), pebble.NoSync)
}

func open(dir string, logger *slog.Logger) (*Index, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of the dedup index: %w", err)
	}
	cache := pebble.NewCache(cacheBytes)
	defer cache.Unref()
	x := &Index{dir: dir, log: logger, given: make(chan struct{}), loaded: make(chan struct{}), stop: make(chan struct{})}
	o := &pebble.Options{
		Cache:                       cache,
		MemTableSize:                memTableBytes,
		MemTableStopWritesThreshold: 4,
		DisableWAL:                  true, // a lost tail costs a little space on the stores
		MaxOpenFiles:                64,
		Logger:                      quiet{x},
		FormatMajorVersion:          pebble.FormatNewest,
	}
	o.EventListener = &pebble.EventListener{BackgroundError: x.giveUp}
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	var db *pebble.DB
	if err := x.unlessGivenUp(func() (err error) {
		db, err = pebble.Open(dir, o)
		return err
	}); err != nil {
		return nil, fmt.Errorf("open the dedup index %s: %w", dir, err)
	}
	rows, err := lru.New[block.SegmentID, format.SegmentRow](rowCache)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	x.db, x.rows = db, rows
	go x.load()
	return x, nil
}

// load fills the filter with the chunks that the index holds already. Until
// then look-ups do without it.
func (x *Index) load() {
	defer close(x.loaded)
	it, err := x.db.NewIter(&pebble.IterOptions{LowerBound: []byte{'c'}, UpperBound: []byte{'c' + 1}})
	if err != nil {
		return
	}
	for ok := it.First(); ok; ok = it.Next() {
		select {
		case <-x.stop:
			_ = it.Close()
			return
		default:
		}
		if key := it.Key(); len(key) == 1+len(crypt.ChunkID{}) {
			x.known.add(crypt.ChunkID(key[1:]))
		}
	}
	if it.Close() == nil {
		x.known.complete()
	}
}

// giveUp takes the index out of use and does not return: the goroutine of
// Pebble that calls it would go on trying.
func (x *Index) giveUp(err error) {
	x.once.Do(func() {
		x.log.Warn("the dedup index cannot be written and is out of use until the next start: chunks that the history has will be stored again", "folder", x.dir, "error", err)
		if err := os.RemoveAll(x.dir); err != nil {
			x.log.Warn("remove the dedup index", "error", err)
		}
		close(x.given)
	})
	select {}
}

func (x *Index) isGivenUp() bool {
	select {
	case <-x.given:
		return true
	default:
		return false
	}
}

// unlessGivenUp runs f, which may be stuck in Pebble when the index is given
// up: then it is left there.
func (x *Index) unlessGivenUp(f func() error) error {
	if x.isGivenUp() {
		return ErrGivenUp
	}
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-x.given:
		return ErrGivenUp
	}
}

// quiet keeps Pebble's talk out of the agent's log; what goes wrong comes by
// giveUp.
type quiet struct{ x *Index }

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (q quiet) Fatalf(f string, a ...any) {
	q.x.giveUp(fmt.Errorf(f, a...))
}

type mark struct {
	group  block.GroupID
	branch block.BranchID
	n      uint64
}

func (m mark) encode() []byte {
	b := append(append([]byte(nil), m.group[:]...), m.branch[:]...)
	return binary.LittleEndian.AppendUint64(b, m.n)
}

func (x *Index) mark() (m mark, ok bool) {
	v, closer, err := x.db.Get(keyMark)
	if err != nil {
		return m, false
	}
	defer closer.Close()
	if len(v) != 40 {
		return m, false
	}
	return mark{block.GroupID(v[:16]), block.BranchID(v[16:32]), binary.LittleEndian.Uint64(v[32:])}, true
}

func chunkKey(id crypt.ChunkID) []byte     { return append([]byte{'c'}, id[:]...) }
func segmentKey(id block.SegmentID) []byte { return append([]byte{'s'}, id[:]...) }

// Add takes the new segments' chunks of a batch that is logged as entry n of
// the branch. It returns ErrGivenUp once the index is out of use.
func (x *Index) Add(b *batch.Batch, g block.GroupID, branch block.BranchID, n uint64) error {
	return x.unlessGivenUp(func() error { return x.add(b, g, branch, n) })
}

func (x *Index) add(b *batch.Batch, g block.GroupID, branch block.BranchID, n uint64) error {
	fresh := map[block.SegmentID]bool{}
	w := x.db.NewBatch()
	defer w.Close()
	for _, s := range b.Segments {
		fresh[s.Row.ID] = true
		if err := w.Set(segmentKey(s.Row.ID), encodeRow(s.Row), nil); err != nil {
			return fmt.Errorf("dedup index: %w", err)
		}
	}
	var value [24]byte
	for _, v := range b.Volumes {
		for _, e := range v.Extents {
			if e.Zero || !fresh[e.Segment.ID] {
				continue
			}
			copy(value[:], e.Segment.ID[:])
			binary.LittleEndian.PutUint32(value[16:], uint32(e.Chunk))
			binary.LittleEndian.PutUint32(value[20:], uint32(e.ChunkLen))
			if err := w.Set(chunkKey(e.ChunkID), value[:], nil); err != nil {
				return fmt.Errorf("dedup index: %w", err)
			}
			x.known.add(e.ChunkID)
		}
	}
	if err := w.Set(keyMark, mark{g, branch, n}.encode(), nil); err != nil {
		return fmt.Errorf("dedup index: %w", err)
	}
	if err := w.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("dedup index: %w", err)
	}
	return nil
}

// Lookup returns where a chunk is, if the index knows it.
func (x *Index) Lookup(id crypt.ChunkID) (Location, bool) {
	if x.isGivenUp() || x.known.isNew(id) {
		return Location{}, false
	}
	v, ok := x.get(chunkKey(id))
	if !ok || len(v) != valueSize {
		return Location{}, false
	}
	row, ok := x.row(block.SegmentID(v[:16]))
	if !ok {
		return Location{}, false
	}
	return Location{
		Segment: row,
		Chunk:   int(binary.LittleEndian.Uint32(v[16:])),
		Len:     int(binary.LittleEndian.Uint32(v[20:])),
	}, true
}

// get returns a copy of a key's value. Most chunks that are looked up are new,
// and Pebble's own Get reads a block of the lowest level to find that out, where
// nearly all keys are: an iterator may be told to ask the Bloom filter there.
func (x *Index) get(key []byte) (value []byte, ok bool) {
	it, err := x.db.NewIter(&pebble.IterOptions{UseL6Filters: true})
	if err != nil {
		return nil, false
	}
	if it.SeekPrefixGE(key) && bytes.Equal(it.Key(), key) {
		value, ok = bytes.Clone(it.Value()), true
	}
	if it.Close() != nil {
		return nil, false
	}
	return value, ok
}

func (x *Index) row(id block.SegmentID) (format.SegmentRow, bool) {
	if r, ok := x.rows.Get(id); ok {
		return r, true
	}
	v, ok := x.get(segmentKey(id))
	if !ok {
		return format.SegmentRow{}, false
	}
	page, err := format.DecodePage("dedup index", v)
	if err != nil || len(page.Segments) != 1 {
		return format.SegmentRow{}, false
	}
	x.rows.Add(id, page.Segments[0])
	return page.Segments[0], true
}

func encodeRow(r format.SegmentRow) []byte {
	p := format.Page{Segments: []format.SegmentRow{r}}
	return p.Encode()
}

// Close writes what is in memory and closes the index. One that was given up,
// or is now, keeps its memory until the process ends.
func (x *Index) Close() error {
	if !x.closed.CompareAndSwap(false, true) {
		return nil
	}
	close(x.stop)
	<-x.loaded
	err := x.unlessGivenUp(func() error { return errors.Join(x.db.Flush(), x.db.Close()) })
	if errors.Is(err, ErrGivenUp) {
		return nil // that was said when it happened
	}
	return err
}
