// Package gate is an object.Store in front of another one that may be out of
// reach. While that one answers, every call passes. Once it fails, one call at a
// time is passed on, as a probe, with pauses that grow up to PauseMax and jitter;
// every other call fails at once with a *DownError, without a request. So a dead
// store sees one request in half a minute, whoever wants something of it and how
// much, and what has several stores to choose from goes on to the next one
// without delay. The first call that is answered opens the gate for all.
//
// A store that is read and cannot be written (its disk is full, a permission has
// gone) is told from one that is dead: its reads pass, and its writes are probed.
//
// All that goes to a store must share its gate for this to hold. Nothing is kept:
// a new gate is open.
package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"time"

	"drc/internal/jitter"
	"drc/internal/object"
)

// PauseMin and PauseMax bound the pause between two probes of a store that fails.
// A store that is back is noticed within PauseMax.
const (
	PauseMin = 100 * time.Millisecond
	PauseMax = 30 * time.Second
)

// A probe that is under way for longer than probeMax is not waited for: another
// one may find out that the store is back while the first is stuck.
const probeMax = PauseMax

// DownError says that a store was not asked, because it fails.
type DownError struct {
	URL   string
	Since time.Time // when it began to fail
	Err   error     // how its last call failed
}

func (e *DownError) Error() string {
	return fmt.Sprintf("%s has failed since %s, and is tried again by itself: %v", e.URL, e.Since.UTC().Format(time.RFC3339), e.Err)
}

// Unwrap returns how the store failed.
func (e *DownError) Unwrap() error { return e.Err }

// Kind is what calls have in common that fail together.
type Kind int

// Reads are what changes nothing: Get, GetRange, Stat, List and ListDirs. Writes
// are Put and Delete.
const (
	Reads Kind = iota
	Writes
)

// Store is the gate of one store. It is safe for concurrent use.
type Store struct {
	below object.Store

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change that Wait waits for
	failing [2]bool       // by kind. Writes are held back by both
	since   time.Time     // when it began to fail
	err     error         // the last failure
	pause   time.Duration // before the next probe
	next    time.Time     // the next probe comes no earlier
	probe   time.Time     // since when one is under way; zero: none
}

var _ object.Store = (*Store)(nil)

// Of returns the gate of s: s itself if it is one, or a new one, which owns s.
func Of(s object.Store) *Store {
	if g, ok := s.(*Store); ok {
		return g
	}
	return &Store{below: s, changed: make(chan struct{})}
}

// Down returns since when the store has failed, and how; zero and nil while it
// does not.
func (s *Store) Down() (since time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.since, s.err
}

// Wait returns when a call of that kind would be passed on: at once while the
// store does not fail. Of many that wait, one will find that it does the probe,
// and the others get a DownError and wait again. It returns ctx's error if that
// ends before.
func (s *Store) Wait(ctx context.Context, k Kind) error {
	for {
		s.mu.Lock()
		at, passes := s.passes(k, time.Now())
		changed := s.changed
		s.mu.Unlock()
		if passes {
			return ctx.Err()
		}
		t := time.NewTimer(time.Until(at))
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-changed:
			t.Stop()
		case <-t.C:
		}
	}
}

// holdsBack reports whether calls of that kind are not simply passed; s.mu is
// held.
func (s *Store) holdsBack(k Kind) bool { return s.failing[Reads] || s.failing[k] }

// passes reports whether a call of that kind may go on now, or when it may at the
// latest; s.mu is held.
func (s *Store) passes(k Kind, now time.Time) (at time.Time, ok bool) {
	switch {
	case !s.holdsBack(k):
		return now, true
	case !s.probe.IsZero() && now.Sub(s.probe) < probeMax:
		return s.probe.Add(probeMax), false
	}
	return s.next, !now.Before(s.next)
}

// begin asks whether a call may go on. over must be called when it has ended.
func (s *Store) begin(ctx context.Context, k Kind) (over func(err error), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if _, ok := s.passes(k, now); !ok {
		return nil, &DownError{URL: s.below.URL(), Since: s.since, Err: s.err}
	}
	var probe time.Time
	if s.holdsBack(k) {
		probe, s.probe = now, now
	}
	return func(err error) { s.over(ctx, k, probe, err) }, nil
}

// over takes note of how a call has ended, a probe if probe is not zero.
func (s *Store) over(ctx context.Context, k Kind, probe time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := !probe.IsZero() && probe.Equal(s.probe) // and no other one has been sent since
	if last {
		s.probe = time.Time{}
	}
	switch {
	case answered(err):
		s.answer(k)
	case ctx.Err() != nil: // whoever called has gone away: that says nothing
	case last || !s.holdsBack(k):
		s.fail(k, err)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// answered reports whether a call that ended so shows that the store is there.
func answered(err error) bool {
	return err == nil || errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrExists) ||
		errors.Is(err, object.ErrTooLarge) || errors.Is(err, io.ErrUnexpectedEOF)
}

// answer notes that the store has answered; s.mu is held.
func (s *Store) answer(k Kind) {
	if k == Reads && s.failing[Reads] {
		s.next = time.Now() // a write may see at once whether it is all well again
	}
	s.failing[Reads] = false
	if k == Writes {
		s.failing[Writes] = false
	}
	if s.failing == [2]bool{} {
		s.since, s.err, s.pause, s.next = time.Time{}, nil, 0, time.Time{}
	}
}

// fail notes a failure; s.mu is held. A first write that fails makes reads
// suspect, too: mostly the store is dead.
func (s *Store) fail(k Kind, err error) {
	now := time.Now()
	if s.since.IsZero() {
		s.since = now
	}
	if k == Writes && !s.failing[Writes] {
		s.failing[Reads] = true
	}
	s.failing[k], s.err = true, err
	s.pause = min(max(PauseMin, 2*s.pause), PauseMax)
	s.next = now.Add(jitter.Of(s.pause))
}

// URL implements object.Store.
func (s *Store) URL() string { return s.below.URL() }

// Put implements object.Store.
func (s *Store) Put(ctx context.Context, name string, body []byte) (object.Answer, error) {
	if err := object.CheckName(name); err != nil {
		return object.Answer{}, err
	}
	over, err := s.begin(ctx, Writes)
	if err != nil {
		return object.Answer{}, err
	}
	a, err := s.below.Put(ctx, name, body)
	over(err)
	return a, err
}

// Get implements object.Store.
func (s *Store) Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, object.Answer, error) {
	if err := object.CheckName(name); err != nil {
		return dst, object.Answer{}, err
	}
	over, err := s.begin(ctx, Reads)
	if err != nil {
		return dst, object.Answer{}, err
	}
	raw, a, err := s.below.Get(ctx, name, limit, dst)
	over(err)
	return raw, a, err
}

// GetRange implements object.Store.
func (s *Store) GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error) {
	if err := errors.Join(object.CheckName(name), object.CheckRange(name, off, n)); err != nil {
		return dst, err
	}
	over, err := s.begin(ctx, Reads)
	if err != nil {
		return dst, err
	}
	raw, err := s.below.GetRange(ctx, name, off, n, dst)
	over(err)
	return raw, err
}

// Stat implements object.Store.
func (s *Store) Stat(ctx context.Context, name string) (object.Info, error) {
	if err := object.CheckName(name); err != nil {
		return object.Info{}, err
	}
	over, err := s.begin(ctx, Reads)
	if err != nil {
		return object.Info{}, err
	}
	info, err := s.below.Stat(ctx, name)
	over(err)
	return info, err
}

// List implements object.Store.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[object.Info, error] {
	return listing(ctx, s, object.CheckPrefix(prefix), s.below.List(ctx, prefix, after))
}

// ListDirs implements object.Store.
func (s *Store) ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return listing(ctx, s, object.CheckDirPrefix(prefix), s.below.ListDirs(ctx, prefix))
}

// listing is all, as one call that ends when it is not listened to any more. With
// wrong it ends at once: what was asked for is no fault of the store.
func listing[T any](ctx context.Context, s *Store, wrong error, all iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		if wrong != nil {
			yield(none, wrong)
			return
		}
		over, err := s.begin(ctx, Reads)
		if err != nil {
			yield(none, err)
			return
		}
		defer func() { over(err) }()
		for x, e := range all {
			err = e
			if !yield(x, e) {
				return
			}
		}
	}
}

// Delete implements object.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := object.CheckName(name); err != nil {
		return err
	}
	over, err := s.begin(ctx, Writes)
	if err != nil {
		return err
	}
	err = s.below.Delete(ctx, name)
	over(err)
	return err
}

// Close implements object.Store.
func (s *Store) Close() error { return s.below.Close() }
