package vbuf

import (
	"sync"
	"testing"

	"drc/internal/vfs"
)

// TestRead_WhileTheSameFileGrows: a reader looks its place up in a file's index
// while a writer adds to that index. The race detector is the judge.
func TestRead_WhileTheSameFileGrows(t *testing.T) {
	o := testOptions(vfs.NewMem(), 1)
	o.FileBytes = 2 << 20
	o.Dirs[0].SizeBytes = 64 << 20
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	put(t, j, 1)
	flush(t, j)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				checkRead(t, j, 1, j.Durable(), salted(1))
			}
		}
	})
	for range 400 {
		put(t, j, 1)
		flush(t, j)
	}
	close(stop)
	wg.Wait()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
