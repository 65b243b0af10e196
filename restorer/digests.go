package restorer

import (
	"context"
	"slices"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/digest"
	"drc/internal/format"
	"drc/internal/object"
)

// digestCandidates is how many of the newest digests of a store are looked at.
const digestCandidates = 4

// newestDigest finds the newest digest that can be read and says nothing of
// entries behind the one up to which the history is read. Without one, for whatever
// reason, the logs are read from their beginning.
func (h *History) newestDigest(ctx context.Context) *digest.Digest {
	lists := askAll(ctx, h.stores, false, func(ctx context.Context, st object.Store) (out []object.Info, err error) {
		few := 0
		for info, err := range st.List(ctx, format.DigestPrefix(h.GroupID), "") {
			if err != nil {
				return nil, err
			}
			n, _, ok := format.ParseDigestName(h.GroupID, info.Name)
			if !ok || (h.cfg.UpTo != nil && n > h.cfg.UpTo.N) {
				continue
			}
			out = append(out, info)
			if few++; few == digestCandidates {
				break
			}
		}
		return out, nil
	})
	var found []object.Info // of copies of different sizes one is damaged: opening it tells
	for _, l := range lists {
		for _, info := range l.out {
			if !slices.ContainsFunc(found, func(f object.Info) bool { return f.Name == info.Name && f.Size == info.Size }) {
				found = append(found, info)
			}
		}
	}
	slices.SortStableFunc(found, func(a, b object.Info) int { return compareStrings(a.Name, b.Name) })
	for _, info := range found {
		d, err := h.openDigest(ctx, info)
		if err == nil {
			return d
		}
		if ctx.Err() != nil {
			return nil
		}
		h.cfg.Logger.Warn("a digest of the log is of no use; going on without it", "object", info.Name, "error", err)
	}
	return nil
}

func (h *History) openDigest(ctx context.Context, info object.Info) (*digest.Digest, error) {
	n, id, _ := format.ParseDigestName(h.GroupID, info.Name)
	d, err := fromAny(ctx, h.stores, info.Name, func(ctx context.Context, m *member, anyway insist) (*digest.Digest, error) {
		return digest.Open(h.cfg.Ring, m.URL()+" "+info.Name, digest.Place{Group: h.GroupID, N: n, ID: id}, info.Size, func(off, n int64) ([]byte, error) {
			return h.stores.getRange(ctx, m, anyway, info.Name, off, n)
		})
	}, func(reasons string) error {
		return format.Corrupt(info.Name, "no store has a good copy of it: %s", reasons)
	})
	if err != nil {
		return nil, err
	}
	return d, h.takeKeySets(ctx, d)
}

// takeKeySets brings the key sets of all entries of a digest into the ring.
func (h *History) takeKeySets(ctx context.Context, d *digest.Digest) error {
	sets, err := d.KeySets(ctx, h.fetchFromStores) // not sealed: whether it is what was written cannot be told at once
	if err != nil {
		return err
	}
	g, _ := errgroup.WithContext(ctx)
	g.SetLimit(keySetsAtOnce)
	for _, raw := range sets {
		g.Go(func() error {
			_, err := h.cfg.Ring.Add(raw)
			return err
		})
	}
	return g.Wait()
}

// keySetsAtOnce is how many key sets are opened side by side.
const keySetsAtOnce = 8

// beginWith has the logs begin where a digest says that they were, as far as they
// still are there: a log that is not as the digest says was rolled back or damaged,
// and is read from its beginning.
func (h *History) beginWith(ctx context.Context, d *digest.Digest, logs []*storeLog) {
	g, gctx := errgroup.WithContext(ctx)
	for i := range d.Logs {
		at := &d.Logs[i]
		for _, l := range logs {
			if l.m.ID != at.Store || l.m.Store == nil {
				continue
			}
			g.Go(func() error {
				raw, err := h.stores.get(gctx, l.m, true, format.LogName(h.GroupID, at.Next-1), format.MaxLogObjectBytes)
				if err == nil && format.HashOf(raw) == at.Last {
					l.begin(at)
				}
				return nil
			})
		}
	}
	_ = g.Wait()
}

// begin has a log begin behind what a digest says of it.
func (l *storeLog) begin(at *format.DigestLog) {
	l.acc.Next, l.acc.Last, l.acc.Promised, l.acc.Decided = at.Next, at.Last, at.Promised, at.Decided
	l.acc.Latest.N, l.acc.Latest.Epoch, l.acc.Latest.Hash, l.acc.Latest.Index = at.N, at.Epoch, at.Hash, at.Index
	l.base = at.Next
}

// logEnds are the places at which the logs end, for who looks for an old value.
func logEnds(logs []*storeLog) map[block.ID]logEnd {
	out := map[block.ID]logEnd{}
	for _, l := range logs {
		out[l.m.ID] = logEnd{next: l.acc.Next, n: l.acc.Latest.N, index: l.acc.Latest.Index}
	}
	return out
}

// logEnd is how far a store's log goes, and where its newest entry is.
type logEnd struct{ next, n, index uint64 }
