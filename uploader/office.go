package uploader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
)

// othersWait is how long taking office waits for the stores beyond a majority.
const othersWait = 2 * time.Second

// ErrFenced means: another writer has taken over. This one can commit nothing any
// more, and its exports must take no more writes.
var ErrFenced = errors.New("fenced: another agent has taken over this group")

// LockedError says that another writer is in office and a takeover was not
// asked for.
type LockedError struct {
	Epoch format.Epoch
	Since time.Time // the newest time that the other writer gave
	Store string
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("this group is written by another agent (epoch %s in %s): stop that agent first, or pass --takeover to fence it for good",
		e.Epoch, e.Store)
}

// TakeOffice makes this agent the group's one writer: it waits until a
// majority of the stores has been read, checks that the last writer was this
// host (or a takeover was asked for), makes a new epoch durable, promises it
// on a majority, and settles the entry that may be undecided. Run must be
// running. It waits for ever for stores that cannot be reached.
func (l *Log) TakeOffice(ctx context.Context) error {
	loaded := func(v *view) bool { return v.loaded && v.broken == nil }
	if err := l.mu.await(ctx, 0, func() bool { return l.set.Majority(l.votes(loaded)) }); err != nil {
		return err
	}
	// What another agent promised on the other stores is to be known, too: an
	// epoch below it would have no vote there for as long as this agent lives.
	soon, cancel := context.WithTimeout(ctx, othersWait)
	_ = l.mu.await(soon, 0, func() bool {
		return !slices.ContainsFunc(l.views, func(v view) bool { return !v.loaded && v.broken == nil && v.downFrom.IsZero() })
	})
	cancel()
	if err := ctx.Err(); err != nil {
		return err
	}
	own := l.cfg.State.Epochs()
	var last format.Epoch
	var where string
	l.mu.Lock()
	for i := range l.views {
		if v := &l.views[i]; loaded(v) && last.Less(v.acc.Promised) {
			last, where = v.acc.Promised, l.stores[i].member.URL()
		}
	}
	l.mu.Unlock()
	if !last.IsZero() && !slices.Contains(own, last) && !l.cfg.Takeover {
		return &LockedError{Epoch: last, Store: where}
	}
	e := format.Epoch{Number: last.Number + 1, Random: block.NewID()}
	for _, o := range own {
		e.Number = max(e.Number, o.Number+1)
	}
	var pause backoff
	for {
		err := l.cfg.State.AddEpoch(e)
		l.setTrouble("keep an epoch before it is used", err)
		if err == nil {
			break
		}
		if pause.wait(ctx) != nil {
			return ctx.Err()
		}
	}
	l.mu.Lock()
	l.epoch = e
	l.mu.notify()
	l.mu.Unlock()

	promised := func(v *view) bool { return loaded(v) && !v.fenced && v.acc.Promised == e }
	fenced := false
	err := l.mu.await(ctx, 0, func() bool {
		fenced = l.lost()
		return fenced || l.set.Majority(l.votes(promised))
	})
	if err != nil {
		return err
	}
	if fenced {
		return ErrFenced
	}
	for pause.reset(); ; {
		err := l.settle(ctx, promised)
		var corrupt *format.CorruptError
		if err != nil && (ctx.Err() != nil || errors.Is(err, ErrFenced) || (errors.As(err, &corrupt) && !errors.Is(err, errNoSource))) {
			return err
		}
		l.setTrouble("read the newest history", err)
		if err == nil {
			break
		}
		if pause.wait(ctx) != nil {
			return ctx.Err()
		}
	}
	l.cfg.Logger.Info("in office: this agent writes the group's history", "group_id", l.cfg.Group.String(), "epoch", e.String(), "entry", l.decided.N)
	return nil
}

// settle finds the last entry among the stores that have promised, has it
// decided under the own epoch, and tells OnEntry of all entries that are new
// to this host. After an error it may be called again: it goes on where it was.
func (l *Log) settle(ctx context.Context, promised func(v *view) bool) error {
	l.mu.Lock()
	var n uint64
	byN := map[uint64]grouplog.Accepted{}
	for i := range l.views {
		v := &l.views[i]
		if !promised(v) {
			continue
		}
		for k, a := range v.entries {
			if old, ok := byN[k]; !ok || old.Epoch.Less(a.Epoch) {
				byN[k] = a
			}
			n = max(n, k)
		}
	}
	from, begun := l.decided, l.want
	told := l.told
	l.mu.Unlock()
	last := position{n, byN[n].Hash}
	if n <= from.N {
		last = from
	}
	if begun.N > from.N {
		last = begun // stores that have promised since do not change what was adopted
	}
	if last.N > from.N {
		before := from.Hash
		if last.N > from.N+1 {
			before = byN[last.N-1].Hash
		}
		if err := l.fits(ctx, last, before); err != nil {
			return err
		}
	}
	l.mu.Lock()
	l.want = last
	l.mu.notify()
	l.mu.Unlock()
	if last.N > from.N {
		if err := l.awaitDecided(ctx, last); err != nil {
			return err
		}
	}
	for k := told.N + 1; k <= last.N; k++ {
		p := last
		if k < last.N {
			a, ok := byN[k]
			if !ok {
				return fmt.Errorf("entry %d of the log is missing in every store that can be reached", k)
			}
			p = position{k, a.Hash}
		}
		raw, err := l.value(ctx, p)
		if err != nil {
			return err
		}
		entry, err := l.open(k, raw)
		if err != nil {
			return err
		}
		if k > 1 && (told.Hash != format.Hash{}) && entry.Parent != told.Hash {
			return format.Corrupt(fmt.Sprintf("log entry %d", k), "it does not follow the entry before it")
		}
		if err := l.cfg.OnEntry(entry); err != nil {
			return err
		}
		told = p
		l.mu.Lock()
		l.told = told
		l.mu.Unlock()
	}
	l.mu.Lock()
	l.inOffice = true
	l.settled(last)
	l.mu.Unlock()
	return nil
}

// fits checks that the value p names before as its parent: only then may it be
// adopted.
func (l *Log) fits(ctx context.Context, p position, before format.Hash) error {
	raw, err := l.value(ctx, p)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("log entry %d", p.N)
	v, err := grouplog.VerifyValue(l.cfg.Ring.Root(), name, raw)
	if err != nil {
		return err
	}
	if v.N != p.N || v.Group != l.cfg.Group || v.Parent != before {
		return format.Corrupt(name, "it does not follow the entry before it")
	}
	return nil
}

// open opens the value of entry n.
func (l *Log) open(n uint64, raw []byte) (*grouplog.Entry, error) {
	name := fmt.Sprintf("log entry %d", n)
	v, _, _, _, err := format.DecodeValue(name, raw) // verified when it is opened
	if err != nil {
		return nil, err
	}
	if _, ok := l.cfg.Ring.Set(v.KeySet); !ok && len(v.KeySets) == 0 && l.cfg.KeySet != nil {
		if err := l.cfg.KeySet(v.KeySet); err != nil {
			return nil, err
		}
	}
	return grouplog.OpenValue(l.cfg.Ring, name, raw)
}

// awaitDecided waits until a majority holds p under the own epoch.
func (l *Log) awaitDecided(ctx context.Context, p position) error {
	fenced := false
	err := l.mu.await(ctx, 0, func() bool {
		fenced = l.lost()
		return fenced || l.set.Majority(l.votes(func(v *view) bool { return l.holds(v, p) }))
	})
	if err == nil && fenced {
		err = ErrFenced
	}
	return err
}

// holds reports whether a store has accepted p under the own epoch; l.mu is held.
func (l *Log) holds(v *view, p position) bool {
	a, ok := v.entries[p.N]
	return ok && a.Epoch == l.epoch && a.Hash == p.Hash
}

// lost reports whether a majority can no longer be had; l.mu is held.
func (l *Log) lost() bool {
	return !l.set.Majority(l.set.Votes() - l.votes(func(v *view) bool { return v.fenced }))
}

// setTrouble notes what keeps this host from taking office; nil: nothing.
func (l *Log) setTrouble(doing string, err error) {
	if err != nil {
		err = fmt.Errorf("%s: %w", doing, err)
		l.cfg.Logger.Warn("this agent cannot write the group's history yet; trying again", "error", err)
	}
	l.mu.Lock()
	l.trouble = err
	l.mu.Unlock()
}

// Trouble is what keeps this host from taking office, other than stores that
// are out of reach; nil if nothing does. It is tried again.
func (l *Log) Trouble() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.trouble
}
