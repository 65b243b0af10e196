package vbuf

import (
	"math/rand/v2"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

// TestSetNext_IsDurable: a journal that was begun says where it is after a power
// cut, although it never had a record; one that was only looked at, and closed,
// does not. So an empty buffer is told from the one that was used last.
func TestSetNext_IsDurable(t *testing.T) {
	for _, next := range []block.Seq{0, 1, 77} {
		m := vfs.NewMem()
		o := testOptions(m, 2)
		b := mustOpen(t, o)
		j, err := b.Journal(t.Context(), testGroup)
		if err != nil {
			t.Fatal(err)
		}
		if next > 0 {
			if err := j.SetNext(next); err != nil {
				t.Fatal(err)
			}
			o.FS = m.Crash(rand.New(rand.NewPCG(1, uint64(next))))
			b.Close() // of the dead file system
		} else if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		b = mustOpen(t, o)
		if j, err = b.Journal(t.Context(), testGroup); err != nil {
			t.Fatal(err)
		}
		if got := j.Next(); got != next {
			t.Errorf("begun at %d, the next start finds %d", next, got)
		}
		if next > 0 {
			j.Enqueue(testWrite(next, 0))
			if err := j.Flush(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}
