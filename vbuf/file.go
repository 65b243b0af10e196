package vbuf

import (
	"fmt"
	"math/rand/v2"
	"sort"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// file is one use of a journal file, on one disk or with equal copies on two.
// Its fields below the line are guarded by Journal.mu.
type file struct {
	number      uint64
	incarnation uint64
	first       block.Seq
	sum         uint32 // of the header, to which the first record chains
	sizeBytes   int64

	last    block.Seq // of the last record that counts; first-1 if there is none
	pos     int64     // where the next record goes
	copies  []*fileCopy
	index   []indexEntry
	readers int
	dirty   bool // written to since the last sync began
	short   bool // it has lost a copy that another disk could take over
}

// fileCopy is a file on one disk.
type fileCopy struct {
	slot *slot
	f    vfs.File // open while it is written to or not synced, else nil
}

// indexEntry says where a record begins; there is one every indexEveryBytes.
type indexEntry struct {
	seq block.Seq
	off int64
}

const indexEveryBytes = 128 << 10

// note enters the record seq at off into the index if it is far enough from the
// one before. Records are noted in order.
func (f *file) note(seq block.Seq, off int64) {
	if n := len(f.index); n == 0 || off-f.index[n-1].off >= indexEveryBytes {
		f.index = append(f.index, indexEntry{seq, off})
	}
}

// seek returns the last indexed record not behind seq.
func (f *file) seek(seq block.Seq) indexEntry {
	i := sort.Search(len(f.index), func(i int) bool { return f.index[i].seq > seq })
	if i == 0 {
		return indexEntry{f.first, format.JournalBlockBytes}
	}
	return f.index[i-1]
}

// cut makes last the last record that counts.
func (f *file) cut(last block.Seq) {
	if f.last <= last {
		return
	}
	f.last = max(last, f.first-1)
	i := sort.Search(len(f.index), func(i int) bool { return f.index[i].seq > f.last })
	f.index = f.index[:i]
}

// closeCopies closes what is open. No write or sync of f may be under way.
func (f *file) closeCopies() {
	for _, c := range f.copies {
		if c.f != nil {
			_ = c.f.Close() // all that matters was synced
			c.f = nil
		}
	}
}

// newCopies gets a file of sizeBytes from the disks: two copies if there are two
// usable disks, on two devices if there are. It returns errHold if there is no
// space, errLastDisk if no disk can be written.
func (b *Buffer) newCopies(sizeBytes int64) ([]*fileCopy, error) {
	var copies []*fileCopy
	giveUp := func() {
		for _, c := range copies {
			_ = c.f.Close()
			b.recycle(c.slot)
		}
	}
	tried := map[*disk]bool{}
	held := false
	var last error
	for {
		d := b.pickDisk(copies, tried)
		if d == nil {
			break
		}
		tried[d] = true
		s, f, err := b.newSlot(d, sizeBytes)
		switch {
		case err == nil:
			copies = append(copies, &fileCopy{s, f})
		case isHold(err):
			held = true
		default:
			last = fmt.Errorf("make a journal file on %s: %w", d.path, err)
			if err := b.failDisk(d, err); err != nil {
				giveUp()
				return nil, last
			}
		}
		if len(copies) == 2 {
			return copies, nil
		}
	}
	switch {
	case held:
		giveUp()
		return nil, errHold // rather wait than do without the second copy
	case len(copies) == 1:
		return copies, nil
	case last != nil:
		return nil, last
	}
	return nil, errLastDisk
}

// pickDisk returns the usable disk with most room, on a device of its own if
// possible, or nil. If none is usable, those that are suspect have to do.
func (b *Buffer) pickDisk(have []*fileCopy, tried map[*disk]bool) *disk {
	b.mu.Lock()
	defer b.mu.Unlock()
	var best *disk
	bestApart, bestRoom := false, int64(0)
	for _, d := range b.disks {
		if !d.usable() || tried[d] {
			continue
		}
		apart := true
		for _, c := range have {
			apart = apart && c.slot.disk.device != d.device
		}
		room := d.slotsLeft(b.fileBytes)
		if best == nil || (apart && !bestApart) || (apart == bestApart && room > bestRoom) {
			best, bestApart, bestRoom = d, apart, room
		}
	}
	return best
}

// openFile begins a new file whose first record will be first and chains to
// prev. The caller holds the write token and not the lock.
func (j *Journal) openFile(h format.JournalFile) (*file, error) {
	copies, err := j.b.newCopies(h.SizeBytes)
	if err != nil {
		return nil, err
	}
	h.Repo, h.Group, h.Incarnation = j.b.opt.Repo, j.group, rand.Uint64()
	f := &file{number: h.Number, incarnation: h.Incarnation, first: h.First, last: h.First - 1,
		sum: h.Checksum(), sizeBytes: h.SizeBytes, pos: format.JournalBlockBytes, copies: copies, dirty: true}
	if err := j.writeCopies(f, [][]byte{headerBlock(&h)}, 0); err != nil {
		for _, c := range f.copies {
			_ = c.f.Close()
			c.slot.poisoned = true
			j.b.recycle(c.slot)
		}
		return nil, err
	}
	return f, nil
}

// writeCopies writes bufs at off of all copies of f. A copy that fails is given
// up together with its disk; the others are enough, once the survivors are
// labelled. It fails if no copy is left, or with errHold if one found no space:
// then the same may be written again. The caller holds the write token and not
// the lock.
func (j *Journal) writeCopies(f *file, bufs [][]byte, off int64) error {
	var failed *fileCopy
	var cause error
	j.mu.Lock()
	copies := f.copies // replaced when it changes
	j.mu.Unlock()
	for _, c := range copies {
		err := c.f.WriteVecAt(bufs, off)
		if err == nil {
			continue
		}
		if isNoSpace(err) {
			return fmt.Errorf("%w: %w", errHold, err)
		}
		failed, cause = c, err
		break
	}
	if failed == nil {
		return nil
	}
	if err := j.giveUpCopy(f, failed, cause); err != nil {
		return err
	}
	return j.writeCopies(f, bufs, off)
}

// giveUpCopy takes a copy out of f after a write or a sync of it has failed with
// cause, and its disk out of the set. It fails, with f unchanged, if it is the
// only one. The caller holds a token and not the lock.
func (j *Journal) giveUpCopy(f *file, bad *fileCopy, cause error) error {
	j.mu.Lock()
	bad.slot.poisoned = true
	kept := make([]*fileCopy, 0, len(f.copies))
	for _, c := range f.copies {
		if c != bad {
			kept = append(kept, c)
		}
	}
	if len(kept) == 0 {
		j.mu.Unlock()
		_ = j.b.failDisk(bad.slot.disk, cause) // so that another is tried next, if there is one
		return cause
	}
	if len(kept) < len(f.copies) {
		f.copies = kept
		// The holder of the other token may be using it just now.
		j.doomed = append(j.doomed, doomed{slot: bad.slot, f: bad.f})
	}
	j.mu.Unlock()
	if err := j.b.failDisk(bad.slot.disk, cause); err != nil {
		return fmt.Errorf("go on without %s (%w): %w", bad.slot.disk.path, cause, err)
	}
	if j.b.usableDisks() > 1 {
		j.mu.Lock()
		f.short = true // the next batch begins a file with two copies
		j.mu.Unlock()
	}
	return nil
}
