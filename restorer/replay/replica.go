package replay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/manifest"
	"drc/internal/vfs"
	"drc/restorer"
)

const (
	// windowBytes is the unit in which a copy is filled.
	windowBytes = 32 << 20
	// batchBytes and batchExtents are about how much of it is fetched at a time.
	batchBytes   = 64 << 20
	batchExtents = 64 << 10
	// lookBytes is about how much of a volume one step looks at while it fills.
	lookBytes = 16 << 30
	zeroBytes = 1 << 20
)

// replica is the copy of a volume.
//
// The worker of its group writes; mu guards what clients and Status read. It is held
// for reading while a view reads the file, and for writing while marks are set.
type replica struct {
	g    *group
	file string // the name that it has when it is whole

	path    string // the name that it has now
	raw     vfs.SparseFile
	pending marks // what the step under way changes; nil: there is none
	image   *restorer.Image
	hasher  *crypt.ChunkHasher
	buffer  []byte

	mu      sync.RWMutex
	st      *copyState
	vol     *restorer.Volume // nil: it is not followed
	views   map[*view]struct{}
	marked  marks     // pending, once the file is being changed
	behind  int64     // bytes to be fetched, as far as they are counted
	oldest  time.Time // of the first checkpoint that it should be at and is not; zero: none
	fetched int64     // bytes, since it was opened
}

func (c *replica) followed() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.vol != nil
}

func (c *replica) follow(v restorer.Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.vol = &v
}

func (c *replica) volume() restorer.Volume {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return *c.vol
}

// point is where the copy is.
func (c *replica) point() restorer.Point {
	at := c.st.Position
	return restorer.Point{Checkpoint: restorer.Checkpoint{N: at.Entry, Seq: at.Seq, Time: at.Time}, Volume: c.volume(), Hash: at.Hash}
}

// set changes the state in memory.
func (c *replica) set(f func(*copyState)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c.st)
}

// open opens the file, which it makes if the copy begins.
func (c *replica) open() error {
	if c.raw != nil {
		return nil
	}
	s := c.g.s
	changed := false
	at, err := s.o.Stamp(c.file)
	if err != nil {
		return fmt.Errorf("open the copy %s: %w", c.file, err)
	}
	switch {
	case c.st.Whole && !at.Exists, c.st.Compare && !at.Exists:
		s.logger.Warn("a copy is gone; it begins anew", "file", c.file, "volume", c.st.Name)
		c.set(func(st *copyState) { st.Whole, st.Compare, st.Filled, st.Position = false, false, 0, position{} })
		changed = true
	case c.st.Whole && !c.g.broken && (at.Inode != c.st.Stamp.Inode || at.MTime != c.st.Stamp.MTime):
		s.logger.Warn("a copy was changed by another program; it is compared with the history in full", "file", c.file, "volume", c.st.Name)
		c.set(func(st *copyState) { st.Whole, st.Compare, st.Filled, st.Position = false, true, 0, position{} })
		changed = true
	}
	if changed {
		if err := c.g.save(); err != nil {
			return err
		}
	}
	name := c.file
	if !c.st.Whole && !c.st.Compare && !at.Exists {
		name += FillingSuffix // otherwise it has its name already, and only that was not noted
	}
	c.mu.Lock()
	c.path = name
	c.mu.Unlock()
	f, err := s.fs.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) && !c.st.Whole && !c.st.Compare {
		c.set(func(st *copyState) { st.Filled = 0 })
		if f, err = s.fs.Create(c.path); err == nil {
			if err = s.fs.SyncDir(path.Dir(c.path)); err != nil {
				_ = f.Close()
			}
		}
	}
	if err != nil {
		return fmt.Errorf("open the copy %s: %w", c.path, err)
	}
	raw, ok := f.(vfs.SparseFile)
	if !ok {
		_ = f.Close()
		return fmt.Errorf("the copy %s is on a file system without sparse files", c.path)
	}
	if err := raw.TryLock(); err != nil {
		_ = raw.Close()
		if errors.Is(err, vfs.ErrLocked) {
			return &InUseError{"the copy " + c.path}
		}
		return fmt.Errorf("lock the copy %s: %w", c.path, err)
	}
	size, err := raw.Size()
	switch {
	case err != nil:
		err = fmt.Errorf("find the size of the copy %s: %w", c.path, err)
	case size > c.st.SizeBytes:
		err = fmt.Errorf("%s has %d bytes, and volume %q has %d: it is not a copy of that", c.path, size, c.st.Name, c.st.SizeBytes)
	case size < c.st.SizeBytes:
		err = noRoom("the copy "+c.path, raw.Truncate(c.st.SizeBytes))
	}
	if err != nil {
		_ = raw.Close()
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.raw = raw
	return nil
}

// reopen opens the file anew: of one whose sync failed nothing can be known.
func (c *replica) reopen() error {
	if c.raw != nil {
		c.mu.Lock()
		_ = c.raw.Close()
		c.raw = nil
		c.mu.Unlock()
	}
	was := c.g.broken
	c.g.broken = true // its times are those of a step that was cut short
	err := c.open()
	c.g.broken = was
	return err
}

func (c *replica) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.raw == nil {
		return nil
	}
	err := c.raw.Close()
	c.raw = nil
	return err
}

// mark tells the views what is going to change, before it does.
func (c *replica) mark() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.marked == nil {
		c.marked = c.pending
	}
	if c.marked == nil { // a step of an earlier process: what it changes is not known
		c.marked = newMarks(c.st.SizeBytes)
		c.marked.add(block.Extent{Len: c.st.SizeBytes})
	}
	for v := range c.views {
		v.dirty.addAll(c.marked)
	}
}

// moved: the step is done.
func (c *replica) moved() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending, c.marked = nil, nil
}

// write changes the file.
func (c *replica) write(x restorer.Change) error {
	if x.End() > c.st.SizeBytes {
		return errNoRedo
	}
	if x.Zero {
		return c.zero(x.Extent)
	}
	_, err := c.raw.WriteAt(x.Data, x.Off)
	return noRoom("the copy "+c.path, err)
}

func (c *replica) zero(e block.Extent) error {
	err := c.raw.PunchHole(e.Off, e.Len)
	if errors.Is(err, vfs.ErrNoHoles) {
		zeroes := make([]byte, min(zeroBytes, e.Len))
		for err = nil; err == nil && !e.Empty(); {
			n := min(e.Len, zeroBytes)
			_, err = c.raw.WriteAt(zeroes[:n], e.Off)
			e = block.Extent{Off: e.Off + n, Len: e.Len - n}
		}
	}
	return noRoom("the copy "+c.path, err)
}

// sync makes the file durable. After an error the step is done again, with the file
// opened anew.
func (c *replica) sync() error {
	if err := c.raw.Sync(); err != nil {
		return noRoom("the copy "+c.path, err)
	}
	return nil
}

// fill does a part of bringing the copy to its first point, and reports whether there
// was something to do.
func (c *replica) fill(ctx context.Context) (bool, error) {
	if err := c.open(); err != nil {
		return false, err
	}
	if c.image == nil {
		if ok, err := c.chooseTarget(ctx); err != nil || !ok {
			return false, err
		}
	}
	c.mu.Lock()
	for v := range c.views { // of a time when the copy was whole
		v.dirty.add(block.Extent{Len: c.st.SizeBytes})
	}
	c.mu.Unlock()
	at, err := c.fillOn(ctx)
	if err != nil {
		c.image = nil // opened anew: the stores may have changed
	}
	if at > c.st.Filled {
		if serr := c.filled(at); serr != nil {
			return false, errors.Join(err, serr)
		}
	}
	return err == nil, err
}

// chooseTarget chooses the point to which the copy is filled: the one that it was
// being filled to or, if that cannot be, the newest one.
func (c *replica) chooseTarget(ctx context.Context) (ok bool, err error) {
	h, v := c.g.history(), c.volume()
	var p restorer.Point
	if at := c.st.Position; at.Entry > 0 {
		if p, err = h.At(ctx, v, at.Entry, at.Hash); err == nil {
			ok = true
		} else if !errors.Is(err, restorer.ErrNoSuchPoint) {
			return false, err
		}
	}
	if !ok {
		if p, ok, err = h.Last(ctx, v, c.g.end(h), c.g.notAfter()); err != nil || !ok {
			return false, err
		}
		if !c.st.Compare { // it may hold a part of another point
			if err = c.raw.Truncate(0); err == nil {
				err = c.raw.Truncate(c.st.SizeBytes)
			}
			if err != nil {
				return false, noRoom("the copy "+c.path, err)
			}
		}
		c.set(func(st *copyState) { st.Filled, st.Position = 0, position{p.N, p.Hash, p.Seq, p.Time} })
		if err := c.g.save(); err != nil {
			return false, err
		}
	}
	if c.image, err = restorer.OpenImageAt(ctx, h, p); err != nil {
		return false, err
	}
	c.hasher = crypt.NewChunkHasher(crypt.Key(h.Group.ChunkIDKey))
	return true, nil
}

// fillOn fills the next part, and returns up to where the file is as it shall be.
func (c *replica) fillOn(ctx context.Context) (done int64, err error) {
	done = c.st.Filled
	at, fetched, looked := done, int64(0), int64(0)
	for at < c.st.SizeBytes && fetched < c.g.s.o.StepBytes && looked < lookBytes {
		var want []manifest.Extent
		bytes := int64(0)
		for at < c.st.SizeBytes && bytes < batchBytes && len(want) < batchExtents && looked < lookBytes {
			w := block.Extent{Off: at, Len: min(windowBytes, c.st.SizeBytes-at)}
			part, err := c.missing(ctx, w)
			if err != nil {
				return done, err
			}
			for _, x := range part {
				bytes += x.Len
			}
			want = append(want, part...)
			at = w.End()
			looked += w.Len
		}
		if len(want) > 0 {
			if err := c.image.Fetch(ctx, want, func(changes []restorer.Change) error {
				for _, x := range changes {
					if err := c.write(x); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				return done, err
			}
		}
		done, fetched = at, fetched+bytes
		c.mu.Lock()
		c.fetched += bytes
		c.mu.Unlock()
	}
	return done, nil
}

// missing returns what has to be fetched of a window, and makes zeroes where the volume
// has them.
func (c *replica) missing(ctx context.Context, w block.Extent) ([]manifest.Extent, error) {
	extents, err := c.image.Extents(ctx, w)
	if err != nil {
		return nil, err
	}
	if !c.st.Compare {
		var out []manifest.Extent
		for _, x := range extents {
			if !x.Zero {
				out = append(out, x)
			}
		}
		return out, nil
	}
	if c.buffer == nil {
		c.buffer = make([]byte, windowBytes)
	}
	have := c.buffer[:w.Len]
	if n, err := c.raw.ReadAt(have, w.Off); int64(n) < w.Len {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read the copy %s: %w", c.path, err)
	}
	var out []manifest.Extent
	end := w.Off
	clean := func(e block.Extent) error {
		if e.Empty() || isZero(have[e.Off-w.Off:e.End()-w.Off]) {
			return nil
		}
		return c.zero(e)
	}
	for _, x := range extents {
		if err := clean(block.Extent{Off: end, Len: x.Off - end}); err != nil {
			return nil, err
		}
		end = x.End()
		if x.Zero {
			if err := clean(x.Extent); err != nil {
				return nil, err
			}
			continue
		}
		if x.Offset == 0 && x.Len == int64(x.ChunkLen) && c.hasher.ID(have[x.Off-w.Off:x.End()-w.Off]) == x.ChunkID {
			continue
		}
		out = append(out, x)
	}
	return out, clean(block.Extent{Off: end, Len: w.End() - end})
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// filled notes how far the copy is filled; when it is whole it gets its name.
func (c *replica) filled(at int64) error {
	if err := c.sync(); err != nil {
		c.image = nil
		return errors.Join(err, c.close())
	}
	s := c.g.s
	if at < c.st.SizeBytes {
		c.set(func(st *copyState) { st.Filled = at })
		return c.g.save()
	}
	if c.path != c.file {
		if err := s.fs.Rename(c.path, c.file); err != nil {
			return fmt.Errorf("give the copy its name: %w", err)
		}
		c.mu.Lock()
		c.path = c.file
		c.mu.Unlock()
		if err := s.fs.SyncDir(path.Dir(c.file)); err != nil {
			return fmt.Errorf("make the name of the copy durable: %w", err)
		}
	}
	now, err := s.o.Stamp(c.path)
	if err != nil {
		return fmt.Errorf("look at the copy %s: %w", c.path, err)
	}
	before := *c.st
	c.set(func(st *copyState) { st.Whole, st.Compare, st.Filled, st.Stamp = true, false, at, now })
	if err := c.g.save(); err != nil {
		c.set(func(st *copyState) { *st = before })
		return err
	}
	c.image, c.hasher, c.buffer = nil, nil, nil
	return nil
}

// isBehind notes how much is to be fetched.
func (c *replica) isBehind(bytes int64, all bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if all || bytes > c.behind {
		c.behind = bytes
	}
}

// look finds out which checkpoint the copy should be at next.
func (c *replica) look(ctx context.Context) error {
	p, ok, err := c.g.history().Next(ctx, c.volume(), c.st.Position.Entry)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.oldest = time.Time{}
	if limit := c.g.notAfter(); ok && (limit == nil || !p.Time.After(*limit)) {
		c.oldest = p.Time
	} else {
		c.behind = 0
	}
	return nil
}
