package vbuf

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
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

	last       block.Seq // of the last record that counts; first-1 if there is none
	pos        int64     // where the next record goes
	copies     []*fileCopy
	index      []indexEntry
	readers    int
	dirty      bool // written to since the last sync began
	short      bool // it has lost a copy that another disk could take over
	unmendable bool // it cannot be copied: something in it cannot be read
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
		d := b.pickDisk(copies, tried, sizeBytes)
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

// pickDisk returns the usable disk for one more copy of a file of sizeBytes, or nil:
// on a device of its own if possible, and where most room is.
func (b *Buffer) pickDisk(have []*fileCopy, tried map[*disk]bool, sizeBytes int64) *disk {
	b.mu.Lock()
	defer b.mu.Unlock()
	var places []place
	for _, d := range b.disks {
		if d.usable() && !tried[d] {
			places = b.addTo(places, d, d.slotsLeft(b.fileBytes))
		}
	}
	var best *disk
	var bestRank [4]int64
	for _, d := range b.disks {
		if !d.usable() || tried[d] || slices.ContainsFunc(have, func(c *fileCopy) bool { return c.slot.disk == d }) {
			continue
		}
		apart := int64(1)
		for _, c := range have {
			if c.slot.disk.device == d.device {
				apart = 0
			}
		}
		slots, key := d.slotsLeft(b.fileBytes), b.placeOf(d)
		files := (sizeBytes + b.fileBytes - 1) / b.fileBytes
		p := places[slices.IndexFunc(places, func(p place) bool { return p.key == key })]
		// The copies of all files find room if the place that has most comes first.
		rank := [4]int64{apart, min(slots, files), p.sum, slots}
		if best == nil || slices.Compare(rank[:], bestRank[:]) > 0 {
			best, bestRank = d, rank
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

// writeCopies writes bufs at off of all copies of f, at the same time. A copy that
// fails is given up together with its disk; the others are enough, once the
// survivors are labelled. It fails if no copy is left, or with errHold if one found
// no space: then the same may be written again. The caller holds the write token
// and not the lock.
func (j *Journal) writeCopies(f *file, bufs [][]byte, off int64) error {
	j.mu.Lock()
	copies := f.copies // replaced when it changes
	j.mu.Unlock()
	if len(copies) == 0 {
		return errPoisoned
	}
	errs := j.writeErrs[:0]
	if len(copies) == 1 || !j.b.several.Load() {
		for _, c := range copies {
			err := errPoisoned
			if !j.isPoisoned(c) {
				err = c.f.WriteVecAt(bufs, off)
			}
			errs = append(errs, err)
		}
	} else {
		errs = writeAtOnce(copies, func(c *fileCopy) bool { return j.isPoisoned(c) }, bufs, off, errs)
	}
	j.writeErrs = errs
	var noSpace error
	for i, err := range errs {
		d := copies[i].slot.disk
		switch {
		case err == nil:
			if d.refused.Load() {
				d.refused.Store(false)
				j.b.noteRoom(d, true)
			}
		case isNoSpace(err):
			noSpace = err
			d.refused.Store(true)
			j.b.noteRoom(d, false)
		default:
			if errors.Is(err, errStalled) {
				// The write may still happen one day, and needs what it was given.
				j.vecs, j.headers = nil, nil
			}
			if err := j.giveUpCopy(f, copies[i], err); err != nil {
				return err
			}
		}
	}
	if noSpace != nil {
		return fmt.Errorf("%w: %w", errHold, noSpace)
	}
	return nil
}

func (j *Journal) isPoisoned(c *fileCopy) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return c.slot.poisoned
}

// writeAtOnce writes to all copies, which are on different disks.
func writeAtOnce(copies []*fileCopy, poisoned func(*fileCopy) bool, bufs [][]byte, off int64, errs []error) []error {
	var jobs [2]*job // a file has no more copies
	for i, c := range copies {
		err := errPoisoned
		if !poisoned(c) {
			jobs[i], err = c.f.(*diskFile).beginWrite(bufs, off)
		}
		errs = append(errs, err)
	}
	for i, c := range copies {
		if jobs[i] != nil {
			errs[i] = c.slot.disk.await(jobs[i])
		}
	}
	return errs
}

// giveUpCopy takes a copy out of f after a write or a sync of it has failed with
// cause, and its disk out of the set. It fails, with f unchanged, if it is the
// only one, and with errHold if the survivors have no space for their labels: then
// it must be called again before anything is acknowledged. The caller holds a token
// and not the lock.
func (j *Journal) giveUpCopy(f *file, bad *fileCopy, cause error) error {
	j.mu.Lock()
	bad.slot.poisoned = true
	others := false
	for _, c := range f.copies {
		others = others || c != bad
	}
	j.mu.Unlock()
	// The labels first: what another caller acknowledges meanwhile has been
	// written to the failing copy as well, or is not acknowledged.
	err := j.b.failDisk(bad.slot.disk, cause)
	if !others {
		return cause
	}
	if isHold(err) {
		return err
	}
	if err != nil {
		return fmt.Errorf("go on without %s (%w): %w", bad.slot.disk.path, cause, err)
	}
	several := j.b.usableDisks() > 1
	j.mu.Lock()
	defer j.mu.Unlock()
	if i := slices.Index(f.copies, bad); i >= 0 {
		f.copies = slices.Concat(f.copies[:i], f.copies[i+1:])
		// The holder of the other token may be using it just now.
		j.doomed = append(j.doomed, doomed{slot: bad.slot, f: bad.f})
	}
	f.short = several // the next batch begins a file with two copies
	return nil
}
