package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/segment"
	"drc/vbuf"
)

// TestSpool_PlacedBeforeItWasKept: a batch becomes durable in the buffer when
// some of its shards are on their stores already, and the agent dies. The next
// start must not look for these in the buffer.
func TestSpool_PlacedBeforeItWasKept(t *testing.T) {
	ctx := t.Context()
	opt := vbuf.Options{Repo: block.ID{1}, Host: block.ID{2}, Dirs: []vbuf.DirOptions{{Path: filepath.Join(t.TempDir(), "buffer"), SizeBytes: 16 << 20}}}
	group := block.GroupID{3}
	open := func() (*vbuf.Buffer, *spool) {
		buffer, err := vbuf.Open(ctx, opt)
		if err != nil {
			t.Fatal(err)
		}
		s, err := buffer.Spool(ctx, group)
		if err != nil {
			t.Fatal(err)
		}
		return buffer, newSpool(s, slog.New(slog.DiscardHandler), func(block.Seq) {})
	}
	row, shards := realShards(t, format.Profile{Data: 2, Parity: 1})
	whole := &batch.Batch{From: 1, To: 2, KeySet: row.KeySet, Bytes: 100, Oldest: 1,
		Items:    format.Items{Range: &format.Range{Branch: block.BranchID{6}, From: 1, To: 2, Time: 1}},
		Segments: []batch.Segment{{Row: row, Shards: [][]byte{nil, shards[1], shards[2]}}}}

	buffer, p := open()
	if err := p.Persist(ctx, whole, whole); err != nil {
		t.Fatal(err)
	}
	if err := buffer.Close(); err != nil {
		t.Fatal(err)
	}
	buffer, p = open()
	defer buffer.Close()
	batches, placed, _, err := p.recovered()
	if err != nil {
		t.Fatal(err)
	}
	if len(batches) != 1 || placed[0][0] != 1 {
		t.Fatalf("%d batches, of whose shards %b are placed; shard 0 was, and the others are in the buffer", len(batches), placed)
	}
	for i := 1; i < 3; i++ {
		if _, err := p.ReadShard(row.ID, i); err != nil {
			t.Error(err)
		}
	}
}

// realShards is a segment as the segmenter makes them.
func realShards(t *testing.T, p format.Profile) (format.SegmentRow, [][]byte) {
	t.Helper()
	w := segment.NewWriter(crypttest.Keys())
	noise := make([]byte, 300<<10)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(noise)
	w.Add(noise)
	sealed := w.Finish()
	shards, err := sealed.Shards(p)
	if err != nil {
		t.Fatal(err)
	}
	row := sealed.Row(p, 0)
	if row.Profile != p {
		t.Fatalf("the segment has profile %v", row.Profile)
	}
	return row, shards
}

// TestSpool_ShardsLostWithADisk: shard objects that are lost are made again, to the
// byte, from those in the buffer, and from those on the stores once they have left
// it; also by the next start, and once the batch is logged.
func TestSpool_ShardsLostWithADisk(t *testing.T) {
	ctx := t.Context()
	row, shards := realShards(t, format.Profile{Data: 2, Parity: 2})
	whole := &batch.Batch{From: 1, To: 2, KeySet: row.KeySet, Bytes: 100, Oldest: 1,
		Items:    format.Items{Range: &format.Range{Branch: block.BranchID{6}, From: 1, To: 2, Time: 1}},
		Segments: []batch.Segment{{Row: row, Shards: slices.Clone(shards)}}}
	opt := vbuf.Options{Repo: block.ID{1}, Host: block.ID{2}}
	for _, name := range []string{"a", "b"} {
		opt.Dirs = append(opt.Dirs, vbuf.DirOptions{Path: filepath.Join(t.TempDir(), name), SizeBytes: 16 << 20})
	}
	onStores := map[int]bool{}
	open := func() (*vbuf.Buffer, *spool) {
		buffer, err := vbuf.Open(ctx, opt)
		if err != nil {
			t.Fatal(err)
		}
		s, err := buffer.Spool(ctx, block.GroupID{3})
		if err != nil {
			t.Fatal(err)
		}
		p := newSpool(s, slog.New(slog.DiscardHandler), func(block.Seq) {})
		p.fetch = func(_ context.Context, seg block.SegmentID, i int) ([]byte, error) {
			if !onStores[i] || seg != row.ID {
				return nil, errors.New("it is not on its store")
			}
			return shards[i], nil
		}
		return buffer, p
	}
	lose := func(i int) {
		n := 0
		for _, d := range opt.Dirs {
			files, _ := filepath.Glob(filepath.Join(d.Path, "spool", "*", fmt.Sprintf("*.%d.shard", i)))
			for _, f := range files {
				n++
				if err := os.Remove(f); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n != 1 {
			t.Fatalf("shard %d is kept %d times", i, n)
		}
	}
	check := func(p *spool, why string, there ...int) {
		t.Helper()
		for i := range shards {
			if onStores[i] {
				continue // nobody asks for it
			}
			data, err := p.ReadShard(row.ID, i)
			if !slices.Contains(there, i) {
				if !errors.Is(err, vbuf.ErrShardLost) {
					t.Errorf("%s: shard %d: %v", why, i, err)
				}
			} else if err != nil || !bytes.Equal(data, shards[i]) {
				t.Errorf("%s: shard %d is not what it was (%v)", why, i, err)
			}
		}
	}
	buffer, p := open()
	if err := p.Persist(ctx, whole, whole); err != nil {
		t.Fatal(err)
	}
	whole.Segments[0].Shards = nil
	lose(1)
	lose(2)
	check(p, "two of four", 0, 1, 2, 3)
	lose(0)
	check(p, "three of four", 3)
	onStores[0] = true
	check(p, "and one on a store", 1, 2, 3)
	if err := buffer.Close(); err != nil {
		t.Fatal(err)
	}
	buffer, p = open()
	defer buffer.Close()
	if _, _, _, err := p.recovered(); err != nil {
		t.Fatal(err)
	}
	check(p, "after a restart", 1, 2, 3)
	for b := range p.kept {
		p.Logged(b)
	}
	check(p, "when it is logged", 1, 2, 3)
}
