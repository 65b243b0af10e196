package restorer

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
)

// windowBytes is the unit in which the map of an image is worked out.
const windowBytes = 32 << 20

// Image is a volume as it was at one point: a read-only device whose content
// is fetched from the stores when it is asked for. It is safe for concurrent
// use.
type Image struct {
	history *History
	point   Point
	beyond  *Beyond                     // see Extend
	over    *block.Map[manifest.Extent] // of beyond: the newest of its batches
	after   uint64                      // what entries up to this one changed is left out; see Changes

	mu     sync.Mutex
	layers []layer         // oldest first; the newest wins
	broken map[string]bool // merged manifests of which a page is no good in any store

	memory *Memory // shared with other images
	number uint64  // tells it from these
	ahead  readAhead
}

var _ block.Device = (*Image)(nil)

// OpenImage returns the image of a volume at a point; see History.Resolve. It
// reads the directories of the manifests that make it up, and no pages.
func OpenImage(ctx context.Context, h *History, volume, point string) (*Image, error) {
	p, err := h.Resolve(ctx, volume, point)
	if err != nil {
		return nil, err
	}
	return OpenImageAt(ctx, h, p)
}

// OpenImageAt returns the image of a point that was resolved before.
func OpenImageAt(ctx context.Context, h *History, p Point) (*Image, error) {
	return openImage(ctx, h, 0, p)
}

func openImage(ctx context.Context, h *History, after uint64, p Point) (*Image, error) {
	im := &Image{
		history: h,
		point:   p,
		after:   after,
		memory:  h.cfg.Memory,
		number:  h.cfg.Memory.images.Add(1),
	}
	var err error
	if im.layers, err = planLayers(ctx, h, after, p, nil); err != nil {
		return nil, fmt.Errorf("open the image of volume %q at seq %s: %w", p.Volume.Name, p.Seq, err)
	}
	return im, nil
}

// Point is the point that the image is of.
func (im *Image) Point() Point { return im.point }

// History is the history that the image is part of.
func (im *Image) History() *History { return im.history }

// Damage lists the objects found missing or damaged so far, here and in the
// history. The data was had from elsewhere.
func (im *Image) Damage() []Damage { return im.history.Damage() }

// Geometry implements block.Device.
func (im *Image) Geometry() block.Geometry {
	return block.Geometry{SizeBytes: im.point.Volume.SizeBytes, SectorSize: int(im.point.Volume.SectorSize), ReadOnly: true}
}

// WriteAt implements block.Device: an image takes no writes.
func (im *Image) WriteAt(context.Context, []byte, int64, block.WriteOptions) error {
	return block.ErrReadOnly
}

// Zero implements block.Device: an image takes no writes.
func (im *Image) Zero(context.Context, block.Extent, block.ZeroOptions) error {
	return block.ErrReadOnly
}

// Flush implements block.Device: there is nothing to flush.
func (im *Image) Flush(context.Context) error { return nil }

// Allocation implements block.Device: zeroes are holes.
func (im *Image) Allocation(ctx context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if err := im.Geometry().CheckRange(e); err != nil {
		return err
	}
	var open block.Extent
	openHole, more := false, true
	piece := func(p block.Extent, hole bool) bool {
		switch {
		case p.Empty():
		case !open.Empty() && openHole == hole:
			open.Len += p.Len
		default:
			more = open.Empty() || visit(open, openHole)
			open, openHole = p, hole
		}
		return more
	}
	for at := e.Off; at < e.End() && more; {
		w := block.Extent{Off: at, Len: min(e.End(), (at/windowBytes+1)*windowBytes) - at}
		extents, err := im.Extents(ctx, w)
		if err != nil {
			return err
		}
		for _, x := range extents {
			if !piece(block.Extent{Off: at, Len: x.Off - at}, true) || !piece(x.Extent, x.Zero) {
				break
			}
			at = x.End()
		}
		if more {
			piece(block.Extent{Off: at, Len: w.End() - at}, true)
		}
		at = w.End()
	}
	if more && !open.Empty() {
		visit(open, openHole)
	}
	return nil
}

// Extents returns what the image has at e: extents within e, sorted, not
// overlapping. What is not covered reads as zeroes. Content is not fetched, so
// an agent's key is enough.
func (im *Image) Extents(ctx context.Context, e block.Extent) ([]manifest.Extent, error) {
	if e.Off < 0 || e.Len < 0 || e.End() > im.point.Volume.SizeBytes || e.End() < e.Off {
		return nil, block.ErrOutOfRange
	}
	var out []manifest.Extent
	for n := e.Off / windowBytes; n*windowBytes < e.End(); n++ {
		extents, err := im.window(ctx, n)
		if err != nil {
			return nil, err
		}
		out = appendCut(out, extents, e)
	}
	return out, nil
}

// appendCut appends the parts of extents that lie in e.
func appendCut(out, extents []manifest.Extent, e block.Extent) []manifest.Extent {
	for _, x := range extents[firstEndingAfter(extents, e.Off):] {
		if x.Off >= e.End() {
			break
		}
		if cut := e.Off - x.Off; cut > 0 {
			x = x.Advance(cut)
		}
		if x.End() > e.End() {
			x.Len = e.End() - x.Off
		}
		out = append(out, x)
	}
	return out
}

// ReadAt implements block.Device. Who reads on where another read has ended
// gets what follows with it, for the reads to come.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	return im.readAt(ctx, p, off, keepFrames)
}

// OnePass is the image for who reads all of it once. It uses what is in the cache, and
// puts no content there, where that would push out what others use.
func (im *Image) OnePass() block.Device { return onePass{im} }

type onePass struct{ *Image }

func (o onePass) ReadAt(ctx context.Context, p []byte, off int64) error {
	return o.readAt(ctx, p, off, holdFrames)
}

func (im *Image) readAt(ctx context.Context, p []byte, off int64, use frameUse) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := im.Geometry().CheckRange(e); err != nil {
		return err
	}
	clear(p)
	if !im.history.cfg.Ring.CanReadContent() {
		return fmt.Errorf("read volume %q: %w: reading content needs the identity", im.point.Volume.Name, crypt.ErrWrongKey)
	}
	if n := im.ahead.extend(e.Off, e.Len); n > 0 {
		more := block.Extent{Off: e.Off, Len: min(e.Len+n, im.point.Volume.SizeBytes-e.Off)}
		if im.read(ctx, p, e, more, use) == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// What was not asked for must not make the read fail.
	}
	return im.read(ctx, p, e, e, use)
}

// read fills p, which is the image's content at e, and fetches what is in more.
func (im *Image) read(ctx context.Context, p []byte, e, more block.Extent, use frameUse) error {
	extents, err := im.Extents(ctx, more)
	if err != nil {
		return err
	}
	work := groupPieces(extents)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, s := range work {
		g.Go(func() error {
			return im.fetch(gctx, s, use, func(parts []piece) error {
				for _, x := range parts {
					if from, to := max(x.Off, e.Off), min(x.End(), e.End()); from < to {
						copy(p[from-e.Off:to-e.Off], x.data[from-x.Off:to-x.Off])
					}
				}
				return nil
			})
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("read volume %q at %s: %w", im.point.Volume.Name, e, err)
	}
	return nil
}

// segmentWork is what is wanted of one segment.
type segmentWork struct {
	row    format.SegmentRow
	pieces []manifest.Extent
}

// groupPieces sorts extents of chunks by segment, in the order in which the
// segments first appear.
func groupPieces(extents []manifest.Extent) []*segmentWork {
	var out []*segmentWork
	at := map[block.SegmentID]*segmentWork{}
	for _, x := range extents {
		if x.Zero {
			continue
		}
		w := at[x.Segment.ID]
		if w == nil {
			w = &segmentWork{row: x.Segment}
			at[x.Segment.ID] = w
			out = append(out, w)
		}
		w.pieces = append(w.pieces, x)
	}
	return out
}

// flights makes several callers that want the same thing wait for one of them
// to make it.
type flights struct {
	mu sync.Mutex
	m  map[segmentKey]chan struct{}
}

// join returns true if the caller shall do the work and call done after it;
// otherwise somebody else has done it meanwhile.
func (f *flights) join(ctx context.Context, key segmentKey) (mine bool, done func(), err error) {
	f.mu.Lock()
	if c, ok := f.m[key]; ok {
		f.mu.Unlock()
		select {
		case <-c:
			return false, nil, nil
		case <-ctx.Done():
			return false, nil, ctx.Err()
		}
	}
	defer f.mu.Unlock()
	if f.m == nil {
		f.m = map[segmentKey]chan struct{}{}
	}
	c := make(chan struct{})
	f.m[key] = c
	return true, func() {
		f.mu.Lock()
		delete(f.m, key)
		f.mu.Unlock()
		close(c)
	}, nil
}
