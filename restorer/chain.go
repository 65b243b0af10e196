package restorer

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"

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

// choose is grouplog.Choose for logs of which a part was read by an earlier
// run: of all values that are accepted for n the one of the highest epoch.
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

// walk follows the parents' hashes from the tip to entry 1 and returns the
// hashes in order.
func walk(ctx context.Context, h *History, t tip) ([]format.Hash, error) {
	chain := make([]format.Hash, t.n)
	hash := t.hash
	for n := t.n; n >= 1; n-- {
		chain[n-1] = hash
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
	return chain, nil
}

// collect opens the entries of the chain and gathers what they say.
func (h *History) collect(ctx context.Context, chain []format.Hash) error {
	h.Entries = make([]Entry, len(chain))
	// Key sets come first and in order: bodies are sealed under them.
	for i, hash := range chain {
		if h.values.node(uint64(i+1), hash).keySets {
			raw, err := h.values.raw(ctx, uint64(i+1), hash)
			if err != nil {
				return err
			}
			if _, err := grouplog.OpenValue(h.cfg.Ring, fmt.Sprintf("log entry %d", i+1), raw); err != nil {
				return err
			}
		}
	}
	type said struct {
		group     *format.Group
		volumes   []format.Volume
		gapBegins []format.GapBegin
		gapEnds   []block.VolumeIndex
	}
	things := make([]said, len(chain))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for i, hash := range chain {
		g.Go(func() error {
			n := uint64(i + 1)
			b, err := h.values.body(gctx, n, hash)
			if err != nil {
				return err
			}
			it := b.items
			h.Entries[i] = Entry{
				N: n, Hash: hash, Epoch: b.epoch, Range: it.Range, Names: it.Checkpoints, Degraded: it.Degraded,
				Unconfirmed: n > h.Decided, manifest: it.Manifest != nil || it.Reference != nil, reference: it.Reference,
			}
			s := said{group: it.Group, volumes: it.Volumes, gapBegins: it.GapBegins, gapEnds: it.GapEnds}
			for _, p := range it.Partials {
				h.Entries[i].Partial = append(h.Entries[i].Partial, p.Volume)
			}
			if n == uint64(len(chain)) {
				h.Resyncs = it.Partials
			}
			things[i] = s
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if things[0].group == nil {
		return format.Corrupt("log entry 1", "it does not describe the group")
	}
	h.Group = *things[0].group
	h.gaps = map[block.VolumeIndex][]Gap{}
	h.points = map[block.VolumeIndex][]Checkpoint{}
	names := map[block.Seq][]string{}
	last := block.Seq(0)
	for i := range h.Entries {
		e := &h.Entries[i]
		for _, v := range things[i].volumes {
			h.volumes = append(h.volumes, Volume{Volume: v, JoinedN: e.N})
		}
		if e.Range == nil {
			for _, c := range e.Names {
				names[c.Seq] = append(names[c.Seq], c.Name)
			}
			continue
		}
		if e.Range.To < last {
			return format.Corrupt(fmt.Sprintf("log entry %d", e.N), "it ends at seq %s, before the end of the entry before it, %s", e.Range.To, last)
		}
		last = e.Range.To
		for _, b := range things[i].gapBegins {
			h.gaps[b.Volume] = append(h.gaps[b.Volume], Gap{After: b.After, Open: true, Reason: b.Reason, BeginN: e.N, Begin: e.Time()})
		}
		for _, v := range things[i].gapEnds {
			for j := range h.gaps[v] {
				if g := &h.gaps[v][j]; g.Open {
					g.Open, g.Until, g.EndN, g.End = false, last, e.N, e.Time()
				}
			}
		}
		for _, v := range h.volumes {
			open := slices.ContainsFunc(h.gaps[v.Index], func(g Gap) bool { return g.Open })
			if open || slices.Contains(e.Partial, v.Index) {
				continue
			}
			p := Checkpoint{N: e.N, Seq: last, Time: e.Time(), Unconfirmed: e.Unconfirmed}
			// Of several entries that end at one seq, the last one counts.
			if k := len(h.points[v.Index]); k > 0 && h.points[v.Index][k-1].Seq == last {
				h.points[v.Index][k-1] = p
			} else {
				h.points[v.Index] = append(h.points[v.Index], p)
			}
		}
		for _, c := range e.Names {
			names[c.Seq] = append(names[c.Seq], c.Name)
		}
	}
	for _, points := range h.points {
		for i := range points {
			points[i].Names = names[points[i].Seq]
		}
	}
	return nil
}

// errNoCopy: a store has nothing of that name and, unlike where ErrNotFound is
// the answer, need not have it.
var errNoCopy = errors.New("it has no copy")
