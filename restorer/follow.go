package restorer

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/object"
)

const (
	// forwardObjects is how many objects of a log are asked for one after the other
	// before what there is is listed.
	forwardObjects = 8
	// A history with so many entries behind its digest is opened anew: there is a
	// newer digest by then.
	followEntries = 1024
	// A store that does not answer is left alone for followPause, and longer each
	// time, up to followPauseMax.
	followPause    = 5 * time.Second
	followPauseMax = time.Minute
	// followList is how often logs are listed although nothing new is seen: objects
	// may be lost, and others be behind them.
	followList = 10 * time.Minute
)

// Follower keeps a group's history up to date while it grows. Its histories end at
// the newest entry that is known to be decided: what they say never changes.
//
// To ask whether there is anything new costs one small request, to one store after
// the other. Only if there is are the other logs read, from where they were left.
//
// Its methods are not safe for concurrent use; the histories that it returns are.
type Follower struct {
	cfg     Config
	stores  *stores
	group   block.GroupID
	history *History

	next    int                 // the member that is asked next
	away    map[block.ID]absent // stores that did not answer
	rebased uint64              // entries behind the digest when the history was opened
	behind  bool                // logs were read farther than the history goes, for an error
	listed  time.Time           // when the logs were listed
}

// absent is a store that is left alone for a while.
type absent struct {
	until time.Time
	pause time.Duration
}

// Follow reads the history of a group, of which it leaves out what is not decided.
// Where nothing is yet the error is ErrNoEntries.
func Follow(ctx context.Context, cfg Config, group block.GroupID) (*Follower, error) {
	cfg.defaults()
	cfg.decided = true
	cfg.CacheDir = "" // one that stays open for long would keep the cache's lock
	f := &Follower{cfg: cfg, stores: newStores(&cfg), group: group, away: map[block.ID]absent{}}
	return f, f.open(ctx)
}

func (f *Follower) open(ctx context.Context) error {
	h, err := openHistory(ctx, f.cfg, f.stores, f.group)
	if err != nil {
		return err
	}
	if old := f.history; old != nil && (h.N() < old.N() || !h.has(ctx, old.newest.N, old.newest.Hash)) {
		return format.Corrupt(format.LogPrefix(f.group), "entry %d, which was decided, is not in it any more: the stores were rolled back", old.newest.N)
	}
	f.history, f.rebased, f.behind, f.listed = h, uint64(len(h.tail)), false, time.Now()
	return nil
}

// has reports whether entry n is the one with this hash.
func (h *History) has(ctx context.Context, n uint64, hash format.Hash) bool {
	e, err := h.Entry(ctx, n)
	return err == nil && e.Hash == hash
}

// History is the history as far as it is known.
func (f *Follower) History() *History { return f.history }

// Poll looks whether the history goes on, and reports whether it does. After an error
// the history is what it was, and Poll may be called again.
func (f *Follower) Poll(ctx context.Context) (bool, error) {
	if news, err := f.news(ctx); err != nil || !news {
		return false, err
	}
	n := f.history.N()
	if tail := uint64(len(f.history.tail)); tail < max(followEntries, 2*f.rebased) {
		f.behind = true
		h, err := f.goOn(ctx)
		if err == nil {
			f.history, f.behind = h, false
			return h.N() > n, nil
		}
		if ctx.Err() != nil || isUnreachable(err) {
			return false, err
		}
		f.cfg.Logger.Warn("the history cannot be followed from where it was left; opening it anew", "group", f.group.String(), "error", err)
	}
	err := f.open(ctx)
	return err == nil && f.history.N() > n, err
}

// news reports whether a log has become longer. It asks one store, the next time
// another one: one may be away or, for the writer, out of reach.
func (f *Follower) news(ctx context.Context) (bool, error) {
	if f.behind || time.Since(f.listed) > followList {
		return true, nil
	}
	var failed error
	logs := f.history.logs
	for range logs {
		l := logs[f.next%len(logs)]
		f.next++
		if l.m.Store == nil || f.isAway(l) || (l.err != nil && isDamage(l.err)) {
			continue
		}
		if l.acc.Next == 0 {
			return true, nil // it was not read yet
		}
		_, err := f.stores.get(ctx, l.m, true, format.LogName(f.group, l.acc.Next), format.MaxLogObjectBytes)
		switch {
		case err == nil:
			return true, nil
		case ctx.Err() != nil:
			return false, ctx.Err()
		case errors.Is(err, object.ErrNotFound):
			f.back(l)
			return false, nil
		case aboutObject(err):
			return true, nil // something is there, and reading it tells what
		}
		f.leaveAlone(l)
		failed = err
	}
	if failed == nil {
		failed = &unreachableError{format.LogPrefix(f.group), errors.New("no store answers; they are tried again in a while")}
	}
	return false, failed
}

func (f *Follower) isAway(l *storeLog) bool { return time.Now().Before(f.away[l.m.ID].until) }

func (f *Follower) leaveAlone(l *storeLog) {
	a := f.away[l.m.ID]
	a.pause = min(max(2*a.pause, followPause), followPauseMax)
	a.until = time.Now().Add(a.pause)
	f.away[l.m.ID] = a
}

func (f *Follower) back(l *storeLog) { delete(f.away, l.m.ID) }

// goOn reads the logs from where they were left and returns the history up to the
// newest entry that is decided now.
func (f *Follower) goOn(ctx context.Context) (*History, error) {
	old := f.history
	h := old.successor()
	list := time.Since(f.listed) > followList
	for _, l := range h.logs {
		l.follow = !list && l.acc.Next > 0
		switch {
		case l.err != nil && isDamage(l.err):
		case f.isAway(l):
			l.err = &unreachableError{l.m.URL(), errors.New("it did not answer, and is left alone for a while")}
		default:
			l.err = errUnread
		}
	}
	var asked []*storeLog
	for _, l := range h.logs {
		if errors.Is(l.err, errUnread) {
			asked = append(asked, l)
		}
	}
	readOnce(ctx, h, asked)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	for _, l := range asked {
		if l.err != nil && isUnreachable(l.err) {
			f.leaveAlone(l)
		} else {
			f.back(l)
		}
	}
	if list {
		f.listed = time.Now()
	}
	sound, err := soundLogs(ctx, h, h.logs)
	if err != nil {
		return nil, err
	}
	t, err := chooseTip(h, sound)
	if err != nil {
		return nil, err
	}
	known := Position{old.newest.N, old.newest.Hash}
	if t.decided <= known.N {
		old.logs = h.logs
		return old, nil
	}
	chain, err := walk(h, t, known)
	if err != nil {
		return nil, err
	}
	h.Decided = t.decided
	things, err := h.openEntries(ctx, chain[:t.decided-known.N])
	if err != nil {
		return nil, err
	}
	for _, e := range things {
		if err := h.hear(ctx, e); err != nil {
			return nil, err
		}
	}
	return h, h.endWith(ctx)
}

// successor is a history that begins as h is, and shares with it what does not
// change.
func (h *History) successor() *History {
	n := &History{
		GroupID: h.GroupID, Group: h.Group, Decided: h.Decided,
		volumes: slices.Clone(h.volumes), named: slices.Clip(h.named), names: maps.Clone(h.names), branches: h.branches, lines: maps.Clone(h.lines), lastSeq: h.lastSeq,
		gaps:   map[volumeOn][]Gap{},
		digest: h.digest, inDigest: h.inDigest, tail: h.tail, newest: h.newest, logs: h.logs, pages: h.pages,
		cfg: h.cfg, stores: h.stores, values: h.values, manifests: h.manifests,
	}
	for v, gaps := range h.gaps {
		n.gaps[v] = slices.Clone(gaps)
	}
	return n
}

// FetchedBytes is how many bytes were read from the stores, by this follower and by
// what was opened with its histories.
func (f *Follower) FetchedBytes() int64 { return f.stores.bytes.Load() }
