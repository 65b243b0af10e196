package restorer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/digest"
	"drc/internal/format"
)

// pagesMemoryEntries bounds the entries that were read from digests and stay in
// memory.
const pagesMemoryEntries = 16 << 10

// Entry is one entry of a group's history.
type Entry struct {
	N           uint64
	Hash        format.Hash
	Epoch       format.Epoch  // of its author
	Range       *format.Range // nil if it extends nothing
	Names       []format.NamedCheckpoint
	Partial     []block.VolumeIndex // volumes of which its end is no checkpoint
	Degraded    []format.Degraded
	Branch      *format.Branch   // the branch that it begins, or nil
	Handover    *format.Handover // of its author, or nil
	Unconfirmed bool             // not known to be decided

	manifest  bool                      // it has one, inline or referenced
	reference *format.ManifestReference // of a manifest object
	places    []format.DigestPlace      // where its value lies, as far as a digest says so
}

// Time is the author's wall clock when the entry was cut.
func (e *Entry) Time() time.Time {
	if e.Range == nil {
		return time.Time{}
	}
	return time.Unix(0, e.Range.Time)
}

func newEntry(n uint64, hash format.Hash, epoch format.Epoch, it *format.Items) Entry {
	e := Entry{
		N: n, Hash: hash, Epoch: epoch, Range: it.Range, Names: it.Checkpoints, Degraded: it.Degraded, Branch: it.Branch, Handover: it.Handover,
		manifest: it.Manifest != nil || it.Reference != nil, reference: it.Reference,
	}
	for _, p := range it.Partials {
		e.Partial = append(e.Partial, p.Volume)
	}
	return e
}

// N is the number of the newest entry.
func (h *History) N() uint64 { return h.inDigest + uint64(len(h.tail)) }

// Newest is the newest entry.
func (h *History) Newest() Entry { return h.newest }

// Entry returns entry n, which is from 1 to N. Where it is in no digest it is in
// memory; otherwise a page of entries may have to be fetched.
func (h *History) Entry(ctx context.Context, n uint64) (*Entry, error) {
	switch {
	case n == 0 || n > h.N():
		return nil, format.Corrupt("the log", "entry %d is asked for, and there are %d", n, h.N())
	case n > h.inDigest:
		return &h.tail[n-h.inDigest-1], nil
	}
	page, err := h.page(ctx, (n-1)/format.DigestRows)
	if err != nil {
		return nil, err
	}
	return &page[(n-1)%format.DigestRows], nil
}

// page returns a page of the entries that the digest has.
func (h *History) page(ctx context.Context, number uint64) ([]Entry, error) {
	if page, ok := h.pages.get(number); ok {
		return page, nil
	}
	rows, err := h.digest.Entries(ctx, h.fetchDigest, number)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return h.fromLogs(ctx, number, err)
	}
	page := make([]Entry, len(rows))
	for i, r := range rows {
		page[i] = newEntry(r.N, r.Hash, r.Epoch, r.Items)
		page[i].manifest = page[i].manifest || r.Inline
		page[i].places = r.Places
	}
	h.pages.put(number, page)
	return page, nil
}

// fromLogs returns a page of entries that cannot be had from digests: then the logs
// are read from their beginning, once.
func (h *History) fromLogs(ctx context.Context, number uint64, why error) ([]Entry, error) {
	h.inFull.Lock()
	defer h.inFull.Unlock()
	if h.full == nil {
		h.cfg.Logger.Warn("a part of a digest cannot be had; reading the logs from their beginning", "group", h.GroupID.String(), "error", why)
		cfg := h.cfg
		cfg.CacheDir = "" // it is in use
		cfg.UpTo = &Position{h.inDigest, h.digest.Header.Hash}
		full := newHistory(cfg, h.stores, h.GroupID)
		if err := full.readFrom(ctx, nil); err != nil {
			return nil, fmt.Errorf("read entries from %d on: %w", number*format.DigestRows+1, errors.Join(why, err))
		}
		h.full = full
	}
	page := h.full.tail[number*format.DigestRows : min((number+1)*format.DigestRows, h.full.N())]
	h.pages.put(number, page)
	return page, nil
}

// Each visits the entries from entry from on, in order, until visit returns false.
func (h *History) Each(ctx context.Context, from uint64, visit func(*Entry) bool) error {
	for n := max(from, 1); n <= h.N(); n++ {
		e, err := h.Entry(ctx, n)
		if err != nil {
			return err
		}
		if !visit(e) {
			return nil
		}
	}
	return nil
}

// BackOn visits the entries that are history of a branch, from entry from down to
// entry 1, until visit returns false.
func (h *History) BackOn(ctx context.Context, b block.BranchID, from uint64, visit func(*Entry) bool) error {
	on := Volume{Branch: b}
	for n := h.floor(on, from); n > 0; n = h.floor(on, n-1) {
		e, err := h.Entry(ctx, n)
		if err != nil {
			return err
		}
		if !visit(e) {
			return nil
		}
	}
	return nil
}

// fetchDigest is a digest.Fetch for what is sealed: it has parts of digests from the
// cache or any store.
func (h *History) fetchDigest(ctx context.Context, name string, off, n int64, check func([]byte) error) error {
	kept := h.cfg.keptDigest(name, off, n)
	if sealed, ok := kept.get(); ok {
		if check(sealed) == nil {
			return nil
		}
		kept.drop()
	}
	return h.fetchFromStores(ctx, name, off, n, func(sealed []byte) error {
		err := check(sealed)
		if err == nil {
			kept.put(sealed)
		}
		return err
	})
}

// fetchFromStores is a digest.Fetch: it has parts of digests from any store. It does
// not wait for stores that are away: there are the logs.
func (h *History) fetchFromStores(ctx context.Context, name string, off, n int64, check func([]byte) error) error {
	var one sync.Mutex // copies come side by side, and one good one is enough
	over := false
	defer func() {
		one.Lock()
		defer one.Unlock()
		over = true
	}()
	_, err := fromAnyOnce(ctx, h.stores, name, func(ctx context.Context, m *member, anyway insist) (struct{}, error) {
		raw, err := h.stores.getRange(ctx, m, anyway, name, off, n)
		if err != nil {
			return struct{}{}, err
		}
		one.Lock()
		defer one.Unlock()
		if over {
			return struct{}{}, nil
		}
		err = check(raw)
		over = err == nil
		return struct{}{}, err
	}, func(reasons string) error {
		return &format.CorruptError{Object: name, Offset: off, Reason: "no store has a good copy of this part: " + reasons}
	})
	return err
}

var _ digest.Fetch = (*History)(nil).fetchDigest

// entriesCost is the cost of a page of entries in memory.
func entriesCost(page []Entry) int64 { return int64(len(page)) }

// body returns the opened value of an entry.
func (h *History) body(ctx context.Context, n uint64) (*body, error) {
	e, err := h.Entry(ctx, n)
	if err != nil {
		return nil, err
	}
	return h.values.body(ctx, n, e.Hash, e.places)
}

// isPoint reports whether an entry is a checkpoint of a volume.
func (h *History) isPoint(v Volume, e *Entry) bool {
	return e.Range != nil && e.N >= v.JoinedN && h.holds(v, e.N) && !slices.Contains(e.Partial, v.Index) && h.gapAt(v, e.N) == nil
}

// gapAt is the gap of a volume that is open behind entry n, or nil.
func (h *History) gapAt(v Volume, n uint64) (at *Gap) {
	h.gapsOf(v, func(g *Gap) bool {
		if g.BeginN <= n && (g.Open || n < g.EndN) {
			at = g
		}
		return at == nil
	})
	return at
}
