package vbuf

import (
	"errors"
	"fmt"
	"io/fs"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// The mark of a journal.
//
// Before a journal file is written again for another use, or removed, a mark says
// so: without it a start would miss the file and take what was in it for lost. The
// start may be one without any one of the disks, so each of them has the newest mark
// before a file is given up; two disks of which one has an older mark would be one
// disk only.
//
// To give back files is what makes room, so it must not need any: where the file
// system is full the journal would wait for itself, and with it the other disks. So
// the first mark, written when a journal is made or a disk joins, takes the room for
// two, and later ones are written in place by turns. A crash while one is written
// leaves the other, which is the newest that anybody relies on.
//
// For that the other one must be durable. What this process has not written itself
// may be in the page cache only, if its writer was killed: so the newest mark that a
// start finds in a file is written there once more, and synced, before the other slot
// is used. A file of which a sync has failed is not used again: a new one replaces it
// whole, and so does it one of the older form, which was a mark and nothing else.

// markAlone is the slot of a mark that has a file of the older form for itself.
const markAlone = -1

func (j *Journal) markName(d *disk) string {
	return j.b.path(d, journalFolder, j.group.String()+markSuffix)
}

// readMark reads the file of the marks on one disk. damaged says that the slot beside
// the newest mark cannot be read, which a crash may have left.
func (j *Journal) readMark(d *disk) (m *format.JournalMark, slot int, damaged, err error) {
	raw, err := vfs.ReadFile(d.fs, j.markName(d), format.JournalMarkSlots*format.JournalMarkSlotBytes)
	if err != nil {
		return nil, markAlone, nil, err
	}
	m, slot, damaged = format.DecodeJournalMarks(j.markName(d), raw)
	if m == nil {
		return nil, markAlone, nil, damaged
	}
	if m.Repo != j.b.opt.Repo || m.Group != j.group {
		return nil, markAlone, nil, format.Corrupt(j.markName(d), "it belongs to another journal")
	}
	return m, slot, damaged, nil
}

// readMarks loads the newest mark and reports whether there was one, and whether
// some disk has not got it. It fails if there are marks and none is whole.
func (j *Journal) readMarks() (found, uneven bool, err error) {
	var bad error
	var serials []uint64
	for _, d := range j.b.aliveDisks() {
		m, _, damaged, err := j.readMark(d)
		if errors.Is(err, fs.ErrNotExist) {
			serials = append(serials, 0)
			continue
		}
		if err != nil {
			bad = err
			continue
		}
		if damaged != nil {
			j.b.log.Warn("a mark of a journal is damaged, the one before it serves; it is no fault after a power cut", "group", j.group, "err", damaged)
			uneven = true
		}
		serials = append(serials, m.Serial)
		if m.Serial > j.mark.Serial {
			j.mark = *m
		}
	}
	if j.mark.Serial == 0 {
		return false, bad != nil, bad
	}
	for _, s := range serials {
		uneven = uneven || s != j.mark.Serial
	}
	return true, uneven || bad != nil, nil
}

// keepMarks makes durable in place what a start has found in the files of the marks,
// so that the next one can be written beside it. Where that fails the next mark
// replaces the file.
func (j *Journal) keepMarks() {
	j.markMu.Lock()
	defer j.markMu.Unlock()
	for _, d := range j.b.writtenDisks() {
		m, slot, _, err := j.readMark(d)
		if err != nil {
			continue // the next mark makes the file
		}
		if slot == markAlone {
			if err = j.newMarks(d, m.Encode()); err == nil {
				slot = 0
			}
		} else {
			err = j.writeSlot(d, slot, m.Encode())
		}
		if err != nil {
			j.b.log.Warn("the mark of a journal cannot be written where it is: the next one needs room", "file", j.markName(d), "err", err)
			continue
		}
		j.setMarkSlot(d, 1-slot)
	}
}

func (j *Journal) setMarkSlot(d *disk, slot int) {
	if j.markSlots == nil {
		j.markSlots = map[*disk]int{}
	}
	j.markSlots[d] = slot
}

// newMarks replaces the file of the marks on d by one with raw in its first slot.
func (j *Journal) newMarks(d *disk, raw []byte) error {
	whole := make([]byte, format.JournalMarkSlots*format.JournalMarkSlotBytes)
	copy(whole, raw)
	return vfs.WriteFileAtomic(d.fs, j.markName(d), whole)
}

// writeSlot makes a mark durable in one slot.
func (j *Journal) writeSlot(d *disk, slot int, raw []byte) error {
	f, err := d.fs.Open(j.markName(d))
	if err != nil {
		return err
	}
	defer f.Close()
	whole := make([]byte, format.JournalMarkSlotBytes)
	copy(whole, raw)
	if _, err := f.WriteAt(whole, int64(slot)*format.JournalMarkSlotBytes); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		delete(j.markSlots, d)
		return err
	}
	return nil
}

// putMarkOn makes a mark durable on one disk, beside the one before.
func (j *Journal) putMarkOn(d *disk, raw []byte) error {
	slot, known := j.markSlots[d]
	if !known {
		if err := j.newMarks(d, raw); err != nil {
			return err
		}
		j.setMarkSlot(d, 1)
		return nil
	}
	if err := j.writeSlot(d, slot, raw); err != nil {
		return err // the same slot again, if any: the other one is the newest
	}
	j.setMarkSlot(d, 1-slot)
	return nil
}

// putMark makes a mark durable on every disk of the set that is written to; of
// marks that differ the newest counts. Under markMu.
func (j *Journal) putMark(oldest uint64, released, durable block.Seq) error {
	b := j.b
	m := format.JournalMark{Repo: b.opt.Repo, Group: j.group, Serial: j.mark.Serial + 1,
		Oldest: oldest, Released: released, Durable: durable}
	j.mark.Serial = m.Serial // no two tries have the same
	raw := m.Encode()
	written := 0
	for _, d := range b.writtenDisks() {
		err := j.putMarkOn(d, raw)
		if err == nil {
			written++
			continue
		}
		if isNoSpace(err) {
			b.noteRoom(d, false)
			return fmt.Errorf("%w: %w", errHold, err)
		}
		if ferr := b.failDisk(d, err); ferr != nil {
			return fmt.Errorf("mark the journal on %s: %w", d.path, err)
		}
	}
	if written == 0 {
		return fmt.Errorf("no disk took the mark of the journal of group %s", j.group)
	}
	j.mark = m
	j.mu.Lock()
	j.oldestMarked = oldest
	j.mu.Unlock()
	return nil
}
