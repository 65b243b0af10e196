package restorer

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/manifest"
)

// onePieceExtents: changes of at most so many extents are worked out as a whole, and
// others part of the volume after part.
const onePieceExtents = 128 << 10

// Change is what an extent of a volume was changed to.
type Change struct {
	block.Extent
	Zero bool
	Data []byte // nil for zeroes
}

// Changes are what brings a volume from one point to a later one: of each byte that
// was written between the two, the newest content. It is safe for concurrent use.
type Changes struct {
	im    *Image
	after Point
}

// OpenChanges finds what was changed of a volume behind the point after, up to the
// point to. It reads the directories of the manifests that say so, and no pages.
func OpenChanges(ctx context.Context, h *History, after, to Point) (*Changes, error) {
	e, err := h.Entry(ctx, after.N)
	if err != nil {
		return nil, err
	}
	if e.Hash != after.Hash || after.N > to.N || !h.holds(to.Volume, after.N) || after.Volume.ID != to.Volume.ID {
		return nil, fmt.Errorf("%w: the history of volume %q has no log entry %d with hash %s before entry %d", ErrNoSuchPoint, to.Volume.Name, after.N, after.Hash, to.N)
	}
	im, err := openImage(ctx, h, after.N, to)
	if err != nil {
		return nil, err
	}
	return &Changes{im, after}, nil
}

// To is the point to which the changes lead.
func (c *Changes) To() Point { return c.im.point }

// Image is the whole volume at To. It fetches anew what it needs.
func (c *Changes) Image(ctx context.Context) (*Image, error) {
	return OpenImageAt(ctx, c.im.history, c.im.point)
}

// parts visits the extents that were changed, sorted by address, some at a time.
func (c *Changes) parts(ctx context.Context, visit func([]manifest.Extent) error) error {
	size := c.im.point.Volume.SizeBytes
	c.im.mu.Lock()
	layers := c.im.layers
	c.im.mu.Unlock()
	extents := 0
	var spans []block.Extent // where there may be changes
	for _, l := range layers {
		for _, row := range l.m.Directory.Pages {
			extents += row.Extents
			spans = append(spans, block.Extent{Off: row.First, Len: row.End - row.First})
		}
	}
	if extents <= onePieceExtents {
		all, err := c.im.at(ctx, block.Extent{Len: size})
		if err != nil || len(all) == 0 {
			return err
		}
		return visit(all)
	}
	slices.SortFunc(spans, func(a, b block.Extent) int { return int(min(1, max(-1, a.Off-b.Off))) })
	at := int64(0)
	for _, s := range spans {
		for at = max(at, s.Off/windowBytes*windowBytes); at < min(s.End(), size); at += windowBytes {
			part, err := c.im.at(ctx, block.Extent{Off: at, Len: min(windowBytes, size-at)})
			if err != nil {
				return err
			}
			if len(part) == 0 {
				continue
			}
			if err := visit(part); err != nil {
				return err
			}
		}
	}
	return nil
}

// Bytes counts what was changed: bytes to be fetched, and bytes that became zeroes.
// It stops when the former are more than limit; 0 means no limit.
func (c *Changes) Bytes(ctx context.Context, limit int64) (data, zero int64, err error) {
	err = c.parts(ctx, func(extents []manifest.Extent) error {
		for _, x := range extents {
			if x.Zero {
				zero += x.Len
			} else {
				data += x.Len
			}
		}
		if limit > 0 && data > limit {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return data, zero, err
}

var errEnough = errors.New("that is enough")

// Fetch hands all changes to sink, each once, in no order. They do not overlap. Sink
// may be called from several goroutines at once, and must not keep Data.
func (c *Changes) Fetch(ctx context.Context, sink func([]Change) error) error {
	return c.parts(ctx, func(extents []manifest.Extent) error { return c.im.Fetch(ctx, extents, sink) })
}

// Fetch hands extents of the image with their content to sink, each once, in no order.
// Sink may be called from several goroutines at once, and must not keep Data.
func (im *Image) Fetch(ctx context.Context, extents []manifest.Extent, sink func([]Change) error) error {
	var zeroes []Change
	for _, x := range extents {
		if x.Zero {
			zeroes = append(zeroes, Change{Extent: x.Extent, Zero: true})
		}
	}
	if len(zeroes) > 0 {
		if err := sink(zeroes); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(restoreConcurrency)
	for _, w := range groupPieces(extents) {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			return im.fetch(gctx, w, dropFrames, func(parts []piece) error {
				out := make([]Change, len(parts))
				for i, p := range parts {
					out[i] = Change{Extent: p.Extent.Extent, Data: p.data}
				}
				return sink(out)
			})
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("fetch what was changed of volume %q: %w", im.point.Volume.Name, err)
	}
	return ctx.Err()
}
