package vbuf

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"drc/internal/vfs"
)

var update = flag.Bool("update", false, "write the golden trace anew")

// TestTrace_FileOperations holds the file operations of a short life of a buffer
// with two disks: a change in what is written, synced and renamed, and in which
// order, shows up here.
func TestTrace_FileOperations(t *testing.T) {
	var mu sync.Mutex
	var lines []string
	m := vfs.NewMem()
	say := func(line string) {
		mu.Lock()
		lines = append(lines, line)
		mu.Unlock()
	}
	batchID := regexp.MustCompile(`[0-9a-f]{32}\.batch`)
	m.SetHook(func(op vfs.Op, name string) error {
		say(fmt.Sprintf("  %s %s", op, batchID.ReplaceAllString(name, "ID.batch")))
		return nil
	})
	ctx := context.Background()
	o := testOptions(m, 2)
	say("open")
	b := mustOpen(t, o)
	say("journal")
	j := mustJournal(t, b)
	say("write")
	seq := put(t, j, 1)
	if err := j.WaitWritten(ctx, seq); err != nil {
		t.Fatal(err)
	}
	say("flush")
	flush(t, j)
	say("flush again")
	flush(t, j)
	say("write three and flush")
	for range 3 {
		put(t, j, 1)
	}
	flush(t, j)
	say("step: a spare")
	for range 2 {
		if _, err := b.Step(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		put(t, j, 1)
	}
	say("roll")
	flush(t, j)
	say("release")
	j.Release(j.Durable())
	if _, err := b.Step(ctx); err != nil {
		t.Fatal(err)
	}
	say("spool")
	s := mustSpool(t, b)
	batch := testBatch(10, 1, 1, 512)
	s.Add(batch)
	say("persist")
	if err := s.Persist(ctx, batch); err != nil {
		t.Fatal(err)
	}
	say("placed, logged")
	s.Placed(batch.Shards[0].Segment, 0)
	if err := s.Logged(batch); err != nil {
		t.Fatal(err)
	}
	say("drop")
	if err := s.Drop(batch); err != nil {
		t.Fatal(err)
	}
	say("close")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	m.SetHook(nil)

	// The disks are written and synced at the same time.
	for i := 0; i < len(lines); {
		k := i
		for k < len(lines) && k < i+2 && strings.HasPrefix(lines[k], "  write ") {
			k++
		}
		for k < len(lines) && strings.HasPrefix(lines[k], "  sync ") && strings.HasPrefix(lines[i], "  sync ") {
			k++
		}
		slices.Sort(lines[i:k])
		i = max(k, i+1)
	}
	got := []byte(strings.Join(lines, "\n") + "\n")
	golden := filepath.Join("testdata", "trace.txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("the file operations are not those of %s any more:\n%s", golden, got)
	}
}
