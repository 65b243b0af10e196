package vbuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

// testBatch is a batch of one segment of k+m shards whose bytes follow from to.
func testBatch(to block.Seq, k, m, size int) *Batch {
	b := &Batch{From: to - 9, To: to, Record: fmt.Appendf(nil, "record of %d", to)}
	seg := block.SegmentID{byte(to), byte(to >> 8), 1}
	for i := range k + m {
		b.Shards = append(b.Shards, Shard{Segment: seg, Index: i, Parity: m, Data: shardBytes(seg, i, size)})
	}
	return b
}

func shardBytes(seg block.SegmentID, i, size int) []byte {
	return bytes.Repeat([]byte{seg[0], seg[1], byte(i), 0x5a}, size/4)
}

func mustSpool(t testing.TB, b *Buffer) *Spool {
	t.Helper()
	s, err := b.Spool(context.Background(), testGroup)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func checkShards(t testing.TB, s *Spool, b *Batch, size int) {
	t.Helper()
	for _, sh := range b.Shards {
		if s.IsPlaced(sh.Segment, sh.Index) {
			continue
		}
		data, err := s.ReadShard(sh.Segment, sh.Index)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(data, shardBytes(sh.Segment, sh.Index, size)) {
			t.Fatalf("shard %d of %v is wrong", sh.Index, sh.Segment)
		}
	}
}

func TestSpool_LifeOfABatch(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	o := testOptions(m, 2)
	b := mustOpen(t, o)
	s := mustSpool(t, b)
	one, two := testBatch(10, 2, 2, 4096), testBatch(20, 2, 2, 4096)
	s.Add(one)
	s.Add(two)
	if s.MemoryBytes() != 8*4096 || s.DiskBytes() != 0 {
		t.Fatalf("%d in memory, %d on disk", s.MemoryBytes(), s.DiskBytes())
	}
	s.Placed(two.Shards[3].Segment, 3)
	if err := s.Persist(ctx, two); err != nil {
		t.Fatal(err)
	}
	if s.MemoryBytes() != 4*4096 || s.DiskBytes() != 3*4096 || b.Stats().SegmentBytes != 3*4096 {
		t.Fatalf("%d in memory, %d on disk, %+v", s.MemoryBytes(), s.DiskBytes(), b.Stats())
	}
	checkShards(t, s, one, 4096)
	checkShards(t, s, two, 4096)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}

	b = mustOpen(t, o)
	s = mustSpool(t, b)
	list := s.Batches()
	if len(list) != 1 || list[0].To != 20 || list[0].From != 11 || string(list[0].Record) != "record of 20" || !s.IsPlaced(two.Shards[3].Segment, 3) {
		t.Fatalf("%+v", list)
	}
	two = list[0]
	checkShards(t, s, two, 4096)
	s.Placed(two.Shards[0].Segment, 0)
	if did, err := s.reclaim(); !did || err != nil {
		t.Fatal(err)
	}
	if s.DiskBytes() != 2*4096 || b.Stats().SegmentBytes != 2*4096 {
		t.Fatalf("%d on disk", s.DiskBytes())
	}
	if err := s.Logged(two); err != nil {
		t.Fatal(err)
	}
	m = m.Crash(rand.New(rand.NewPCG(1, 1)))
	o.FS = m
	b = mustOpen(t, o)
	s = mustSpool(t, b)
	list = s.Batches()
	if len(list) != 1 || !list[0].Logged || len(list[0].Record) != 0 || !s.IsPlaced(two.Shards[0].Segment, 0) {
		t.Fatalf("%+v", list)
	}
	checkShards(t, s, list[0], 4096)
	if err := s.Drop(list[0]); err != nil {
		t.Fatal(err)
	}
	if len(s.Batches()) != 0 || s.DiskBytes() != 0 || b.Stats().SegmentBytes != 0 {
		t.Fatalf("%d on disk, %+v", s.DiskBytes(), b.Stats())
	}
	for i := range 2 {
		if left, _ := m.ReadDir(fmt.Sprintf("/disk%d/spool/%s", i, testGroup)); len(left) != 0 {
			t.Fatalf("left over: %v", left)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestPlacement_AnyOneDiskMayBeLost: after the loss of one disk at least k of
// the shards are there.
func TestPlacement_AnyOneDiskMayBeLost(t *testing.T) {
	for disks := 2; disks <= 6; disks++ {
		for _, km := range [][2]int{{1, 0}, {4, 1}, {2, 2}, {4, 2}, {1, 1}, {10, 4}} {
			m := vfs.NewMem()
			o := testOptions(m, disks)
			b := mustOpen(t, o)
			batch := testBatch(10, km[0], km[1], 4096)
			s := mustSpool(t, b)
			s.Add(batch)
			if err := s.Persist(context.Background(), batch); err != nil {
				t.Fatal(err)
			}
			for lost := range disks {
				m.SetHook(failOn(fmt.Sprintf("/disk%d/", lost), vfs.OpOpen, vfs.OpRead))
				have := 0
				for _, sh := range batch.Shards {
					_, err := s.ReadShard(sh.Segment, sh.Index)
					if err == nil {
						have++
					} else if !errors.Is(err, ErrShardLost) {
						t.Fatal(err)
					}
				}
				if have < km[0] {
					t.Fatalf("%d+%d on %d disks: without disk %d only %d shards", km[0], km[1], disks, lost, have)
				}
			}
			m.SetHook(nil)
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestReadShard_RotIsNeverReturned(t *testing.T) {
	m := vfs.NewMem()
	b := mustOpen(t, testOptions(m, 2))
	s := mustSpool(t, b)
	batch := testBatch(10, 4, 1, 4096) // five on two disks: kept twice
	s.Add(batch)
	if err := s.Persist(context.Background(), batch); err != nil {
		t.Fatal(err)
	}
	seg := batch.Shards[2].Segment
	for i, d := range b.disks {
		f, err := m.Open(s.shardName(d, seg, 2))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteAt([]byte{0xff}, 100)
		data, err := s.ReadShard(seg, 2)
		if i == 0 && (err != nil || !bytes.Equal(data, shardBytes(seg, 2, 4096))) {
			t.Fatalf("the second copy did not help: %v", err)
		}
		if i == 1 && !errors.Is(err, ErrShardLost) {
			t.Fatalf("rot was returned: %v", err)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestPersist_FullLeavesAllAsItWas(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	o.Dirs[0].SizeBytes = 256 << 10
	b := mustOpen(t, o)
	s := mustSpool(t, b)
	j := mustJournal(t, b)
	// The journal is full, yet a batch can be persisted.
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		for {
			w := evenWrite(j.Next())
			if err := j.Reserve(ctx, 4096); err != nil {
				done <- err
				return
			}
			j.Enqueue(w)
		}
	}()
	for !b.Stats().Full {
		runtime.Gosched()
	}
	cancel()
	<-done
	flush(t, j)
	small := testBatch(10, 1, 0, 32<<10)
	s.Add(small)
	if err := s.Persist(context.Background(), small); err != nil {
		t.Fatal(err)
	}
	big := testBatch(20, 1, 0, 200<<10)
	s.Add(big)
	if err := s.Persist(context.Background(), big); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	if s.MemoryBytes() != 200<<10 || s.DiskBytes() != 32<<10 {
		t.Fatalf("%d in memory, %d on disk", s.MemoryBytes(), s.DiskBytes())
	}
	// Room below the quota that the file system has not.
	m.SetLimit("/disk0", b.Stats().UsedBytes+20<<10)
	other := testBatch(30, 1, 0, 24<<10)
	s.Add(other)
	if err := s.Persist(context.Background(), other); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	m.SetLimit("/disk0", 1<<40)
	j.Release(j.Durable())
	if _, err := j.reclaim(); err != nil {
		t.Fatal(err)
	}
	if err := s.Drop(small); err != nil {
		t.Fatal(err)
	}
	checkShards(t, s, big, 200<<10)
	if err := s.Persist(context.Background(), big); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestPersist_DiskFails(t *testing.T) {
	m := vfs.NewMem()
	b := mustOpen(t, testOptions(m, 3))
	s := mustSpool(t, b)
	m.SetHook(failOn("/disk1/spool", vfs.OpSync))
	batch := testBatch(10, 4, 2, 4096)
	s.Add(batch)
	if err := s.Persist(context.Background(), batch); err != nil {
		t.Fatal(err)
	}
	if st := b.Stats(); st.Disks[1].State != "failed" || st.Disks[1].SegmentBytes != 0 {
		t.Fatalf("%+v", st.Disks[1])
	}
	checkShards(t, s, batch, 4096)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSpool_EveryPromiseThroughCrashes lets a spool live through crashes at
// random points: what was persisted is there whole, what was dropped is gone,
// what was said of a persisted batch and is durable stays said, and nothing is
// left over.
func TestSpool_EveryPromiseThroughCrashes(t *testing.T) {
	type fact struct {
		persisted, tried, dropping, dropped, logged bool
		placed                                      map[int]bool
	}
	const size = 1024
	for seed := range uint64(*crashSeeds) {
		rng := rand.New(rand.NewPCG(seed, 77))
		disks := 1 + rng.IntN(3)
		m := vfs.NewMem()
		o := testOptions(m, disks)
		facts := map[block.Seq]*fact{}
		var to block.Seq
		for life := range 8 {
			left := rng.IntN(250)
			if life == 7 {
				left = 1 << 30
			}
			dead := false
			m.SetHook(func(op vfs.Op, name string) error {
				if left--; left < 0 {
					dead = true
					return errPowerCut
				}
				return nil
			})
			o.FS = m
			err := func() error {
				b, err := Open(context.Background(), o)
				if err != nil {
					return err
				}
				defer b.Close()
				s, err := b.Spool(context.Background(), testGroup)
				if err != nil {
					return err
				}
				seen := map[block.Seq]bool{}
				for _, batch := range s.Batches() {
					f := facts[batch.To]
					if f == nil || !f.tried || f.dropped {
						t.Fatalf("seed %d life %d: batch %d is there", seed, life, batch.To)
					}
					seen[batch.To] = true
					f.persisted = true
					if f.logged && !batch.Logged || !batch.Logged && string(batch.Record) != fmt.Sprintf("record of %d", batch.To) {
						t.Fatalf("seed %d life %d: batch %d: logged %v, record %q", seed, life, batch.To, batch.Logged, batch.Record)
					}
					for _, sh := range batch.Shards {
						if s.IsPlaced(sh.Segment, sh.Index) {
							if !f.placed[sh.Index] {
								t.Fatalf("shard %d of %d is said to be placed", sh.Index, batch.To)
							}
							continue
						}
						data, err := s.ReadShard(sh.Segment, sh.Index)
						if err != nil {
							return err
						}
						if !bytes.Equal(data, shardBytes(sh.Segment, sh.Index, size)) {
							t.Fatal("wrong shard")
						}
					}
				}
				for to, f := range facts {
					if f.persisted && !f.dropping && !seen[to] {
						t.Fatalf("seed %d life %d: batch %d is lost", seed, life, to)
					}
					if !seen[to] {
						f.dropped = true
					}
				}
				for range rng.IntN(30) {
					list := s.Batches()
					if rng.IntN(3) == 0 || len(list) == 0 {
						to += 10
						facts[to] = &fact{placed: map[int]bool{}}
						s.Add(testBatch(to, 1+rng.IntN(4), rng.IntN(3), size))
						continue
					}
					batch := list[rng.IntN(len(list))]
					f := facts[batch.To]
					switch rng.IntN(5) {
					case 0:
						f.tried = true
						if err := s.Persist(context.Background(), batch); err != nil {
							return err
						}
						f.persisted = true
					case 1:
						i := rng.IntN(len(batch.Shards))
						f.placed[i] = true
						s.Placed(batch.Shards[i].Segment, i)
					case 2:
						if err := s.Logged(batch); err != nil {
							return err
						}
						f.logged = f.persisted
					case 3:
						f.dropping = true
						if err := s.Drop(batch); err != nil {
							return err
						}
						f.dropped = true
					case 4:
						if _, err := b.Step(context.Background()); err != nil {
							return err
						}
					}
				}
				return nil
			}()
			m.SetHook(nil)
			if err != nil && !dead {
				t.Fatalf("seed %d life %d: %v", seed, life, err)
			}
			if rng.IntN(3) == 0 {
				m = m.Kill()
			} else {
				m = m.Crash(rng)
			}
		}
		o.FS = m
		b := mustOpen(t, o)
		s := mustSpool(t, b)
		var want int64
		for _, d := range b.disks {
			entries, _ := m.ReadDir(s.dir(d))
			for _, e := range entries {
				if strings.HasSuffix(e.Name, shardSuffix) {
					want += size
				}
			}
		}
		if s.DiskBytes() != want || b.Stats().SegmentBytes != want {
			t.Fatalf("seed %d: %d bytes on disk, counted %d and %d", seed, want, s.DiskBytes(), b.Stats().SegmentBytes)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
