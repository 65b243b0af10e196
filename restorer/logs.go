package restorer

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
)

const (
	// A log is read in stretches of at most so many objects and bytes.
	stretchObjects = 512
	stretchBytes   = 16 << 20
	// listObjects is how many objects are listed at a time: a folder is read
	// whole for each listing, however little of it is wanted.
	listObjects = 16 << 10
	// minorityPatience is how long other logs are waited for when some are
	// read, but no majority.
	minorityPatience = 3 * time.Second
)

// storeLog is one store's log of the group, verified.
type storeLog struct {
	m       *member
	acc     grouplog.Acceptor
	base    uint64        // objects below were not read: a digest says what they say
	hashes  []format.Hash // of each object from base on
	tails   []format.Tail // the newest that this log names for each store
	decided []claim
	listed  []int64 // sizes of the objects that come next, as far as they are listed
	follow  bool    // what is new is asked for by name before it is listed
	err     error   // why the log has no say
	answers atomic.Int64
}

// claim is what a wrapper says: up to n, entries are decided.
type claim struct {
	epoch format.Epoch
	n     uint64
}

// entry is what the log has accepted for n, if n may be its newest.
func (l *storeLog) entry(n uint64) (grouplog.Accepted, bool) {
	if a, ok := l.acc.Entry(n); ok {
		return a, true
	}
	return l.acc.Latest, l.acc.Latest.N == n && n > 0 // the digest says so
}

func (l *storeLog) name(group block.GroupID, index uint64) string {
	return l.m.URL() + " " + format.LogName(group, index)
}

// readLogs reads all logs that can be reached. Those that fail verification
// are left out, with a warning.
func readLogs(ctx context.Context, h *History) ([]*storeLog, error) {
	logs := make([]*storeLog, len(h.stores.members))
	for i, m := range h.stores.members {
		logs[i] = &storeLog{m: m, acc: grouplog.Acceptor{Store: m.ID}, err: errUnread}
	}
	if h.digest != nil {
		h.beginWith(ctx, h.digest, logs)
	}
	h.logs = logs
	began := time.Now()
	for pause := 100 * time.Millisecond; ; pause *= 2 {
		readOnce(ctx, h, logs)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		left := patienceLeft(h, logs) - time.Since(began)
		if left < pause {
			break
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
	return soundLogs(ctx, h, logs)
}

// soundLogs are those of the logs that were read which have a say.
func soundLogs(ctx context.Context, h *History, logs []*storeLog) ([]*storeLog, error) {
	if err := checkTails(ctx, h, logs); err != nil {
		return nil, err
	}
	h.values.endAt(logEnds(logs))
	var sound, damaged []*storeLog
	var unreachable []error
	for _, l := range logs {
		switch {
		case l.err == nil:
			sound = append(sound, l)
		case isDamage(l.err):
			damaged = append(damaged, l)
			h.warn("the log in %s is damaged and has no say: %v", l.m.URL(), l.err)
		default:
			unreachable = append(unreachable, l.err)
			h.warn("the log in %s cannot be read: %v", l.m.URL(), l.err)
		}
	}
	has, begun := false, false
	for _, l := range sound {
		has = has || l.acc.Latest.N > 0
		begun = begun || l.acc.Next > 0
	}
	switch {
	case has:
		return sound, nil
	case h.cfg.Salvage && len(damaged) > 0:
		h.warn("there is no sound log: what is left of damaged ones is used, and the history may have been longer")
		return append(sound, damaged...), nil
	case len(unreachable) > 0:
		return nil, errors.Join(unreachable...)
	case len(damaged) > 0:
		// %w of the first, so that the caller sees what kind of error it is.
		return nil, fmt.Errorf("no store has a sound log: %w", damaged[0].err)
	}
	if begun {
		return nil, fmt.Errorf("group %s: %w", h.GroupID, ErrNoEntries)
	}
	return nil, format.Corrupt(format.LogPrefix(h.GroupID), "no store has an entry in it")
}

var errUnread = &unreachableError{"the log", errors.New("it was not read yet")}

// readOnce reads the logs that are not read yet, side by side. When a majority
// is read, those of which nothing more comes are given up.
func readOnce(ctx context.Context, h *History, logs []*storeLog) {
	var unread []*storeLog
	for _, l := range logs {
		if l.err != nil && isUnreachable(l.err) {
			unread = append(unread, l)
		}
	}
	type end struct {
		l   *storeLog
		err error
	}
	ends := make(chan end)
	stop := map[*storeLog]context.CancelFunc{}
	seen := map[*storeLog]int64{}
	since := map[*storeLog]time.Time{}
	for _, l := range unread {
		lctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stop[l], since[l] = cancel, time.Now()
		go func() { ends <- end{l, l.catchUp(lctx, h)} }()
	}
	look := time.NewTicker(stragglers / 10)
	defer look.Stop()
	givenUp := map[*storeLog]bool{}
	for len(stop) > 0 {
		select {
		case e := <-ends:
			delete(stop, e.l)
			e.l.err = e.err
			if givenUp[e.l] && e.err != nil && ctx.Err() == nil {
				e.l.err = &unreachableError{e.l.m.URL(), errors.New("it does not answer, and others do")}
				h.stores.fell(e.l.m, e.l.err)
			}
		case <-look.C:
			for l, cancel := range stop {
				if n := l.answers.Load(); n != seen[l] {
					seen[l], since[l] = n, time.Now()
				}
				if majority(h, logs) && time.Since(since[l]) >= stragglers {
					givenUp[l] = true
					cancel()
				}
			}
		}
	}
}

// majority reports whether enough logs are read to decide.
func majority(h *History, logs []*storeLog) bool {
	return h.cfg.Repo.Set().MajorityOf(func(id block.ID) bool {
		return slices.ContainsFunc(logs, func(l *storeLog) bool { return l.m.ID == id && l.err == nil })
	})
}

// patienceLeft is how long stores that do not answer are waited for: not at
// all if a majority is read or none may answer, long if no log is read.
func patienceLeft(h *History, logs []*storeLog) time.Duration {
	some, silent := false, false
	for _, l := range logs {
		some = some || l.err == nil
		silent = silent || (isUnreachable(l.err) && l.m.Store != nil)
	}
	switch {
	case !silent || majority(h, logs):
		return 0
	case some:
		return min(h.cfg.Patience, minorityPatience)
	}
	return h.cfg.Patience
}

// catchUp reads the log from where it was left to its end.
func (l *storeLog) catchUp(ctx context.Context, h *History) error {
	if l.m.Store == nil {
		return &unreachableError{l.m.URL(), l.m.Err}
	}
	if l.follow {
		if end, err := l.forward(ctx, h); err != nil || end {
			return err
		}
	}
	for {
		n, err := l.stretch(ctx, h)
		if err != nil || n == 0 {
			return err
		}
	}
}

// forward reads the next few objects without listing them, and reports whether there
// are no more. It does not see that there are others behind a hole.
func (l *storeLog) forward(ctx context.Context, h *History) (end bool, err error) {
	for range forwardObjects {
		index := l.acc.Next
		raw, err := h.stores.get(ctx, l.m, true, format.LogName(h.GroupID, index), format.MaxLogObjectBytes)
		if errors.Is(err, object.ErrNotFound) {
			return true, nil
		}
		if aboutObject(err) {
			err = format.Corrupt(l.name(h.GroupID, index), "%s", reason(err))
		} else if err != nil {
			return false, err
		}
		l.answers.Add(1)
		var o format.LogObject
		if err == nil {
			if o, err = l.verify(h, index, raw); err == nil {
				err = l.add(h, index, o, raw)
			}
		}
		if err != nil {
			h.stores.found(l.m, format.LogName(h.GroupID, index), err)
			return false, err
		}
	}
	return false, nil
}

// stretch reads the next objects of the log and returns how many.
func (l *storeLog) stretch(ctx context.Context, h *History) (n int, err error) {
	defer func() {
		if err != nil {
			l.listed = nil // the next try begins where this one did
		}
	}()
	from := l.acc.Next
	after := ""
	if from > 0 {
		after = format.LogName(h.GroupID, from-1)
	}
	if len(l.listed) == 0 {
		type list struct {
			sizes  []int64 // of the objects from there on
			beyond bool    // there are others behind a hole
		}
		next, err := request(ctx, h.stores, l.m, true, 0, func(ctx context.Context, st object.Store) (x list, err error) {
			for info, err := range st.List(ctx, format.LogPrefix(h.GroupID), after) {
				if err != nil {
					return x, err
				}
				index, ok := format.ParseLogName(h.GroupID, info.Name)
				if !ok || index < from {
					continue
				}
				if index != from+uint64(len(x.sizes)) {
					x.beyond = true
					break
				}
				if x.sizes = append(x.sizes, info.Size); len(x.sizes) == listObjects {
					break
				}
			}
			return x, nil
		})
		if err != nil {
			return 0, err
		}
		l.answers.Add(1)
		if len(next.sizes) == 0 && next.beyond {
			// The list is newer than the reads before it, so this is no race.
			name := l.name(h.GroupID, from)
			h.stores.found(l.m, format.LogName(h.GroupID, from), object.ErrNotFound)
			return 0, format.Corrupt(name, "it is missing, and there are objects behind it")
		}
		l.listed = next.sizes
	}
	count := uint64(0)
	for sum := int64(0); count < min(stretchObjects, uint64(len(l.listed))) && sum < stretchBytes; count++ {
		sum += l.listed[count]
	}
	l.listed = l.listed[count:]
	raws := make([][]byte, count)
	objects := make([]format.LogObject, count)
	bad := make([]error, count)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(h.cfg.Requests)
	verify := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i := range count {
		g.Go(func() error {
			name := format.LogName(h.GroupID, from+i)
			raw, err := h.stores.get(gctx, l.m, true, name, format.MaxLogObjectBytes)
			l.answers.Add(1)
			if aboutObject(err) {
				bad[i] = format.Corrupt(l.name(h.GroupID, from+i), "%s", reason(err))
				return nil
			}
			if err != nil {
				return err
			}
			verify <- struct{}{}
			defer func() { <-verify }()
			raws[i] = raw
			objects[i], bad[i] = l.verify(h, from+i, raw)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	for i := range count {
		if bad[i] == nil {
			bad[i] = l.add(h, from+i, objects[i], raws[i])
		}
		if bad[i] != nil {
			h.stores.found(l.m, format.LogName(h.GroupID, from+i), bad[i])
			// Whatever else is readable here may be a good copy of a value.
			for j := i + 1; j < count; j++ {
				if bad[j] == nil {
					h.values.learn(l.m, from+j, objects[j], raws[j])
				}
			}
			return 0, bad[i]
		}
	}
	return int(count), nil
}

// verify checks an object's signature and place, and those of the value in it
// unless it is known already.
func (l *storeLog) verify(h *History, index uint64, raw []byte) (format.LogObject, error) {
	name := l.name(h.GroupID, index)
	at := grouplog.Place{Repo: h.cfg.Repo.ID, Group: h.GroupID, Store: l.m.ID, Index: index}
	o, err := grouplog.VerifyObject(h.cfg.Ring.Root(), name, at, raw)
	if err != nil || o.Kind != format.LogCommit {
		return o, err
	}
	if h.values.verified(format.HashOf(o.Value)) {
		return o, nil
	}
	v, err := grouplog.VerifyValue(h.cfg.Ring.Root(), name, o.Value)
	if err == nil && v.Group != h.GroupID {
		err = format.Corrupt(name, "its value belongs to another group")
	}
	return o, err
}

// add takes the next object into the log.
func (l *storeLog) add(h *History, index uint64, o format.LogObject, raw []byte) error {
	counts := !o.Epoch.Less(l.acc.Promised)
	if err := l.acc.Add(l.name(h.GroupID, index), o, raw); err != nil {
		return err
	}
	l.hashes = append(l.hashes, l.acc.Last)
	h.values.learn(l.m, index, o, raw)
	if len(o.Tails) > 0 {
		l.learnTails(o.Tails)
	}
	if counts {
		if n := len(l.decided); n == 0 || l.decided[n-1].epoch != o.Epoch {
			l.decided = append(l.decided, claim{epoch: o.Epoch})
		}
		c := &l.decided[len(l.decided)-1]
		c.n = max(c.n, o.Decided)
	}
	return nil
}

func (l *storeLog) learnTails(tails []format.Tail) {
next:
	for _, t := range tails {
		for i := range l.tails {
			if l.tails[i].Store == t.Store {
				if t.Next > l.tails[i].Next {
					l.tails[i] = t
				}
				continue next
			}
		}
		l.tails = append(l.tails, t)
	}
}

// checkTails compares where logs end with what other logs' objects say of
// them: a log that ends earlier, or differently, was rolled back and has no
// say.
func checkTails(ctx context.Context, h *History, logs []*storeLog) error {
	for _, teller := range logs {
		if teller.err != nil {
			continue
		}
		for _, t := range teller.tails {
			for _, l := range logs {
				if l.m.ID != t.Store || l.err != nil {
					continue
				}
				if l.acc.Next < t.Next {
					// It may have grown since it was read, and only since then.
					if err := l.catchUp(ctx, h); err != nil {
						if ctx.Err() != nil {
							return ctx.Err()
						}
						l.err = err
						continue
					}
				}
				name := l.m.URL() + " " + format.LogPrefix(h.GroupID)
				switch {
				case l.acc.Next < t.Next:
					l.err = format.Corrupt(name, "it ends at index %d, and %s knows it up to %d: the store was rolled back", l.acc.Next, teller.m.URL(), t.Next)
				case t.Next > l.base && l.hashes[t.Next-1-l.base] != t.Last:
					l.err = format.Corrupt(name, "object %d is not the one that %s knows: the store was rolled back", t.Next-1, teller.m.URL())
				}
				if l.err != nil {
					h.stores.found(l.m, format.LogName(h.GroupID, min(l.acc.Next, t.Next)), l.err)
				}
			}
		}
	}
	return nil
}
