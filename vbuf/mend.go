package vbuf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"drc/internal/block"
	"drc/internal/format"
)

// After each change of the set what is needed is brought to where it should be, in
// the background: journal files are on two disks again, batches so that any one
// disk may be lost, and nothing is left on a disk that is to go. Each step makes a
// new copy durable before it is counted, and counts it before an old one is given
// up; a crash in between leaves a copy too many, which the next start makes equal
// or removes.

// movedMax is how often in a row reading from a failing disk is tried before what
// it alone holds is given up.
const movedMax = 3

// mend does one unit of that and reports whether there was any.
func (b *Buffer) mend(ctx context.Context) (did bool, err error) {
	if !b.mendDue.Swap(false) {
		return false, nil
	}
	b.wanting.Store(false)
	defer func() {
		if did || err != nil || b.unfinished() {
			b.mendDue.Store(true)
		}
	}()
	leaving := b.leaving()
	if len(leaving) > 0 {
		// What nobody has opened is to be moved, too.
		if did, err := b.openAll(ctx); did || err != nil {
			return did, err
		}
	}
	for _, j := range b.openJournals() {
		if did, err := j.mend(ctx); did || err != nil {
			return did, err
		}
	}
	for _, s := range b.openSpools() {
		if did, err := s.mend(ctx); did || err != nil {
			return did, err
		}
	}
	if did, err := b.spreadBitmaps(ctx, leaving); did || err != nil {
		return did, err
	}
	for _, d := range leaving {
		if b.isEmpty(d) {
			return true, b.finish(d)
		}
	}
	return false, nil
}

// leaving are the disks that are to go once they are empty.
func (b *Buffer) leaving() (list []*disk) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.disks {
		if d.failed == nil && (d.draining || d.suspect) {
			list = append(list, d)
		}
	}
	return list
}

func (b *Buffer) isSuspect(d *disk) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return d.suspect
}

// unfinished reports whether mend has work that waits for something.
func (b *Buffer) unfinished() bool {
	return b.wanting.Load() || len(b.leaving()) > 0 || b.anyFull()
}

// openAll opens one group that is in the buffer and was not opened yet.
func (b *Buffer) openAll(ctx context.Context) (did bool, err error) {
	groups, err := b.Groups()
	if err != nil {
		return false, err
	}
	for _, g := range groups {
		b.mu.Lock()
		j, s := b.journals[g], b.spools[g]
		b.mu.Unlock()
		if j == nil {
			if _, err := b.Journal(ctx, g); err != nil {
				return false, fmt.Errorf("move the journal of group %s to other disks: %w", g, err)
			}
			return true, nil
		}
		if s == nil {
			if _, err := b.Spool(ctx, g); err != nil {
				return false, fmt.Errorf("move the batches of group %s to other disks: %w", g, err)
			}
			return true, nil
		}
	}
	return false, nil
}

// isEmpty reports whether nothing that is needed is on d.
func (b *Buffer) isEmpty(d *disk) bool {
	for _, j := range b.openJournals() {
		j.mu.Lock()
		for _, f := range j.files {
			if slices.ContainsFunc(f.copies, func(c *fileCopy) bool { return c.slot.disk == d }) {
				j.mu.Unlock()
				return false
			}
		}
		j.mu.Unlock()
	}
	for _, s := range b.openSpools() {
		if s.isOn(d) {
			return false
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, found := range b.found {
		if slices.ContainsFunc(found, func(f foundFile) bool { return f.slot.disk == d }) {
			return false
		}
	}
	return true
}

// mend makes one copy of a journal file that has too few, or gives up those on
// disks that are to go.
func (j *Journal) mend(ctx context.Context) (did bool, err error) {
	b := j.b
	want := min(2, b.usableDisks())
	if want == 0 {
		return false, nil
	}
	j.mu.Lock()
	if j.err != nil {
		j.mu.Unlock()
		return false, nil
	}
	var todo *file
	for _, f := range j.files {
		good, other := j.countCopies(f)
		needed := f.last >= f.first && f.last > j.released || f == j.current
		if good >= want && good <= 2 && other == 0 || good == 0 && other == 0 || !needed && other == 0 {
			continue
		}
		if f == j.current || f.dirty {
			if f.last >= f.first && f.last > j.durable || f.dirty {
				f.short = true
				j.mu.Unlock()
				return true, j.Flush(ctx)
			}
			if j.writing || j.syncing {
				f.short = true
				b.wanting.Store(true)
				continue // the next batch begins a new one
			}
			j.endCurrent()
		}
		if good >= want || !needed {
			j.giveUpOthers(f)
			j.mu.Unlock()
			return true, nil
		}
		if todo == nil && !f.unmendable && f.last >= f.first {
			todo = f
		}
	}
	if todo == nil {
		j.mu.Unlock()
		return false, nil
	}
	// The live files of one number share the file on the disk: around a hole there
	// are two.
	var parts []*file
	for _, f := range j.files {
		if f.number == todo.number {
			f.readers++
			parts = append(parts, f)
		}
	}
	copies := todo.copies
	j.mu.Unlock()
	did, err = j.addCopy(todo, parts, copies)
	j.mu.Lock()
	for _, f := range parts {
		f.readers--
	}
	j.mu.Unlock()
	return did, err
}

// countCopies counts the copies of f on disks that stay and on those that do not.
// Under mu.
func (j *Journal) countCopies(f *file) (good, other int) {
	j.b.mu.Lock()
	defer j.b.mu.Unlock()
	for _, c := range f.copies {
		if c.slot.disk.usable() {
			good++
		} else {
			other++
		}
	}
	return good, other
}

// endCurrent ends the writing to the current file, of which all is durable. Under
// mu, with nobody writing or syncing.
func (j *Journal) endCurrent() {
	j.retire(j.current)
	j.current = nil
	j.leave(0)
}

// giveUpOthers forgets the copies of f on disks that are to go, and those beyond
// two, which a crash has left. Under mu.
func (j *Journal) giveUpOthers(f *file) {
	j.b.mu.Lock()
	defer j.b.mu.Unlock()
	var kept []*fileCopy
	for _, apart := range []bool{true, false} {
		for _, c := range f.copies {
			if c.slot.disk.usable() && len(kept) < 2 && !slices.Contains(kept, c) &&
				(!apart || len(kept) == 0 || c.slot.disk.device != kept[0].slot.disk.device) {
				kept = append(kept, c)
			}
		}
	}
	for _, c := range f.copies {
		if slices.Contains(kept, c) {
			continue
		}
		c.slot.poisoned = true // not to be used again
		if !slices.ContainsFunc(j.files, func(o *file) bool {
			return o != f && o.number == f.number && slices.ContainsFunc(o.copies, func(x *fileCopy) bool { return x.slot == c.slot })
		}) {
			j.doomed = append(j.doomed, doomed{slot: c.slot, f: c.f, until: f.last})
		}
	}
	f.copies = kept
}

// addCopy makes a copy of f, which stands for parts, on one more disk. The parts
// are pinned by their readers.
func (j *Journal) addCopy(f *file, parts []*file, copies []*fileCopy) (did bool, err error) {
	b := j.b
	b.mu.Lock()
	full := map[*disk]bool{}
	for _, d := range b.disks {
		if d.quotaBytes-d.journalBytes-d.shardBytes < f.sizeBytes && (len(d.free) == 0 || f.sizeBytes != b.fileBytes) {
			full[d] = true
		}
	}
	b.mu.Unlock()
	to := b.pickDisk(copies, full, f.sizeBytes)
	if to == nil {
		b.wanting.Store(true) // room
		return false, nil
	}
	s, w, err := b.newSlot(to, f.sizeBytes)
	if isHold(err) {
		b.wanting.Store(true)
		return false, nil
	}
	if err != nil {
		return true, b.failDisk(to, fmt.Errorf("make a journal file on %s: %w", to.path, err))
	}
	bad, err := j.copyFile(w, f, parts, copies)
	_ = w.Close()
	var target *targetError
	switch {
	case errors.As(err, &target):
		s.poisoned = true
		b.dropSlot(s)
		return true, b.failDisk(to, target.err)
	case err != nil:
		lost, rerr := j.giveUpReading(f, copies, err)
		if lost {
			j.loseFrom(f, parts, max(bad, parts[0].first), err)
		}
		if !lost || bad == 0 {
			s.poisoned = true
			b.dropSlot(s)
			return rerr == nil, rerr
		}
		// What is in front of bad is kept.
	}
	j.mu.Lock()
	for _, p := range parts {
		if slices.Contains(j.files, p) {
			p.copies = append(slices.Clone(p.copies), &fileCopy{slot: s})
		}
	}
	b.mu.Lock()
	for _, c := range copies {
		c.slot.disk.moved = 0
	}
	b.mu.Unlock()
	j.mu.Unlock()
	return true, nil
}

// targetError is a failure of the disk that is written to.
type targetError struct{ err error }

func (e *targetError) Error() string { return e.err.Error() }

// copyFile writes to w what is in copies: first the records, of which each is
// checked, and last the header, so that a copy that is not whole is none. If
// records cannot be read it returns the first of them, or 0 if it is the header.
func (j *Journal) copyFile(w io.WriterAt, f *file, parts []*file, copies []*fileCopy) (bad block.Seq, err error) {
	var wins []*window
	defer func() {
		for _, x := range wins {
			x.close()
		}
	}()
	var header []byte
	for _, c := range copies {
		x, oerr := j.b.openWindow(c.slot)
		if oerr != nil {
			err = oerr
			continue
		}
		wins = append(wins, x)
		for _, at := range [2]int64{0, headerCopyOffset} {
			raw := x.at(at, format.JournalBlockBytes-headerCopyOffset)
			if raw == nil || header != nil {
				continue
			}
			if h, herr := format.DecodeJournalFile(c.slot.name, raw); herr == nil && h.Number == f.number && h.Incarnation == f.incarnation {
				header = headerBlock(h)
			}
		}
		if x.err != nil {
			err = x.err
		}
	}
	if header == nil {
		if err == nil {
			err = &DamageError{j.group, []Range{{f.first, f.last}}}
		}
		return 0, fmt.Errorf("read the header of journal file %d of group %s: %w", f.number, j.group, err)
	}
	for _, p := range parts {
		j.mu.Lock()
		start := p.seek(p.first)
		last := p.last
		j.mu.Unlock()
		off := start.off
		for seq := start.seq; seq <= last; seq++ {
			r, raw, at, ok := findRecord(wins, off, p.incarnation, seq)
			if !ok {
				err := error(&DamageError{j.group, []Range{{seq, last}}})
				for _, x := range wins {
					if x.err != nil {
						err = x.err
					}
				}
				return seq, finishCopy(w, header, err)
			}
			if _, err := w.WriteAt(raw, at); err != nil {
				return 0, &targetError{err}
			}
			off = at + r.SizeBytes()
		}
	}
	return 0, finishCopy(w, header, nil)
}

// finishCopy makes a copy one that counts; it returns err if all went well.
func finishCopy(w io.WriterAt, header []byte, err error) error {
	type syncer interface{ Sync() error }
	if serr := w.(syncer).Sync(); serr != nil {
		return &targetError{serr}
	}
	if _, werr := w.WriteAt(header, 0); werr != nil {
		return &targetError{werr}
	}
	if serr := w.(syncer).Sync(); serr != nil {
		return &targetError{serr}
	}
	return err
}

// giveUpReading decides what becomes of a file that cannot be read to be copied.
// From a disk that is only read it is tried some times, and is then lost; from one
// that is drained it is tried for ever, for nobody said that it may be lost. Of a
// file whose disks stay nothing more is tried: who reads it is told.
func (j *Journal) giveUpReading(f *file, copies []*fileCopy, cause error) (lost bool, err error) {
	b := j.b
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range copies {
		d := c.slot.disk
		if !d.suspect && !d.draining {
			continue
		}
		d.moved++
		d.lastErr = fmt.Errorf("move a journal file to another disk: %w", cause)
		if d.suspect && d.moved >= movedMax {
			d.moved = 0
			return true, nil
		}
		return false, fmt.Errorf("%s: %w", d.path, d.lastErr)
	}
	b.log.Error("a journal file cannot be copied to a second disk", "group", j.group, "first", f.first, "last", f.last, "err", cause)
	f.unmendable = true
	return false, nil
}

// loseFrom gives up the records of f from seq on, to the end of the last part.
func (j *Journal) loseFrom(f *file, parts []*file, seq block.Seq, cause error) {
	var losses []Loss
	j.mu.Lock()
	for _, p := range parts {
		from := max(seq, p.first, j.released+1)
		if p.last < seq {
			continue
		}
		if from <= p.last {
			r := Range{from, p.last}
			j.damaged = append(j.damaged, r)
			losses = append(losses, Loss{Group: j.group, Range: r, Cause: cause})
		}
		p.cut(seq - 1)
	}
	kept := j.files[:0:0]
	for _, p := range j.files {
		if slices.Contains(parts, p) && p.last < p.first {
			for _, c := range p.copies {
				c.slot.poisoned = true
				j.doomed = append(j.doomed, doomed{slot: c.slot, f: c.f})
			}
			j.b.mu.Lock()
			j.heldFiles--
			j.b.mu.Unlock()
			continue
		}
		kept = append(kept, p)
	}
	j.files = kept
	slices.SortFunc(j.damaged, func(x, y Range) int { return int(int64(x.From) - int64(y.From)) })
	j.mu.Unlock()
	j.b.report(losses)
}
