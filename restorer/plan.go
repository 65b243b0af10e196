package restorer

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/object"
)

// layer is one manifest of an image: what a run of entries changed.
type layer struct {
	m      *manifest.Manifest // its directory holds rows of the image's volume only
	name   string             // of its object; empty if it travels in entry n
	n      uint64
	hash   format.Hash
	fromTo [2]uint64
}

// step is a part of a plan: a merged manifest, or entry n's own.
type step struct {
	merged *mergedManifest
	n      uint64
}

type mergedManifest struct {
	format.ManifestName
	name  string
	sizes map[*member]int64 // of each store's copy: of different ones at most one is right
}

func (s *mergedManifest) size(m *member) int64 {
	if n, ok := s.sizes[m]; ok {
		return n
	}
	largest := int64(0) // this store was not listed
	for _, n := range s.sizes {
		largest = max(largest, n)
	}
	return largest
}

// planLayers finds the fewest manifests that cover the entries behind entry after, up
// to p.N, and opens them. A merged manifest that is no good anywhere is done without,
// as are those in without.
func planLayers(ctx context.Context, h *History, after uint64, p Point, without map[string]bool) ([]layer, error) {
	var merged []*mergedManifest
	var err error
	if after == 0 || p.N-after >= listFrom {
		if merged, err = listMerged(ctx, h, p); err != nil {
			return nil, err
		}
	}
	merged = slices.DeleteFunc(merged, func(m *mergedManifest) bool { return without[m.name] })
	for {
		steps, err := planSteps(ctx, h, p.Volume, merged, after, p.N)
		if err != nil {
			return nil, err
		}
		layers := make([]*layer, len(steps))
		failed := make([]error, len(steps))
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(h.cfg.Requests)
		for i, s := range steps {
			g.Go(func() error {
				var err error
				if s.merged != nil {
					layers[i], err = openMerged(gctx, h, s.merged)
					if err != nil && isDamage(err) {
						failed[i], err = err, nil
					}
				} else {
					layers[i], err = openOwn(gctx, h, s.n)
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return nil, err
		}
		again := false
		for i, err := range failed {
			if err != nil {
				again = true
				bad := steps[i].merged
				h.cfg.Logger.Warn("a merged manifest is no good in any store; going on with the older ones", "object", bad.name, "error", err)
				merged = slices.DeleteFunc(merged, func(m *mergedManifest) bool { return m == bad })
			}
		}
		if again {
			continue
		}
		var out []layer
		for _, l := range layers {
			if l == nil {
				continue
			}
			own := *l.m
			own.Directory = &format.Directory{Pages: slices.Clone(l.m.Pages(p.Volume.Index, block.Extent{Len: format.MaxVolumeBytes}))}
			l.m = &own
			if len(l.m.Directory.Pages) > 0 {
				out = append(out, *l)
			}
		}
		return out, nil
	}
}

// listFrom: of fewer entries behind another one it is not looked whether some are
// merged.
const listFrom = 16

// planSteps covers the entries behind entry after, up to n: always with the merged manifest that begins
// at the first uncovered entry and reaches farthest, else with that entry's
// own.
func planSteps(ctx context.Context, h *History, v Volume, merged []*mergedManifest, after, n uint64) ([]step, error) {
	best := map[uint64]*mergedManifest{}
	for _, m := range merged {
		if b := best[m.From]; m.To <= n && (b == nil || b.To < m.To) {
			best[m.From] = m
		}
	}
	var out []step
	for at := h.ceil(v, after+1); at <= n; at = h.ceil(v, at) {
		if m := best[at]; m != nil {
			out = append(out, step{merged: m})
			at = m.To + 1
			continue
		}
		e, err := h.Entry(ctx, at)
		if err != nil {
			return nil, err
		}
		if e.manifest {
			out = append(out, step{n: at})
		}
		at++
	}
	return out, nil
}

// listMerged lists the manifests of more than one entry that cover entries up
// to p.N, and history of p's volume only, and are on any store. Only entries that are
// decided are ever merged.
func listMerged(ctx context.Context, h *History, p Point) ([]*mergedManifest, error) {
	lists := askAll(ctx, h.stores, false, func(ctx context.Context, st object.Store) ([]object.Info, error) {
		var found []object.Info
		for _, s := range h.spans(p.Volume) {
			if s.from > p.N {
				break
			}
			for info, err := range st.List(ctx, format.ManifestPrefix(h.GroupID, s.branch), "") {
				if err != nil {
					return nil, err
				}
				if name, ok := format.ParseManifestName(h.GroupID, info.Name); ok && name.From != name.To && name.From >= s.from && name.To <= min(s.to, p.N) {
					found = append(found, info)
				}
			}
		}
		return found, nil
	})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	byName := map[string]*mergedManifest{}
	for i, m := range h.stores.members {
		if lists[i].err != nil && m.Store != nil {
			// Without the list the plan is longer, and not wrong.
			h.cfg.Logger.Warn("cannot list manifests", "store", m.URL(), "error", lists[i].err)
		}
		for _, info := range lists[i].out {
			if byName[info.Name] == nil {
				name, _ := format.ParseManifestName(h.GroupID, info.Name)
				byName[info.Name] = &mergedManifest{ManifestName: name, name: info.Name, sizes: map[*member]int64{}}
			}
			byName[info.Name].sizes[m] = info.Size
		}
	}
	var out []*mergedManifest
	for _, m := range byName {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *mergedManifest) int { return compareStrings(a.name, b.name) })
	return out, nil
}

func compareStrings(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func openMerged(ctx context.Context, h *History, s *mergedManifest) (*layer, error) {
	m, err := openManifest(ctx, h, s.name, s.size, func(hd *format.ManifestHeader) error {
		if hd.ID != s.ID || hd.FromN != s.From || hd.ToN != s.To || hd.Group != h.GroupID || hd.Branch != s.Branch {
			return format.Corrupt(s.name, "its header says something else than its name")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &layer{m: m, name: s.name, fromTo: [2]uint64{s.From, s.To}}, nil
}

// openManifest opens a manifest object, from the cache or any store. check refuses one
// that stands at the wrong place.
func openManifest(ctx context.Context, h *History, name string, size func(*member) int64, check func(*format.ManifestHeader) error) (m *manifest.Manifest, err error) {
	if m, ok := h.manifests.get(name); ok {
		return m, nil
	}
	defer func() {
		if err == nil {
			h.manifests.put(name, m)
		}
	}()
	kept := h.cfg.keptManifest(name)
	if raw, ok := kept.get(); ok {
		m, err := manifest.OpenBytes(h.cfg.Ring, name, raw)
		if err == nil {
			err = check(&m.Header)
		}
		if err == nil {
			return m, nil
		}
		kept.drop()
	}
	return fromAny(ctx, h.stores, name, func(ctx context.Context, st *member, anyway insist) (*manifest.Manifest, error) {
		var read []stretch
		m, err := manifest.Open(h.cfg.Ring, st.URL()+" "+name, size(st), func(off, n int64) ([]byte, error) {
			p, err := h.stores.getRange(ctx, st, anyway, name, off, n)
			read = append(read, stretch{off, p})
			return p, err
		})
		if err == nil {
			err = check(&m.Header)
		}
		if err != nil {
			return nil, err
		}
		if h.cfg.Cache != nil {
			kept.put(skeletonOf(name, size(st), read))
		}
		return m, nil
	}, func(reasons string) error {
		return format.Corrupt(name, "no store has a good copy of it: %s", reasons)
	})
}

// openOwn opens the manifest of one entry.
func openOwn(ctx context.Context, h *History, n uint64) (*layer, error) {
	e, err := h.Entry(ctx, n)
	if err != nil {
		return nil, err
	}
	l := &layer{n: n, hash: e.Hash, fromTo: [2]uint64{n, n}}
	id := block.ID{}
	check := func(hd *format.ManifestHeader) error {
		if hd.FromN != n || hd.ToN != n || hd.Group != h.GroupID || (!id.IsZero() && hd.ID != id) {
			return format.Corrupt(fmt.Sprintf("manifest of log entry %d", n), "its header says that it is of entries %d to %d of group %s", hd.FromN, hd.ToN, hd.Group)
		}
		return nil
	}
	if r := e.reference; r != nil {
		id = r.ID
		l.name = format.ManifestName{Branch: e.Range.Branch, From: n, To: n, ID: r.ID}.Name(h.GroupID)
		l.m, err = openManifest(ctx, h, l.name, func(*member) int64 { return r.Bytes }, check)
	} else if m, ok := h.manifests.get(inlineName(n)); ok {
		l.m = m
	} else {
		var b *body
		if b, err = h.body(ctx, n); err == nil {
			l.m, err = manifest.OpenBytes(h.cfg.Ring, inlineName(n), b.items.Manifest)
		}
		if err == nil {
			err = check(&l.m.Header)
		}
		if err == nil {
			h.manifests.put(inlineName(n), l.m)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("manifest of log entry %d: %w", n, err)
	}
	return l, nil
}

func inlineName(n uint64) string { return fmt.Sprintf("manifest in log entry %d", n) }
