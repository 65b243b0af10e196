package pipeline

import (
	"os"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/state"
)

// What was noted of entries is known after a restart; what a power cut left as
// zeroes, or cut off, is not.
func TestEntries_KnownOrNot(t *testing.T) {
	dir, err := state.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	id := block.GroupID{1}
	if err := (groupFiles{dir, id}).saveGroup(&groupState{ID: id}); err != nil {
		t.Fatal(err)
	}
	hash := func(n uint64) format.Hash { return format.Hash{byte(n), 1} }
	for _, n := range []uint64{1, 2, 5, 3} {
		if err := (groupFiles{dir, id}).Note(n, hash(n), n == 2); err != nil {
			t.Fatal(err)
		}
	}
	f := groupFiles{dir, id}
	for n, known := range map[uint64]bool{1: true, 2: true, 3: true, 4: false, 5: true, 6: false} {
		h, named, ok := f.Entry(n)
		if ok != known || (ok && (h != hash(n) || named != (n == 2))) {
			t.Errorf("entry %d: %s, named %t, known %t", n, h, named, ok)
		}
	}
	if err := os.Truncate(dir.Path(f.path("entries.hash")...), 4*32+31); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dir.Path(f.path("entries.named")...), 2); err != nil {
		t.Fatal(err)
	}
	for n, known := range map[uint64]bool{1: true, 2: true, 3: false, 5: false} {
		if _, _, ok := f.Entry(n); ok != known {
			t.Errorf("entry %d is known: %t", n, ok)
		}
	}
}
