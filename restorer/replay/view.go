package replay

import (
	"context"
	"fmt"
	"io"
	"sync"

	"drc/internal/block"
	"drc/restorer"
)

// view is a copy as it was at one point: what was not changed since then is read from
// the file, and the rest from the stores.
type view struct {
	c     *replica
	point restorer.Point
	hist  *restorer.History
	dirty marks // guarded by c.mu

	mu    sync.Mutex
	image *restorer.Image
}

var _ block.Device = (*view)(nil)

// NotReadyError says that a copy cannot be read yet.
type NotReadyError struct {
	Volume string
	Filled int64
	Size   int64
}

func (e *NotReadyError) Error() string {
	return fmt.Sprintf("the copy of volume %q is not whole yet (%d of %d bytes are done): wait for it, or read a point from the stores as %s@POINT", e.Volume, e.Filled, e.Size, e.Volume)
}

// View opens the copy of a volume, read-only, as it is now. It stays as it is until it
// is released. If there is no copy of that name ok is false.
func (s *Standby) View(name string) (dev block.Device, release func(), ok bool, err error) {
	for _, g := range s.all() {
		for _, c := range g.list() {
			if c.followed() && c.volume().Name == name {
				dev, release, err := c.view()
				return dev, release, true, err
			}
		}
	}
	return nil, nil, false, nil
}

// Names are the names of the copies that are whole.
func (s *Standby) Names() (out []string) {
	for _, x := range s.Status() {
		if x.Whole {
			out = append(out, x.Volume)
		}
	}
	return out
}

func (c *replica) view() (block.Device, func(), error) {
	hist := c.g.history()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.st.Whole || c.raw == nil {
		return nil, nil, &NotReadyError{c.st.Name, c.st.Filled, c.st.SizeBytes}
	}
	at := c.st.Position
	v := &view{
		c: c, hist: hist, dirty: newMarks(c.st.SizeBytes),
		point: restorer.Point{Checkpoint: restorer.Checkpoint{N: at.Entry, Seq: at.Seq, Time: at.Time}, Volume: *c.vol, Hash: at.Hash},
	}
	v.dirty.addAll(c.marked) // a step has begun to change the file
	c.views[v] = struct{}{}
	return v, sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.views, v)
	}), nil
}

// Point is the point that the view is of.
func (v *view) Point() restorer.Point { return v.point }

// Geometry implements block.Device.
func (v *view) Geometry() block.Geometry {
	return block.Geometry{SizeBytes: v.point.Volume.SizeBytes, SectorSize: int(v.point.Volume.SectorSize), ReadOnly: true}
}

// ReadAt implements block.Device.
func (v *view) ReadAt(ctx context.Context, p []byte, off int64) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := v.Geometry().CheckRange(e); err != nil {
		return err
	}
	changed, err := v.readFile(p, e)
	for _, x := range changed {
		if err != nil {
			break
		}
		err = v.readStores(ctx, p[x.Off-off:x.End()-off], x.Off)
	}
	if err != nil {
		return fmt.Errorf("read the copy of volume %q at %s: %w", v.point.Volume.Name, e, err)
	}
	return nil
}

// readFile reads what was not changed, and returns what was.
func (v *view) readFile(p []byte, e block.Extent) (changed []block.Extent, err error) {
	v.c.mu.RLock()
	defer v.c.mu.RUnlock()
	for at := e.Off; at < e.End(); {
		part, marked := v.dirty.run(block.Extent{Off: at, Len: e.End() - at})
		switch {
		case marked:
			changed = append(changed, part)
		case v.c.raw == nil:
			return nil, fmt.Errorf("the file %s is not open", v.c.path)
		default:
			n, err := v.c.raw.ReadAt(p[part.Off-e.Off:part.End()-e.Off], part.Off)
			if int64(n) < part.Len {
				if err == nil {
					err = io.ErrUnexpectedEOF
				}
				return nil, err
			}
		}
		at = part.End()
	}
	return changed, nil
}

// readStores reads from the image at the view's point.
func (v *view) readStores(ctx context.Context, p []byte, off int64) error {
	v.mu.Lock()
	if v.image == nil {
		at, err := v.hist.At(ctx, v.point.Volume, v.point.N, v.point.Hash)
		if err == nil {
			v.image, err = restorer.OpenImageAt(ctx, v.hist, at)
		}
		if err != nil {
			v.mu.Unlock()
			return err
		}
	}
	im := v.image
	v.mu.Unlock()
	return im.ReadAt(ctx, p, off)
}

// WriteAt implements block.Device: a view takes no writes.
func (v *view) WriteAt(context.Context, []byte, int64, block.WriteOptions) error {
	return block.ErrReadOnly
}

// Zero implements block.Device: a view takes no writes.
func (v *view) Zero(context.Context, block.Extent, block.ZeroOptions) error {
	return block.ErrReadOnly
}

// Flush implements block.Device: there is nothing to flush.
func (v *view) Flush(context.Context) error { return nil }

// Allocation implements block.Device. That a piece is a hole is not told.
func (v *view) Allocation(_ context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if err := v.Geometry().CheckRange(e); err != nil {
		return err
	}
	visit(e, false)
	return nil
}

// FindAt looks for what VOLUME@POINT names in the newest histories.
func (s *Standby) FindAt(ctx context.Context, name string) (*restorer.History, restorer.Point, error) {
	var all []*restorer.History
	for _, g := range s.all() {
		all = append(all, g.history())
	}
	return restorer.NewCatalog(all...).FindAt(ctx, name)
}
