package mem_test

import (
	"testing"

	"drc/internal/object"
	"drc/internal/object/mem"
	"drc/internal/object/objecttest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return mem.New(mem.Options{}) })
}

func TestTamper_ChangesOnlyThatStore(t *testing.T) {
	store := mem.New(mem.Options{})
	if _, err := store.Put(t.Context(), "a", []byte("abc")); err != nil {
		t.Fatal(err)
	}
	clone := store.Clone()
	if !store.Tamper("a", func(b []byte) []byte { b[0] = 'x'; return b[:2] }) {
		t.Fatal("the object was not found")
	}
	if store.Tamper("b", func(b []byte) []byte { return b }) {
		t.Error("an absent object was found")
	}
	for store, want := range map[*mem.Store]string{store: "xb", clone: "abc"} {
		if got, _, err := store.Get(t.Context(), "a", 10, nil); err != nil || string(got) != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
}
