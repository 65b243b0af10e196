package uploader

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/repo"
)

// LogConfig is what a Log works by.
type LogConfig struct {
	Repo     *repo.Repository
	Group    block.GroupID
	Agent    *crypt.Agent
	Ring     *crypt.Ring
	State    State
	Takeover bool
	Now      func() time.Time
	Logger   *slog.Logger
	// OnEntry is told of each decided entry that this host's state did not
	// know, and of each that this writer decides, in order.
	OnEntry func(e *grouplog.Entry) error
	// KeySet brings a key set into the ring that an entry before the saved
	// Tails had brought; nil if nothing was saved.
	KeySet func(id block.ID) error
	// Ours is asked of the newest entry before an epoch is promised, and of each
	// entry before OnEntry is told of it: whether this host holds what it says.
	// An error, which should be a *DivergedError, ends TakeOffice with it. The
	// newest entry has no items if it cannot be opened yet. nil: nothing is asked.
	Ours func(e *grouplog.Entry) error
	// OnOffice is called before TakeOffice succeeds, when all entries up to the
	// newest are known and no value of this writer exists. It is called again if
	// it fails. May be nil.
	OnOffice func() error
	// Office is an earlier office of this host, if there was one: what it passed by
	// is no history.
	Office Office
}

// Office is a time in which a host was the group's one writer.
type Office struct {
	Epoch format.Epoch `json:"epoch"`
	N     uint64       `json:"n"` // the newest entry when it began
}

// passedBy reports whether an entry was left behind on a minority of the stores by a
// writer that this office has fenced: it stands behind the newest entry that a
// majority knew, under a lower epoch. It is not decided and never will be. From the
// logs alone that cannot be told, because who brings a store up to date appends old
// entries under a new epoch.
func (o Office) passedBy(a grouplog.Accepted) bool { return a.N > o.N && a.Epoch.Less(o.Epoch) }

// position is an entry of the history.
type position struct {
	N    uint64
	Hash format.Hash
}

// Log is this agent's hand on a group's logs.
type Log struct {
	cfg    LogConfig
	set    grouplog.StoreSet
	stores []*storeLog
	values values

	mu       monitor
	views    []view              // one for each store
	tails    map[block.ID]uint64 // how long each store's log is, by any object read
	epoch    format.Epoch        // ours, once it is durable
	decided  position
	told     position // the newest entry that OnEntry was told of, or that was known before
	want     position // what the stores shall hold: decided, or one beyond
	floor    uint64   // below it no view need know an entry: it is decided, and is read back where it is missing
	promised bool     // a majority has promised our epoch: not before is a commit appended, so that a commit tells that its epoch was in office
	inOffice bool
	unplaced int   // shards of decided entries that are not on their stores
	trouble  error // why this host cannot take office yet
}

// view is what others may know of a storeLog.
type view struct {
	acc      grouplog.Acceptor // without its entries
	entries  map[uint64]grouplog.Accepted
	ends     []grouplog.Acceptor // acc as it was behind each of the last entries, oldest first
	loaded   bool
	fenced   bool
	broken   error // the log is damaged: no vote, not written
	downFrom time.Time
	lastErr  error
	date     int64
}

// NewLog returns a Log. It starts nothing.
func NewLog(cfg LogConfig) *Log {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Repo = Gated(cfg.Repo)
	l := &Log{cfg: cfg, set: cfg.Repo.Set(), tails: map[block.ID]uint64{}}
	t := cfg.State.Tails()
	for _, m := range cfg.Repo.Members {
		s := &storeLog{log: l, i: len(l.stores), member: m, acc: grouplog.Acceptor{Store: m.ID}}
		if t != nil {
			for _, a := range t.Logs {
				if a.Store == m.ID {
					s.acc, s.whole, s.saved = a.Acceptor, min(a.Whole, t.N), true
				}
			}
			l.decided, l.floor = position{t.N, t.Hash}, t.N
		}
		l.stores = append(l.stores, s)
		v := view{acc: s.acc, entries: map[uint64]grouplog.Accepted{}}
		if a := s.acc.Latest; a.N > 0 {
			v.entries[a.N] = a
		}
		l.views = append(l.views, v)
	}
	l.want, l.told = l.decided, l.decided
	return l
}

// Run works on the stores' logs until ctx ends: each store by its own
// goroutine.
func (l *Log) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range l.stores {
		if s.member.Store == nil {
			s.change(func(v *view) { v.downFrom, v.lastErr = l.cfg.Now(), s.member.Err })
			continue
		}
		wg.Go(func() { s.run(ctx) })
	}
	wg.Wait()
	return nil
}

// poke has those who wait look again.
func (l *Log) poke() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.notify()
}

// votes counts the votes of stores for which in holds; l.mu is held.
func (l *Log) votes(in func(v *view) bool) int {
	n := 0
	for i := range l.views {
		if in(&l.views[i]) {
			n += l.set[i].Votes
		}
	}
	return n
}

// publish shows others what s knows, entry n in particular if that is not 0,
// and what its newest object says of the stores' tails. Entry n need not be the
// newest: a log may hold a later one that an older writer left.
func (l *Log) publish(s *storeLog, n uint64, tails []format.Tail) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range tails {
		l.tails[t.Store] = max(l.tails[t.Store], t.Next)
	}
	v := &l.views[s.i]
	v.acc, v.date = s.acc, s.date.Load()
	if a, ok := s.acc.Entry(n); ok {
		v.entries[n] = a
		if v.ends = append(v.ends, v.acc); len(v.ends) > keptEntries {
			v.ends = slices.Delete(v.ends, 0, len(v.ends)-keptEntries)
		}
	}
	l.advance(s.i)
	l.mu.notify()
}

// change changes what others see of s.
func (s *storeLog) change(f func(v *view)) {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.views[s.i])
	l.mu.notify()
}

// known is what a new wrapper says of the logs.
func (l *Log) known() (decided uint64, tails []format.Tail) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.views {
		if v.loaded {
			tails = append(tails, v.acc.Tail())
		}
	}
	return l.decided.N, tails
}

// value returns the bytes of an entry, from memory or from a store that has
// it.
func (l *Log) value(ctx context.Context, p position) ([]byte, error) {
	n, hash := p.N, p.Hash
	if raw := l.values.get(n, hash); raw != nil {
		return raw, nil
	}
	type place struct {
		s *storeLog
		a grouplog.Accepted
	}
	var places []place
	l.mu.Lock()
	for i := range l.views {
		if a, ok := l.views[i].entries[n]; ok {
			places = append(places, place{l.stores[i], a})
		}
	}
	l.mu.Unlock()
	err := fmt.Errorf("entry %d is in no store that can be reached", n)
	for _, p := range places {
		if p.a.Hash != hash {
			continue
		}
		var raw []byte
		if raw, err = p.s.get(ctx, p.a.Index); err != nil {
			continue
		}
		o, _, _, derr := format.DecodeLogObject(p.s.member.URL(), raw)
		if derr != nil || format.HashOf(o.Value) != hash {
			err = format.Corrupt(p.s.member.URL()+" "+format.LogName(l.cfg.Group, p.a.Index), "it has changed since it was read")
			continue // of another store: this one's reader is not to blame
		}
		return o.Value, nil
	}
	return nil, fmt.Errorf("%w: %w", errNoSource, err)
}

// Next is the number of the next entry, and the hash of the one before it.
func (l *Log) Next() (n uint64, parent format.Hash, epoch format.Epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.decided.N + 1, l.decided.Hash, l.epoch
}

// Append has value decided as the next entry: it returns nil when a majority
// of the stores holds it, ErrFenced when it never will.
func (l *Log) Append(ctx context.Context, value []byte) error {
	l.mu.Lock()
	p := position{l.decided.N + 1, format.HashOf(value)}
	l.values.keep(p.N, p.Hash, value)
	l.want = p
	l.mu.notify()
	l.mu.Unlock()
	if err := l.awaitDecided(ctx, p); err != nil {
		return err
	}
	l.mu.Lock()
	l.settled(p)
	l.mu.Unlock()
	return nil
}

// Save has the state keep the ends of the logs, so that the next start reads
// them from here on. It is for the host to call once it has noted itself what is
// decided, and not while an Append is under way.
func (l *Log) Save() error {
	l.mu.Lock()
	t := &Tails{N: l.decided.N, Hash: l.decided.Hash}
	for i := range l.views {
		if v := &l.views[i]; v.broken == nil && v.acc.Next > 0 {
			t.Logs = append(t.Logs, StoreTail{v.acc, min(l.stores[i].whole, t.N)})
		}
	}
	l.mu.Unlock()
	return l.cfg.State.SaveTails(t)
}
