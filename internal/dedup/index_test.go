package dedup_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/dedup"
	"drc/internal/format"
	"drc/internal/manifest"
)

var (
	group  = block.GroupID{1}
	branch = block.BranchID{2}
)

// chunks makes a batch with one segment of n chunks, numbered from first on.
func chunks(first, n int) *batch.Batch {
	row := format.SegmentRow{ID: block.SegmentID(block.NewID()), Payload: 100, IndexBytes: 10, Profile: format.Profile{Data: 1}}
	v := batch.VolumeExtents{}
	for i := range n {
		v.Extents = append(v.Extents, manifest.Extent{
			Extent: block.Extent{Off: int64(i) << 12, Len: 1 << 12}, Segment: row, Chunk: i, ChunkLen: 1 << 12, ChunkID: chunkID(first + i),
		})
	}
	return &batch.Batch{Segments: []batch.Segment{{Row: row}}, Volumes: []batch.VolumeExtents{v}}
}

func chunkID(i int) (id crypt.ChunkID) {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(i)))
	copy(id[:], sum[:])
	return id
}

func open(t *testing.T, dir string, n uint64, logger *slog.Logger) *dedup.Index {
	t.Helper()
	x, err := dedup.Open(dir, group, branch, n, logger)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestIndex_AnswersAfterARestart: what was added is found, with its row, by
// this process and the next one, unless the log ends before it or it is another
// branch's.
func TestIndex_AnswersAfterARestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dedup")
	x := open(t, dir, 0, slog.New(slog.DiscardHandler))
	b := chunks(0, 100)
	if err := x.Add(b, group, branch, 7); err != nil {
		t.Fatal(err)
	}
	check := func(x *dedup.Index, want bool) {
		t.Helper()
		for i := range 100 {
			loc, ok := x.Lookup(chunkID(i))
			if ok != want || ok && (loc.Chunk != i || loc.Len != 1<<12 || loc.Segment != b.Segments[0].Row) {
				t.Fatalf("chunk %d is at %+v, %v", i, loc, ok)
			}
		}
		if _, ok := x.Lookup(chunkID(100)); ok {
			t.Error("a chunk that was never added is found")
		}
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
	}
	check(x, true)
	check(open(t, dir, 7, slog.New(slog.DiscardHandler)), true)
	x = open(t, dir, 7, slog.New(slog.DiscardHandler))
	x.AwaitFilter()
	check(x, true)
	check(open(t, dir, 6, slog.New(slog.DiscardHandler)), false)

	x = open(t, dir, 0, slog.New(slog.DiscardHandler))
	if err := x.Add(b, group, branch, 1); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	x, err := dedup.Open(dir, group, block.BranchID{3}, 9, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	check(x, false)
}

// TestIndex_DamagedIsMadeAnew: garbage in its files is no reason not to start.
func TestIndex_DamagedIsMadeAnew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dedup")
	x := open(t, dir, 0, slog.New(slog.DiscardHandler))
	if err := errors.Join(x.Add(chunks(0, 10), group, branch, 1), x.Close()); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.Name()), bytes.Repeat([]byte{0xa5}, 500), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	x = open(t, dir, 5, slog.New(slog.DiscardHandler))
	if _, ok := x.Lookup(chunkID(1)); ok {
		t.Error("a damaged index answers")
	}
	if err := errors.Join(x.Add(chunks(0, 10), group, branch, 6), x.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestIndex_IsGivenUpWhenItCannotBeWritten: it says so once, answers nothing
// more, and neither Add nor Close waits for a disk that does not come back.
func TestIndex_IsGivenUpWhenItCannotBeWritten(t *testing.T) {
	for name, use := range map[string]func(x *dedup.Index) error{
		"close": func(x *dedup.Index) error {
			if err := x.Add(chunks(0, 10), group, branch, 1); err != nil {
				return err
			}
			return x.Close()
		},
		"add until memory must be written": func(x *dedup.Index) error {
			for i := range 10000 {
				if err := x.Add(chunks(i*1000, 1000), group, branch, uint64(i+1)); err != nil {
					return err
				}
			}
			return errors.New("all was added")
		},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			dir := filepath.Join(t.TempDir(), "dedup")
			x := open(t, dir, 0, slog.New(slog.NewTextHandler(&log, nil)))
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			done := make(chan error)
			go func() { done <- use(x) }()
			select {
			case err := <-done:
				if err != nil && !errors.Is(err, dedup.ErrGivenUp) {
					t.Fatal(err)
				}
			case <-time.After(time.Minute):
				t.Fatal("stuck")
			}
			if err := x.Add(chunks(0, 1), group, branch, 1); !errors.Is(err, dedup.ErrGivenUp) {
				t.Errorf("Add then returns %v", err)
			}
			if _, ok := x.Lookup(chunkID(1)); ok {
				t.Error("it still answers")
			}
			if err := x.Close(); err != nil {
				t.Error(err)
			}
			if n := bytes.Count(log.Bytes(), []byte("\n")); n != 1 || !bytes.Contains(log.Bytes(), []byte("out of use until the next start")) {
				t.Errorf("%d lines of log: %s", n, log.Bytes())
			}
		})
	}
}

// TestIndex_FilterNeverHidesAChunk: not while it is filled, nor when it is full
// many times over.
func TestIndex_FilterNeverHidesAChunk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dedup")
	x := open(t, dir, 0, slog.New(slog.DiscardHandler))
	const n, each = 80, 1000
	for i := range n {
		if err := x.Add(chunks(i*each, each), group, branch, uint64(i+1)); err != nil {
			t.Fatal(err)
		}
		if i == n/2 {
			if err := x.Close(); err != nil {
				t.Fatal(err)
			}
			x = open(t, dir, n, slog.New(slog.DiscardHandler)) // goes on while the filter is filled
		}
		if _, ok := x.Lookup(chunkID(i * each / 2)); !ok {
			t.Fatalf("chunk %d is hidden", i*each/2)
		}
	}
	x.AwaitFilter()
	unknown := 0
	for i := range n * each {
		if x.IsNew(chunkID(i)) {
			t.Fatalf("chunk %d is hidden", i)
		}
		if !x.IsNew(chunkID(n*each + i)) {
			unknown++
		}
	}
	if unknown > n*each/50 {
		t.Errorf("%d of %d new chunks are taken for known ones", unknown, n*each)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkLookup_New looks up chunks that a large index does not have.
func BenchmarkLookup_New(b *testing.B) {
	x, err := dedup.Open(filepath.Join(b.TempDir(), "dedup"), group, branch, 0, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	const n = 2 << 20
	for i := range n / 4096 {
		if err := x.Add(chunks(i*4096, 4096), group, branch, uint64(i+1)); err != nil {
			b.Fatal(err)
		}
	}
	for i := 0; b.Loop(); i++ {
		if _, ok := x.Lookup(chunkID(n + i)); ok {
			b.Fatal("found")
		}
	}
	if err := x.Close(); err != nil {
		b.Fatal(err)
	}
}
