package uploader

import (
	"context"
	"fmt"
	"slices"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
)

// inlineManifestBytes is the largest manifest that travels in its entry.
const inlineManifestBytes = 64 << 10

// unlogged returns what of a batch the log does not have. A host that lost its
// progress in a power cut cuts seqs again that are history already. What the log
// holds beyond the batch's end must not be overlaid with the older writes of the
// batch, and the log's end never goes back: of such a batch only its statements
// are left. What is returned can be changed: it shares only payloads with b.
func (u *Uploader) unlogged(b *batch.Batch) *batch.Batch {
	u.mu.Lock()
	defer u.mu.Unlock()
	left := *b
	left.Segments, left.Volumes = slices.Clone(b.Segments), slices.Clone(b.Volumes)
	for i := range left.Volumes {
		left.Volumes[i].Extents = slices.Clone(left.Volumes[i].Extents)
	}
	left.Items.Volumes = nil
	for _, v := range b.Items.Volumes {
		if !u.described[v.Index] {
			left.Items.Volumes = append(left.Items.Volumes, v)
		}
	}
	if rg := b.Items.Range; rg != nil && rg.To < u.lastTo {
		end := *rg
		end.To = u.lastTo
		left.Items.Range = &end
		left.Volumes, left.Segments, left.Bytes = nil, nil, 0
	}
	return &left
}

// resolve puts the entry's number in the rows of segments that travel in it.
func (u *Uploader) resolve(b *batch.Batch, n uint64) {
	for i := range b.Segments {
		if b.Segments[i].Inline != nil {
			b.Segments[i].Row.Inline = n
		}
	}
	inline := map[block.SegmentID]bool{}
	for _, s := range b.Segments {
		inline[s.Row.ID] = s.Inline != nil
	}
	for _, v := range b.Volumes {
		for i := range v.Extents {
			if x := &v.Extents[i]; !x.Zero && inline[x.Segment.ID] {
				x.Segment.Inline = n
			}
		}
	}
}

// manifest makes the entry's manifest, and puts it on the stores if it is too
// large to travel inline.
func (u *Uploader) manifest(ctx context.Context, b *batch.Batch, n uint64, items *format.Items) error {
	if len(b.Volumes) == 0 {
		return nil
	}
	build := manifest.NewBuilder(format.ManifestHeader{
		Group: u.cfg.Group, Branch: u.cfg.Branch, FromN: n, ToN: n, From: b.From, To: b.To,
	}, u.cfg.Agent, u.cfg.Keys)
	for _, v := range b.Volumes {
		for _, x := range v.Extents {
			build.Add(v.Volume, x)
		}
	}
	raw := build.Finish()
	if len(raw) <= inlineManifestBytes {
		items.Manifest = raw
		return nil
	}
	name := format.ManifestName{Branch: u.cfg.Branch, From: n, To: n, ID: build.ID()}
	items.Reference = &format.ManifestReference{ID: build.ID(), Bytes: int64(len(raw)), Hash: format.HashOf(raw)}
	if u.merger != nil {
		u.merger.recent.keep(name.Name(u.cfg.Group), raw)
	}
	return u.putEverywhere(ctx, name.Name(u.cfg.Group), raw)
}

// keySets returns the key sets that the entry needs and the log may not have.
func (u *Uploader) keySets(b *batch.Batch) ([]*crypt.KeySet, error) {
	var out []*crypt.KeySet
	for _, id := range []block.ID{u.cfg.Keys.ID, b.KeySet} {
		if u.cfg.LoggedKeySets[id] || (len(out) > 0 && out[0].ID == id) {
			continue
		}
		ks, ok := u.cfg.Ring.Set(id)
		if !ok {
			return nil, fmt.Errorf("key set %s of seqs %s to %s is not at hand", id, b.From, b.To)
		}
		out = append(out, ks)
	}
	return out, nil
}
