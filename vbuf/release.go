package vbuf

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"

	"drc/internal/block"
)

// Release says that nobody needs the records up to upTo any more. Records that
// are not durable are not released. It does no I/O: the files are given back by
// Run, or by who waits for room.
func (j *Journal) Release(upTo block.Seq) {
	j.mu.Lock()
	upTo = min(upTo, j.durable)
	freed := false
	if upTo > j.released {
		j.released = upTo
		freed = len(j.files) > 0 && j.files[0].last <= upTo && (j.files[0] != j.current || upTo+1 == j.next)
	}
	j.mu.Unlock()
	if freed {
		j.b.roomChanged()
		j.b.wakeRun()
	}
}

// Released is the last record that nobody needs.
func (j *Journal) Released() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.released
}

// setAside ends the writing to the current file if nothing in it is needed and
// nobody is about to write to it, so that it can be given back: a file can be as
// large as the largest write, and the next one would wait for its room for ever.
func (j *Journal) setAside() {
	j.mu.Lock()
	defer j.mu.Unlock()
	f := j.current
	if f == nil || f.dirty || j.writing || j.syncing || j.released+1 != j.next {
		return
	}
	j.b.mu.Lock()
	defer j.b.mu.Unlock()
	if j.reserved > 0 { // it was promised the room that is left there
		return
	}
	j.retire(f)
	j.current, j.leftBytes = nil, 0
}

// reclaim gives back the files that hold nothing needed. The mark that says so
// is durable before the first of them can be written again: otherwise recovery
// would miss them.
func (j *Journal) reclaim() (did bool, err error) {
	j.markMu.Lock()
	defer j.markMu.Unlock()
	j.mu.Lock()
	n := 0
	for n < len(j.files) {
		f := j.files[n]
		if f == j.current || f.dirty || f.readers > 0 || f.last > j.released {
			break
		}
		n++
	}
	idle := !j.writing && !j.syncing
	var rubbish []doomed
	kept := j.doomed[:0]
	for _, d := range j.doomed {
		// What it holds is elsewhere, and nobody is writing to it.
		if idle && d.until <= j.durable {
			rubbish = append(rubbish, d)
		} else {
			kept = append(kept, d)
		}
	}
	clear(j.doomed[len(kept):])
	j.doomed = kept
	oldest := j.nextNumber
	if n < len(j.files) {
		oldest = j.files[n].number
	}
	gone := append([]*file(nil), j.files[:n]...)
	released, durable := j.released, j.durable
	j.mu.Unlock()
	if len(rubbish) > 0 {
		j.removeRubbish(rubbish)
	}
	if n == 0 {
		return len(rubbish) > 0, nil
	}
	if err := j.putMark(oldest, released, durable); err != nil {
		j.markFailed(err)
		return false, err
	}
	j.mu.Lock()
	j.markTries = 0
	// Nobody else takes files from the front, and those in front stay: they are
	// durable and not written to.
	j.files = append(j.files[:0:0], j.files[n:]...)
	rest := uint64(0)
	if len(j.files) > 0 {
		rest = j.files[0].number
	}
	j.b.mu.Lock()
	j.heldFiles -= n
	j.b.mu.Unlock()
	j.mu.Unlock()
	for i, f := range gone {
		f.closeCopies()
		// Around a hole one file stands for two: see oldFile.resumed.
		if i+1 < len(gone) && gone[i+1].number == f.number || i+1 == len(gone) && rest == f.number {
			continue
		}
		for _, c := range f.copies {
			j.b.recycle(c.slot)
		}
	}
	j.b.roomChanged()
	return true, nil
}

// markFailed counts how often no disk took a mark: in the end the journal is lost, as
// nobody may ever write to it again who would find that out.
func (j *Journal) markFailed(err error) {
	if isHold(err) {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.markTries++; j.markTries > retriesMax && j.err == nil {
		j.fail(fmt.Errorf("%w: no disk takes the mark of the journal any more: %w", ErrLost, err))
	}
}

// removeRubbish removes files, durably, so that none of them comes back.
func (j *Journal) removeRubbish(list []doomed) {
	dirs := map[string]*disk{}
	for _, d := range list {
		if d.f != nil {
			_ = d.f.Close()
		}
		j.b.dropSlot(d.slot)
		if !d.slot.disk.out.Load() {
			dirs[path.Dir(d.slot.name)] = d.slot.disk
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		if err := dirs[dir].fs.SyncDir(dir); err != nil {
			j.b.log.Warn("removed journal files may come back after a crash", "dir", dir, "err", err)
		}
	}
}

// reclaimAll is reclaim for all journals, for who waits for room: files that are
// being written to are not spared.
func (b *Buffer) reclaimAll() (did bool, err error) {
	b.mu.Lock()
	journals := make([]*Journal, 0, len(b.journals))
	for _, j := range b.journals {
		journals = append(journals, j)
	}
	b.mu.Unlock()
	var errs []error
	for _, j := range journals {
		j.setAside()
		d, err := j.reclaim()
		did = did || d
		errs = append(errs, err)
	}
	return did, errors.Join(errs...)
}

// writeMark notes the present state.
func (j *Journal) writeMark() error {
	j.markMu.Lock()
	defer j.markMu.Unlock()
	j.mu.Lock()
	oldest := j.nextNumber
	if len(j.files) > 0 {
		oldest = j.files[0].number
	}
	released, durable := j.released, j.durable
	j.mu.Unlock()
	if j.mark.Oldest == oldest && j.mark.Released == released && j.mark.Durable == durable {
		return nil
	}
	return j.putMark(oldest, released, durable)
}

// reset drops all records, durably, and begins at next.
func (j *Journal) reset(next block.Seq) error {
	j.markMu.Lock()
	j.mu.Lock()
	if j.writing || j.syncing {
		j.mu.Unlock()
		j.markMu.Unlock()
		return errors.New("the journal is in use")
	}
	if err := j.err; err != nil && (!errors.Is(err, ErrLost) || j.b.usableDisks() == 0) {
		j.mu.Unlock()
		j.markMu.Unlock()
		return err
	}
	oldest := j.nextNumber
	j.writing, j.syncing = true, true // nobody writes to what goes
	j.mu.Unlock()
	err := j.putMark(oldest, next-1, next-1)
	j.mu.Lock()
	j.writing, j.syncing = false, false
	if err == nil {
		for _, f := range j.files {
			for _, c := range f.copies {
				j.doomed = append(j.doomed, doomed{slot: c.slot, f: c.f})
			}
		}
		j.files, j.current = nil, nil
		j.restart(next)
		j.err, j.retries = nil, 0
		j.b.mu.Lock()
		j.reserved, j.leftBytes, j.heldFiles = 0, 0, 0
		j.b.mu.Unlock()
		for i := range j.doomed {
			j.doomed[i].until = 0
		}
	}
	j.writeWaiters.wakeAll()
	j.syncWaiters.wakeAll()
	j.mu.Unlock()
	j.markMu.Unlock()
	if err != nil {
		return fmt.Errorf("reset the journal of group %s: %w", j.group, err)
	}
	_, err = j.reclaim()
	return err
}
