package vbuf

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drc/internal/block"
	"drc/internal/vfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	testRepo  = block.ID{1}
	testHost  = block.ID{2}
	testGroup = block.GroupID{3}
)

// testOptions is a buffer of small files on disks of their own.
func testOptions(m *vfs.Mem, disks int) Options {
	o := Options{Repo: testRepo, Host: testHost, FS: m, FileBytes: 32 << 10, RetryEvery: time.Millisecond}
	for i := range disks {
		dir := fmt.Sprintf("/disk%d", i)
		m.SetDevice(dir, dir)
		o.Dirs = append(o.Dirs, DirOptions{Path: dir, SizeBytes: 4 << 20})
	}
	return o
}

func mustOpen(t testing.TB, o Options) *Buffer {
	t.Helper()
	b, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustJournal(t testing.TB, b *Buffer) *Journal {
	t.Helper()
	j, err := b.Journal(context.Background(), testGroup)
	if err != nil {
		t.Fatal(err)
	}
	if j.Next() == 0 {
		if err := j.SetNext(1); err != nil {
			t.Fatal(err)
		}
	}
	return j
}

// write makes a write whose content follows from its number and salt, so that a
// reader can tell whether it is right.
func testWrite(seq block.Seq, salt uint64) block.Write {
	rng := rand.New(rand.NewPCG(uint64(seq), salt))
	w := block.Write{Seq: seq, Time: int64(seq) * 1000, Volume: block.VolumeIndex(rng.IntN(3)), Kind: block.KindData}
	sizes := []int{512, 1024, 4096, 4096, 8192, 700, 1}
	n := sizes[rng.IntN(len(sizes))]
	w.Extent = block.Extent{Off: rng.Int64N(1 << 40), Len: int64(n)}
	if rng.IntN(8) == 0 {
		w.Kind = block.KindZero
		w.Extent.Len = rng.Int64N(1 << 32)
		return w
	}
	w.Data = make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(w.Data[i:], rng.Uint64())
	}
	w.Data[0] = byte(salt)
	return w
}

func sameWrite(a, b block.Write) bool {
	return a.Seq == b.Seq && a.Time == b.Time && a.Volume == b.Volume && a.Kind == b.Kind && a.Extent == b.Extent && bytes.Equal(a.Data, b.Data)
}

// put appends the next write.
func put(t testing.TB, j *Journal, salt uint64) block.Seq {
	t.Helper()
	w := testWrite(j.Next(), salt)
	if err := j.Reserve(context.Background(), int64(len(w.Data))); err != nil {
		t.Fatal(err)
	}
	j.Enqueue(w)
	return w.Seq
}

func flush(t testing.TB, j *Journal) {
	t.Helper()
	if err := j.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// checkRead reads from..to and compares with what was written.
func checkRead(t testing.TB, j *Journal, from, to block.Seq, salt func(block.Seq) uint64) {
	t.Helper()
	want := from
	for want <= to {
		next, err := j.Read(want, 10_000, func(w block.Write) error {
			if w.Seq != want {
				return fmt.Errorf("got %d, want %d", w.Seq, want)
			}
			if !sameWrite(w, testWrite(want, salt(want))) {
				return fmt.Errorf("write %d reads back wrong", want)
			}
			want++
			return nil
		})
		if err != nil {
			t.Fatalf("read from %d (journal %d to %d): %v", want, j.First(), j.Last(), err)
		}
		if next != want {
			t.Fatalf("next is %d after %d", next, want-1)
		}
		if want <= to && j.Durable() < want {
			t.Fatalf("only %d is durable, want %d", j.Durable(), to)
		}
	}
}

func salted(s uint64) func(block.Seq) uint64 { return func(block.Seq) uint64 { return s } }

func TestJournal_AppendFlushReadReopen(t *testing.T) {
	for _, disks := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(disks), func(t *testing.T) {
			m := vfs.NewMem()
			b := mustOpen(t, testOptions(m, disks))
			j := mustJournal(t, b)
			if j.First() != 0 || j.Last() != 0 {
				t.Fatal("a new journal is not empty")
			}
			for i := range 200 {
				seq := put(t, j, 7)
				if i%5 == 0 {
					if err := j.WaitWritten(context.Background(), seq); err != nil {
						t.Fatal(err)
					}
				}
				if i%17 == 0 {
					flush(t, j)
					if j.Durable() != seq {
						t.Fatalf("durable %d after a flush at %d", j.Durable(), seq)
					}
				}
			}
			flush(t, j)
			checkRead(t, j, 1, 200, salted(7))
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			b = mustOpen(t, testOptions(m, disks))
			j = mustJournal(t, b)
			if j.First() != 1 || j.Last() != 200 || j.Durable() != 200 || j.Next() != 201 {
				t.Fatalf("after reopen: %d to %d, durable %d, next %d", j.First(), j.Last(), j.Durable(), j.Next())
			}
			for range 50 {
				put(t, j, 7)
			}
			flush(t, j)
			checkRead(t, j, 1, 250, salted(7))
			if st := b.Stats(); st.Waiting != 0 || st.UsedBytes == 0 || len(st.Disks) != disks {
				t.Fatalf("stats %+v", st)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestJournal_ReleaseFreesAndGoesOn(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 2)
	o.Dirs[0].SizeBytes, o.Dirs[1].SizeBytes = 400<<10, 400<<10
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	for range 2000 { // many times the quota
		seq := put(t, j, 1)
		if seq%10 == 0 {
			flush(t, j)
		}
		if seq > 20 {
			j.Release(seq - 20)
		}
	}
	flush(t, j)
	checkRead(t, j, j.First(), 2000, salted(1))
	if st := b.Stats(); st.UsedBytes > st.CapacityBytes {
		t.Fatalf("uses %d of %d bytes", st.UsedBytes, st.CapacityBytes)
	}
	j.Release(2000)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = mustOpen(t, o)
	j = mustJournal(t, b)
	if j.First() != 0 || j.Last() != 0 || j.Next() != 2001 {
		t.Fatalf("after all was released: %d to %d, next %d", j.First(), j.Last(), j.Next())
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestReserve_FullBufferHoldsWritersBack(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	o.Dirs[0].SizeBytes = 400 << 10
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	held := make(chan error, 1)
	go func() {
		for {
			w := testWrite(j.Next(), 1)
			if err := j.Reserve(ctx, int64(len(w.Data))); err != nil {
				held <- err
				return
			}
			j.Enqueue(w)
			if err := j.WaitWritten(ctx, w.Seq); err != nil {
				held <- err
				return
			}
		}
	}()
	for round := range 3 {
		for b.Stats().Waiting == 0 || j.First() == 0 {
			runtime.Gosched()
		}
		last := j.Last()
		flush(t, j)
		checkRead(t, j, j.First(), last, salted(1))
		if round == 2 {
			cancel()
		}
		j.Release(last)
	}
	if err := <-held; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if st := b.Stats(); st.UsedBytes > st.CapacityBytes {
		t.Fatalf("uses %d of %d bytes", st.UsedBytes, st.CapacityBytes)
	}
	if err := j.Reserve(context.Background(), 100<<20); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestJournal_LargeWritesAndBoundedMemory: a write may be larger than a journal
// file, and no more than MaxUnsyncedBytes wait for a sync.
func TestJournal_LargeWritesAndBoundedMemory(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 2)
	o.MaxUnsyncedBytes = 256 << 10
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	sizes := []int{100 << 10, 512, 40 << 10, 4096, 200 << 10, 1, 32<<10 - 4096 - 64, 32 << 10}
	big := func(seq block.Seq) block.Write {
		n := sizes[int(seq)%len(sizes)]
		return block.Write{Seq: seq, Kind: block.KindData, Extent: block.Extent{Len: int64(n)}, Data: bytes.Repeat([]byte{byte(seq)}, n)}
	}
	check := func(from, to block.Seq) {
		t.Helper()
		for next := from; next <= to; {
			at, err := j.Read(next, 1, func(w block.Write) error {
				if !sameWrite(w, big(w.Seq)) {
					t.Fatalf("write %d is wrong", w.Seq)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			next = at
		}
	}
	for seq := block.Seq(1); seq <= 100; seq++ {
		w := big(seq)
		if err := j.Reserve(context.Background(), int64(len(w.Data))); err != nil {
			t.Fatal(err)
		}
		j.Enqueue(w)
		if u := j.UnsyncedBytes(); u > o.MaxUnsyncedBytes {
			t.Fatalf("%d bytes wait for a sync", u)
		}
		if seq > 10 && seq%5 == 0 {
			check(seq-10, j.Durable())
			j.Release(seq - 10)
		}
	}
	flush(t, j)
	m = m.Crash(rand.New(rand.NewPCG(1, 2)))
	o.FS = m
	b = mustOpen(t, o)
	j = mustJournal(t, b)
	check(j.First(), 100)
	if groups, err := b.Groups(); err != nil || len(groups) != 1 || groups[0] != testGroup {
		t.Fatalf("groups %v, %v", groups, err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// Reading goes on in a file that is being written to: the index of the file is
// shared, and only under the lock.
func TestRead_WhileRecordsAreAppended(t *testing.T) {
	o := testOptions(vfs.NewMem(), 1)
	o.FileBytes = 1 << 20 // many entries of the index in one file
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	const records = 400
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range records {
			flush(t, j)
			put(t, j, 5)
		}
		flush(t, j)
	}()
	for read := block.Seq(1); read <= records; {
		to := j.Durable()
		if to < read {
			runtime.Gosched()
			continue
		}
		checkRead(t, j, read, to, salted(5))
		read = to + 1
	}
	<-ended
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
