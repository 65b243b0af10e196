package vbuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/vfs"
)

// testBatch is a batch of one segment of k+m shards whose bytes follow from to.
func testBatch(to block.Seq, k, m, size int) *Batch {
	b := &Batch{From: to - 9, To: to, Record: fmt.Appendf(nil, "record of %d", to)}
	seg := block.SegmentID{byte(to), byte(to >> 8), 1}
	seg[3], seg[4] = byte(k), byte(m)
	for i := range k + m {
		b.Shards = append(b.Shards, Shard{Segment: seg, Index: i, Parity: m, HeadBytes: 8, TailBytes: 12, Data: shardBytes(seg, i, size)})
	}
	return b
}

// shardBytes are the bytes of a shard of a segment of testBatch: the parity shards
// follow from the others, but for their first and last bytes.
func shardBytes(seg block.SegmentID, i, size int) []byte {
	p := format.Profile{Data: int(seg[3]), Parity: int(seg[4])}
	shards := make([][]byte, p.Total())
	for k := range shards {
		shards[k] = make([]byte, size-8-12)
		if k < p.Data {
			copy(shards[k], bytes.Repeat([]byte{seg[0], seg[1], byte(k), 0x5a}, size/4))
		}
	}
	if err := erasure.Encode(p, shards); err != nil {
		panic(err)
	}
	return slices.Concat(fmt.Appendf(nil, "head %03d", i), shards[i], fmt.Appendf(nil, "the tail %03d", i))
}

func mustSpool(t testing.TB, b *Buffer) *Spool {
	t.Helper()
	s, err := b.Spool(context.Background(), testGroup)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func recordOf(t testing.TB, s *Spool, batch *Batch) string {
	t.Helper()
	raw, err := s.ReadRecord(batch)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
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
	if s.MemoryBytes() != 4*4096 || s.DiskBytes() != 3*4096 || b.Stats().SegmentBytes != 3*4096+2*recordStepBytes {
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
	if len(list) != 1 || list[0].To != 20 || list[0].From != 11 || recordOf(t, s, list[0]) != "record of 20" || list[0].Record != nil || !s.IsPlaced(two.Shards[3].Segment, 3) {
		t.Fatalf("%+v", list)
	}
	two = list[0]
	checkShards(t, s, two, 4096)
	s.Placed(two.Shards[0].Segment, 0)
	if did, err := s.reclaim(); !did || err != nil {
		t.Fatal(err)
	}
	if s.DiskBytes() != 2*4096 || b.Stats().SegmentBytes != 2*4096+2*recordStepBytes {
		t.Fatalf("%d on disk, %+v", s.DiskBytes(), b.Stats())
	}
	if err := s.Logged(two); err != nil {
		t.Fatal(err)
	}
	m = m.Crash(rand.New(rand.NewPCG(1, 1)))
	o.FS = m
	b = mustOpen(t, o)
	s = mustSpool(t, b)
	list = s.Batches()
	if len(list) != 1 || !list[0].Logged || !s.IsPlaced(two.Shards[0].Segment, 0) {
		t.Fatalf("%+v", list)
	}
	checkShards(t, s, list[0], 4096)
	// Its owner has forgotten over the power cut that it is logged, and cuts again.
	again := testBatch(15, 2, 2, 4096)
	s.Add(again)
	if err := s.Persist(ctx, again); err != nil {
		t.Fatal(err)
	}
	if all := s.Batches(); len(all) != 2 || all[0] != again || all[1] != list[0] {
		t.Fatalf("%+v", all)
	}
	if err := s.Drop(again); err != nil {
		t.Fatal(err)
	}
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

// Disks that are nearly full send shards to others, which must not become the only
// place of more than the parity makes good. What is persisted so needs no mending.
func TestPlacement_AnyOneDiskMayBeLostThoughOthersAreFull(t *testing.T) {
	placed := 0
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0))
		m := vfs.NewMem()
		o := testOptions(m, 2+rng.IntN(4))
		b := mustOpen(t, o)
		s := mustSpool(t, b)
		for _, d := range b.disks { // before the journal takes anything
			d.quotaBytes = d.journalBytes + d.shardBytes + (1+rng.Int64N(8))*4096
		}
		km := [][2]int{{1, 0}, {2, 1}, {1, 1}, {4, 1}, {4, 2}, {2, 2}, {3, 3}}[rng.IntN(7)]
		batch := testBatch(10, km[0], km[1], 4096)
		s.Add(batch)
		err := s.Persist(context.Background(), batch)
		switch {
		case err == nil:
			placed++
			for _, d := range b.disks {
				if alone := slices.IndexFunc(batch.s.copies, func(on []*disk) bool { return len(on) == 1 && on[0] == d }); alone >= 0 && batch.isLost(d) {
					t.Errorf("seed %d: %d+%d is lost with %s", seed, km[0], km[1], d.path)
				}
			}
			b.mendSoon()
			for n := 0; ; n++ {
				did, err := b.mend(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if !did {
					break
				}
				if n == 20 {
					t.Fatalf("seed %d: %d+%d on %d disks is mended for ever", seed, km[0], km[1], len(b.disks))
				}
			}
		case !errors.Is(err, ErrFull):
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if placed < 50 {
		t.Errorf("only %d batches found room", placed)
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
		if err != nil || !bytes.Equal(data, shardBytes(seg, 2, 4096)) {
			t.Fatalf("%d copies are rotten, and the other one and the code did not help: %v", i+1, err)
		}
	}
	// One more than the code can bring back.
	for _, d := range b.disks {
		f, err := m.Open(s.shardName(d, seg, 4))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteAt([]byte{0xff}, 100)
	}
	for _, index := range []int{2, 4} {
		if _, err := s.ReadShard(seg, index); !errors.Is(err, ErrShardLost) {
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
	small := testBatch(10, 1, 0, 28<<10)
	s.Add(small)
	if err := s.Persist(context.Background(), small); err != nil {
		t.Fatal(err)
	}
	big := testBatch(20, 1, 0, 200<<10)
	s.Add(big)
	if err := s.Persist(context.Background(), big); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	if s.MemoryBytes() != 200<<10 || s.DiskBytes() != 28<<10 {
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
					if f.logged && !batch.Logged || !batch.Logged && recordOf(t, s, batch) != fmt.Sprintf("record of %d", batch.To) {
						t.Fatalf("seed %d life %d: batch %d: logged %v", seed, life, batch.To, batch.Logged)
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
		var want, records int64
		for _, d := range b.disks {
			entries, _ := m.ReadDir(s.dir(d))
			for _, e := range entries {
				if strings.HasSuffix(e.Name, shardSuffix) {
					want += size
				} else if strings.HasSuffix(e.Name, recordSuffix) {
					records += recordStepBytes
				}
			}
		}
		if s.DiskBytes() != want || b.Stats().SegmentBytes != want+records {
			t.Fatalf("seed %d: %d bytes of shards and %d of records on disk, counted %d and %d", seed, want, records, s.DiskBytes(), b.Stats().SegmentBytes)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSpool_RecordsAreNotInMemory: a long outage of a volume with few writes leaves
// very many batches, which are all record. They count against the quota, and are
// read when they are wanted; one that rots is had from the other disk.
func TestSpool_RecordsAreNotInMemory(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	o := testOptions(m, 2)
	b := mustOpen(t, o)
	s := mustSpool(t, b)
	const recordBytes = 15000 // four steps with what is added
	persisted := 0
	for ; ; persisted++ {
		batch := &Batch{From: block.Seq(persisted + 1), To: block.Seq(persisted + 1), Record: bytes.Repeat([]byte{byte(persisted)}, recordBytes)}
		s.Add(batch)
		err := s.Persist(ctx, batch)
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if batch.Record != nil {
			t.Fatal("its record stays in memory")
		}
	}
	if st := b.Stats(); persisted == 0 || st.SegmentBytes != int64(persisted)*2*16384 {
		t.Errorf("%d records take up %d bytes", persisted, st.SegmentBytes)
	}
	for i, batch := range s.Batches()[:persisted] {
		f, err := m.Open(s.recordName(b.disks[i%2], batch.s.id))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{0xee}, 5000); err != nil {
			t.Fatal(err)
		}
		if got := recordOf(t, s, batch); got != string(bytes.Repeat([]byte{byte(i)}, recordBytes)) {
			t.Fatalf("record %d is another one", i)
		}
		if err := s.Drop(batch); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.Stats().SegmentBytes; n != 0 {
		t.Errorf("%d bytes are in use when all is dropped", n)
	}
}

// TestSpool_BatchesWithoutWrites keeps batches that say something and hold no
// writes, as a named checkpoint does when nothing was written since the last
// batch. They are found again, in their place.
func TestSpool_BatchesWithoutWrites(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	o := testOptions(m, 2)
	b := mustOpen(t, o)
	s := mustSpool(t, b)
	for _, r := range []Range{{1, 0}, {1, 10}, {11, 10}, {11, 20}} {
		batch := &Batch{From: r.From, To: r.To, Record: fmt.Appendf(nil, "%v", r)}
		s.Add(batch)
		if err := s.Persist(ctx, batch); err != nil {
			t.Fatal(err)
		}
	}
	o.FS = m.Kill()
	var found []string
	s = mustSpool(t, mustOpen(t, o))
	for _, batch := range s.Batches() {
		found = append(found, recordOf(t, s, batch))
	}
	if got := strings.Join(found, " "); got != "1-0 1-10 11-10 11-20" {
		t.Errorf("found %s", got)
	}
}

// Shards reach their stores while their batch is being persisted: the race detector
// watches.
func TestPersist_WhileShardsArePlaced(t *testing.T) {
	b := mustOpen(t, testOptions(vfs.NewMem(), 2))
	s := mustSpool(t, b)
	for i := range 20 {
		batch := testBatch(block.Seq(i+1), 4, 2, 1000)
		s.Add(batch)
		placed := make(chan struct{})
		go func() {
			defer close(placed)
			for i := range batch.Shards {
				s.Placed(batch.Shards[i].Segment, batch.Shards[i].Index)
			}
		}()
		if err := s.Persist(context.Background(), batch); err != nil {
			t.Error(err)
		}
		<-placed
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
