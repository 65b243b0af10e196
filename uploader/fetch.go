package uploader

import (
	"context"
	"errors"
	"fmt"

	"drc/internal/format"
	"drc/internal/object"
)

// fetchTries bounds how many objects of one store's log are looked at for an
// entry. Each entry has one object there, and each change of writer a promise
// and one more commit, so the first guess is rarely far off.
const fetchTries = 32

// errNoSuchValue: every store's log was looked into, and none has the value.
var errNoSuchValue = errors.New("no store's log holds that value")

// Fetch returns the value of entry n whose hash is known, from memory or from
// a store's log. The caller knows from elsewhere that the hash is that of the
// decided value: a log may also hold what a fenced writer left behind.
func (l *Log) Fetch(ctx context.Context, n uint64, hash format.Hash) ([]byte, error) {
	if raw := l.values.get(n, hash); raw != nil {
		return raw, nil
	}
	var failed error
	for i, s := range l.stores {
		l.mu.Lock()
		v := &l.views[i]
		next, latestN, latestIndex := v.acc.Next, v.acc.Latest.N, v.acc.Latest.Index
		usable := v.loaded && v.broken == nil && s.member.Store != nil
		l.mu.Unlock()
		if !usable {
			failed = errors.Join(failed, fmt.Errorf("%s cannot be read", s.member.URL()))
			continue
		}
		guess := int64(latestIndex) + int64(n) - int64(latestN)
		raw, err := s.search(ctx, guess, int64(next), n, hash)
		if err != nil {
			failed = errors.Join(failed, err)
		}
		if raw != nil {
			return raw, nil
		}
	}
	if failed == nil {
		failed = errNoSuchValue
	}
	return nil, fmt.Errorf("fetch log entry %d: %w", n, failed)
}

// search looks for the value in the log's objects before next, at guess first.
// Where another entry is found, the guess is corrected by the distance; from a
// place that is of no use it goes to the nearest one not seen yet. It returns
// nil if it does not find the value.
func (s *storeLog) search(ctx context.Context, guess, next int64, n uint64, hash format.Hash) ([]byte, error) {
	seen := map[int64]bool{}
	for range fetchTries {
		at, ok := nearest(guess, next, seen)
		if !ok {
			return nil, nil
		}
		seen[at] = true
		name := format.LogName(s.log.cfg.Group, uint64(at))
		raw, _, err := s.member.Store.Get(ctx, name, format.MaxLogObjectBytes, nil)
		if errors.Is(err, object.ErrNotFound) {
			guess = at
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s of %s: %w", name, s.member.URL(), err)
		}
		guess = at
		o, _, _, err := format.DecodeLogObject(name, raw)
		if err != nil || o.Kind != format.LogCommit {
			continue
		}
		// The hash proves the bytes, so no signature need be checked here.
		if format.HashOf(o.Value) == hash {
			return o.Value, nil
		}
		if v, _, _, _, err := format.DecodeValue(name, o.Value); err == nil && v.N != n {
			guess = at + int64(n) - int64(v.N)
		}
	}
	return nil, nil
}

// nearest is the place in [0, next) closest to guess that was not seen.
func nearest(guess, next int64, seen map[int64]bool) (int64, bool) {
	guess = max(0, min(guess, next-1))
	for d := int64(0); d <= fetchTries; d++ {
		for _, at := range []int64{guess + d, guess - d} {
			if at >= 0 && at < next && !seen[at] {
				return at, true
			}
		}
	}
	return 0, false
}
