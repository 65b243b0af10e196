package vbuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// rotAt changes a byte of a file behind the back of the buffer, durably.
func rotAt(t *testing.T, m *vfs.Mem, name string, at int64) {
	t.Helper()
	f, err := m.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, at); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 0x10
	if _, err := f.WriteAt(p, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// scrubAll scrubs at a time at which all that is there is due, until nothing is.
func scrubAll(t *testing.T, b *Buffer, at time.Time) {
	t.Helper()
	for {
		n, err := b.Scrub(context.Background(), at)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return
		}
	}
}

// kept makes a buffer with some batches in it.
func kept(t *testing.T, m *vfs.Mem, disks, k, parity int) (Options, *Buffer, *Spool, []*Batch) {
	t.Helper()
	o := testOptions(m, disks)
	b := mustOpen(t, o)
	s := mustSpool(t, b)
	var list []*Batch
	for i := range 4 {
		batch := testBatch(block.Seq(10*(i+1)), k, parity, 3000)
		s.Add(batch)
		if err := s.Persist(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		list = append(list, batch)
	}
	return o, b, s, list
}

func shardFiles(s *Spool, batch *Batch, i int) (names []string) {
	for _, d := range batch.s.copies[i] {
		names = append(names, s.shardName(d, batch.Shards[i].Segment, batch.Shards[i].Index))
	}
	return names
}

// TestScrub_MendsRot: what has rotted, of shards and of records, and can be made again,
// is, and is right on the disk afterwards, also over a power cut.
func TestScrub_MendsRot(t *testing.T) {
	for _, c := range []struct{ disks, k, parity int }{{1, 4, 2}, {2, 2, 0}, {2, 4, 1}, {3, 4, 2}} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			m := vfs.NewMem()
			o, b, s, list := kept(t, m, c.disks, c.k, c.parity)
			now := time.Now()
			scrubAll(t, b, now)
			if got := b.Stats().Scrub; got.CheckedBytes != 0 {
				t.Fatalf("%+v: what was just written is checked", got)
			}
			now = now.Add(2 * scrubEvery)
			scrubAll(t, b, now)
			if got := b.Stats().Scrub; got.Rotten != 0 || got.CheckedBytes < 4*3000 {
				t.Fatalf("%+v: nothing has rotted", got)
			}
			want := int64(0)
			for n, batch := range list {
				for i := range max(c.parity, 1) { // one copy of as many shards
					rotAt(t, m, shardFiles(s, batch, (n+i)%len(batch.Shards))[0], int64(100+500*n))
					want++
				}
				if c.disks > 1 {
					rotAt(t, m, s.recordName(b.disks[n%c.disks], batch.s.id), 70)
					want++
				}
			}
			// One is lost altogether.
			if names := shardFiles(s, list[0], len(list[0].Shards)-1); c.parity == 0 {
				if err := m.Remove(names[0]); err != nil {
					t.Fatal(err)
				}
				want++
			}
			now = now.Add(2 * scrubEvery)
			scrubAll(t, b, now)
			if got := b.Stats().Scrub; got.Rotten != want || got.Mended != want || got.Lost != 0 {
				t.Errorf("%+v: %d files had rotted", got, want)
			}
			now = now.Add(2 * scrubEvery)
			scrubAll(t, b, now)
			if got := b.Stats().Scrub; got.Rotten != want {
				t.Errorf("%+v: there is still rot", got)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			b = mustOpen(t, o)
			s = mustSpool(t, b)
			for _, batch := range s.Batches() {
				checkShards(t, s, batch, 3000)
				for i := range batch.Shards {
					if bad, left, _ := s.rottenCopies(batch, i); len(bad) > 0 || !left || len(batch.s.copies[i]) == 0 {
						t.Errorf("shard %d of the batch up to %d is not right on its disks", i, batch.To)
					}
				}
				recordOf(t, s, batch)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestScrub_SaysWhatIsLost: rot beyond the parity is reported once, with its seqs, at
// work, and the next start knows of it without reading a shard. The other batches, and
// the shards of the segment that are right, stay.
func TestScrub_SaysWhatIsLost(t *testing.T) {
	m := vfs.NewMem()
	o, b, _, _ := kept(t, m, 1, 4, 2)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	var losses []Loss
	o.OnLoss = func(l Loss) { losses = append(losses, l) }
	b = mustOpen(t, o)
	s := mustSpool(t, b)
	bad := s.Batches()[1]
	for i := range 3 {
		rotAt(t, m, shardFiles(s, bad, 2*i)[0], 1000)
	}
	scrubAll(t, b, time.Now()) // after a start all is due at once
	check := func(s *Spool) {
		t.Helper()
		if lost := s.Lost(); len(lost) != 1 || lost[0].To != bad.To {
			t.Errorf("%d batches are lost", len(lost))
		}
		if len(losses) != 1 || losses[0].Batch == nil || losses[0].Range != (Range{bad.From, bad.To}) {
			t.Errorf("reported: %+v", losses)
		}
		for _, batch := range s.Batches() {
			if batch.To != bad.To {
				checkShards(t, s, batch, 3000)
				continue
			}
			for i, sh := range batch.Shards {
				data, err := s.ReadShard(sh.Segment, sh.Index)
				if right := slices.Contains([]int{1, 3, 5}, i); right != (err == nil) {
					t.Errorf("shard %d: %v", i, err)
				} else if right && !bytes.Equal(data, shardBytes(sh.Segment, i, 3000)) {
					t.Errorf("shard %d is wrong", i)
				}
			}
		}
	}
	check(s)
	if got := b.Stats().Scrub; got.Rotten != 3 || got.Mended != 0 || got.Lost != 3 {
		t.Errorf("%+v", got)
	}
	scrubAll(t, b, time.Now().Add(3*scrubEvery))
	check(s)
	for seed := range uint64(10) { // power fails, and files that were removed may be back
		crashed := o
		crashed.FS = m.Clone().Crash(rand.New(rand.NewPCG(seed, 1)))
		losses = nil
		again := mustOpen(t, crashed)
		check(mustSpool(t, again))
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	losses = nil
	b = mustOpen(t, o)
	check(mustSpool(t, b))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestScrub_FromTheStores: where too much has rotted here, and others of the segment
// are on stores, it waits for these and makes the shards again from them.
func TestScrub_FromTheStores(t *testing.T) {
	m := vfs.NewMem()
	_, b, s, list := kept(t, m, 1, 4, 2)
	batch := list[2]
	for i := range 3 {
		s.Placed(batch.Shards[i].Segment, i)
	}
	for { // their files go
		if did, err := s.reclaim(); err != nil {
			t.Fatal(err)
		} else if !did {
			break
		}
	}
	inReach := false
	s.SetElsewhere(func(_ context.Context, seg block.SegmentID, index int) (map[int][]byte, error) {
		if !inReach {
			return nil, errors.New("the store is not in reach")
		}
		return map[int][]byte{0: shardBytes(seg, 0, 3000), 1: shardBytes(seg, 1, 3000), 2: shardBytes(seg, 2, 3000), 5: shardBytes(seg, 5, 3000)}, nil
	})
	for _, i := range []int{3, 4} {
		rotAt(t, m, shardFiles(s, batch, i)[0], 1000)
	}
	now := time.Now().Add(2 * scrubEvery)
	scrubAll(t, b, now)
	if got := b.Stats().Scrub; got.Mended != 0 || got.Lost != 0 || len(s.Lost()) > 0 {
		t.Fatalf("%+v: they are on the stores", got)
	}
	inReach = true
	scrubAll(t, b, now.Add(scrubRetry))
	if got := b.Stats().Scrub; got.Mended != 2 || got.Lost != 0 {
		t.Fatalf("%+v", got)
	}
	checkShards(t, s, batch, 3000)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestScrub_AnErrorIsNoRot: a disk that fails to read gives nothing up.
func TestScrub_AnErrorIsNoRot(t *testing.T) {
	m := vfs.NewMem()
	_, b, s, list := kept(t, m, 1, 2, 0)
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpRead && bytes.HasSuffix([]byte(name), []byte(shardSuffix)) {
			return errors.New("input/output error")
		}
		return nil
	})
	now := time.Now().Add(2 * scrubEvery)
	scrubAll(t, b, now)
	m.SetHook(nil)
	if got := b.Stats().Scrub; got.Rotten != 0 || len(s.Lost()) > 0 {
		t.Errorf("%+v", got)
	}
	for _, batch := range list {
		checkShards(t, s, batch, 3000)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
