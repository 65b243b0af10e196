package vbuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// failOn makes the operations of the given kinds below dir fail.
func failOn(dir string, ops ...vfs.Op) func(vfs.Op, string) error {
	return func(op vfs.Op, name string) error {
		for _, o := range ops {
			if o == op && strings.HasPrefix(name, dir) {
				return syscall.EIO
			}
		}
		return nil
	}
}

func TestMirror_LossOfOneDiskLosesNothing(t *testing.T) {
	faults := map[string][]vfs.Op{
		"write":  {vfs.OpWrite},
		"sync":   {vfs.OpSync},
		"create": {vfs.OpCreate},
		"all": {vfs.OpWrite, vfs.OpSync, vfs.OpCreate, vfs.OpRead, vfs.OpOpen, vfs.OpRename, vfs.OpRemove,
			vfs.OpSyncDir, vfs.OpPreallocate, vfs.OpReadDir, vfs.OpMkdir},
	}
	for name, ops := range faults {
		for _, disks := range []int{2, 3} {
			t.Run(fmt.Sprintf("%s/disks%d", name, disks), func(t *testing.T) {
				m := vfs.NewMem()
				o := testOptions(m, disks)
				b := mustOpen(t, o)
				j := mustJournal(t, b)
				for range 40 {
					put(t, j, 1)
				}
				flush(t, j)
				m.SetHook(failOn("/disk1/", ops...))
				for range 40 {
					if err := j.WaitWritten(context.Background(), put(t, j, 1)); err != nil {
						t.Fatal(err)
					}
				}
				flush(t, j)
				for range 200 { // several files
					put(t, j, 1)
				}
				flush(t, j)
				checkRead(t, j, 1, 280, salted(1))
				if st := b.Stats(); st.Disks[1].State != "failed" || st.Disks[1].LastError == "" {
					t.Fatalf("the disk is not given up: %+v", st.Disks[1])
				}
				// Power cut; the disk is there again, but has missed something.
				m = m.Crash(rand.New(rand.NewPCG(1, 1)))
				o.FS = m
				var setup *SetupError
				if _, err := Open(context.Background(), o); !errors.As(err, &setup) || setup.Path != "/disk1" {
					t.Fatalf("a stale disk was taken: %v", err)
				}
				if disks == 2 {
					stale := o
					stale.Dirs = o.Dirs[1:2]
					if _, err := Open(context.Background(), stale); !errors.As(err, &setup) {
						t.Fatalf("a stale disk alone was taken: %v", err)
					}
				}
				o.Dirs = append(append([]DirOptions(nil), o.Dirs[:1]...), o.Dirs[2:]...)
				b = mustOpen(t, o)
				j = mustJournal(t, b)
				checkRead(t, j, 1, 280, salted(1))
				// Emptied it joins as a new one, and gets the copies it needs.
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
				m.SetDevice("/fresh", "/fresh")
				o.Dirs = append(o.Dirs, DirOptions{Path: "/fresh", SizeBytes: 4 << 20})
				b = mustOpen(t, o)
				j = mustJournal(t, b)
				for _, f := range j.files {
					if len(f.copies) != 2 {
						t.Fatalf("file %d has %d copies", f.number, len(f.copies))
					}
				}
				checkRead(t, j, 1, 280, salted(1))
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

func TestSync_FailureOnOnlyDiskWritesToFreshFile(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	for range 10 {
		put(t, j, 1)
	}
	flush(t, j)
	for range 10 {
		if err := j.WaitWritten(context.Background(), put(t, j, 1)); err != nil {
			t.Fatal(err)
		}
	}
	poisoned := ""
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpSync && strings.HasSuffix(name, fileSuffix) {
			if poisoned == "" {
				poisoned = name
				return syscall.EIO
			}
			if name == poisoned {
				t.Errorf("%s was synced again", name)
			}
		}
		if op == vfs.OpWrite && poisoned == name {
			t.Errorf("%s was written again", name)
		}
		return nil
	})
	flush(t, j)
	if poisoned == "" {
		t.Fatal("no sync failed")
	}
	for range 100 {
		put(t, j, 1)
	}
	flush(t, j)
	checkRead(t, j, 1, 120, salted(1))
	m.SetHook(nil)
	m = m.Crash(rand.New(rand.NewPCG(3, 3)))
	o.FS = m
	b = mustOpen(t, o)
	j = mustJournal(t, b)
	if j.Last() != 120 {
		t.Fatalf("the journal ends at %d", j.Last())
	}
	checkRead(t, j, 1, 120, salted(1))
	j.Release(120)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestJournal_FailsWhenNoDiskTakesIt(t *testing.T) {
	m := vfs.NewMem()
	b := mustOpen(t, testOptions(m, 1))
	j := mustJournal(t, b)
	for range 5 {
		put(t, j, 1)
	}
	flush(t, j)
	m.SetHook(failOn("/disk0/journal", vfs.OpWrite, vfs.OpSync))
	ctx := context.Background()
	durable := make(chan error, 1)
	go func() { durable <- j.WaitDurable(ctx, 6) }()
	var wg sync.WaitGroup
	var seqMu sync.Mutex
	for range 8 {
		wg.Go(func() {
			seqMu.Lock()
			w := testWrite(j.Next(), 1)
			j.Enqueue(w)
			seqMu.Unlock()
			if err := j.WaitWritten(ctx, w.Seq); !errors.Is(err, syscall.EIO) {
				t.Errorf("write %d: %v", w.Seq, err)
			}
			if err := j.Flush(ctx); !errors.Is(err, syscall.EIO) {
				t.Errorf("flush: %v", err)
			}
		})
	}
	wg.Wait()
	if err := <-durable; !errors.Is(err, syscall.EIO) || j.Err() == nil {
		t.Fatalf("%v, %v", err, j.Err())
	}
	n := 0
	if err := j.Unsynced(func(w block.Write) error {
		n++
		if !sameWrite(w, testWrite(w.Seq, 1)) {
			return errors.New("wrong")
		}
		return nil
	}); err != nil || n != 8 {
		t.Fatalf("%d writes in memory, %v", n, err)
	}
	checkRead(t, j, 1, 5, salted(1))
	// Room that a refused write was promised would be lost to all other journals
	// of the buffer.
	b.mu.Lock()
	before := j.reserved
	b.mu.Unlock()
	if err := j.Reserve(ctx, 4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("reserve: %v", err)
	}
	b.mu.Lock()
	after := j.reserved
	b.mu.Unlock()
	if after != before {
		t.Errorf("%d bytes stay reserved for a write that was refused", after-before)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestENOSPC_HoldsAndGoesOn(t *testing.T) {
	for _, disks := range []int{1, 2} {
		t.Run(fmt.Sprint(disks), func(t *testing.T) {
			m := vfs.NewMem()
			o := testOptions(m, disks)
			m.SetLimit("/disk0", 100<<10) // three files, the quota has many
			b := mustOpen(t, o)
			j := mustJournal(t, b)
			done := make(chan error, 1)
			go func() {
				for range 100 {
					w := testWrite(j.Next(), 1)
					if err := j.Reserve(context.Background(), int64(len(w.Data))); err != nil {
						done <- err
						return
					}
					j.Enqueue(w)
					if err := j.WaitWritten(context.Background(), w.Seq); err != nil {
						done <- err
						return
					}
				}
				done <- j.Flush(context.Background())
			}()
			for !b.Stats().Full {
				select {
				case err := <-done:
					t.Fatalf("not held back (%v)", err)
				default:
					runtime.Gosched()
				}
			}
			m.SetLimit("/disk0", 1<<40)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			checkRead(t, j, 1, 100, salted(1))
			for _, d := range b.Stats().Disks {
				if d.State != "ok" {
					t.Fatalf("%+v", d)
				}
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestRecover_FlippedBitIsFoundOrHarmless: after a clean stop, damage of the
// only copy is never taken for the end, and never read as data.
func TestRecover_FlippedBitIsFoundOrHarmless(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	for i := range 60 {
		put(t, j, 1)
		if i%7 == 0 {
			flush(t, j)
		}
		if i == 30 {
			j.Release(25)
			if _, err := j.reclaim(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	found, harmless := 0, 0
	for seed := range uint64(400) {
		rng := rand.New(rand.NewPCG(seed, 9))
		c := m.Clone()
		entries, _ := c.ReadDir("/disk0/journal")
		f, err := c.Open("/disk0/journal/" + entries[rng.IntN(len(entries))].Name)
		if err != nil {
			t.Fatal(err)
		}
		size, _ := f.Size()
		off := rng.Int64N(size)
		p := make([]byte, 1)
		_, _ = f.ReadAt(p, off)
		p[0] ^= 1 << rng.IntN(8)
		_, _ = f.WriteAt(p, off)
		o.FS = c
		b := mustOpen(t, o)
		j, err := b.Journal(context.Background(), testGroup)
		var damage *DamageError
		var corrupt *format.CorruptError
		switch {
		case errors.As(err, &damage):
			found++
			j, err = b.JournalDamaged(context.Background(), testGroup)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(j.Damaged()) != fmt.Sprint(damage.Ranges) {
				t.Fatalf("%v, but %v", damage, j.Damaged())
			}
			if j.Next() != 61 {
				t.Fatalf("next is %d", j.Next())
			}
			for seq := block.Seq(26); seq <= 60; seq++ {
				lost := false
				for _, r := range damage.Ranges {
					lost = lost || r.From <= seq && seq <= r.To
				}
				_, err := j.Read(seq, 1, func(w block.Write) error {
					if !sameWrite(w, testWrite(seq, 1)) {
						t.Fatalf("write %d is wrong", seq)
					}
					return nil
				})
				var here *DamageError
				if lost != errors.As(err, &here) || !lost && err != nil {
					t.Fatalf("seed %d: read %d: %v; damaged %v", seed, seq, err, j.Damaged())
				}
			}
			// It can be written on.
			put(t, j, 1)
			flush(t, j)
			checkRead(t, j, 61, 61, salted(1))
		case errors.As(err, &corrupt):
			found++
			if j, err = b.ResetJournal(context.Background(), testGroup, 100); err != nil || j.Next() != 100 {
				t.Fatal(err)
			}
			put(t, j, 1)
			flush(t, j)
		case err != nil:
			t.Fatal(err)
		default:
			harmless++
			if j.Next() != 61 {
				t.Fatalf("seed %d: the journal ends at %d", seed, j.Next()-1)
			}
			checkRead(t, j, 26, 60, salted(1))
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		b = mustOpen(t, o)
		j2, err := b.JournalDamaged(context.Background(), testGroup)
		if err != nil || j2.Next() != j.Next() {
			t.Fatalf("seed %d: once more: next %d, was %d, %v", seed, j2.Next(), j.Next(), err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if found == 0 || harmless == 0 {
		t.Fatalf("found %d, harmless %d: the test proves nothing", found, harmless)
	}
}

func TestRead_FallsBackToMirror(t *testing.T) {
	m := vfs.NewMem()
	b := mustOpen(t, testOptions(m, 2))
	j := mustJournal(t, b)
	for range 50 {
		put(t, j, 1)
	}
	flush(t, j)
	for i, c := range j.files[0].copies {
		f, _ := m.Open(c.slot.name)
		// A different half of each copy.
		_, _ = f.WriteAt(make([]byte, 8192), 4096+int64(i)*20480)
	}
	checkRead(t, j, 1, 50, salted(1))
	for _, c := range j.files[0].copies {
		f, _ := m.Open(c.slot.name)
		_, _ = f.WriteAt(make([]byte, 8192), 4096)
	}
	var damage *DamageError
	if _, err := j.Read(1, 1<<30, func(block.Write) error { return nil }); !errors.As(err, &damage) {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestReset_IsDurable: a journal that was reset stays so through a crash, and its
// old records never come back.
func TestReset_IsDurable(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 0))
		m := vfs.NewMem()
		o := testOptions(m, 2)
		b := mustOpen(t, o)
		j := mustJournal(t, b)
		for range 50 {
			put(t, j, 1)
		}
		flush(t, j)
		if err := j.SetNext(1000); err == nil {
			t.Fatal("SetNext dropped records")
		}
		if _, err := b.ResetJournal(context.Background(), testGroup, 20); err != nil {
			t.Fatal(err)
		}
		m = m.Crash(rng)
		o.FS = m
		b = mustOpen(t, o)
		j = mustJournal(t, b)
		if j.Next() != 20 || j.First() != 0 {
			t.Fatalf("seed %d: next %d, first %d", seed, j.Next(), j.First())
		}
		for range 10 {
			put(t, j, 2)
		}
		flush(t, j)
		m = m.Crash(rng)
		o.FS = m
		b = mustOpen(t, o)
		j = mustJournal(t, b)
		checkRead(t, j, 20, 29, salted(2))
		if j.Last() != 29 {
			t.Fatalf("ends at %d", j.Last())
		}
		j.Release(29)
		if err := j.SetNext(100); err != nil {
			t.Fatal(err)
		}
		put(t, j, 3)
		flush(t, j)
		m = m.Crash(rng)
		o.FS = m
		b = mustOpen(t, o)
		j = mustJournal(t, b)
		if j.First() != 100 || j.Last() != 100 {
			t.Fatalf("%d to %d", j.First(), j.Last())
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// evenWrite is a write whose size does not depend on its number.
func evenWrite(seq block.Seq) block.Write {
	return block.Write{Seq: seq, Kind: block.KindData, Extent: block.Extent{Off: int64(seq) << 12, Len: 4096},
		Data: bytes.Repeat([]byte{byte(seq), byte(seq >> 8)}, 2048)}
}

// TestJournal_ManyWritersWithFaults has many goroutines append, flush, read and
// release while one of two disks fails.
func TestJournal_ManyWritersWithFaults(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 5))
		m := vfs.NewMem()
		o := testOptions(m, 2)
		o.MaxUnsyncedBytes = 64 << 10
		b := mustOpen(t, o)
		j := mustJournal(t, b)
		left := rng.IntN(400)
		kind := []vfs.Op{vfs.OpWrite, vfs.OpSync}[rng.IntN(2)]
		failing := false
		m.SetHook(func(op vfs.Op, name string) error {
			if strings.HasPrefix(name, "/disk1/") {
				left--
				if failing = failing || left < 0 && op == kind; failing {
					return syscall.EIO
				}
			}
			return nil
		})
		ctx, cancel := context.WithCancel(context.Background())
		var background sync.WaitGroup
		background.Go(func() { _ = b.Run(ctx) })
		var seqMu sync.Mutex
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 60 {
					if err := j.Reserve(ctx, 4096); err != nil {
						t.Error(err)
						return
					}
					seqMu.Lock()
					w := evenWrite(j.Next())
					j.Enqueue(w)
					seqMu.Unlock()
					if err := j.WaitWritten(ctx, w.Seq); err != nil {
						t.Error(err)
						return
					}
					if i%9 == g {
						if err := j.Flush(ctx); err != nil {
							t.Error(err)
							return
						}
						if j.Durable() < w.Seq {
							t.Errorf("durable %d after flush of %d", j.Durable(), w.Seq)
						}
					}
				}
			})
		}
		var reader sync.WaitGroup
		reader.Go(func() { // and releaser
			next := block.Seq(1)
			for next <= 480 {
				if err := j.WaitDurable(ctx, next); err != nil {
					t.Error(err)
					return
				}
				at, err := j.Read(next, 30_000, func(w block.Write) error {
					if !sameWrite(w, evenWrite(w.Seq)) {
						t.Errorf("write %d is wrong", w.Seq)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
					return
				}
				next = at
				j.Release(next - 1 - min(next-1, 20))
			}
		})
		wg.Wait()
		if err := j.Flush(ctx); err != nil {
			t.Error(err)
		}
		reader.Wait()
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
		cancel()
		background.Wait()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		m.SetHook(nil)
		o.FS = m
		if failing {
			o.Dirs = o.Dirs[:1]
		}
		b = mustOpen(t, o)
		j = mustJournal(t, b)
		for next := j.First(); next <= 480; {
			at, err := j.Read(next, 1<<20, func(w block.Write) error {
				if !sameWrite(w, evenWrite(w.Seq)) {
					t.Errorf("write %d is wrong", w.Seq)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			next = at
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRecover_KeepsWhatIsBehindDamage flushes writes one by one and damages one:
// all behind it are kept, the last one too, whose flush no mark in the file tells.
func TestRecover_KeepsWhatIsBehindDamage(t *testing.T) {
	const last = block.Seq(7)
	for bad := block.Seq(2); bad < last; bad++ {
		mem := vfs.NewMem()
		o := testOptions(mem, 1)
		o.FileBytes = 256 << 10
		b := mustOpen(t, o)
		j := mustJournal(t, b)
		content := func(seq block.Seq) []byte { return bytes.Repeat([]byte{0x50 + byte(seq)}, 4096) }
		for seq := block.Seq(1); seq <= last; seq++ {
			if err := j.Reserve(context.Background(), 4096); err != nil {
				t.Fatal(err)
			}
			j.Enqueue(block.Write{Seq: seq, Volume: 1, Kind: block.KindData, Extent: block.Extent{Off: int64(seq) << 12, Len: 4096}, Data: content(seq)})
			flush(t, j)
		}
		after := mem.Kill()
		_ = b.Close()
		entries, err := after.ReadDir("/disk0/journal")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			f, err := after.Open("/disk0/journal/" + e.Name)
			if err != nil {
				t.Fatal(err)
			}
			n, _ := f.Size()
			p := make([]byte, n)
			_, _ = f.ReadAt(p, 0)
			if at := bytes.Index(p, content(bad)); at >= 0 {
				_, _ = f.WriteAt([]byte{1}, int64(at))
			}
			_ = f.Close()
		}
		o.FS = after
		b = mustOpen(t, o)
		var damage *DamageError
		if _, err := b.Journal(context.Background(), testGroup); !errors.As(err, &damage) {
			t.Fatalf("write %d is damaged, and the journal opens: %v", bad, err)
		}
		if j, err = b.JournalDamaged(context.Background(), testGroup); err != nil {
			t.Fatal(err)
		}
		if got := j.Damaged(); len(got) != 1 || got[0] != (Range{bad, bad}) || j.Next() != last+1 {
			t.Errorf("write %d is damaged: lost %v, next %d", bad, got, j.Next())
		}
		want := bad + 1
		if _, err := j.Read(want, 1<<20, func(w block.Write) error {
			if w.Seq != want || !bytes.Equal(w.Data, content(w.Seq)) {
				t.Errorf("write %d is damaged: %d is read where %d is due", bad, w.Seq, want)
			}
			want++
			return nil
		}); err != nil || want != last+1 {
			t.Errorf("write %d is damaged: read up to %d: %v", bad, want, err)
		}
		_ = b.Close()
	}
}
