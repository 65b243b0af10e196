package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

const (
	blockBytes = format.OverlayBlockBytes
	// fetchesAtOnce bounds what one read fetches from the base side by side.
	fetchesAtOnce = 4
	// zeroChunkBytes is what is written at once where no holes can be punched.
	zeroChunkBytes = 1 << 20
)

// Device is a base with what was written over it. See the package comment for
// what survives what. Close it.
type Device struct {
	name     string // of FILE
	sideName string
	identity Identity
	geometry block.Geometry
	base     block.Device // nil if there is none
	file     vfs.SparseFile
	side     vfs.SparseFile
	bits     *bitmap
	locks    rangeLock

	// life is held, shared, by who works with the files, and never while the base
	// is waited for.
	life   sync.RWMutex
	closed bool
	end    error // what Close returned

	failed atomic.Pointer[SyncError]

	mu       sync.Mutex // guards what follows
	touched  bool       // FILE was written to since the last round of syncs began
	unsynced map[int64]*words
	written  int64  // blocks whose bit is set
	next     *round // of syncs, which has not begun

	turn     chan struct{} // has one element while somebody syncs, who alone uses what follows
	phase    format.OverlayPhase
	listed   []uint64 // a bit for each page that the directory has
	unlisted []int64  // pages that are durable, and that the directory lacks
}

var _ block.Device = (*Device)(nil)

// Identity says what the overlay is of.
func (d *Device) Identity() Identity { return d.identity }

// Geometry implements block.Device.
func (d *Device) Geometry() block.Geometry { return d.geometry }

// Complete reports whether all of the volume is in FILE, durably: no base is
// needed any more.
func (d *Device) Complete() bool { return d.bits.complete.Load() }

// Failed returns the *SyncError after which the device takes no writes, or nil.
func (d *Device) Failed() error {
	if f := d.failed.Load(); f != nil {
		return f
	}
	return nil
}

// blocksOf returns the blocks that e touches.
func blocksOf(e block.Extent) blocks {
	return blocks{e.Off / blockBytes, (e.End() + blockBytes - 1) / blockBytes}
}

// extent is what the blocks of r cover: the last one may be cut short by the end
// of the volume.
func (d *Device) extent(r blocks) block.Extent {
	off := r.first * blockBytes
	return block.Extent{Off: off, Len: min(r.end*blockBytes, d.geometry.SizeBytes) - off}
}

// enter begins work with the files; leave ends it.
func (d *Device) enter() error {
	d.life.RLock()
	if d.closed {
		d.life.RUnlock()
		return block.ErrStopping
	}
	return nil
}

func (d *Device) leave() { d.life.RUnlock() }

// refused says why no write is taken, if so.
func (d *Device) refused() error {
	if f := d.failed.Load(); f != nil {
		return fmt.Errorf("%w: %w", block.ErrReadOnly, f)
	}
	return nil
}

// ReadAt implements block.Device. What the base has is fetched without any lock,
// so that a base that hangs holds up nobody but its readers: it never changes, and
// what is written meanwhile is seen in the second turn, which reads all that is
// written then.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := d.geometry.CheckRange(e); err != nil {
		return err
	}
	if e.Empty() {
		return nil
	}
	missing, err := d.readWritten(ctx, p, e)
	if err != nil || len(missing) == 0 {
		return err
	}
	parts := make([]part, len(missing))
	for i, m := range missing {
		parts[i] = part{m, p[m.Off-off : m.End()-off]}
	}
	if err := d.fetch(ctx, parts); err != nil {
		return err
	}
	_, err = d.readWritten(ctx, p, e)
	return err
}

// readWritten reads into p what of e is in FILE, as it is at one moment, and
// returns what is not.
func (d *Device) readWritten(ctx context.Context, p []byte, e block.Extent) (missing []block.Extent, err error) {
	if err := d.enter(); err != nil {
		return nil, err
	}
	defer d.leave()
	r := blocksOf(e)
	claim, err := d.locks.lockShared(ctx, r)
	if err != nil {
		return nil, err
	}
	defer d.locks.unlock(claim)
	err = d.bits.runs(r, func(run blocks, written bool) error {
		x := d.extent(run).Intersect(e)
		if !written {
			missing = append(missing, x)
			return nil
		}
		_, err := d.file.ReadAt(p[x.Off-e.Off:x.End()-e.Off], x.Off)
		return local("read", d.name, err)
	})
	return missing, err
}

// part is a place for what the base has at an extent.
type part struct {
	block.Extent
	p []byte
}

// fetch fills the parts from the base. No lock may be held.
func (d *Device) fetch(ctx context.Context, parts []part) error {
	if d.base == nil {
		return fmt.Errorf("%s: %w", d.name, ErrNeedsBase) // Open lets nobody get here
	}
	return fetch(ctx, d.base, parts)
}

// fetch fills parts from a base.
func fetch(ctx context.Context, base block.Device, parts []part) error {
	if len(parts) == 1 {
		return fetchOne(ctx, base, parts[0])
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchesAtOnce)
	for _, x := range parts {
		g.Go(func() error { return fetchOne(gctx, base, x) })
	}
	return g.Wait()
}

func fetchOne(ctx context.Context, base block.Device, x part) error {
	if err := base.ReadAt(ctx, x.p, x.Off); err != nil {
		return &baseError{err}
	}
	return nil
}

// edges is what the base has in the first and the last block of a request, beside
// the request itself; nil where the request begins or ends with a block, or where
// the block is written.
type edges struct{ head, tail *part }

// fetchEdges fetches them, without a lock: a block that is written by now stays
// so, and one that is written later needs no base then.
func (d *Device) fetchEdges(ctx context.Context, e block.Extent, o block.ZeroOptions) (x edges, err error) {
	whole := d.extent(blocksOf(e))
	if whole == e {
		return edges{}, nil
	}
	if err := d.enter(); err != nil {
		return edges{}, err
	}
	first, last, err := d.bits.ends(blocksOf(e))
	d.leave()
	if err != nil {
		return edges{}, err
	}
	var parts []part
	if n := e.Off - whole.Off; n > 0 && !first {
		x.head = &part{block.Extent{Off: whole.Off, Len: n}, make([]byte, n)}
		parts = append(parts, *x.head)
	}
	if n := whole.End() - e.End(); n > 0 && !last {
		x.tail = &part{block.Extent{Off: e.End(), Len: n}, make([]byte, n)}
		parts = append(parts, *x.tail)
	}
	if len(parts) == 0 {
		return edges{}, nil
	}
	if o.Fast {
		return edges{}, fmt.Errorf("%w: the stores must be asked for the rest of a block", block.ErrUnsupported)
	}
	return x, d.fetch(ctx, parts)
}

// change calls f, which changes the blocks r of e, while nobody else reads or
// changes them and their pages are ready. x is what of the edges is still needed.
func (d *Device) change(ctx context.Context, e block.Extent, x edges, f func(r blocks, x edges) error) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	r := blocksOf(e)
	claim, err := d.locks.lock(ctx, r)
	if err != nil {
		return err
	}
	defer d.locks.unlock(claim)
	if err := d.refused(); err != nil {
		return err
	}
	if err := d.bits.prepare(r); err != nil {
		return err
	}
	first, last, err := d.bits.ends(r)
	if err != nil {
		return err
	}
	if first {
		x.head = nil
	}
	if last {
		x.tail = nil
	}
	return f(r, x)
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, o block.WriteOptions) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := d.geometry.CheckRange(e); err != nil {
		return err
	}
	if err := d.refused(); err != nil {
		return err
	}
	if !e.Empty() {
		x, err := d.fetchEdges(ctx, e, block.ZeroOptions{})
		if err == nil {
			err = d.change(ctx, e, x, func(r blocks, x edges) error { return d.write(ctx, p, e, r, x) })
		}
		if err != nil {
			return err
		}
	}
	if o.FUA {
		return d.Flush(ctx)
	}
	return nil
}

// write writes p and the edges.
func (d *Device) write(ctx context.Context, p []byte, e block.Extent, r blocks, x edges) error {
	some, space, err := d.bits.survey(r)
	if err != nil {
		return err
	}
	// Where a block is written already, half a write could be read. Where none is,
	// what was written when space ran out cannot.
	if some && !space {
		whole := d.extent(r)
		if err := d.file.Reserve(whole.Off, whole.Len); err != nil && !errors.Is(err, vfs.ErrNoHoles) {
			return local("reserve space in", d.name, err)
		}
	}
	bufs, at := [][]byte{p}, e.Off
	if x.head != nil {
		bufs, at = [][]byte{x.head.p, p}, x.head.Off
	}
	if x.tail != nil {
		bufs = append(bufs, x.tail.p)
	}
	err = d.file.WriteVecAt(bufs, at)
	d.touch()
	if err != nil {
		return local("write", d.name, err)
	}
	return d.set(ctx, r, data)
}

// Zero implements block.Device. Its time depends on the pages of the sidecar that
// e touches, each of 7.5 MiB.
func (d *Device) Zero(ctx context.Context, e block.Extent, o block.ZeroOptions) error {
	if err := d.geometry.CheckRange(e); err != nil {
		return err
	}
	if err := d.refused(); err != nil {
		return err
	}
	if !e.Empty() {
		x, err := d.fetchEdges(ctx, e, o)
		if err == nil {
			err = d.change(ctx, e, x, func(r blocks, x edges) error { return d.zero(ctx, e, o, r, x) })
		}
		if err != nil {
			return err
		}
	}
	if o.FUA {
		return d.Flush(ctx)
	}
	return nil
}

// zero zeroes e and writes the edges, whose blocks are not written: until their
// bits are set nobody reads them.
func (d *Device) zero(ctx context.Context, e block.Extent, o block.ZeroOptions, r blocks, x edges) error {
	defer d.touch()
	for _, edge := range []*part{x.head, x.tail} {
		switch {
		case edge == nil:
		case isZero(edge.p) && !o.NoHole: // a hole may go on over it
			e = block.Extent{Off: min(e.Off, edge.Off), Len: max(e.End(), edge.End()) - min(e.Off, edge.Off)}
		default:
			if _, err := d.file.WriteAt(edge.p, edge.Off); err != nil {
				return local("write", d.name, err)
			}
		}
	}
	if err := d.zeroFile(e, o); err != nil {
		return err
	}
	d.touch() // before set, which may sync
	return d.set(ctx, r, hole)
}

// zeroFile makes e zeroes in FILE.
func (d *Device) zeroFile(e block.Extent, o block.ZeroOptions) error {
	punch := d.file.PunchHole
	if o.NoHole {
		punch = d.file.ZeroRange
	}
	err := punch(e.Off, e.Len)
	if !errors.Is(err, vfs.ErrNoHoles) {
		return local("zero", d.name, err)
	}
	if o.Fast {
		return fmt.Errorf("%w: the file system of %s cannot punch holes", block.ErrUnsupported, d.name)
	}
	if err := d.file.Reserve(e.Off, e.Len); err != nil && !errors.Is(err, vfs.ErrNoHoles) {
		return local("reserve space in", d.name, err)
	}
	zeroes := make([]byte, min(zeroChunkBytes, e.Len))
	for at := e.Off; at < e.End(); {
		n := min(int64(len(zeroes)), e.End()-at)
		if _, err := d.file.WriteAt(zeroes[:n], at); err != nil {
			return local("write", d.name, err)
		}
		at += n
	}
	return nil
}

func isZero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// touch notes that FILE was written to.
func (d *Device) touch() {
	d.mu.Lock()
	d.touched = true
	d.mu.Unlock()
}

// set sets the written bits of r, whose content is in FILE.
func (d *Device) set(ctx context.Context, r blocks, c content) error {
	return r.onPages(func(n int64, from, to int) error {
		fresh, err := d.bits.set(n, from, to, c)
		if err != nil || fresh.none() {
			return err
		}
		if d.note(n, &fresh) <= maxUnsyncedPages {
			return nil
		}
		return d.sync(ctx)
	})
}

// note remembers bits that were set in page n for the next round of syncs. It
// returns of how many pages there are any.
func (d *Device) note(n int64, fresh *words) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w := d.unsynced[n]; w != nil {
		w.or(fresh)
	} else {
		w := *fresh
		d.unsynced[n] = &w
	}
	d.written += fresh.count()
	return len(d.unsynced)
}

// Flush implements block.Device.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	return d.sync(ctx)
}

// Progress is how much of the volume is in FILE.
type Progress struct {
	DoneBytes  int64
	TotalBytes int64
	Complete   bool // all of it is, durably
}

// Progress returns how much of the volume is in FILE, written by clients or
// brought by Hydrate.
func (d *Device) Progress() Progress {
	p := Progress{TotalBytes: d.geometry.SizeBytes, Complete: d.Complete()}
	d.mu.Lock()
	p.DoneBytes = min(d.written*blockBytes, p.TotalBytes)
	d.mu.Unlock()
	if p.Complete {
		p.DoneBytes = p.TotalBytes
	}
	return p
}

// Close flushes and closes the files. It waits for those who work with them, and
// not for those who wait for the base, who get block.ErrStopping afterwards. The
// base stays open. A second Close returns what the first one did.
func (d *Device) Close() error {
	d.life.Lock()
	defer d.life.Unlock()
	if d.closed {
		return d.end
	}
	d.closed = true
	err := d.sync(context.Background())
	if err == nil {
		err = d.listAll()
	}
	d.end = errors.Join(err, d.file.Close(), d.side.Close())
	return d.end
}
