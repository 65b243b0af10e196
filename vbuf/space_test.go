package vbuf

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// TestReserve_LargeWritesOneAfterTheOther has writes follow each other of which
// the buffer holds one at a time: the file that was made for the last one is
// given back although nothing else is written that would end it. In a second
// journal as well: the room is everybody's.
func TestReserve_LargeWritesOneAfterTheOther(t *testing.T) {
	o := testOptions(vfs.NewMem(), 1)
	o.Dirs[0].SizeBytes, o.FileBytes = 16<<20, 256<<10
	b := mustOpen(t, o)
	defer b.Close()
	var journals []*Journal
	for i := range 2 {
		j, err := b.Journal(t.Context(), block.GroupID{byte(i + 1)})
		if err != nil {
			t.Fatal(err)
		}
		if err := j.SetNext(1); err != nil {
			t.Fatal(err)
		}
		journals = append(journals, j)
	}
	data := make([]byte, 7<<20) // of 12 MiB
	for seq := block.Seq(1); seq <= 3; seq++ {
		for _, j := range journals {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			released := make(chan struct{})
			go func() { // while the next one waits
				defer close(released)
				time.Sleep(time.Millisecond)
				for _, o := range journals {
					o.Release(o.Durable())
				}
			}()
			if err := j.Reserve(ctx, int64(len(data))); err != nil {
				t.Fatalf("write %d: %v", seq, err)
			}
			<-released
			j.Enqueue(block.Write{Seq: seq, Kind: block.KindData, Extent: block.Extent{Len: int64(len(data))}, Data: data})
			if err := j.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			cancel()
			if st := b.Stats(); st.UsedBytes > 12<<20 || format.JournalRecordBytes(int64(len(data))) > st.UsedBytes {
				t.Errorf("write %d: %d bytes in use", seq, st.UsedBytes)
			}
		}
	}
}

// TestReserve_LargeWritesKeepTheQuota: writes that need files of their own wait when
// the journal's share of the quota is used up, as others do.
func TestReserve_LargeWritesKeepTheQuota(t *testing.T) {
	for _, bytes := range []int{256<<10 - 4096, 256 << 10, 300 << 10, 600 << 10} {
		o := testOptions(vfs.NewMem(), 2)
		for i := range o.Dirs {
			o.Dirs[i].SizeBytes = 8 << 20
		}
		o.FileBytes = 256 << 10
		b := mustOpen(t, o)
		j := mustJournal(t, b)
		data := make([]byte, bytes)
		writes := 0
		for ; ; writes++ {
			for did := true; did; { // as Run does
				var err error
				if did, err = b.prepareSpare(); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			err := j.Reserve(ctx, int64(len(data)))
			cancel()
			if err != nil {
				break
			}
			j.Enqueue(block.Write{Seq: j.Next(), Kind: block.KindData, Extent: block.Extent{Len: int64(len(data))}, Data: data})
			if err := j.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, d := range b.Stats().Disks {
				if d.UsedBytes > 6<<20 {
					t.Fatalf("%d bytes each: after %d writes %d bytes of 6 MiB are used", bytes, writes+1, d.UsedBytes)
				}
			}
		}
		if held := writes * bytes; held < 3<<20 || held > 6<<20 {
			t.Errorf("%d bytes each: %d bytes are held in two journals of 6 MiB", bytes, held)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDivert_NobodyWaitsForRoom: who waits because the buffer or its file system
// is full is told of, and sent away; what is enqueued stays, and goes on when the
// diversion is lifted.
func TestDivert_NobodyWaitsForRoom(t *testing.T) {
	for _, why := range []string{"quota", "file system"} {
		t.Run(why, func(t *testing.T) {
			mem := vfs.NewMem()
			o := testOptions(mem, 1)
			held := make(chan block.GroupID, 1000)
			o.Held = func(g block.GroupID) {
				select {
				case held <- g:
				default:
				}
			}
			b := mustOpen(t, o)
			defer b.Close()
			j := mustJournal(t, b)
			if why == "file system" {
				mem.SetLimit("/disk0", 64<<10)
			}
			away := errors.New("away")
			done := make(chan error, 1)
			last := block.Seq(0)
			go func() {
				for seq := j.Next(); ; seq++ {
					w := testWrite(seq, 1)
					if err := j.Reserve(context.Background(), int64(len(w.Data))); err != nil {
						done <- err
						return
					}
					j.Enqueue(w)
					last = seq
					if err := j.WaitWritten(context.Background(), seq); err != nil {
						done <- err
						return
					}
				}
			}()
			if g := <-held; g != testGroup {
				t.Errorf("group %s is said to be held", g)
			}
			j.Divert(away)
			if err := <-done; !errors.Is(err, away) {
				t.Fatalf("who waited got %v", err)
			}
			if n := b.Stats().Waiting; n != 0 {
				t.Errorf("%d are waiting", n)
			}
			if err := j.Reserve(context.Background(), 1<<20); why == "quota" && !errors.Is(err, away) {
				t.Errorf("who comes later got %v", err)
			}
			j.Divert(nil)
			mem.SetLimit("/disk0", 1<<30)
			if err := j.Flush(context.Background()); err != nil || j.Durable() != last {
				t.Errorf("afterwards %d of %d are durable: %v", j.Durable(), last, err)
			}
		})
	}
}

// TestClose_FileSystemFull: a stop in order ends well although the last mark finds no
// room, and the next open has everything.
func TestClose_FileSystemFull(t *testing.T) {
	mem := vfs.NewMem()
	o := testOptions(mem, 1)
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	for range 20 {
		put(t, j, 1)
	}
	flush(t, j)
	j.Release(10)
	mem.SetLimit("/disk0", 1)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	mem.SetLimit("/disk0", 1<<40)
	o.FS = mem.Kill()
	j = mustJournal(t, mustOpen(t, o))
	if next := j.Next(); next != 21 {
		t.Fatalf("the journal goes on at %s", next)
	}
	checkRead(t, j, 11, 20, salted(1))
}

// TestReserve_WaitsWhereTheMarkHasNoRoom: what was released cannot be given back, as
// the file system of the buffer has no room for the note that says so. A writer that
// needs the room waits, and goes on by itself when there is some.
func TestReserve_WaitsWhereTheMarkHasNoRoom(t *testing.T) {
	mem := vfs.NewMem()
	o := testOptions(mem, 1)
	o.Dirs[0].SizeBytes, o.RetryEvery = 256<<10, time.Millisecond
	b := mustOpen(t, o)
	defer b.Close()
	j := mustJournal(t, b)
	for {
		full, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := j.Reserve(full, 4096)
		cancel()
		if err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			break
		}
		j.Enqueue(evenWrite(j.Next()))
		flush(t, j)
	}
	mem.SetHook(func(op vfs.Op, name string) error {
		// In place too, as on a file system that copies what is written.
		if op == vfs.OpWrite && strings.Contains(name, markSuffix) {
			return syscall.ENOSPC
		}
		return nil
	})
	j.Release(j.Durable())
	running, stop := context.WithCancel(t.Context())
	defer stop()
	go b.Run(running)
	done := make(chan error, 1)
	go func() { done <- j.Reserve(t.Context(), 4096) }()
	select {
	case err := <-done:
		t.Fatalf("the writer did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	mem.SetHook(nil)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestReserve_WhereNoDiskTakesTheMark: a writer waits for room that only a mark on the
// last disk gives. He is not told of that disk's errors, but in the end, as nothing
// else would find it out, that the buffer is lost; if the disk works again before, he
// has room.
func TestReserve_WhereNoDiskTakesTheMark(t *testing.T) {
	for name, fails := range map[string]int64{"for good": 1 << 40, "some times": 2} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mem := vfs.NewMem()
				o := testOptions(mem, 1)
				o.Dirs[0].SizeBytes, o.RetryEvery = 256<<10, time.Second
				b := mustOpen(t, o)
				defer b.Close()
				j := mustJournal(t, b)
				for err := error(nil); err == nil; {
					full, cancel := context.WithTimeout(t.Context(), time.Second)
					if err = j.Reserve(full, 4096); err == nil {
						j.Enqueue(evenWrite(j.Next()))
						flush(t, j)
					}
					cancel()
				}
				var failed atomic.Int64
				mem.SetHook(func(op vfs.Op, name string) error {
					if op == vfs.OpSync && strings.Contains(name, markSuffix) && failed.Add(1) <= fails {
						return syscall.EIO
					}
					return nil
				})
				j.Release(j.Durable())
				running, stop := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() { _ = b.Run(running); close(done) }()
				defer func() { stop(); <-done }()
				wait, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				if err := j.Reserve(wait, 4096); errors.Is(err, ErrLost) != (fails > 2) || (err != nil && fails == 2) {
					t.Errorf("who waits for room gets: %v", err)
				}
			})
		})
	}
}

// TestReserve_KeepsTheQuota: the buffer does not grow beyond its quota, whatever the
// size of the writes is and however often they are flushed, one by one too.
func TestReserve_KeepsTheQuota(t *testing.T) {
	for seed := range uint64(300) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 11))
			disks, most, flushes := 1+rng.IntN(3), rng.IntN(17), rng.Float64()
			m := vfs.NewMem()
			o := testOptions(m, disks)
			o.FileBytes <<= rng.IntN(3)
			if rng.IntN(2) == 0 {
				m.SetDevice("/disk1", "/disk0")
			}
			for i := range o.Dirs {
				o.Dirs[i].SizeBytes = int64(512+rng.IntN(512)) << 10
			}
			b := mustOpen(t, o)
			defer b.Close()
			j := mustJournal(t, b)
			promised, full := 0, false
			for !full {
				var writes [][]byte // promised together, as by several writers
				for range 1 + rng.IntN(8) {
					data := make([]byte, 1+rng.IntN(1<<rng.IntN(most+1)))
					waiting, cancel := context.WithTimeout(t.Context(), time.Second)
					err := j.Reserve(waiting, int64(len(data)))
					cancel()
					if errors.Is(err, context.DeadlineExceeded) {
						full = len(writes) == 0
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					writes = append(writes, data)
				}
				for _, data := range writes {
					j.Enqueue(block.Write{Seq: j.Next(), Kind: block.KindData, Extent: block.Extent{Len: int64(len(data))}, Data: data})
					if promised++; rng.Float64() < flushes {
						flush(t, j)
					}
				}
			}
			flush(t, j) // there is room for all that was promised
			var used int64
			for _, d := range b.disks {
				limit := min(d.journalMaxBytes(), d.quotaBytes-d.batchReserve())
				if used += d.journalBytes; d.journalBytes > limit {
					t.Errorf("seed %d: %d writes of up to 1<<%d bytes: disk %s has %d bytes of journal, of %d", seed, promised, most, d.path, d.journalBytes, limit)
				}
			}
			b.mu.Lock()
			files, _ := b.sharedFiles(true)
			b.mu.Unlock()
			if have := files * int64(min(disks, 2)) * b.fileBytes; used < have/2 {
				t.Errorf("seed %d: %d writes of up to 1<<%d bytes: %d disks are full with %d bytes of %d", seed, promised, most, disks, used, have)
			}
		})
	}
}
