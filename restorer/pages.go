package restorer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
)

// pagesAtOnce is how many pages of a window are loaded side by side. They are
// loaded newest first, so a few too many may be when the newest cover all.
const pagesAtOnce = 16

// window returns the extents of window n of the image.
func (im *Image) window(ctx context.Context, n int64) ([]manifest.Extent, error) {
	if out, ok := im.memory.windows.get(windowKey{im.number, n}); ok {
		return out, nil
	}
	e := block.Extent{Off: n * windowBytes, Len: windowBytes}
	e.Len = min(e.Len, im.point.Volume.SizeBytes-e.Off)
	out, err := im.at(ctx, e)
	if err != nil {
		return nil, err
	}
	im.memory.windows.put(windowKey{im.number, n}, out)
	return out, nil
}

// at works out what the image has at e.
func (im *Image) at(ctx context.Context, e block.Extent) ([]manifest.Extent, error) {
	im.mu.Lock()
	layers := im.layers
	im.mu.Unlock()
	out, err := im.workOut(ctx, layers, e)
	var broken *brokenLayer
	for errors.As(err, &broken) {
		if layers, err = im.without(ctx, broken); err == nil {
			out, err = im.workOut(ctx, layers, e)
		}
	}
	return out, err
}

// brokenLayer says that a merged manifest has a page that is no good in any
// store.
type brokenLayer struct {
	name string
	err  error
}

func (b *brokenLayer) Error() string { return b.err.Error() }
func (b *brokenLayer) Unwrap() error { return b.err }

// without plans the image again, without a merged manifest that turned out to
// be broken.
func (im *Image) without(ctx context.Context, b *brokenLayer) ([]layer, error) {
	im.mu.Lock() // held while planning: others would only do the same
	defer im.mu.Unlock()
	if im.broken[b.name] {
		return im.layers, nil
	}
	broken := map[string]bool{b.name: true}
	for name := range im.broken {
		broken[name] = true
	}
	layers, err := planLayers(ctx, im.history, im.after, im.point, broken)
	if err != nil {
		return nil, errors.Join(b.err, err)
	}
	im.history.cfg.Logger.Warn("a merged manifest is damaged in every store; going on with the older ones", "object", b.name)
	im.layers, im.broken = layers, broken
	return layers, nil
}

type pageRef struct {
	layer *layer
	row   format.PageRow
}

// workOut lays the pages of all layers over each other at e, the newest
// first, until e is covered.
func (im *Image) workOut(ctx context.Context, layers []layer, e block.Extent) ([]manifest.Extent, error) {
	var refs []pageRef
	for i := len(layers) - 1; i >= 0; i-- {
		l := &layers[i]
		for _, row := range l.m.Pages(im.point.Volume.Index, e) {
			refs = append(refs, pageRef{l, row})
		}
	}
	m := block.NewMap(manifest.Extent.Advance)
	im.laidOver(m, e)
	for len(refs) > 0 && m.Bytes() < e.Len {
		n := min(len(refs), pagesAtOnce)
		pages, err := im.loadPages(ctx, refs[:n])
		if err != nil {
			return nil, err
		}
		refs = refs[n:]
		for _, extents := range pages {
			for _, x := range extents[firstEndingAfter(extents, e.Off):] {
				if x.Off >= e.End() {
					break
				}
				underlay(m, x, e)
			}
		}
	}
	out := make([]manifest.Extent, 0, m.Len())
	m.All(func(part block.Extent, x manifest.Extent) bool {
		x.Extent = part // Advance moved the start; the end may have been cut
		out = append(out, x)
		return true
	})
	return out, nil
}

// underlay puts x, cut to e, where m has nothing yet.
func underlay(m *block.Map[manifest.Extent], x manifest.Extent, e block.Extent) {
	var free []block.Extent
	m.Gaps(x.Intersect(e), func(gap block.Extent) bool {
		free = append(free, gap)
		return true
	})
	for _, gap := range free {
		m.Set(gap, x.Advance(gap.Off-x.Off))
	}
}

// firstEndingAfter is the index of the first extent that ends after off.
func firstEndingAfter(extents []manifest.Extent, off int64) int {
	return sort.Search(len(extents), func(i int) bool { return extents[i].End() > off })
}

// loadPages returns the extents of pages, side by side where they must be
// fetched.
func (im *Image) loadPages(ctx context.Context, refs []pageRef) ([][]manifest.Extent, error) {
	out := make([][]manifest.Extent, len(refs))
	g, gctx := errgroup.WithContext(ctx)
	for i, r := range refs {
		key := im.pageKey(r)
		if page, ok := im.memory.pages.get(key); ok {
			out[i] = page
			continue
		}
		g.Go(func() error {
			page, err := im.loadPage(gctx, r)
			if err != nil && isDamage(err) && r.layer.n == 0 {
				return &brokenLayer{r.layer.name, err}
			}
			if err != nil {
				return err
			}
			im.memory.pages.put(key, page)
			out[i] = page
			return nil
		})
	}
	return out, g.Wait()
}

func (im *Image) loadPage(ctx context.Context, r pageRef) ([]manifest.Extent, error) {
	h := im.history
	if r.layer.name == "" && r.row.Home.IsZero() {
		b, err := h.body(ctx, r.layer.n)
		if err != nil {
			return nil, err
		}
		read := manifest.BytesReader(inlineName(r.layer.n), b.items.Manifest)
		sealed, err := read(r.row.Offset, int64(r.row.StoredBytes))
		if err != nil {
			return nil, err
		}
		return checkPage(r.layer.m.OpenPage(r.row, sealed))
	}
	name := r.layer.name
	if !r.row.Home.IsZero() {
		name = r.row.HomeName
	}
	kept := h.cfg.keptPage(name, r.row)
	if sealed, ok := kept.get(); ok {
		page, err := checkPage(r.layer.m.OpenPage(r.row, sealed))
		if err == nil {
			return page, nil
		}
		kept.drop()
	}
	return fromAny(ctx, h.stores, name, func(ctx context.Context, m *member, anyway insist) ([]manifest.Extent, error) {
		sealed, err := h.stores.getRange(ctx, m, anyway, name, r.row.Offset, int64(r.row.StoredBytes))
		if err != nil {
			return nil, err
		}
		page, err := checkPage(r.layer.m.OpenPage(r.row, sealed))
		if err == nil {
			kept.put(sealed)
		}
		return page, err
	}, func(reasons string) error {
		return &format.CorruptError{Object: name, Offset: r.row.Offset, Reason: "no store has a good copy of this page: " + reasons}
	})
}

// checkPage checks the order of extents, on which look-ups rely.
func checkPage(page []manifest.Extent, err error) ([]manifest.Extent, error) {
	if err != nil {
		return nil, err
	}
	if !slices.IsSortedFunc(page, func(a, b manifest.Extent) int { return cmp.Compare(a.Off, b.Off) }) {
		return nil, fmt.Errorf("a page's extents are not in order")
	}
	return page, nil
}
