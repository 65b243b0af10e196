package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/repo"
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

// State is what a writer keeps durably on its host.
type State interface {
	// Epochs are the epochs that were taken with this state.
	Epochs() []format.Epoch
	// AddEpoch makes e durable before it returns.
	AddEpoch(e format.Epoch) error
	// Tails are the ends of the logs as last saved; nil if nothing was saved.
	Tails() *Tails
	// SaveTails keeps t, not necessarily durably.
	SaveTails(t *Tails) error
}

// Tails are a place from which the logs can be read on.
type Tails struct {
	N    uint64 // the newest entry that is known to be decided
	Hash format.Hash
	Logs []StoreTail
}

// StoreTail is how far one store's log was read, and what it is known to hold.
type StoreTail struct {
	grouplog.Acceptor
	Whole uint64 // up to this entry the log holds what was chosen
}

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
}

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

	mu       sync.Mutex
	changed  chan struct{}       // closed and replaced whenever something below changes
	views    []view              // one for each store
	tails    map[block.ID]uint64 // how long each store's log is, by any object read
	epoch    format.Epoch        // ours, once it is durable
	decided  position
	told     position // the newest entry that OnEntry was told of, or that was known before
	want     position // what the stores shall hold: decided, or one beyond
	floor    uint64   // below it no view need know an entry: it is decided, and is read back where it is missing
	inOffice bool
	trouble  error // why this host cannot take office yet
}

// view is what others may know of a storeLog.
type view struct {
	acc      grouplog.Acceptor // without its entries
	entries  map[uint64]grouplog.Accepted
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
	l := &Log{cfg: cfg, set: cfg.Repo.Set(), changed: make(chan struct{}), tails: map[block.ID]uint64{}}
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

// poke has those who wait look again.
func (l *Log) poke() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notify()
}

func (l *Log) notify() {
	close(l.changed)
	l.changed = make(chan struct{})
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
	for i := range l.stores {
		if l.stores[i] == s {
			v := &l.views[i]
			v.acc, v.date = s.acc, s.date.Load()
			if a, ok := s.acc.Entry(n); ok {
				v.entries[n] = a
			}
			l.advance(i)
		}
	}
	l.notify()
}

func (l *Log) set1(s *storeLog, f func(v *view)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.stores {
		if l.stores[i] == s {
			f(&l.views[i])
		}
	}
	l.notify()
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

// await calls ready, with l.mu held, after every change until it returns true.
func (l *Log) await(ctx context.Context, ready func() bool) error {
	for {
		l.mu.Lock()
		ok, changed := ready(), l.changed
		l.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
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

// lost reports whether a majority can no longer be had; l.mu is held.
func (l *Log) lost() bool {
	return !l.set.Majority(l.set.Votes() - l.votes(func(v *view) bool { return v.fenced }))
}

// Run works on the stores' logs until ctx ends: each store by its own
// goroutine.
func (l *Log) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range l.stores {
		if s.member.Store == nil {
			l.set1(s, func(v *view) { v.downFrom, v.lastErr = l.cfg.Now(), s.member.Err })
			continue
		}
		wg.Go(func() { s.run(ctx) })
	}
	wg.Wait()
	return nil
}

// run keeps one store's log up with what is wanted.
func (s *storeLog) run(ctx context.Context) {
	var pause, noSource backoff
	for ctx.Err() == nil {
		err := s.work(ctx, func() { pause.reset(); noSource.reset() })
		if ctx.Err() != nil {
			return
		}
		var corrupt *format.CorruptError
		switch {
		case errors.Is(err, errNoSource): // not this store's fault, whatever the reason
			s.log.set1(s, func(v *view) { v.lastErr = err })
			s.log.cfg.Logger.Warn("a store lacks an entry that cannot be read from another one now; trying again", "store", s.member.URL(), "error", err)
			if noSource.wait(ctx) != nil {
				return
			}
		case errors.Is(err, errFencedHere):
			s.log.set1(s, func(v *view) { v.fenced, v.lastErr = true, err })
			s.log.cfg.Logger.Warn("another writer's promise stands in this store's log: it has no vote for us any more",
				"store", s.member.URL(), "epoch", s.acc.Promised.String())
			return
		case errors.As(err, &corrupt):
			s.log.set1(s, func(v *view) { v.broken, v.lastErr = err, err })
			s.log.cfg.Logger.Error("this store's log is damaged: it has no vote and is not written", "store", s.member.URL(), "error", err)
			return
		case err != nil:
			s.log.set1(s, func(v *view) {
				if v.downFrom.IsZero() {
					v.downFrom = s.log.cfg.Now()
					s.log.cfg.Logger.Warn("a store's log cannot be reached; trying again", "store", s.member.URL(), "error", err)
				}
				v.lastErr = err
			})
			if pause.wait(ctx) != nil {
				return
			}
		}
	}
}

// work does what is to be done on the store's log, and returns the first
// failure. It calls well after each thing that the store has done.
func (s *storeLog) work(ctx context.Context, well func()) error {
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	if err := s.whollyRead(ctx); err != nil {
		return err
	}
	up := func() {
		well()
		s.log.set1(s, func(v *view) {
			if !v.downFrom.IsZero() {
				s.log.cfg.Logger.Info("a store's log is reached again", "store", s.member.URL(), "down_for", s.log.cfg.Now().Sub(v.downFrom).Round(time.Second).String())
			}
			v.loaded, v.downFrom, v.lastErr = true, time.Time{}, nil
		})
	}
	up()
	for {
		var epoch format.Epoch
		var next position
		var known uint64
		err := s.log.await(ctx, func() bool {
			if known = s.log.tails[s.member.ID]; known > s.acc.Next {
				return true
			}
			epoch = s.log.epoch
			next = s.next()
			return !epoch.IsZero() && (s.acc.Promised != epoch || next.N > 0)
		})
		if err != nil {
			return err
		}
		if known > s.acc.Next {
			// Another store's object says that this log was longer when it was
			// written. Either it has grown since it was read, or it was cut back.
			if err := s.catchUp(ctx); err != nil {
				return err
			}
			if s.acc.Next < known {
				return format.Corrupt(s.member.URL()+" "+format.LogPrefix(s.log.cfg.Group),
					"its log has %d objects, and another store says that it had %d: it was rolled back or damaged", s.acc.Next, known)
			}
			continue
		}
		if s.acc.Promised != epoch {
			if err := s.append(ctx, format.LogPromise, epoch, 0, nil); err != nil {
				return err
			}
			up()
			continue
		}
		old := next.Hash == format.Hash{}
		raw, err := s.wanted(ctx, &next)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%w: %w", errNoSource, err)
		}
		if a, ok := s.acc.Entry(next.N); !old || !ok || a.Hash != next.Hash {
			if err := s.append(ctx, format.LogCommit, epoch, next.N, raw); err != nil {
				return err
			}
			up()
		}
		if old {
			s.log.holdsOld(s, next.N)
		}
	}
}

// wanted returns the bytes of an entry that the log lacks, and its hash if p
// has none.
func (s *storeLog) wanted(ctx context.Context, p *position) (raw []byte, err error) {
	if p.Hash != (format.Hash{}) {
		if raw, err = s.log.value(ctx, *p); err == nil || !s.log.isDecided(p.N) {
			return raw, err
		}
	}
	if s.past == nil {
		s.past = &past{log: s.log, of: s}
	}
	*p, raw, err = s.past.entry(ctx, p.N)
	return raw, err
}

func (l *Log) isDecided(n uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return n <= l.decided.N
}

// holdsOld takes note that s holds entry n, which is below the floor, as it was
// chosen.
func (l *Log) holdsOld(s *storeLog, n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.whole == n-1 {
		s.whole = n
		l.notify()
	}
}

// next is the first entry up to the wanted one that this log does not hold as
// it was chosen, or the zero position. The wanted entry itself must be held
// under the own epoch unless it is known to be decided. The hash is zero if it
// must be found out first. l.mu is held.
func (s *storeLog) next() position {
	before := s.whole
	s.log.advance(s.i)
	if s.whole != before {
		s.log.notify() // Safe may have grown
	}
	if s.whole >= s.log.want.N {
		return position{}
	}
	return position{s.whole + 1, s.log.chosen(s.whole + 1).Hash}
}

// advance notes up to where store i holds what was chosen; l.mu is held.
func (l *Log) advance(i int) {
	s := l.stores[i]
	for s.whole < l.want.N {
		n := s.whole + 1
		chosen := l.chosen(n)
		a, ok := l.views[i].entries[n]
		if chosen.N == 0 || !ok || a.Hash != chosen.Hash || (n == l.want.N && n > l.decided.N && a.Epoch != l.epoch) {
			return
		}
		s.whole = n
	}
}

// settled notes that p is decided, and forgets what was decided long before: an
// outage of one store must not fill the memory. What a store lacks of that is
// read back from another one. l.mu is held.
func (l *Log) settled(p position) {
	l.decided = p
	if p.N > keptEntries {
		l.floor = max(l.floor, p.N-keptEntries)
	}
	for i := range l.views {
		l.advance(i)
		whole := l.stores[i].whole
		maps.DeleteFunc(l.views[i].entries, func(n uint64, _ grouplog.Accepted) bool { return n < l.floor && n <= whole })
	}
	l.notify()
}

// forgettable is the entry below which s need not remember what it accepted.
func (l *Log) forgettable(s *storeLog) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return min(l.floor, s.whole+1)
}

// chosen is the value of entry n: the wanted one, or of all that the stores
// have accepted the one of the highest epoch. Below the floor the views may know
// of values only that were not chosen, so there it is not known. l.mu is held.
func (l *Log) chosen(n uint64) position {
	switch {
	case n == l.want.N:
		return l.want
	case n == l.decided.N:
		return l.decided
	case n < l.floor:
		return position{}
	}
	var best grouplog.Accepted
	for i := range l.views {
		if a, ok := l.views[i].entries[n]; ok && (best.N == 0 || best.Epoch.Less(a.Epoch)) {
			best = a
		}
	}
	return position{best.N, best.Hash}
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

// TakeOffice makes this agent the group's one writer: it waits until a
// majority of the stores has been read, checks that the last writer was this
// host (or a takeover was asked for), makes a new epoch durable, promises it
// on a majority, and settles the entry that may be undecided. Run must be
// running. It waits for ever for stores that cannot be reached.
func (l *Log) TakeOffice(ctx context.Context) error {
	loaded := func(v *view) bool { return v.loaded && v.broken == nil }
	if err := l.await(ctx, func() bool { return l.set.Majority(l.votes(loaded)) }); err != nil {
		return err
	}
	// What another agent promised on the other stores is to be known, too: an
	// epoch below it would have no vote there for as long as this agent lives.
	soon, cancel := context.WithTimeout(ctx, othersWait)
	_ = l.await(soon, func() bool {
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
	l.notify()
	l.mu.Unlock()

	promised := func(v *view) bool { return loaded(v) && !v.fenced && v.acc.Promised == e }
	fenced := false
	err := l.await(ctx, func() bool {
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
	l.notify()
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
	v, err := grouplog.VerifyValue(l.cfg.Ring.Root(), name, raw)
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
	err := l.await(ctx, func() bool {
		fenced = l.lost()
		return fenced || l.set.Majority(l.votes(func(v *view) bool { return l.holds(v, p) }))
	})
	if err == nil && fenced {
		err = ErrFenced
	}
	return err
}

// holds reports whether a store has accepted p under the own epoch, or has
// gone on to a later entry; l.mu is held.
func (l *Log) holds(v *view, p position) bool {
	a, ok := v.entries[p.N]
	return ok && a.Epoch == l.epoch && a.Hash == p.Hash
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
	l.notify()
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

// Safe is the newest decided entry that more than lost stores hold, with
// everything before it: that many stores can go and it is still there. What a
// store accepted from a writer before, and was not chosen, does not count.
func (l *Log) Safe(lost int) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.safe(lost)
}

func (l *Log) safe(lost int) uint64 {
	var held []uint64
	for i := range l.views {
		if l.views[i].broken == nil {
			held = append(held, l.stores[i].whole)
		}
	}
	slices.Sort(held)
	if len(held) <= lost {
		return 0
	}
	return min(l.decided.N, held[len(held)-1-lost])
}

// AwaitSafe waits until Safe(lost) has passed after.
func (l *Log) AwaitSafe(ctx context.Context, lost int, after uint64) error {
	return l.await(ctx, func() bool { return l.safe(lost) > after })
}

// Dates are the stores' clocks in their latest answers.
func (l *Log) Dates() []format.StoreDate {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []format.StoreDate
	for i := range l.views {
		if d := l.views[i].date; d != 0 {
			out = append(out, format.StoreDate{Store: l.stores[i].member.ID, Time: d})
		}
	}
	return out
}

// StoreStatus is the state of one store's log for status and metrics.
type StoreStatus struct {
	Store     block.ID
	URL       string
	State     string    // "up", "down", "fenced", "damaged", "joining"
	Since     time.Time // when it went down
	LastError string
	Entry     uint64 // newest entry that it holds
}

// Status describes every store.
func (l *Log) Status() []StoreStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]StoreStatus, len(l.stores))
	for i, s := range l.stores {
		v := &l.views[i]
		st := StoreStatus{Store: s.member.ID, URL: s.member.URL(), State: "up", Since: v.downFrom, Entry: v.acc.Latest.N}
		switch {
		case v.broken != nil:
			st.State = "damaged"
		case v.fenced:
			st.State = "fenced"
		case !v.downFrom.IsZero():
			st.State = "down"
		case !v.loaded:
			st.State = "joining"
		}
		if v.lastErr != nil {
			st.LastError = v.lastErr.Error()
		}
		out[i] = st
	}
	return out
}

// Contested reports whether a minority of the stores follows another writer.
func (l *Log) Contested() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.votes(func(v *view) bool { return v.fenced }) > 0 && !l.lost()
}

// InOffice reports whether TakeOffice has succeeded.
func (l *Log) InOffice() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inOffice
}

// OutOfReach reports whether so many stores have failed that no majority can
// be had until some of them are back.
func (l *Log) OutOfReach() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	down := l.votes(func(v *view) bool { return !v.downFrom.IsZero() || v.broken != nil })
	return !l.set.Majority(l.set.Votes() - down)
}

// Exposed reports whether the newest decided entry is on no more stores than
// lost, the number that may be lost.
func (l *Log) Exposed(lost int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.safe(lost) < l.decided.N
}
