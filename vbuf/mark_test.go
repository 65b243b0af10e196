package vbuf

import (
	"fmt"
	"slices"
	"testing"

	"drc/internal/format"
	"drc/internal/vfs"
)

// fillAndRelease writes until the journal has several files, and releases all but the
// last few records.
func fillAndRelease(t *testing.T, j *Journal, salt uint64) {
	t.Helper()
	for range 40 {
		flushed := put(t, j, salt)
		flush(t, j)
		if flushed > 5 {
			j.Release(flushed - 5)
		}
	}
}

// markOn is the newest mark on a disk.
func markOn(t *testing.T, m *vfs.Mem, j *Journal, dir string) *format.JournalMark {
	t.Helper()
	name := dir + "/journal/" + j.group.String() + markSuffix
	raw, err := vfs.ReadFile(m, name, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	mark, _, err := format.DecodeJournalMarks(name, raw)
	if err != nil {
		t.Fatal(err)
	}
	return mark
}

// TestMark_NeedsNoRoom: journal files are given back though the file system of one
// disk, or of all, is full to the last byte, and the mark that says so is on each of
// them: a start without any one of them finds all that was flushed.
func TestMark_NeedsNoRoom(t *testing.T) {
	for _, full := range []int{1, 2} {
		t.Run(fmt.Sprint(full), func(t *testing.T) {
			m := vfs.NewMem()
			o := testOptions(m, 2)
			b := mustOpen(t, o)
			j := mustJournal(t, b)
			for range 80 {
				put(t, j, 1)
				flush(t, j)
			}
			for i := range full {
				dir := fmt.Sprintf("/disk%d", 1-i)
				space, err := m.StatFS(dir)
				if err != nil {
					t.Fatal(err)
				}
				m.SetLimit(dir, space.TotalBytes-space.FreeBytes)
			}
			for range 3 {
				before := markOn(t, m, j, "/disk0")
				j.Release(j.Durable() - 3)
				if did, err := j.reclaim(); !did || err != nil {
					t.Fatalf("nothing was given back: %v", err)
				}
				for range 30 { // into the files that were given back
					put(t, j, 1)
					flush(t, j)
				}
				after := markOn(t, m, j, "/disk0")
				if after.Oldest <= before.Oldest || *after != *markOn(t, m, j, "/disk1") {
					t.Fatalf("after %+v the disks have %+v and %+v", before, after, markOn(t, m, j, "/disk1"))
				}
			}
			from, to := j.Released()+1, j.Durable()
			for lost := range 2 {
				dead := m.Clone()
				dead.SetLimit("/disk0", 1<<40)
				dead.SetLimit("/disk1", 1<<40)
				gone, kept := fmt.Sprintf("/disk%d", lost), fmt.Sprintf("/disk%d", 1-lost)
				dead.Vanish(gone)
				if err := RemoveOffline(dead, []string{kept}, RemoveOptions{Path: gone}); err != nil {
					t.Fatal(err)
				}
				rest := o
				rest.FS, rest.Dirs = dead, []DirOptions{o.Dirs[1-lost]}
				survivor := mustOpen(t, rest)
				checkRead(t, mustJournal(t, survivor), from, to, salted(1))
				if err := survivor.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestMark_TornWriteLeavesTheOther: whatever a crash leaves of the mark that was being
// written, the one before it serves.
func TestMark_TornWriteLeavesTheOther(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	for range 5 {
		fillAndRelease(t, j, 1)
		if did, err := j.reclaim(); !did || err != nil {
			t.Fatal(did, err)
		}
		newest := markOn(t, m, j, "/disk0")
		next := j.markSlots[b.disks[0]]
		for _, torn := range [][]byte{slices.Repeat([]byte{0xff}, 7), []byte("DRCN\x01"), make([]byte, format.JournalMarkBytes/2)} {
			crashed := m.Clone()
			f, err := crashed.Open("/disk0/journal/" + j.group.String() + markSuffix)
			if err == nil {
				_, err = f.WriteAt(torn, int64(next)*format.JournalMarkSlotBytes)
			}
			if err == nil {
				err = f.Sync()
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = f.Close()
			again := o
			again.FS = crashed
			b2 := mustOpen(t, again)
			j2 := mustJournal(t, b2)
			checkRead(t, j2, j.Released()+1, j.Durable(), salted(1))
			if got := markOn(t, crashed, j2, "/disk0"); got.Serial < newest.Serial || got.Oldest < newest.Oldest {
				t.Errorf("%+v counts, and %+v was durable", got, newest)
			}
			if err := b2.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestMark_OfTheOlderForm: a file that is one mark and nothing else is read, and
// replaced by one in which marks are written in place.
func TestMark_OfTheOlderForm(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	fillAndRelease(t, j, 1)
	if _, err := j.reclaim(); err != nil {
		t.Fatal(err)
	}
	from, to := j.Released()+1, j.Durable()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	name := "/disk0/journal/" + j.group.String() + markSuffix
	mark := markOn(t, m, j, "/disk0")
	if err := vfs.WriteFileAtomic(m, name, mark.Encode()); err != nil {
		t.Fatal(err)
	}
	b = mustOpen(t, o)
	j = mustJournal(t, b)
	checkRead(t, j, from, to, salted(1))
	if got := markOn(t, m, j, "/disk0"); got.Oldest < mark.Oldest {
		t.Errorf("%+v counts after %+v", got, mark)
	}
	if info, err := m.Stat(name); err != nil || info.SizeBytes != format.JournalMarkSlots*format.JournalMarkSlotBytes {
		t.Errorf("the file of the marks: %+v, %v", info, err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
