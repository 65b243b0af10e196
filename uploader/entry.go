package uploader

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
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
	if b.Items.Range == nil {
		return &left
	}
	rg := *b.Items.Range
	left.Items.Range = &rg
	if rg.To < u.lastTo {
		rg.To = u.lastTo
		left.Volumes, left.Segments, left.Bytes = nil, nil, 0
	}
	return &left
}

// entry is what is to be decided next.
type entry struct {
	n       uint64
	value   []byte
	items   *format.Items
	keySets []*crypt.KeySet // that travel with it
}

// entry makes b the next entry. Its manifest is on the stores, or in it.
func (u *Uploader) entry(ctx context.Context, b *batch.Batch, degraded []format.Degraded) (entry, error) {
	n, parent, epoch := u.cfg.Log.Next()
	u.resolve(b, n)
	items := b.Items
	if n > 1 {
		items.Group = nil // a start that had lost its progress announced it again
	}
	if items.Range != nil {
		items.Range.Dates = u.cfg.Log.Dates()
	}
	if items.Handover != nil {
		items.Handover = &format.Handover{Seq: items.Range.To, Time: items.Handover.Time}
	}
	items.Degraded = degraded
	for _, s := range b.Segments {
		if s.Inline != nil {
			items.Segments = append(items.Segments, format.InlineSegment{ID: s.Row.ID, Payload: s.Inline})
		}
	}
	if err := u.manifest(ctx, b, n, &items); err != nil {
		return entry{}, err
	}
	sets, err := u.keySets(b)
	if err != nil {
		return entry{}, err
	}
	draft := grouplog.Draft{Group: u.cfg.Group, N: n, Parent: parent, Epoch: epoch, Keys: u.cfg.Keys, Items: &items}
	for _, ks := range sets {
		draft.KeySets = append(draft.KeySets, ks.Raw)
	}
	value := draft.Make(u.cfg.Agent)
	if len(value) > format.MaxValueBytes {
		return entry{}, fmt.Errorf("entry %d would have %d bytes: this is a bug in drc", n, len(value))
	}
	return entry{n: n, value: value, items: &items, keySets: sets}, nil
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
	var pause backoff
	for {
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
		name := format.ManifestName{Branch: u.cfg.Branch, From: n, To: n, ID: build.ID()}.Name(u.cfg.Group)
		items.Reference = &format.ManifestReference{ID: build.ID(), Bytes: int64(len(raw)), Hash: format.HashOf(raw)}
		err := u.putEverywhere(ctx, name, raw)
		if err == nil && u.merger != nil {
			u.merger.recent.keep(name, raw)
		}
		if !errors.Is(err, errTaken) {
			return err
		}
		if err := pause.wait(ctx); err != nil { // and take another name
			return err
		}
	}
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
