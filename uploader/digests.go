package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"drc/internal/block"
	"drc/internal/digest"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/repo"
)

const (
	// digestWidth is how many entries lie between two digests: a reader reads so
	// many at most by themselves, unless digests have failed.
	digestWidth = 64
	// digestPart bounds the entries that are in no digest yet while a history that
	// has none, or has not had one for long, is gone through.
	digestPart = 4096
	// digestCandidates is how many of the newest digests of a store are looked at.
	digestCandidates = 4
)

// digester writes a digest each digestWidth entries, beside the commits. As with
// merged manifests nothing depends on it: whatever fails is tried again some
// entries later, and never while nothing is written.
type digester struct {
	m      *merger // reads entries back, as they were decided
	u      *Uploader
	logger *slog.Logger

	// Of run's goroutine only.
	build *digest.Builder // nil: to be found out
	last  uint64          // the newest entry of which there is a digest

	mu       monitor
	began    uint64 // first entry that was decided since the start
	top      uint64 // newest decided entry
	done     uint64
	nextTry  uint64
	failures int
	stats    DigestStats
}

// DigestStats are counts of digests since the start.
type DigestStats struct {
	Digests  int64
	Bytes    int64 // each counted once
	Failures int64
}

// decided tells the digester that entry n is decided.
func (d *digester) decided(n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.began == 0 {
		d.began = n
	}
	d.top = n
	d.mu.notify()
}

// run writes digests that are due, until ctx ends or the writer is fenced.
func (d *digester) run(ctx context.Context) {
	for {
		var top uint64
		err := d.mu.await(ctx, 0, func() bool {
			top = d.top
			return d.top != d.done && d.top >= d.nextTry
		})
		if err != nil || d.u.cfg.Log.Fenced() {
			return
		}
		err = d.upTo(ctx, top)
		if ctx.Err() != nil {
			return
		}
		d.after(top, err)
	}
}

func (d *digester) after(top uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done, d.nextTry = top, 0
	if err == nil {
		d.failures = 0
		return
	}
	d.build = nil // it may refer to what is on no store
	d.failures = min(d.failures+1, 8)
	d.nextTry = top + min(uint64(1)<<d.failures, digestWidth)
	d.stats.Failures++
	d.logger.Warn("write a digest of the log; trying again later, and the history is whole without it", "error", err)
}

// upTo goes on to entry top, the newest one, and writes what digests are due.
func (d *digester) upTo(ctx context.Context, top uint64) error {
	if d.build == nil {
		// Until a multiple of the width has gone by there is no need to know.
		d.mu.Lock()
		began := d.began
		d.mu.Unlock()
		if d.last == 0 && top/digestWidth == (began-1)/digestWidth {
			return nil
		}
		if err := d.newest(ctx, top); err != nil {
			return err
		}
	}
	for n := d.build.N() + 1; n <= top; n++ {
		e, err := d.m.entry(ctx, n)
		if err != nil {
			return err
		}
		if e.Parent != d.build.Hash() {
			return format.Corrupt(fmt.Sprintf("log entry %d", n), "it follows another entry than the digest of those before it ends with")
		}
		d.build.Add(digest.Row(n, e.Hash, e.Epoch, e.Items, d.u.cfg.Log.places(n, e.Hash)), e.KeySets)
		if n == top || d.build.Pending() < digestPart {
			continue
		}
		if err := d.put(ctx); err != nil {
			return err
		}
	}
	if d.build.N()/digestWidth == d.last/digestWidth {
		return nil
	}
	return d.put(ctx)
}

// put puts a digest of what was added on the stores.
func (d *digester) put(ctx context.Context) error {
	name, raw := d.build.Finish(d.u.cfg.Agent, d.u.cfg.Keys, d.u.cfg.Log.endsOf(d.build.N()))
	if err := d.u.putEverywhere(ctx, name, raw); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	d.last = d.build.N()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Digests++
	d.stats.Bytes += int64(len(raw))
	return nil
}

// newest finds the newest digest that fits the history, to go on from there; if
// there is none, the history is gone through from its beginning.
func (d *digester) newest(ctx context.Context, top uint64) error {
	names, err := d.list(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		n, id, ok := format.ParseDigestName(d.u.cfg.Group, name)
		if !ok || n > top {
			continue
		}
		x, err := d.open(ctx, name, n, id)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var e *grouplog.Entry
		if err == nil {
			e, err = d.m.entry(ctx, n)
		}
		if err == nil && e.Hash != x.Header.Hash {
			err = format.Corrupt(name, "entry %d is another one than it says", n)
		}
		if err != nil {
			d.logger.Warn("a digest is of no use; going on from an older one", "object", name, "error", err)
			continue
		}
		d.build, d.last = x.Builder(), n
		return nil
	}
	d.build, d.last = digest.NewBuilder(d.u.cfg.Group), 0
	return nil
}

// list returns the names of the newest digests, the newest first. It fails if too
// few stores can be listed.
func (d *digester) list(ctx context.Context) ([]string, error) {
	var names []string
	listed := make([]bool, len(d.u.cfg.Repo.Members))
	var errs []error
	for i, m := range d.u.cfg.Repo.Members {
		some, err := newestDigests(ctx, m, d.u.cfg.Group)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		listed[i] = true
		names = append(names, some...)
	}
	if !d.u.enough(listed) {
		return nil, errors.Join(errs...)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func newestDigests(ctx context.Context, m repo.Member, group block.GroupID) (out []string, err error) {
	if m.Store == nil {
		return nil, fmt.Errorf("%s: %w", m.URL(), m.Err)
	}
	for info, err := range m.Store.List(ctx, format.DigestPrefix(group), "") {
		if err != nil {
			return nil, fmt.Errorf("list digests in %s: %w", m.URL(), err)
		}
		if out = append(out, info.Name); len(out) == digestCandidates {
			break
		}
	}
	return out, nil
}

// open opens a digest, from any store.
func (d *digester) open(ctx context.Context, name string, n uint64, id block.ID) (x *digest.Digest, err error) {
	err = d.m.anyStore(name, func(s repo.Member) error {
		raw, _, err := s.Store.Get(ctx, name, format.MaxDigestBytes, nil)
		if err != nil {
			return err
		}
		x, err = digest.Open(d.u.cfg.Ring, s.URL()+" "+name, digest.Place{Group: d.u.cfg.Group, N: n, ID: id}, int64(len(raw)), func(off, n int64) ([]byte, error) {
			if off < 0 || n < 0 || off > int64(len(raw)) || n > int64(len(raw))-off {
				return nil, format.Corrupt(name, "a part reaches past its end")
			}
			return raw[off : off+n], nil
		})
		return err
	})
	return x, err
}

// places are where stores are known to hold a value of entry n.
func (l *Log) places(n uint64, hash format.Hash) (out []format.DigestPlace) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.views {
		if a, ok := l.views[i].entries[n]; ok && a.Hash == hash && l.views[i].broken == nil {
			out = append(out, format.DigestPlace{Store: l.stores[i].member.ID, Index: a.Index})
		}
	}
	return out
}

// endsOf are the stores' logs up to a place before which nothing is of entries
// behind n, each as far as it is known to go.
func (l *Log) endsOf(n uint64) (out []format.DigestLog) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.views {
		v := &l.views[i]
		if v.broken != nil {
			continue
		}
		for _, a := range slices.Backward(append(slices.Clone(v.ends), v.acc)) {
			if a.Latest.N > n || a.Next == 0 {
				continue
			}
			out = append(out, format.DigestLog{
				Store: a.Store, Next: a.Next, Last: a.Last, Promised: a.Promised, Decided: min(a.Decided, n),
				N: a.Latest.N, Epoch: a.Latest.Epoch, Hash: a.Latest.Hash, Index: a.Latest.Index,
			})
			break
		}
	}
	return out
}

// DigestStats returns a copy of the counts.
func (u *Uploader) DigestStats() DigestStats {
	if u.digester == nil {
		return DigestStats{}
	}
	u.digester.mu.Lock()
	defer u.digester.mu.Unlock()
	return u.digester.stats
}
