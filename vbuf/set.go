package vbuf

import (
	"errors"
	"fmt"
	"slices"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// The set of disks changes while the buffer works: a disk fails, is added, or is
// taken out. Each change is a new generation of labels, and docs/FORMAT-BUFFER.md,
// "The set of disks", says what a crash between two of them leaves. The order of
// the steps is here:
//
//	to drop     no new files go there; labels on all others; then nobody reads or
//	            writes there any more
//	to drain    no new files go there; everything moves; then as to drop
//	to add      a joining label there; labels on all others; its own label; then
//	            files go there
//
// So nothing is acknowledged that a dropped disk lacks before it is known to be
// dropped, and nothing is only on a disk that is not known to be a member.

// errLastDisk: there is no other disk to go on with.
var errLastDisk = errors.New("it is the last disk of the buffer")

// errUnlabelled: no disk of the set takes a label any more.
var errUnlabelled = errors.New("no disk of the buffer takes a label")

// errPoisoned: a write or sync of the file has failed before.
var errPoisoned = errors.New("an earlier write or sync of the file has failed")

func (b *Buffer) newDisk(o DirOptions) *disk {
	d := &disk{b: b, path: o.Path, quotaBytes: o.SizeBytes, jobs: make(chan *job)}
	d.fs = diskFS{d, b.fs}
	return d
}

// unlock gives up the lock of the directory.
func (d *disk) unlock() {
	if d.lock != nil {
		_ = d.lock.Close()
		d.lock = nil
	}
}

// all are the disks, those included that have failed.
func (b *Buffer) all() []*disk {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.disks
}

// openJournals are the journals that were opened, openSpools the spools.
func (b *Buffer) openJournals() []*Journal {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]*Journal, 0, len(b.journals))
	for _, j := range b.journals {
		list = append(list, j)
	}
	slices.SortFunc(list, func(x, y *Journal) int { return block.ID(x.group).Compare(block.ID(y.group)) })
	return list
}

// Look finds out which directories are gone, as the next sync of a file there
// would: for a time in which there may be none. Once all of them are, the journals
// fail with ErrLost.
func (b *Buffer) Look() {
	disks := b.aliveDisks()
	var gone []*disk
	for _, d := range disks {
		if errors.Is(d.isThere(), errVanished) {
			gone = append(gone, d)
		}
	}
	if len(gone) < len(disks) {
		for _, d := range gone {
			_ = b.failDisk(d, errVanished) // the next sync tries again
		}
		return
	}
	b.loseAll(errVanished)
}

// loseAll has every journal fail with ErrLost. The caller holds no lock.
func (b *Buffer) loseAll(cause error) {
	for _, j := range b.openJournals() {
		j.mu.Lock()
		if j.err == nil {
			j.fail(fmt.Errorf("%w: %w", ErrLost, cause))
		}
		j.mu.Unlock()
	}
}

func (b *Buffer) openSpools() []*Spool {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]*Spool, 0, len(b.spools))
	for _, s := range b.spools {
		list = append(list, s)
	}
	slices.SortFunc(list, func(x, y *Spool) int { return block.ID(x.group).Compare(block.ID(y.group)) })
	return list
}

// writeLabel makes the label of d durable.
func (b *Buffer) writeLabel(d *disk, generation uint64, joining bool, members []format.Member) error {
	l := format.Label{Repo: b.opt.Repo, Host: b.opt.Host, Disk: d.id, Generation: generation, Joining: joining, Members: members}
	err := vfs.WriteFileAtomic(d.fs, b.path(d, labelName), l.Encode())
	if isNoSpace(err) && b.giveUpSpare(d) {
		err = vfs.WriteFileAtomic(d.fs, b.path(d, labelName), l.Encode())
	}
	if err != nil {
		return fmt.Errorf("label buffer directory %s: %w", d.path, err)
	}
	return nil
}

// giveUpSpare makes room by removing a journal file that nobody uses, if there is
// one.
func (b *Buffer) giveUpSpare(d *disk) bool {
	b.mu.Lock()
	n := len(d.free)
	if n == 0 {
		b.mu.Unlock()
		return false
	}
	s := d.free[n-1]
	d.free = d.free[:n-1]
	b.mu.Unlock()
	b.dropSlot(s)
	return true
}

// failDisk takes a disk on which an operation failed out of the set: the
// survivors have labels of a new generation on return, so that what this disk has
// missed is never taken for the truth. A disk that alone holds something needed
// stays a member and is only read from then on, until that is elsewhere. It
// returns errLastDisk, and does nothing, if there is no other, and errHold if the
// labels find no space: then nothing may be acknowledged yet, and the same is to
// be tried again. The caller holds no lock behind setMu.
func (b *Buffer) failDisk(d *disk, cause error) error {
	b.setMu.Lock()
	losses, err := b.failDiskLocked(d, cause)
	b.setMu.Unlock()
	b.report(losses)
	return err
}

func (b *Buffer) failDiskLocked(d *disk, cause error) ([]Loss, error) {
	sole := b.aloneHolds(d)
	b.mu.Lock()
	d.lastErr = cause
	if d.failed != nil {
		due := b.labelled != b.generation
		b.mu.Unlock()
		if due {
			return b.labelSet(d)
		}
		return nil, nil
	}
	if d.suspect {
		b.mu.Unlock()
		return nil, nil
	}
	var others, spare []*disk
	for _, o := range b.disks {
		if o != d && o.usable() {
			others = append(others, o)
		}
		if o != d && o.failed == nil && !o.suspect && o.draining {
			spare = append(spare, o)
		}
	}
	if len(others) == 0 && len(spare) > 0 {
		for _, o := range spare {
			o.draining = false
		}
		b.log.Warn("a disk that was to be drained is needed and stays", "path", spare[0].path)
		others = spare
	}
	if len(others) == 0 {
		b.mu.Unlock()
		return nil, errLastDisk
	}
	if sole {
		d.suspect, d.draining, d.moved = true, false, 0
		b.mu.Unlock()
		b.log.Error("a buffer disk fails; it is only read from now on, and taken out once what it alone holds is elsewhere", "path", d.path, "err", cause)
		b.mendSoon()
		return nil, nil
	}
	b.mu.Unlock()
	return b.drop(d, cause)
}

// drop takes d out of the set; setMu is held.
func (b *Buffer) drop(d *disk, cause error) ([]Loss, error) {
	b.mu.Lock()
	d.failed, d.suspect, d.draining = cause, false, false
	b.generation++
	generation := b.generation
	b.mu.Unlock()
	b.log.Error("a buffer disk is dropped", "path", d.path, "err", cause, "generation", generation)
	return b.labelSet(d)
}

// labelSet makes the present generation durable on the disks of the set, and then
// forgets what is on d, which is no member any more. Disks that take no label are
// dropped, too. setMu is held.
func (b *Buffer) labelSet(d *disk) (losses []Loss, err error) {
	generation, members, survivors := b.members()
	labelled := 0
	var noSpace error
	for _, o := range survivors {
		err := b.writeLabel(o, generation, false, members)
		if err == nil {
			labelled++
			b.noteRoom(o, true)
			continue
		}
		if isNoSpace(err) {
			noSpace = err
			b.noteRoom(o, false)
			continue
		}
		// It is stale from now on. The next generation, if there are disks to
		// hold one, says so.
		more, ferr := b.failDiskLocked(o, err)
		losses = append(losses, more...)
		if ferr != nil {
			// errLastDisk or errHold: nothing may be acknowledged without the label.
			if isHold(ferr) {
				return losses, ferr
			}
			return losses, fmt.Errorf("%w: label the surviving disk %s: %w", errUnlabelled, o.path, err)
		}
		if b.generation != generation {
			// The newer generation is on all that survive.
			if d != nil {
				losses = append(losses, b.strip(d)...)
			}
			return losses, nil
		}
	}
	if noSpace != nil {
		return losses, fmt.Errorf("%w: %w", errHold, noSpace)
	}
	if labelled == 0 {
		return losses, fmt.Errorf("no disk took the label of generation %d", generation)
	}
	b.labelled = generation
	if d != nil {
		losses = append(losses, b.strip(d)...)
	}
	return losses, nil
}

// members are the disks of the set, as their labels name them.
func (b *Buffer) members() (generation uint64, members []format.Member, disks []*disk) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.disks {
		if o.failed == nil {
			disks = append(disks, o)
			members = append(members, format.Member{Disk: o.id, Path: o.path})
		}
	}
	return b.generation, members, disks
}

// strip forgets the copies on d, which is out of the set, and returns what is
// lost with it. setMu is held.
func (b *Buffer) strip(d *disk) (losses []Loss) {
	d.out.Store(true)
	b.mu.Lock()
	for _, s := range d.free {
		d.journalBytes -= s.sizeBytes
	}
	d.free = nil
	b.countDisks()
	b.mu.Unlock()
	for _, j := range b.openJournals() {
		losses = append(losses, j.strip(d)...)
	}
	for _, s := range b.openSpools() {
		s.strip(d)
	}
	b.roomChanged()
	b.mendSoon()
	return losses
}

// strip forgets the copies on d.
func (j *Journal) strip(d *disk) (losses []Loss) {
	j.mu.Lock()
	defer j.mu.Unlock()
	orphaned := false
	for _, f := range j.files {
		kept := make([]*fileCopy, 0, len(f.copies))
		for _, c := range f.copies {
			if c.slot.disk != d {
				kept = append(kept, c)
				continue
			}
			c.slot.poisoned = true
			if c.f != nil { // whoever holds a token may be using it
				j.doomed = append(j.doomed, doomed{slot: c.slot, f: c.f})
			}
		}
		if len(kept) == len(f.copies) {
			continue
		}
		f.copies = kept
		f.short = true
		orphaned = orphaned || len(kept) == 0 && (f == j.current || f.dirty || f.last > j.durable)
	}
	if orphaned {
		j.poison(d.failed)
	}
	kept := make([]*file, 0, len(j.files))
	for _, f := range j.files {
		if len(f.copies) > 0 {
			kept = append(kept, f)
			continue
		}
		if from := max(f.first, j.released+1); from <= f.last {
			r := Range{from, f.last}
			j.damaged = append(j.damaged, r)
			losses = append(losses, Loss{Group: j.group, Range: r, Cause: d.failed})
		}
		j.b.mu.Lock()
		j.heldFiles--
		j.b.mu.Unlock()
	}
	if len(kept) < len(j.files) {
		j.files = kept
		slices.SortFunc(j.damaged, func(x, y Range) int { return int(int64(x.From) - int64(y.From)) })
	}
	return losses
}

// aloneHolds reports whether something that is needed would be lost without d.
func (b *Buffer) aloneHolds(d *disk) bool {
	for _, j := range b.openJournals() {
		if j.aloneHolds(d) {
			return true
		}
	}
	for _, s := range b.openSpools() {
		if s.aloneHolds(d) {
			return true
		}
	}
	// Of what is not opened yet only the headers are known.
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, found := range b.found {
		for _, f := range found {
			if f.slot.disk == d && !slices.ContainsFunc(found, func(o foundFile) bool {
				return o.slot.disk != d && o.slot.disk.failed == nil && *o.header == *f.header
			}) {
				return true
			}
		}
	}
	return false
}

// aloneHolds reports whether d has the only copy of records that are needed.
func (j *Journal) aloneHolds(d *disk) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, f := range j.files {
		// What is not durable is in memory.
		if min(f.last, j.durable) <= j.released || min(f.last, j.durable) < f.first {
			continue
		}
		elsewhere := false
		j.b.mu.Lock()
		for _, c := range f.copies {
			elsewhere = elsewhere || c.slot.disk != d && c.slot.disk.failed == nil
		}
		j.b.mu.Unlock()
		if len(f.copies) > 0 && !elsewhere {
			return true
		}
	}
	return false
}
