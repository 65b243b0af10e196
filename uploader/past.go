package uploader

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
)

const (
	// pastStepBack is how many objects before the one that was looked for a log
	// is read from: an entry may have several objects in it.
	pastStepBack = 4
	// pastStepBackMax bounds how far a read begins before an entry's object.
	pastStepBackMax = 256
)

// past reads decided entries back, in order, for a store that lacks them, from
// the log of a store that has them. It holds readAhead objects at most, however
// far the store is behind.
//
// Which value was chosen for n is told by any commit of n+1: its author had n
// decided before it made that, and names n's value as the parent.
type past struct {
	log *Log
	of  *storeLog // the store that lacks them

	src    *storeLog // whose log is being read; nil: none
	next   uint64    // index in that log of the next object to read
	values map[uint64]map[format.Hash][]byte
	parent map[uint64]format.Hash // the value of n that a commit of n+1 names
}

// entry returns what was chosen for n, which is decided.
func (p *past) entry(ctx context.Context, n uint64) (position, []byte, error) {
	p.forgetBelow(n)
	if at, raw, ok := p.known(n); ok {
		return at, raw, nil
	}
	var errs []error
	for _, src := range p.sources(n) {
		at, raw, err := p.from(ctx, src, n)
		if err == nil {
			return at, raw, nil
		}
		p.src = nil
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return position{}, nil, fmt.Errorf("entry %d is in no store that can be read: %w", n, errors.Join(errs...))
}

// sources are the stores that hold what was chosen for n, the one first that is
// being read.
func (p *past) sources(n uint64) []*storeLog {
	l := p.log
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*storeLog
	for i, s := range l.stores {
		if v := &l.views[i]; s != p.of && s.member.Store != nil && v.loaded && v.broken == nil && s.whole >= n {
			out = append(out, s)
		}
	}
	if i := slices.Index(out, p.src); i > 0 {
		out[0], out[i] = out[i], out[0]
	}
	return out
}

// from reads src until n is known.
func (p *past) from(ctx context.Context, src *storeLog, n uint64) (position, []byte, error) {
	if p.src == src {
		if at, raw, err := p.readOn(ctx, n); err == nil {
			return at, raw, nil
		}
	}
	for back := uint64(pastStepBack); ; back *= 4 {
		index, err := src.find(ctx, n)
		if err != nil {
			return position{}, nil, err
		}
		p.src, p.next = src, index-min(index, back)
		p.values, p.parent = map[uint64]map[format.Hash][]byte{}, map[uint64]format.Hash{}
		at, raw, err := p.readOn(ctx, n)
		if err == nil || ctx.Err() != nil || back >= pastStepBackMax {
			return at, raw, err
		}
	}
}

// readOn reads the log on until n is known, or a later entry is reached
// without.
func (p *past) readOn(ctx context.Context, n uint64) (position, []byte, error) {
	for {
		if at, raw, ok := p.known(n); ok {
			return at, raw, nil
		}
		for k := range p.values {
			if k > n+1 { // and its value was not among what was read
				return position{}, nil, fmt.Errorf("%s: its log has no value of entry %d where it was looked for", p.src.member.URL(), n)
			}
		}
		found, err := p.src.fetch(ctx, p.next, readAhead)
		if err != nil {
			return position{}, nil, err
		}
		if len(found) == 0 {
			return position{}, nil, fmt.Errorf("%s: its log ends before what was chosen for entry %d is told", p.src.member.URL(), n)
		}
		for _, raw := range found {
			if err := p.take(raw); err != nil {
				return position{}, nil, err
			}
			p.next++
		}
		p.forgetBelow(n)
	}
}

// take takes the object at p.next.
func (p *past) take(raw []byte) error {
	l := p.log
	name := p.src.member.URL() + " " + format.LogName(l.cfg.Group, p.next)
	o, err := grouplog.VerifyObject(l.cfg.Ring.Root(), name, p.src.place(p.next), raw)
	if err != nil || o.Kind != format.LogCommit {
		return err
	}
	v, err := grouplog.VerifyValue(l.cfg.Ring.Root(), name, o.Value)
	if err != nil {
		return err
	}
	if p.values[v.N] == nil {
		p.values[v.N] = map[format.Hash][]byte{}
	}
	p.values[v.N][format.HashOf(o.Value)] = o.Value
	if v.N > 1 {
		p.parent[v.N-1] = v.Parent
	}
	return nil
}

// known returns what was chosen for n if it has been read.
func (p *past) known(n uint64) (position, []byte, bool) {
	hash, ok := p.parent[n]
	if !ok {
		p.log.mu.Lock()
		decided := p.log.decided
		p.log.mu.Unlock()
		if hash, ok = decided.Hash, decided.N == n; !ok {
			return position{}, nil, false
		}
	}
	raw, ok := p.values[n][hash]
	return position{n, hash}, raw, ok
}

func (p *past) forgetBelow(n uint64) {
	for k := range p.values {
		if k < n {
			delete(p.values, k)
		}
	}
	for k := range p.parent {
		if k < n {
			delete(p.parent, k)
		}
	}
}

// find returns the index of an object of this log near the first ones of entry
// n: of a commit of n, or, where such a one is not met, of the last place before
// that was looked at.
func (s *storeLog) find(ctx context.Context, n uint64) (uint64, error) {
	s.log.mu.Lock()
	acc := &s.log.views[s.i].acc
	guess, next := int64(acc.Latest.Index)+int64(n)-int64(acc.Latest.N), int64(acc.Next)
	s.log.mu.Unlock()
	seen := map[int64]bool{}
	before := int64(0)
	for range fetchTries {
		at, ok := nearest(guess, next, seen)
		if !ok {
			break
		}
		seen[at] = true
		raw, err := s.get(ctx, uint64(at))
		if errors.Is(err, object.ErrNotFound) {
			return 0, format.Corrupt(s.member.URL()+" "+format.LogName(s.log.cfg.Group, uint64(at)), "it was there before and is missing")
		}
		if err != nil {
			return 0, err
		}
		guess = at
		name := s.member.URL() + " " + format.LogName(s.log.cfg.Group, uint64(at))
		o, err := grouplog.VerifyObject(s.log.cfg.Ring.Root(), name, s.place(uint64(at)), raw)
		if err != nil {
			return 0, err
		}
		if o.Kind != format.LogCommit {
			continue
		}
		v, err := grouplog.VerifyValue(s.log.cfg.Ring.Root(), name, o.Value)
		switch {
		case err != nil:
			return 0, err
		case v.N == n:
			return uint64(at), nil
		case v.N < n:
			before = max(before, at)
		}
		guess = at + int64(n) - int64(v.N)
	}
	return uint64(before), nil
}
