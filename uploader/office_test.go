package uploader_test

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object/fault"
	"drc/uploader"
)

// tries starts a host with a state, for a minute, and returns how taking office
// went.
func (h *logHost) tries(state *hostState, forced bool) error {
	h.t.Helper()
	h.state, h.forced = state, forced
	h.run(h.t.Context())
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	return h.log.TakeOffice(ctx)
}

// gone takes stores out of reach until the function that it returns is called.
func (h *logHost) gone(rule fault.Rule, stores ...int) (back func()) {
	rule.Before = fault.ErrInjected
	var undo []func()
	for _, i := range stores {
		undo = append(undo, h.faults[i].Add(rule))
	}
	return func() {
		for _, f := range undo {
			f()
		}
	}
}

// A host whose newest promises reached a minority only was not in office with
// them. They are no reason to push out, unasked, who took over meanwhile, though
// they are the highest.
func TestOffice_PromisesOfAMinorityAreNoOffice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, b := newLogHost(t, 3), &hostState{}, &hostState{}
		if err := h.tries(a, false); err != nil {
			t.Fatal(err)
		}
		h.appends(t.Context(), 1)
		h.stop()
		for range 2 {
			back := h.gone(fault.Rule{Op: fault.Put}, 0, 1)
			if err := h.tries(a, false); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("office with one store of three: %v", err)
			}
			h.stop()
			back()
		}
		back := h.gone(fault.Rule{}, 2)
		if err := h.tries(b, true); err != nil {
			t.Fatal(err)
		}
		h.appends(t.Context(), 1)
		h.stop()
		back()
		var locked *uploader.LockedError
		if err := h.tries(a, false); !errors.As(err, &locked) {
			t.Errorf("the host that was replaced, started unasked: %v", err)
		}
		h.stop()
		if err := h.tries(b, false); err != nil {
			t.Errorf("the host in office, started again: %v", err)
		}
		h.stop()
	})
}

// copied is what a copy of the host's state is.
func (s *hostState) copied(t *testing.T) *hostState {
	t.Helper()
	c := &hostState{epochs: s.Epochs(), tails: &uploader.Tails{}}
	raw, err := json.Marshal(s.Tails())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, c.tails); err != nil {
		t.Fatal(err)
	}
	return c
}

// A store that was away keeps the promise of a writer that was replaced long ago.
// That locks nobody out, also when another store is away then, and although the
// writer in office has had nothing to append.
func TestOffice_AnOldPromiseLocksNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a := newLogHost(t, 3), &hostState{}
		if err := h.tries(a, false); err != nil {
			t.Fatal(err)
		}
		h.appends(t.Context(), 3)
		h.stop()
		if err := h.tries(a.copied(t), false); err != nil { // a clone, before a goes on
			t.Fatal(err)
		}
		h.stop()
		back := h.gone(fault.Rule{}, 2)
		if err := h.tries(a, true); err != nil {
			t.Fatal(err)
		}
		h.stop()
		back()
		back = h.gone(fault.Rule{}, 1)
		if err := h.tries(a, false); err != nil {
			t.Errorf("a restart of the host in office: %v", err)
		}
		h.stop()
		back()
	})
}

// What a host does not hold is seen before it has promised anything, so that who
// goes on with the history is not disturbed; and, where that was not to be seen
// before, at the latest before it is in office.
func TestOffice_NotOverWhatTheHostDoesNotHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, state := newLogHost(t, 3), &hostState{}
		if err := h.tries(state, false); err != nil {
			t.Fatal(err)
		}
		h.appends(t.Context(), 2)
		copied := state.copied(t)
		h.appends(t.Context(), 2)
		writer := *h
		var holds atomic.Uint64
		holds.Store(2)
		h.ours = func(e *grouplog.Entry) error {
			if e.N > holds.Load() {
				return &uploader.DivergedError{N: e.N, To: block.Seq(e.N), Epoch: format.Epoch{Number: 1}}
			}
			return nil
		}
		var diverged *uploader.DivergedError
		if err := h.tries(copied, false); !errors.As(err, &diverged) || !errors.Is(err, uploader.ErrFenced) || diverged.N != 4 {
			t.Fatalf("the copy took office: %v", err)
		}
		if len(copied.Epochs()) != 1 || len(h.heard) != 0 {
			t.Errorf("the copy took an epoch, or was told of %d entries", len(h.heard))
		}
		h.stop()
		for range 2 {
			if err := writer.append(t.Context()); err != nil {
				t.Fatalf("the copy has disturbed the writer: %v", err)
			}
		}
		// The entry lands between the look and the promise, whichever store is the
		// first to be given that: any two are enough to be in office.
		holds.Store(6)
		for _, f := range h.faults {
			f.Add(fault.Rule{Op: fault.Put, Times: 1, Hook: func(context.Context, fault.Call) error {
				holds.Store(2)
				return nil
			}})
		}
		if err := h.tries(copied, false); !errors.As(err, &diverged) || len(h.heard) != 0 {
			t.Errorf("the copy took office: %v, and was told of %d entries", err, len(h.heard))
		}
		h.stop()
		writer.stop()
	})
}

// TestOffice_AnEntryThatBringsAnotherKeySet: an entry may be sealed with the key set
// that its start has logged before, and bring the one of a batch which an earlier
// start has cut. The next start has neither in its ring.
func TestOffice_AnEntryThatBringsAnotherKeySet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newLogHost(t, 1)
		h.start(t.Context())
		h.appends(t.Context(), 2)
		before := h.state.copied(t)
		earlier, err := crypt.NewKeySet(h.agent, h.id.Recipients(), 1)
		if err != nil {
			t.Fatal(err)
		}
		n, parent, epoch := h.log.Next()
		draft := grouplog.Draft{Group: logGroup, N: n, Parent: parent, Epoch: epoch, Keys: logKeys, KeySets: [][]byte{earlier.Raw}, Items: &format.Items{}}
		if err := h.log.Append(t.Context(), draft.Make(h.agent)); err != nil {
			t.Fatal(err)
		}
		h.stop()
		h.state, h.fetches = before, true // the process died before it could save
		h.start(t.Context())
		if !slices.Equal(h.heard, []uint64{n}) {
			t.Errorf("entry %d was to be read, and these were: %v", n, h.heard)
		}
		h.stop()
	})
}

// The writer in office has begun a key set that the host which is told to take over
// has not met: the newest entry cannot be opened. Whose it is can be seen all the
// same, and who does not hold it must not fence the one that does, only to be
// fenced by itself.
func TestOffice_NotOverAnEntryThatItCannotOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, late := newLogHost(t, 3), &hostState{}
		if err := h.tries(&hostState{}, false); err != nil {
			t.Fatal(err)
		}
		other, err := crypt.NewKeySet(h.agent, h.repo.Record.Recipients, 1)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			n, parent, epoch := h.log.Next()
			d := grouplog.Draft{Group: logGroup, N: n, Parent: parent, Epoch: epoch, Keys: other, Items: &format.Items{}}
			if n == 1 {
				d.KeySets = [][]byte{other.Raw}
			}
			if err := h.log.Append(t.Context(), d.Make(h.agent)); err != nil {
				t.Fatal(err)
			}
		}
		writer := *h
		h.ours = func(e *grouplog.Entry) error {
			if !slices.Contains(late.Epochs(), e.Epoch) {
				return &uploader.DivergedError{N: e.N, Epoch: e.Epoch}
			}
			return nil
		}
		// One store does not answer at first: it is asked again.
		back := h.faults[0].Add(fault.Rule{Op: fault.Get, Name: "*", Times: 2, Before: fault.ErrInjected})
		var diverged *uploader.DivergedError
		if err := h.tries(late, true); !errors.As(err, &diverged) || diverged.N != 3 {
			t.Errorf("the host that does not hold the newest entry: %v", err)
		}
		back()
		if len(late.Epochs()) != 0 {
			t.Error("it has taken an epoch before it saw that")
		}
		h.stop()
		if err := writer.append(t.Context()); err != nil {
			t.Errorf("the writer in office was disturbed: %v", err)
		}
		writer.stop()
	})
}

// A writer has left an entry behind on one store when another host fences it on the
// others. That one starts anew, and can read the store now: it goes on where its
// office began, be the store among those that answer first or not.
func TestOffice_WhatItHasPassedByIsNoHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, a, b := newLogHost(t, 3), &hostState{}, &hostState{}
		if err := h.tries(a, false); err != nil {
			t.Fatal(err)
		}
		h.appends(t.Context(), 2)
		back := h.gone(fault.Rule{}, 1, 2)
		soon, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := h.append(soon); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("an entry on one of three stores is decided: %v", err)
		}
		cancel()
		h.stop()
		back()
		back = h.gone(fault.Rule{}, 0)
		if err := h.tries(b, true); err != nil {
			t.Fatal(err)
		}
		h.stop()
		back()
		n, _, epoch := h.log.Next()
		if n != 3 {
			t.Fatalf("the next entry is %d", n)
		}
		h.ours = func(e *grouplog.Entry) error {
			if e.N > 2 {
				return &uploader.DivergedError{N: e.N, Epoch: e.Epoch}
			}
			return nil
		}
		var diverged *uploader.DivergedError
		if err := h.tries(b.copied(t), false); !errors.As(err, &diverged) || diverged.N != 3 {
			t.Fatalf("the entry that was left behind is not to be seen: %v", err)
		}
		h.stop()
		h.office = uploader.Office{Epoch: epoch, N: n - 1}
		for range 2 {
			if err := h.tries(b, false); err != nil {
				t.Fatalf("it does not go on: %v", err)
			}
			if n, _, _ := h.log.Next(); n != 3 {
				t.Errorf("it goes on with entry %d", n)
			}
			h.stop()
		}
		if err := h.tries(b, false); err != nil {
			t.Fatal(err)
		}
		h.appends(t.Context(), 2)
		h.stop()
	})
}
