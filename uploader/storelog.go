package uploader

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
	"drc/internal/object/gate"
	"drc/internal/repo"
)

// readAhead is how many log objects are fetched at a time when a log is read.
const readAhead = 32

// errFencedHere: this store's log holds a promise of a higher epoch.
var errFencedHere = errors.New("another writer has taken over in this store")

// storeLog is one store's log of the group, as this writer sees it. One
// goroutine at a time works on it; what others look at is published in view.
type storeLog struct {
	log     *Log
	i       int // which of the log's stores
	member  repo.Member
	acc     grouplog.Acceptor
	pending pendingObject // what is being put, so that retries are identical
	date    atomic.Int64  // the store's clock in its latest answer, ns since 1970; reads go side by side
	whole   uint64        // up to this entry the log holds what was chosen; guarded by log.mu
	saved   bool          // acc comes from saved tails that the store has not confirmed yet
	read    bool          // nothing lies behind the end of the log: whollyRead has looked
	added   int           // objects added since acc forgot what it need not know
	unput   bool          // the last put has failed: that the log can be read says nothing
	past    *past         // reads what this log lacks and the views have forgotten
}

type pendingObject struct {
	index uint64
	epoch format.Epoch
	value format.Hash
	o     format.LogObject
	raw   []byte
}

// confirm checks that the store still has the object at which its log ended
// when its tail was saved: a store that was rolled back meanwhile would be
// appended to behind a hole.
func (s *storeLog) confirm(ctx context.Context) error {
	if !s.saved || s.acc.Next == 0 {
		return nil
	}
	index := s.acc.Next - 1
	raw, err := s.get(ctx, index)
	if errors.Is(err, object.ErrNotFound) || (err == nil && format.HashOf(raw) != s.acc.Last) {
		return format.Corrupt(s.member.URL()+" "+format.LogName(s.log.cfg.Group, index),
			"it was there before and is not there as it was: the store was rolled back or damaged")
	}
	if err != nil {
		return err
	}
	s.saved = false
	return nil
}

// catchUp reads the log from where it was left to its end.
func (s *storeLog) catchUp(ctx context.Context) error {
	if err := s.confirm(ctx); err != nil {
		return err
	}
	for {
		from := s.acc.Next
		found, err := s.fetch(ctx, from, readAhead)
		for i, raw := range found {
			if err := s.add(from+uint64(i), raw); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		if len(found) < readAhead {
			return nil
		}
	}
}

// whollyRead checks once that nothing lies behind the first free place: objects
// there would say that the log has a hole, and what were appended would be put
// into it.
func (s *storeLog) whollyRead(ctx context.Context) error {
	if s.read {
		return nil
	}
	for info, err := range s.member.Store.List(ctx, format.LogPrefix(s.log.cfg.Group), format.LogName(s.log.cfg.Group, s.acc.Next)) {
		if err != nil {
			return fmt.Errorf("list the log in %s: %w", s.member.URL(), err)
		}
		if _, ok := format.ParseLogName(s.log.cfg.Group, info.Name); !ok {
			continue
		}
		// It may have been appended since the log was read: then what is before
		// it is there as well.
		free := s.acc.Next
		if err := s.catchUp(ctx); err != nil {
			return err
		}
		if s.acc.Next == free {
			return format.Corrupt(s.member.URL()+" "+format.LogName(s.log.cfg.Group, free), "it is missing, and the log goes on behind it")
		}
		break
	}
	s.read = true
	return nil
}

// fetch gets up to n objects from index from on, side by side, and returns those
// before the first that is absent. With an error these are the ones before the
// first that could not be got: of a store that fails now and then, something is
// gained by each try.
func (s *storeLog) fetch(ctx context.Context, from uint64, n int) ([][]byte, error) {
	// Most of the time there is nothing new: ask for one before asking for many.
	first, err := s.get(ctx, from)
	if errors.Is(err, object.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out, errs := make([][]byte, n), make([]error, n)
	out[0] = first
	var wg sync.WaitGroup
	for i := 1; i < n; i++ {
		wg.Go(func() { out[i], errs[i] = s.get(ctx, from+uint64(i)) })
	}
	wg.Wait()
	for i, err := range errs {
		if errors.Is(err, object.ErrNotFound) {
			return out[:i], nil
		}
		if err != nil {
			return out[:i], err
		}
	}
	return out, nil
}

func (s *storeLog) get(ctx context.Context, index uint64) ([]byte, error) {
	name := format.LogName(s.log.cfg.Group, index)
	raw, answer, err := s.member.Store.Get(ctx, name, format.MaxLogObjectBytes, nil)
	s.sawDate(answer)
	if err != nil && !errors.Is(err, object.ErrNotFound) {
		return nil, fmt.Errorf("read %s of %s: %w", name, s.member.URL(), err)
	}
	return raw, err
}

func (s *storeLog) sawDate(a object.Answer) {
	if !a.Date.IsZero() {
		s.date.Store(a.Date.UnixNano())
	}
}

// place is where the object at index belongs.
func (s *storeLog) place(index uint64) grouplog.Place {
	return grouplog.Place{Repo: s.log.cfg.Repo.ID, Group: s.log.cfg.Group, Store: s.member.ID, Index: index}
}

// add verifies the object found at index and takes it into the acceptor.
func (s *storeLog) add(index uint64, raw []byte) error {
	name := s.member.URL() + " " + format.LogName(s.log.cfg.Group, index)
	o, err := grouplog.VerifyObject(s.log.cfg.Ring.Root(), name, s.place(index), raw)
	if err != nil {
		return err
	}
	return s.take(name, o, raw)
}

// take takes a verified object, or one of our own, into the acceptor.
func (s *storeLog) take(name string, o format.LogObject, raw []byte) error {
	var v format.Value
	if o.Kind == format.LogCommit {
		// First: the acceptor takes the object for good.
		var err error
		if v, err = s.log.verify(name, o.Value); err != nil {
			return err
		}
	}
	if err := s.acc.Add(name, o, raw); err != nil {
		return err
	}
	if a, ok := s.acc.Entry(v.N); ok && a.Index == o.Index {
		s.log.values.keep(v.N, a.Hash, o.Value)
	}
	s.log.publish(s, v.N, o.Tails)
	if s.added++; s.added >= keptEntries {
		s.acc.Forget(s.log.forgettable(s))
		s.added = 0
	}
	return nil
}

// verify checks a value that came from a store; what is in memory was checked
// when it came from another one.
func (l *Log) verify(name string, raw []byte) (format.Value, error) {
	v, _, _, _, err := format.DecodeValue(name, raw)
	if err == nil && l.values.get(v.N, format.HashOf(raw)) != nil {
		return v, nil
	}
	return grouplog.VerifyValue(l.cfg.Ring.Root(), name, raw)
}

// append puts an object at the end of the log under epoch e. It tries until it
// has succeeded, another writer's higher epoch is found (errFencedHere), or
// something fails. An unknown outcome is resolved by the next call: it reads
// what is there first.
func (s *storeLog) append(ctx context.Context, kind format.LogKind, e format.Epoch, n uint64, value []byte) error {
	for {
		if e.Less(s.acc.Promised) {
			return errFencedHere
		}
		if s.has(kind, e, n, value) {
			return nil
		}
		name := format.LogName(s.log.cfg.Group, s.acc.Next)
		o, raw := s.object(kind, e, value)
		answer, err := s.member.Store.Put(ctx, name, raw)
		s.sawDate(answer)
		var down *gate.DownError
		if errors.As(err, &down) { // nothing was sent
			s.isDown(err)
			if err := gate.Of(s.member.Store).Wait(ctx, gate.Writes); err != nil {
				return err
			}
			continue
		}
		s.unput = err != nil && !errors.Is(err, object.ErrExists)
		if errors.Is(err, object.ErrExists) {
			// Somebody's object is there: read it, and what follows it.
			if err := s.catchUp(ctx); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("append %s to %s: %w", name, s.member.URL(), err)
		}
		return s.take(s.member.URL()+" "+name, o, raw)
	}
}

// has reports whether the log already holds what append would append: an
// earlier try succeeded although its answer was lost.
func (s *storeLog) has(kind format.LogKind, e format.Epoch, n uint64, value []byte) bool {
	if s.acc.Promised != e {
		return false
	}
	if kind == format.LogPromise {
		return true
	}
	a, ok := s.acc.Entry(n)
	return ok && a.Epoch == e && a.Hash == format.HashOf(value)
}

// object returns the signed object for the next place. Retries of one place
// use identical bytes.
func (s *storeLog) object(kind format.LogKind, e format.Epoch, value []byte) (format.LogObject, []byte) {
	p := pendingObject{index: s.acc.Next, epoch: e, value: format.HashOf(value)}
	if s.pending.raw != nil && s.pending.index == p.index && s.pending.epoch == p.epoch && s.pending.value == p.value {
		return s.pending.o, s.pending.raw
	}
	decided, tails := s.log.known()
	p.o = format.LogObject{
		Kind: kind, Repo: s.log.cfg.Repo.ID, Group: s.log.cfg.Group, Store: s.member.ID,
		Index: s.acc.Next, Previous: s.acc.Last, Epoch: e, Decided: decided, Tails: tails,
		Time: s.log.cfg.Now().UnixNano(), Value: value,
	}
	p.raw = grouplog.SignObject(s.log.cfg.Agent, p.o)
	s.pending = p
	return p.o, p.raw
}
