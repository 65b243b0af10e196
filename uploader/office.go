package uploader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
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

// DivergedError says that the history holds what this host does not: another
// host has written it, or a copy of this one's state that went on by itself. Who
// went on from here would lay its writes over a history that its volumes do not
// hold. It is ErrFenced: this writer commits nothing until a person decides.
type DivergedError struct {
	N     uint64
	To    block.Seq // end of what the entry covers
	Known block.Seq // how far this host knows the history
	Epoch format.Epoch
}

func (e *DivergedError) Error() string {
	return fmt.Sprintf("log entry %d (seq %s, epoch %s) was written by another agent, or by a copy of this one, and this host, which is at seq %s, does not hold it: stop that agent, and pass --takeover to go on from this host's volumes, which are then compared with the history in full",
		e.N, e.To, e.Epoch, e.Known)
}

// Unwrap makes it ErrFenced.
func (e *DivergedError) Unwrap() error { return ErrFenced }

// TakeOffice makes this agent the group's one writer: it waits until a
// majority of the stores has been read, checks that the last writer was this
// host (or a takeover was asked for) and that this host holds the history, makes
// a new epoch durable, promises it on a majority, and settles the entry that may
// be undecided. Run must be running. It waits for ever for stores that cannot be
// reached.
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
	if err := l.mayTakeOffice(own); err != nil && !l.cfg.Takeover {
		return err
	}
	if err := l.knowsNewest(ctx); err != nil {
		return err
	}
	var last format.Epoch
	l.mu.Lock()
	for i := range l.views {
		if v := &l.views[i]; loaded(v) && last.Less(v.acc.Promised) {
			last = v.acc.Promised
		}
	}
	l.mu.Unlock()
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
	l.mu.Lock()
	l.promised = true
	l.mu.notify()
	l.mu.Unlock()
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

// mayTakeOffice reports who else is in office, or may be: a store has promised
// an epoch that is not one of own, is higher than every one of these that is
// known to have been in office, and may have been promised by a majority. An own
// epoch that is higher still proves nothing as long as a minority only has
// promised it: then it was the other one that had the majority.
func (l *Log) mayTakeOffice(own []format.Epoch) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var held format.Epoch // the highest own epoch that was in office
	for _, e := range own {
		inOffice := l.set.Majority(l.votes(func(v *view) bool { return v.acc.Promised == e })) ||
			slices.ContainsFunc(l.views, func(v view) bool { return v.acc.Latest.Epoch == e }) // who commits was in office
		if inOffice && held.Less(e) {
			held = e
		}
	}
	var other *LockedError
	for i := range l.views {
		v := &l.views[i]
		e := v.acc.Promised
		if !v.loaded || v.broken != nil || !held.Less(e) || slices.Contains(own, e) {
			continue
		}
		// A store that has promised a higher one may have promised e before.
		may := l.votes(func(o *view) bool { return !o.loaded || o.broken != nil || !o.acc.Promised.Less(e) })
		if l.set.Majority(may) && (other == nil || other.Epoch.Less(e)) {
			other = &LockedError{Epoch: e, Store: l.stores[i].member.URL()}
		}
	}
	if other == nil {
		return nil
	}
	return other
}

// newestTries is how often the newest entry is asked for before an epoch is
// promised over it unread.
const newestTries = 5

// knowsNewest asks Ours of the newest entry that a store has accepted, so that a
// host whose state is an old copy, or that has been replaced, ends before it has
// disturbed whoever goes on. Of an entry under a key set that this host has not met
// only what is not sealed is asked about: its number, and whose it is. What cannot
// be read here is read when the log is settled, and asked about then.
func (l *Log) knowsNewest(ctx context.Context) error {
	if l.cfg.Ours == nil {
		return nil
	}
	var newest position
	var at format.Epoch
	l.mu.Lock()
	for i := range l.views {
		a := l.views[i].acc.Latest
		if l.cfg.Office.passedBy(a) {
			continue
		}
		if a.N > newest.N || (a.N == newest.N && at.Less(a.Epoch)) {
			newest, at = position{a.N, a.Hash}, a.Epoch
		}
	}
	known := l.told.N
	l.mu.Unlock()
	if newest.N <= known {
		return nil
	}
	var pause backoff
	raw, err := l.value(ctx, newest)
	for try := 1; err != nil && try < newestTries && pause.wait(ctx) == nil; try++ {
		raw, err = l.value(ctx, newest)
	}
	if err != nil {
		return ctx.Err()
	}
	e, err := l.open(newest.N, raw)
	if err != nil {
		v, verr := grouplog.VerifyValue(l.cfg.Ring.Root(), fmt.Sprintf("log entry %d", newest.N), raw)
		if verr != nil {
			return ctx.Err()
		}
		e = &grouplog.Entry{Value: v, Hash: newest.Hash, Raw: raw, Items: &format.Items{}}
	}
	return l.cfg.Ours(e)
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
			if l.cfg.Office.passedBy(a) {
				continue
			}
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
		if l.cfg.Ours != nil {
			if err := l.cfg.Ours(entry); err != nil {
				return err
			}
		}
		if err := l.cfg.OnEntry(entry); err != nil {
			return err
		}
		told = p
		l.mu.Lock()
		l.told = told
		l.mu.Unlock()
	}
	if l.cfg.OnOffice != nil {
		if err := l.cfg.OnOffice(); err != nil {
			return err
		}
	}
	l.mu.Lock()
	l.inOffice = true
	l.settled(last)
	l.mu.Unlock()
	// The next start shall see that this epoch was in office, also where a store
	// that has promised it cannot be read then.
	if err := l.Save(); err != nil {
		l.cfg.Logger.Warn("save how far the logs were read; a restart will read them again", "error", err)
	}
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
	if _, ok := l.cfg.Ring.Set(v.KeySet); !ok && !brings(v) && l.cfg.KeySet != nil {
		if err := l.cfg.KeySet(v.KeySet); err != nil {
			return nil, err
		}
	}
	return grouplog.OpenValue(l.cfg.Ring, name, raw)
}

// brings reports whether an entry brings the key set that it is sealed with. What it
// brings may as well be another one: that of a batch which an earlier start has cut.
func brings(v format.Value) bool {
	for _, raw := range v.KeySets {
		if k, _, _, err := format.DecodeKeySet(raw); err == nil && k.ID == v.KeySet {
			return true
		}
	}
	return false
}

// withKeySets calls open again for each key set that it says is not in the ring,
// once that has been brought there: a start knows the key sets of its own entries
// and batches, and not those of all the history before it.
func (l *Log) withKeySets(open func() error) error {
	var last block.ID
	for {
		err := open()
		var no *crypt.NoKeySetError
		if !errors.As(err, &no) || no.KeySet == last || l.cfg.KeySet == nil {
			return err
		}
		last = no.KeySet
		if kerr := l.cfg.KeySet(no.KeySet); kerr != nil {
			return errors.Join(err, kerr)
		}
	}
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
