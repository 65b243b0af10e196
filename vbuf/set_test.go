package vbuf

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// stocked is a buffer with flushed records 1 to 60 and two persisted batches.
func stocked(t *testing.T, o Options) (*Buffer, *Journal, *Spool) {
	t.Helper()
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	s := mustSpool(t, b)
	for range 60 {
		put(t, j, 1)
	}
	flush(t, j)
	for _, batch := range []*Batch{testBatch(20, 2, 1, 1024), testBatch(40, 4, 2, 1024)} {
		s.Add(batch)
		if err := s.Persist(context.Background(), batch); err != nil {
			t.Fatal(err)
		}
	}
	return b, j, s
}

// checkStock checks what stocked has put there.
func checkStock(t *testing.T, j *Journal, s *Spool) {
	t.Helper()
	checkRead(t, j, 1, 60, salted(1))
	list := s.Batches()
	if len(list) != 2 || list[0].To != 20 || list[1].To != 40 {
		t.Fatalf("%d batches are there", len(list))
	}
	for _, batch := range list {
		checkShards(t, s, batch, 1024)
	}
	if lost := s.Lost(); len(lost) != 0 {
		t.Fatalf("%d batches are lost", len(lost))
	}
}

// settle has the background work done.
func settle(t *testing.T, b *Buffer) {
	t.Helper()
	for n := 0; ; n++ {
		did, err := b.Step(context.Background())
		if err != nil && n > 50 {
			t.Fatal(err)
		}
		if !did && err == nil {
			return
		}
		if n > 1000 {
			t.Fatal("the background work does not end")
		}
	}
}

// checkMirrored checks that every needed file is on two of the disks that stay,
// and that each batch survives the loss of any one of them.
func checkMirrored(t *testing.T, j *Journal, s *Spool) {
	t.Helper()
	for _, f := range j.files {
		if f.last <= j.released || f.last < f.first {
			continue
		}
		if good, other := j.countCopies(f); good != 2 || other != 0 {
			t.Errorf("file %d has %d copies that count, and %d others", f.number, good, other)
		}
	}
	for _, d := range s.b.all() {
		if s.aloneHolds(d) {
			t.Errorf("a batch would be lost with %s", d.path)
		}
	}
	for _, batch := range s.Batches() {
		if s.lacks(batch) != lacksNothing {
			t.Errorf("the batch up to %d is not safe", batch.To)
		}
	}
}

func stateOf(b *Buffer, dir string) string {
	for _, d := range b.Stats().Disks {
		if d.Path == dir {
			return d.State
		}
	}
	return "gone"
}

func TestFail_WhatItHeldIsMirroredAgain(t *testing.T) {
	for _, ops := range [][]vfs.Op{{vfs.OpWrite}, {vfs.OpSync}, nil} {
		m := vfs.NewMem()
		o := testOptions(m, 3)
		b, j, s := stocked(t, o)
		settle(t, b)
		m.SetFault("/disk1", &vfs.Fault{Ops: ops})
		for range 20 {
			put(t, j, 1)
			flush(t, j)
		}
		for stateOf(b, "/disk1") != "failed" { // the disks take turns
			put(t, j, 1)
			flush(t, j)
		}
		settle(t, b)
		checkStock(t, j, s)
		checkMirrored(t, j, s)
		// Any second disk may go now.
		last := j.Durable()
		for i := range 2 {
			dir := []string{"/disk0", "/disk2"}[i]
			c := m.Clone().Crash(rand.New(rand.NewPCG(1, 2)))
			left := o
			left.FS, left.Dirs = c, []DirOptions{o.Dirs[2-2*i]}
			for _, d := range b.Stats().Disks {
				if d.Path == dir {
					left.Forget = append(left.Forget, d.ID)
				}
			}
			b2 := mustOpen(t, left)
			j2, s2 := mustJournal(t, b2), mustSpool(t, b2)
			checkStock(t, j2, s2)
			checkRead(t, j2, 1, last, salted(1))
			if err := b2.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFail_SoleHolderIsEmptiedFirst: a disk whose writes fail, and that alone
// holds something, is read from until that is elsewhere, and then dropped.
func TestFail_SoleHolderIsEmptiedFirst(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	b, j, s := stocked(t, o)
	m.SetDevice("/new", "/new")
	m.SetFault("/disk0/journal", &vfs.Fault{Ops: []vfs.Op{vfs.OpWrite, vfs.OpSync}, Skip: 6})
	if err := b.Add(context.Background(), DirOptions{Path: "/new", SizeBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		put(t, j, 1)
		flush(t, j)
	}
	if st := stateOf(b, "/disk0"); st != "suspect" {
		t.Fatalf("the only holder is %s", st)
	}
	checkStock(t, j, s)
	settle(t, b)
	if st := stateOf(b, "/disk0"); st != "failed" {
		t.Fatalf("the disk that was emptied is %s", st)
	}
	checkStock(t, j, s)
	o.FS = m.Crash(rand.New(rand.NewPCG(1, 2)))
	o.Dirs = []DirOptions{{Path: "/new", SizeBytes: 4 << 20}}
	b = mustOpen(t, o)
	j = mustJournal(t, b)
	checkStock(t, j, mustSpool(t, b))
	checkRead(t, j, 1, 65, salted(1))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFail_SoleHolderThatCannotBeRead: what it alone held is said to be lost, and
// where; the rest goes on, also after a restart.
func TestFail_SoleHolderThatCannotBeRead(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	var losses []Loss
	o.OnLoss = func(l Loss) { losses = append(losses, l) }
	b, j, s := stocked(t, o)
	m.SetDevice("/new", "/new")
	if err := b.Add(context.Background(), DirOptions{Path: "/new", SizeBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	m.SetFault("/disk0", &vfs.Fault{})
	for range 5 {
		put(t, j, 1)
		flush(t, j)
	}
	settle(t, b)
	if st := stateOf(b, "/disk0"); st != "failed" {
		t.Fatalf("the disk is %s", st)
	}
	checkRead(t, j, 61, 65, salted(1))
	var damage *DamageError
	if _, err := j.Read(1, 1<<30, func(block.Write) error { return nil }); !errors.As(err, &damage) || damage.Ranges[0].From != 1 {
		t.Errorf("read of what is lost: %v", err)
	}
	var journal, batches []Range
	for _, l := range losses {
		if l.Batch == nil {
			journal = append(journal, l.Range)
		} else {
			batches = append(batches, l.Range)
		}
	}
	if len(batches) != 2 || len(s.Lost()) != 2 || len(journal) == 0 || journal[len(journal)-1].To != 60 {
		t.Errorf("lost are said to be %v of the journal, batches %v", journal, batches)
	}
	o.FS = m.Crash(rand.New(rand.NewPCG(1, 2)))
	o.Dirs = []DirOptions{{Path: "/new", SizeBytes: 4 << 20}}
	b = mustOpen(t, o)
	if _, err := b.Journal(context.Background(), testGroup); !errors.As(err, &damage) {
		t.Fatalf("the loss is not seen by a start: %v", err)
	}
	j, err := b.JournalDamaged(context.Background(), testGroup)
	if err != nil {
		t.Fatal(err)
	}
	checkRead(t, j, 61, 65, salted(1))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestStall_MirrorThatHangsIsTakenOut(t *testing.T) {
	for _, ops := range [][]vfs.Op{{vfs.OpWrite}, {vfs.OpSync}, {vfs.OpCreate}, {vfs.OpSyncDir}, nil} {
		synctest.Test(t, func(t *testing.T) {
			m := vfs.NewMem()
			o := testOptions(m, 2)
			b, j, s := stocked(t, o)
			hang := make(chan struct{})
			m.SetFault("/disk1", &vfs.Fault{Ops: ops, Hang: hang})
			begin := time.Now()
			for range 200 { // several files
				put(t, j, 1)
				flush(t, j)
			}
			took := time.Since(begin)
			if took < defaultStallAfter || took > 3*defaultStallAfter {
				t.Errorf("%v: the writers were held for %v", ops, took)
			}
			if st := stateOf(b, "/disk1"); st != "failed" {
				t.Errorf("%v: the disk that hangs is %s", ops, st)
			}
			settle(t, b)
			checkStock(t, j, s)
			checkRead(t, j, 1, 260, salted(1))
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			close(hang)
			time.Sleep(time.Minute) // what hung ends
		})
	}
}

// TestStall_ReaderIsNotHeld: records and shards on a disk that hangs are read from
// the other.
func TestStall_ReaderIsNotHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := vfs.NewMem()
		b, j, s := stocked(t, testOptions(m, 2))
		hang := make(chan struct{})
		m.SetFault("/disk0", &vfs.Fault{Ops: []vfs.Op{vfs.OpOpen, vfs.OpRead, vfs.OpStat}, Hang: hang})
		begin := time.Now()
		checkStock(t, j, s)
		if took := time.Since(begin); took > 20*defaultStallAfter {
			t.Errorf("the readers were held for %v", took)
		}
		close(hang)
		time.Sleep(time.Minute)
		m.SetFault("/disk0", nil)
		checkStock(t, j, s)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestStall_NobodyElseAnswers: the only disk is waited for, and so are two that
// hang at the same time; what was written is there when they come back.
func TestStall_NobodyElseAnswers(t *testing.T) {
	for _, disks := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) {
			m := vfs.NewMem()
			b, j, s := stocked(t, testOptions(m, disks))
			hang := make(chan struct{})
			f := &vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Hang: hang, Err: syscall.ENOSPC} // it goes on when they are back
			for i := range disks {
				m.SetFault(fmt.Sprintf("/disk%d", i), f)
			}
			done := make(chan error, 1)
			go func() {
				w := testWrite(j.Next(), 1)
				j.Enqueue(w)
				done <- j.Flush(context.Background())
			}()
			time.Sleep(time.Hour)
			select {
			case err := <-done:
				t.Fatalf("not waited for: %v", err)
			default:
			}
			for i := range disks {
				if st := stateOf(b, fmt.Sprintf("/disk%d", i)); disks > 1 && st != "slow" || disks == 1 && st != "ok" {
					t.Errorf("disk %d is %s", i, st)
				}
				m.SetFault(fmt.Sprintf("/disk%d", i), nil)
			}
			close(hang)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			checkStock(t, j, s)
			checkRead(t, j, 1, 61, salted(1))
			for i := range disks {
				if st := stateOf(b, fmt.Sprintf("/disk%d", i)); st != "ok" {
					t.Errorf("disk %d is %s", i, st)
				}
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		})
	}
}

// TestVanish_IsNoticed: a directory that was removed takes writes and syncs like
// any other, as its files are open; they are not counted.
func TestVanish_IsNoticed(t *testing.T) {
	t.Run("one of two", func(t *testing.T) {
		m := vfs.NewMem()
		b, j, s := stocked(t, testOptions(m, 2))
		m.Vanish("/disk1")
		put(t, j, 1)
		flush(t, j)
		if st := stateOf(b, "/disk1"); st != "failed" {
			t.Errorf("the directory that is gone is %s", st)
		}
		checkStock(t, j, s)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("the only one", func(t *testing.T) {
		m := vfs.NewMem()
		b, j, _ := stocked(t, testOptions(m, 1))
		m.Vanish("/disk0")
		put(t, j, 1)
		if err := j.Flush(context.Background()); !errors.Is(err, ErrLost) || !errors.Is(j.Err(), ErrLost) {
			t.Errorf("flush to nowhere: %v", err)
		}
		_ = b.Close()
	})
	t.Run("by a batch", func(t *testing.T) {
		for disks := 1; disks <= 2; disks++ {
			m := vfs.NewMem()
			b, _, s := stocked(t, testOptions(m, disks))
			m.Vanish("/disk0")
			batch := testBatch(50, 2, 1, 1024)
			s.Add(batch)
			err := s.Persist(context.Background(), batch)
			if disks == 1 && err == nil {
				t.Error("a batch was called durable that is where the disk was")
			}
			if disks == 2 && (err != nil || stateOf(b, "/disk0") != "failed") {
				t.Errorf("another disk is there: %v, and the one that is gone is %s", err, stateOf(b, "/disk0"))
			}
			if entries, err := m.ReadDir("/disk0/spool"); err == nil {
				t.Errorf("where the disk was are now %v", entries)
			}
			_ = b.Close()
		}
	})
	t.Run("without a sync", func(t *testing.T) {
		m := vfs.NewMem()
		b, j, s := stocked(t, testOptions(m, 2))
		b.Look()
		if st := stateOf(b, "/disk1"); st != "ok" || j.Err() != nil {
			t.Errorf("a directory that is there is %s, %v", st, j.Err())
		}
		m.Vanish("/disk1")
		b.Look()
		if st := stateOf(b, "/disk1"); st != "failed" || j.Err() != nil {
			t.Errorf("the directory that is gone is %s, %v", st, j.Err())
		}
		checkStock(t, j, s)
		m.Vanish("/disk0")
		b.Look()
		if !errors.Is(j.Err(), ErrLost) {
			t.Errorf("all are gone, and the journal says %v", j.Err())
		}
		_ = b.Close()
	})
}

// TestLabel_WaitsForRoom: a disk fails while the other has no room for a label.
// That is no failure of the other, and nothing is acknowledged before there is room.
func TestLabel_WaitsForRoom(t *testing.T) {
	for _, op := range []vfs.Op{vfs.OpWrite, vfs.OpSync} {
		m := vfs.NewMem()
		b, j, s := stocked(t, testOptions(m, 2))
		m.SetFault("/disk1", &vfs.Fault{Ops: []vfs.Op{op}})
		m.SetFault("/disk0/label.tmp", &vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Err: syscall.ENOSPC})
		put(t, j, 1)
		done := make(chan error, 1)
		go func() { done <- j.Flush(context.Background()) }()
		for !b.Stats().Full {
			select {
			case err := <-done:
				t.Fatalf("%s: acknowledged without a label: %v", op, err)
			default:
				time.Sleep(100 * time.Microsecond)
			}
		}
		if j.Durable() != 60 {
			t.Errorf("%s: durable is %d", op, j.Durable())
		}
		m.SetFault("/disk0/label.tmp", nil)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if a, b := stateOf(b, "/disk0"), stateOf(b, "/disk1"); a != "ok" || b != "failed" {
			t.Errorf("%s: the disks are %s and %s", op, a, b)
		}
		checkStock(t, j, s)
		checkRead(t, j, 1, 61, salted(1))
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAdd_WhereOthersFail: somebody adds a directory because disks are about to die,
// and the label that names it is the first thing that they do not take.
func TestAdd_WhereOthersFail(t *testing.T) {
	for _, c := range []struct{ disks, dying int }{{1, 1}, {2, 1}, {2, 2}, {3, 2}, {3, 3}} {
		m := vfs.NewMem()
		o := testOptions(m, c.disks)
		b := mustOpen(t, o)
		j := mustJournal(t, b)
		for range 20 {
			j.Enqueue(evenWrite(j.Next()))
		}
		flush(t, j)
		for i := range c.dying {
			m.SetFault(o.Dirs[i].Path, &vfs.Fault{Err: syscall.EIO, Ops: []vfs.Op{vfs.OpWrite, vfs.OpSync, vfs.OpCreate, vfs.OpSyncDir}})
		}
		err := b.Add(t.Context(), DirOptions{Path: "/new", SizeBytes: 4 << 20})
		if lost := c.disks == c.dying; errors.Is(err, ErrLost) != lost || errors.Is(j.Err(), ErrLost) != lost || (err != nil && !lost) {
			t.Errorf("%d of %d disks are dying: %v; the journal: %v", c.dying, c.disks, err, j.Err())
		}
		ok := 0
		for _, d := range b.Stats().Disks {
			if d.State == "ok" {
				ok++
			}
		}
		if err == nil && ok != c.disks-c.dying+1 {
			t.Errorf("%d of %d disks are dying: %+v", c.dying, c.disks, b.Stats().Disks)
		}
		if err != nil { // then it can take their place
			if err := b.Renew(t.Context(), []DirOptions{{Path: "/new", SizeBytes: 4 << 20}}); err != nil {
				t.Errorf("%d of %d disks are dying: %v", c.dying, c.disks, err)
			}
		}
		_ = b.Close()
	}
}

func TestAdd_JoinsAtWork(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	o := testOptions(m, 1)
	b, j, s := stocked(t, o)
	m.SetDevice("/new", "/new")
	grown := DirOptions{Path: "/new", SizeBytes: 4 << 20}
	if err := b.Add(ctx, grown); err != nil {
		t.Fatal(err)
	}
	settle(t, b)
	checkMirrored(t, j, s)
	if st := b.Stats(); st.CapacityBytes != 8<<20 || len(st.Disks) != 2 {
		t.Errorf("%+v", st)
	}
	var setup *SetupError
	for path, says := range map[string]string{"/new": "already", "/disk0/": "already", "/disk0/journal": "inside the other", "/": "inside the other", "/none/dir": "/none does not exist"} {
		if err := b.Add(ctx, DirOptions{Path: path, SizeBytes: 4 << 20}); !errors.As(err, &setup) || !strings.Contains(setup.Reason, says) {
			t.Errorf("add %s: %v", path, err)
		}
	}
	if err := b.Add(ctx, DirOptions{Path: "/tiny", SizeBytes: 10}); !errors.As(err, &setup) {
		t.Errorf("a tiny one: %v", err)
	}
	// The first disk may go.
	first := b.Stats().Disks[0].ID
	c := m.Crash(rand.New(rand.NewPCG(1, 1)))
	o.FS, o.Dirs, o.Forget = c, []DirOptions{grown}, []block.ID{first}
	b = mustOpen(t, o)
	checkStock(t, mustJournal(t, b), mustSpool(t, b))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestDrain_MovesAllAndLeaves(t *testing.T) {
	for disks := 2; disks <= 4; disks++ {
		m := vfs.NewMem()
		o := testOptions(m, disks)
		b, j, s := stocked(t, o)
		other, err := b.Journal(context.Background(), block.GroupID{9}) // idle
		if err != nil {
			t.Fatal(err)
		}
		if err := other.SetNext(5); err != nil {
			t.Fatal(err)
		}
		if err := b.Drain("/disk1"); err != nil {
			t.Fatal(err)
		}
		if st := stateOf(b, "/disk1"); st != "draining" {
			t.Errorf("it is %s", st)
		}
		settle(t, b)
		if st := stateOf(b, "/disk1"); st != "gone" {
			t.Fatalf("it is %s", st)
		}
		checkStock(t, j, s)
		if disks > 2 {
			checkMirrored(t, j, s)
		}
		if left, _ := m.ReadDir("/disk1"); len(left) != 1 || left[0].Name != lockName {
			t.Errorf("left over: %v", left)
		}
		put(t, j, 1)
		flush(t, j)
		m = m.Crash(rand.New(rand.NewPCG(1, 1)))
		o.FS, o.Dirs = m, slices.Delete(slices.Clone(o.Dirs), 1, 2)
		b = mustOpen(t, o)
		j = mustJournal(t, b)
		checkStock(t, j, mustSpool(t, b))
		checkRead(t, j, 61, 61, salted(1))
		if other, err := b.Journal(context.Background(), block.GroupID{9}); err != nil || other.Next() != 5 {
			t.Errorf("the idle journal is at %d, %v", other.Next(), err)
		}
		if disks == 2 {
			if err := b.Drain("/disk0"); !errors.Is(err, errLastDisk) {
				t.Errorf("drain of the last one: %v", err)
			}
		}
		if err := b.Drain("/disk1"); !errors.Is(err, ErrNoDisk) {
			t.Errorf("drain of one that is gone: %v", err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRemove_OnlyWhatTheOthersHave(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	o := testOptions(m, 1)
	var losses []Loss
	o.OnLoss = func(l Loss) { losses = append(losses, l) }
	b, j, s := stocked(t, o)
	if err := b.Remove(ctx, RemoveOptions{Path: "/disk0", Force: true}); !errors.Is(err, errLastDisk) {
		t.Errorf("remove the last one: %v", err)
	}
	m.SetDevice("/new", "/new")
	if err := b.Add(ctx, DirOptions{Path: "/new", SizeBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	// The new one is too small for all: the old one stays, and is used again.
	m.SetLimit("/new", 70<<10)
	if err := b.Remove(ctx, RemoveOptions{Path: "/disk0"}); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Fatalf("removed without room: %v", err)
	}
	if st := stateOf(b, "/disk0"); st != "ok" {
		t.Errorf("it is %s", st)
	}
	checkStock(t, j, s)
	m.SetLimit("/new", 1<<40)
	if err := b.Remove(ctx, RemoveOptions{Path: "/disk0"}); err != nil {
		t.Fatal(err)
	}
	checkStock(t, j, s)
	if len(losses) != 0 || stateOf(b, "/disk0") != "gone" {
		t.Errorf("%v; the disk is %s", losses, stateOf(b, "/disk0"))
	}
	// By force, at once: what only it holds is lost, and said so.
	m.SetDevice("/newer", "/newer")
	if err := b.Add(ctx, DirOptions{Path: "/newer", SizeBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	put(t, j, 1)
	if err := b.Remove(ctx, RemoveOptions{Path: "/new", Force: true}); err != nil {
		t.Fatal(err)
	}
	flush(t, j)
	checkRead(t, j, 61, 61, salted(1))
	settle(t, b)
	lostTo := block.Seq(0)
	for _, l := range losses {
		lostTo = max(lostTo, l.Range.To)
	}
	if lostTo != 60 || len(s.Lost()) != 2 {
		t.Errorf("lost: %v", losses)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

var crashStride = flag.Int("crash.stride", 12, "about how many steps are left out between two crashes; 0 leaves out none")

// TestSet_CrashAtEveryStep: whatever step of an addition, a drain, a removal or a
// failure a power cut comes at, nothing that was flushed is lost, and one of the
// two sets opens.
func TestSet_CrashAtEveryStep(t *testing.T) {
	ctx := context.Background()
	changes := map[string]func(b *Buffer, m *vfs.Mem) error{
		"add":    func(b *Buffer, _ *vfs.Mem) error { return b.Add(ctx, DirOptions{Path: "/disk2", SizeBytes: 4 << 20}) },
		"drain":  func(b *Buffer, _ *vfs.Mem) error { return b.Drain("/disk1") },
		"remove": func(b *Buffer, _ *vfs.Mem) error { return b.Remove(ctx, RemoveOptions{Path: "/disk1"}) },
		"fail":   func(b *Buffer, _ *vfs.Mem) error { return b.failDisk(b.disks[1], syscall.EIO) },
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			first := vfs.NewMem()
			o := testOptions(first, 3)
			all := o.Dirs
			before := all
			if name == "add" {
				before = all[:2]
			}
			o.Dirs = before
			stocked(t, o)
			first = first.Crash(rand.New(rand.NewPCG(7, 7)))
			done := false
			for stop := 0; !done; stop += 1 + rand.New(rand.NewPCG(uint64(stop), 1)).IntN(2**crashStride+1) {
				m := first.Clone()
				o.FS, o.Dirs = m, before
				b := mustOpen(t, o)
				j := mustJournal(t, b)
				mustSpool(t, b)
				left := stop
				dead := false
				m.SetHook(func(vfs.Op, string) error {
					if left--; left < 0 {
						dead = true
						return errPowerCut
					}
					return nil
				})
				// A write that is acknowledged at any moment must be found again.
				acked := block.Seq(60)
				write := func() {
					w := testWrite(j.Next(), 1)
					j.Enqueue(w)
					if j.Flush(ctx) == nil {
						acked = w.Seq
					}
				}
				write()
				err := change(b, m)
				write()
				for n := 0; n < 200 && !dead && err == nil; n++ {
					did, serr := b.Step(ctx)
					if err = serr; !did {
						break
					}
					if n%4 == 0 {
						write()
					}
				}
				if !dead && err != nil {
					t.Fatalf("stop %d: %v", stop, err)
				}
				done = !dead
				m.SetHook(nil)
				rng := rand.New(rand.NewPCG(uint64(stop), 3))
				{
					opened := 0
					var errs []error
					c := m.Crash(rng)
					for _, dirs := range [][]DirOptions{all, {all[0], all[2]}, all[:2]} {
						c := c.Clone()
						o.FS, o.Dirs = c, dirs
						b, err := Open(ctx, o)
						var setup *SetupError
						if errors.As(err, &setup) {
							errs = append(errs, err)
							continue
						}
						if err != nil {
							t.Fatalf("stop %d: %v", stop, err)
						}
						opened++
						j, err := b.Journal(ctx, testGroup)
						if err != nil {
							t.Fatalf("stop %d, %v: %v", stop, dirs, err)
						}
						s := mustSpool(t, b)
						checkStock(t, j, s)
						checkRead(t, j, 1, acked, salted(1))
						settle(t, b)
						checkMirrored(t, j, s)
						if err := b.Close(); err != nil {
							t.Fatal(err)
						}
					}
					if opened == 0 {
						t.Fatalf("stop %d: no set opens: %v", stop, errs)
					}
				}
			}
		})
	}
}

func TestRenew_BeginsOnEmptyDisks(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	o := testOptions(m, 2)
	var losses []Loss
	o.OnLoss = func(l Loss) { losses = append(losses, l) }
	b, j, s := stocked(t, o)
	if err := b.Renew(ctx, []DirOptions{{Path: "/new", SizeBytes: 4 << 20}}); err == nil {
		t.Fatal("a buffer that is well was renewed")
	}
	inMemory := testBatch(60, 2, 1, 1024)
	s.Add(inMemory)
	m.SetFault("/disk0", &vfs.Fault{})
	m.SetFault("/disk1", &vfs.Fault{})
	last := put(t, j, 1)
	if err := j.Flush(ctx); !errors.Is(err, ErrLost) {
		t.Fatalf("flush: %v", err)
	}
	n := 0
	if err := j.Unsynced(func(w block.Write) error {
		n++
		if !sameWrite(w, testWrite(61, 1)) {
			return errors.New("wrong")
		}
		return nil
	}); err != nil || n != 1 {
		t.Fatalf("%d writes in memory, %v", n, err)
	}
	var setup *SetupError
	m.SetFault("/disk0", nil)
	if err := b.Renew(ctx, []DirOptions{{Path: "/disk0", SizeBytes: 4 << 20}}); !errors.As(err, &setup) {
		t.Fatalf("a stale directory was taken: %v", err)
	}
	fresh := []DirOptions{{Path: "/new", SizeBytes: 4 << 20}, {Path: "/newer", SizeBytes: 4 << 20}}
	if err := b.Renew(ctx, fresh); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(j.Err(), ErrLost) {
		t.Errorf("the journal goes on by itself: %v", j.Err())
	}
	if len(s.Lost()) != 2 || len(losses) < 3 {
		t.Errorf("lost: %v", losses)
	}
	if again, err := b.ResetJournal(ctx, testGroup, last+1); err != nil || again != j {
		t.Fatal(err)
	}
	for _, batch := range s.Lost() {
		if err := s.Drop(batch); err != nil {
			t.Fatal(err)
		}
	}
	put(t, j, 1)
	flush(t, j)
	if err := s.Persist(ctx, inMemory); err != nil {
		t.Fatal(err)
	}
	settle(t, b)
	m.SetFault("/disk1", nil)
	m = m.Crash(rand.New(rand.NewPCG(1, 1)))
	o.FS, o.Dirs = m, fresh
	b = mustOpen(t, o)
	j, s = mustJournal(t, b), mustSpool(t, b)
	if j.First() != 62 || j.Last() != 62 || len(s.Batches()) != 1 {
		t.Fatalf("%d to %d, %d batches", j.First(), j.Last(), len(s.Batches()))
	}
	checkRead(t, j, 62, 62, salted(1))
	checkShards(t, s, s.Batches()[0], 1024)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	// The lost ones are stale now.
	o.Dirs = append(slices.Clone(fresh), DirOptions{Path: "/disk0", SizeBytes: 4 << 20})
	if _, err := Open(ctx, o); !errors.As(err, &setup) || setup.Path != "/disk0" {
		t.Fatalf("a lost disk is taken again: %v", err)
	}
}
