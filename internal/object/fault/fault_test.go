package fault

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/object"
	"drc/internal/object/mem"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

func newStore(t *testing.T, names ...string) *Store {
	t.Helper()
	store := New(mem.New(mem.Options{}))
	for _, name := range names {
		if _, err := store.Put(t.Context(), name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	store.Forget()
	return store
}

func has(t *testing.T, store *Store, name string) bool {
	t.Helper()
	_, err := store.below.Stat(t.Context(), name)
	if err != nil && !errors.Is(err, object.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestRule_BeforeAndAfter(t *testing.T) {
	store := newStore(t)
	store.Add(Rule{Op: Put, Name: "before/*", Before: errBroken})
	store.Add(Rule{Op: Put, Name: "after/*", After: errBroken})
	for name, applied := range map[string]bool{"before/a": false, "after/a": true} {
		if _, err := store.Put(t.Context(), name, nil); !errors.Is(err, errBroken) {
			t.Errorf("put %s: %v", name, err)
		}
		if has(t, store, name) != applied {
			t.Errorf("%s applied: %v", name, !applied)
		}
	}
	if _, err := store.Put(t.Context(), "other", nil); err != nil {
		t.Error(err)
	}
}

func TestRule_EveryOperation(t *testing.T) {
	for _, rule := range []Rule{{Before: errBroken}, {After: errBroken}, {Hook: func(context.Context, Call) error { return errBroken }}} {
		store := newStore(t, "a/b")
		store.Add(rule)
		ctx := t.Context()
		_, put := store.Put(ctx, "a/b", []byte("a/b"))
		_, _, get := store.Get(ctx, "a/b", 10, nil)
		_, getRange := store.GetRange(ctx, "a/b", 0, 1, nil)
		_, stat := store.Stat(ctx, "a/b")
		var list, listDirs error
		for _, list = range store.List(ctx, "", "") {
		}
		for _, listDirs = range store.ListDirs(ctx, "") {
		}
		del := store.Delete(ctx, "a/b")
		for i, err := range []error{put, get, getRange, stat, list, listDirs, del} {
			if !errors.Is(err, errBroken) {
				t.Errorf("operation %d: %v", i, err)
			}
		}
		if len(store.Calls()) != 7 {
			t.Errorf("calls: %v", store.Calls())
		}
		if has(t, store, "a/b") == (rule.After != nil) {
			t.Errorf("delete was applied: %v", rule.After == nil)
		}
	}
}

func TestRule_SkipTimesRemove(t *testing.T) {
	store := newStore(t, "a")
	remove := store.Add(Rule{Op: Stat, Skip: 1, Times: 2, Before: errBroken})
	var failed []bool
	for range 5 {
		_, err := store.Stat(t.Context(), "a")
		failed = append(failed, err != nil)
	}
	if !slices.Equal(failed, []bool{false, true, true, false, false}) {
		t.Errorf("failed: %v", failed)
	}
	remove()
	store.Add(Rule{Before: errBroken})
	store.Clear()
	if _, err := store.Stat(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

func TestRule_Alter(t *testing.T) {
	store := newStore(t, "abc", "short")
	store.Add(Rule{Name: "abc", Alter: FlipBit(8)})
	store.Add(Rule{Name: "short", Alter: Truncate(2)})
	got, _, err := store.Get(t.Context(), "abc", 10, []byte("head"))
	if err != nil || string(got) != "headacc" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err = store.GetRange(t.Context(), "abc", 1, 2, nil); err != nil || string(got) != "bb" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, _, err = store.Get(t.Context(), "short", 10, nil); err != nil || string(got) != "sh" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err = store.GetRange(t.Context(), "short", 0, 5, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("range of a truncated object: %v", err)
	}
	store.Clear()
	if got, _, err = store.Get(t.Context(), "abc", 10, nil); err != nil || string(got) != "abc" {
		t.Errorf("the stored bytes changed: %q, %v", got, err)
	}
}

func TestRule_Hide(t *testing.T) {
	store := newStore(t, "a/1", "a/2", "b/1")
	store.Add(Rule{Name: "a/*", Hide: true})
	if _, _, err := store.Get(t.Context(), "a/1", 10, nil); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("get: %v", err)
	}
	var names []string
	for info, err := range store.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, info.Name)
	}
	if !slices.Equal(names, []string{"b/1"}) {
		t.Errorf("listed %q", names)
	}
	// It is there all the same.
	if _, err := store.Put(t.Context(), "a/1", []byte("x")); !errors.Is(err, object.ErrExists) {
		t.Errorf("put: %v", err)
	}
}

func TestRule_BlockUntilReleasedOrCanceled(t *testing.T) {
	store := newStore(t)
	release := make(chan struct{})
	store.Add(Rule{Op: Put, Name: "*", Block: release})
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	put := func(ctx context.Context, name string) {
		_, err := store.Put(ctx, name, nil)
		errs <- err
	}
	go put(ctx, "canceled")
	if err := store.Wait(t.Context(), Put, "canceled", 1); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	go put(t.Context(), "released")
	if err := store.Wait(t.Context(), Put, "*", 2); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := <-errs; err != nil {
		t.Error(err)
	}
	if has(t, store, "canceled") || !has(t, store, "released") {
		t.Error("the wrong put was applied")
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := store.Wait(canceled, Put, "*", 3); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestRule_Delay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newStore(t, "a")
		store.Add(Rule{Delay: time.Minute})
		start := time.Now()
		if _, err := store.Stat(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d != time.Minute {
			t.Errorf("took %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := store.Stat(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestCalls(t *testing.T) {
	store := newStore(t, "a/b")
	store.GetRange(t.Context(), "a/b", 1, 2, nil)
	store.Put(t.Context(), "c", []byte("xyz"))
	want := []Call{{Op: GetRange, Name: "a/b", Off: 1, Size: 2}, {Op: Put, Name: "c", Size: 3}}
	if got := store.Calls(); !slices.Equal(got, want) {
		t.Errorf("calls: %v, want %v", got, want)
	}
	if store.Count("", "") != 2 || store.Count(Put, "") != 1 || store.Count("", "a*") != 1 || store.Count(Put, "a*") != 0 {
		t.Error("wrong counts")
	}
}

func TestMatchName(t *testing.T) {
	for _, test := range []struct {
		pattern, name string
		want          bool
	}{
		{"a", "a", true}, {"a", "ab", false}, {"*", "", true}, {"*", "a/b", true}, {"a/*", "a/b/c", true},
		{"a/*", "b/a/c", false}, {"*/c", "a/b/c", true}, {"a*c", "abc", true}, {"a*c", "ac", true},
		{"a*a", "a", false}, {"a*b*c", "axbxc", true}, {"a*b*c", "acb", false}, {"a*b*b", "ab", false}, {"**", "x", true},
	} {
		if got := matchName(test.pattern, test.name); got != test.want {
			t.Errorf("%q matches %q: %v", test.pattern, test.name, got)
		}
	}
}
