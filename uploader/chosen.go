package uploader

import (
	"context"
	"maps"
	"slices"

	"drc/internal/grouplog"
)

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
		l.mu.notify()
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
	l.mu.notify()
}

// forgettable is the entry below which s need not remember what it accepted.
func (l *Log) forgettable(s *storeLog) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return min(l.floor, s.whole+1)
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
	return l.mu.await(ctx, 0, func() bool { return l.safe(lost) > after })
}
