package restorer

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
)

// tip is the newest entry, and what is known to be decided.
type tip struct {
	n       uint64
	hash    format.Hash
	decided uint64
}

// chooseTip picks the newest entry: of all that the stores have accepted, the
// one of the highest epoch, which is what a takeover would adopt. The entry
// before it is decided, because its author knew so. The tip itself is decided
// if a majority holds it under one epoch, or if a writer that put it here says
// later, in the same epoch, that it is.
func chooseTip(h *History, logs []*storeLog) (tip, error) {
	accs := make([]*grouplog.Acceptor, len(logs))
	for i, l := range logs {
		accs[i] = &l.acc
	}
	set := h.cfg.Repo.Set()
	n := grouplog.Highest(accs)
	c := choose(set, logs, n)
	if !c.Known {
		return tip{}, format.Corrupt(format.LogPrefix(h.GroupID), "no store has entry %d", n)
	}
	t := tip{n: n, hash: c.Hash, decided: n - 1}
	told := uint64(0)
	for _, l := range logs {
		e, ok := l.entry(n)
		for _, claim := range l.decided {
			told = max(told, claim.n)
			if ok && e.Hash == c.Hash && claim.epoch == e.Epoch && claim.n >= n {
				c.Decided = true
			}
		}
	}
	if h.digest != nil && n == h.inDigest && c.Hash == h.digest.Header.Hash {
		c.Decided = true // digests are of nothing else
	}
	if c.Decided {
		t.decided = n
	}
	if told > n {
		h.warn("the history goes on to entry %d at least, in stores that cannot be read: what can be read ends at entry %d", told, n)
	}
	if !c.Decided {
		read := map[block.ID]bool{}
		for _, l := range logs {
			read[l.m.ID] = true
		}
		if !set.MajorityOf(func(id block.ID) bool { return read[id] }) {
			h.warn("fewer stores were read than decide: entry %d is unconfirmed, and there may be newer ones", n)
		} else {
			h.warn("entry %d is on too few stores to be decided: it is unconfirmed", n)
		}
	}
	return t, nil
}

// choose is grouplog.Choose for logs that begin with what a digest says: of all
// values that are accepted for n the one of the highest epoch.
func choose(set grouplog.StoreSet, logs []*storeLog, n uint64) (c grouplog.Choice) {
	for _, l := range logs {
		if e, ok := l.entry(n); ok && (!c.Known || c.Epoch.Less(e.Epoch)) {
			c.Accepted, c.Known = e, true
		}
	}
	c.Decided = c.Known && set.MajorityOf(func(id block.ID) bool {
		for _, l := range logs {
			if e, ok := l.entry(n); ok && l.m.ID == id {
				return e.Epoch == c.Epoch && e.Hash == c.Hash
			}
		}
		return false
	})
	return c
}

// walk follows the parents' hashes from the tip back to base, an entry that is known
// or nothing (N is 0), and returns the hashes of the entries behind it in order.
func walk(h *History, t tip, base Position) ([]format.Hash, error) {
	chain := make([]format.Hash, t.n-base.N)
	hash := t.hash
	for n := t.n; n > base.N; n-- {
		chain[n-base.N-1] = hash
		v := h.values.node(n, hash)
		if v == nil {
			if n == t.n {
				return nil, format.Corrupt(fmt.Sprintf("log entry %d", n), "it is in no store")
			}
			return nil, format.Corrupt(fmt.Sprintf("log entry %d", n), "entry %d names its hash, and no store that can be read has it", n+1)
		}
		if n == 1 && v.parent != (format.Hash{}) {
			return nil, format.Corrupt("log entry 1", "it names an entry before it")
		}
		hash = v.parent
	}
	if base.N > 0 && hash != base.Hash {
		return nil, format.Corrupt(format.LogPrefix(h.GroupID), "entry %d is another one than was known", base.N)
	}
	return chain, nil
}

// collect opens the entries of the chain, which are those behind the digest, and
// gathers what all entries say.
func (h *History) collect(ctx context.Context, chain []format.Hash) error {
	h.tail = nil
	things, err := h.openEntries(ctx, chain)
	if err != nil {
		return err
	}
	var marked []said
	if h.digest != nil {
		rows, err := h.digest.Marks(ctx, h.fetchDigest)
		if err != nil {
			return err
		}
		for _, r := range rows {
			e := newEntry(r.N, r.Hash, r.Epoch, r.Items)
			marked = append(marked, said{&e, r.Items})
		}
	}
	if err := h.listen(ctx, append(marked, things...)); err != nil {
		return err
	}
	return h.endWith(ctx)
}

// openEntries opens the entries of a chain and puts them at the end of the tail.
func (h *History) openEntries(ctx context.Context, chain []format.Hash) ([]said, error) {
	first := h.N() + 1
	// Key sets come first and in order: bodies are sealed under them.
	for i, hash := range chain {
		n := first + uint64(i)
		if h.values.node(n, hash).keySets {
			raw, err := h.values.raw(ctx, n, hash, nil)
			if err != nil {
				return nil, err
			}
			if _, err := grouplog.OpenValue(h.cfg.Ring, fmt.Sprintf("log entry %d", n), raw); err != nil {
				return nil, err
			}
		}
	}
	tail := append(slices.Clip(h.tail), make([]Entry, len(chain))...)
	behind := tail[len(h.tail):]
	things := make([]said, len(chain))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for i, hash := range chain {
		g.Go(func() error {
			n := first + uint64(i)
			b, err := h.values.body(gctx, n, hash, nil)
			if err != nil {
				return err
			}
			behind[i] = newEntry(n, hash, b.epoch, b.items)
			behind[i].Unconfirmed = n > h.Decided
			things[i] = said{&behind[i], b.items}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	h.tail = tail
	return things, nil
}

// said is what an entry says.
type said struct {
	*Entry
	items *format.Items
}

// listen gathers what entries say of the group, its volumes, gaps and names. Those
// that say nothing of these may be left out.
func (h *History) listen(ctx context.Context, all []said) error {
	if len(all) == 0 || all[0].N != 1 || all[0].items.Group == nil {
		return format.Corrupt("log entry 1", "it does not describe the group")
	}
	h.Group = *all[0].items.Group
	h.volumes, h.named, h.lastSeq = nil, nil, 0
	h.gaps = map[volumeOn][]Gap{}
	h.names = map[block.Seq][]int{}
	h.firstBranch(&h.Group)
	for _, e := range all {
		if err := h.hear(ctx, e); err != nil {
			return err
		}
	}
	return nil
}

// hear takes in what the next entry says.
func (h *History) hear(ctx context.Context, e said) error {
	if e.items.Branch != nil {
		if err := h.beginBranch(ctx, e); err != nil {
			return err
		}
	}
	on := h.Current()
	for _, v := range e.items.Volumes {
		h.volumes = append(h.volumes, Volume{Volume: v, JoinedN: e.N, Branch: on})
	}
	for _, c := range e.Names {
		h.named = append(h.named, Named{Name: c.Name, Seq: c.Seq, Time: time.Unix(0, c.Time), n: e.N})
		h.names[c.Seq] = append(slices.Clip(h.names[c.Seq]), len(h.named)-1) // others may share it
	}
	if e.Range == nil {
		return nil
	}
	if e.Range.Branch != on {
		return format.Corrupt(fmt.Sprintf("log entry %d", e.N), "it is of branch %s, and the branch that was begun last is %s", e.Range.Branch, on)
	}
	if e.Range.To < h.lastSeq {
		return format.Corrupt(fmt.Sprintf("log entry %d", e.N), "it ends at seq %s, before the end of the entry before it, %s", e.Range.To, h.lastSeq)
	}
	h.lastSeq = e.Range.To
	for _, b := range e.items.GapBegins {
		k := volumeOn{on, b.Volume}
		h.gaps[k] = append(h.gaps[k], Gap{After: b.After, Open: true, Reason: b.Reason, BeginN: e.N, Begin: e.Time()})
	}
	for _, v := range e.items.GapEnds {
		gaps := h.gaps[volumeOn{on, v}]
		for j := range gaps {
			if g := &gaps[j]; g.Open {
				g.Open, g.Until, g.EndN, g.End = false, h.lastSeq, e.N, e.Time()
			}
		}
	}
	return nil
}

// endWith takes note of the newest entry, and of the resyncs that are under way.
func (h *History) endWith(ctx context.Context) error {
	e, err := h.Entry(ctx, h.N())
	if err != nil {
		return err
	}
	h.newest, h.Resyncs = *e, nil
	if len(e.Partial) == 0 {
		return nil
	}
	b, err := h.body(ctx, e.N)
	if err != nil {
		return err
	}
	h.Resyncs = b.items.Partials
	return nil
}

// errNoCopy: a store has nothing of that name and, unlike where ErrNotFound is
// the answer, need not have it.
var errNoCopy = errors.New("it has no copy")
