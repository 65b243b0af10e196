package vbuf

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"drc/internal/block"
	"drc/internal/format"
)

// Bounds of one vectored write.
const (
	batchBytesMax   = 4 << 20
	batchRecordsMax = 340 // three buffers a record, and a thousand a call
)

// retriesMax is how often in a row the unsynced writes are tried elsewhere after
// all copies of a file have failed.
const retriesMax = 4

var zeroes [format.JournalBlockBytes]byte

// WaitWritten waits until record seq is in the journal file of every mirror: it
// survives the death of the process. The first caller writes for all.
func (j *Journal) WaitWritten(ctx context.Context, seq block.Seq) error {
	waited := false
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.written < seq {
		if j.err != nil {
			return j.err
		}
		if seq >= j.next {
			return fmt.Errorf("record %d was not enqueued", seq)
		}
		if j.writing {
			w := j.writeWaiters.add(seq)
			j.mu.Unlock()
			if err := j.writeWaiters.wait(ctx, &j.mu, w); err != nil {
				return err
			}
			continue
		}
		j.writing = true
		// Others that are about to enqueue do so first: one call then writes for
		// all of them. Who is alone loses next to nothing.
		j.mu.Unlock()
		runtime.Gosched()
		j.mu.Lock()
		err := j.writeBatch()
		j.writing = false
		if isHold(err) {
			waited = true
			// Who waits here goes on trying for the others.
			j.mu.Unlock()
			err = j.hold(ctx)
			j.mu.Lock()
			if err != nil {
				j.writeWaiters.wake(0)
				return err
			}
			continue
		}
		j.writeWaiters.wake(j.written)
		if waited && err == nil {
			j.b.held()
			waited = false
		}
	}
	return nil
}

// writeBatch writes as many of the queued records as fit into one vectored write
// and the current file. The caller holds the write token and the lock, which is
// released during I/O. It fails with errHold, or with the journal.
func (j *Journal) writeBatch() error {
	if j.err != nil {
		return j.err
	}
	if j.written+1 >= j.next {
		return nil
	}
	epoch := j.epoch
	first := j.pending.at(j.written + 1).w
	need := format.JournalRecordBytes(int64(len(first.Data)))
	if f := j.current; f == nil || f.short || f.pos+need > f.sizeBytes {
		if err := j.roll(need); err != nil {
			return j.writeFailed(epoch, err)
		}
		if epoch != j.epoch {
			return nil
		}
	}
	f, pos := j.current, j.current.pos
	start := pos
	promised := int64(0)
	j.batch, j.offs = j.batch[:0], j.offs[:0]
	for seq := j.written + 1; seq < j.next; seq++ {
		p := j.pending.at(seq)
		w := p.w
		size := format.JournalRecordBytes(int64(len(w.Data)))
		if len(j.batch) > 0 && (pos+size > f.sizeBytes || pos-start+size > batchBytesMax || len(j.batch) == batchRecordsMax) {
			break
		}
		j.batch = append(j.batch, w)
		j.offs = append(j.offs, pos)
		pos += size
		promised += p.promisedBytes
	}
	prev, durable := j.writtenSum, j.durable
	if f.last < f.first {
		prev = f.sum
	}
	j.mu.Unlock()
	j.encodeBatch(f, prev, durable, pos)
	err := j.writeCopies(f, j.vecs, start)
	clear(j.vecs)
	j.mu.Lock()
	if err != nil {
		clear(j.batch)
		return j.writeFailed(epoch, err)
	}
	if epoch != j.epoch {
		clear(j.batch)
		return nil // the file was poisoned meanwhile; all is written again
	}
	for i := range j.batch {
		seq := j.batch[i].Seq
		p := j.pending.at(seq)
		p.sum, p.promisedBytes = j.sums[i], 0
		f.note(seq, j.offs[i])
	}
	j.written += block.Seq(len(j.batch))
	j.writtenSum = j.sums[len(j.batch)-1]
	f.last, f.pos, f.dirty = j.written, pos, true
	clear(j.batch)
	j.leave(f.sizeBytes - pos)
	j.b.mu.Lock()
	j.reserved = max(0, j.reserved-promised)
	j.b.space.wakeAll() // it took less than was promised
	j.b.mu.Unlock()
	return nil
}

// encodeBatch fills vecs with the records of batch, up to the file position end,
// and with zeroes up to the next block: a page that is written whole need not
// be read first. Owner of the write token only.
func (j *Journal) encodeBatch(f *file, prev uint32, durable block.Seq, end int64) {
	const h = format.JournalRecordHeaderBytes
	if cap(j.headers) < len(j.batch)*h {
		j.headers = make([]byte, max(len(j.batch), 64)*h)
	}
	j.headers = j.headers[:len(j.batch)*h]
	j.vecs, j.sums = j.vecs[:0], j.sums[:0]
	for i, w := range j.batch {
		r := format.JournalRecord{Prev: prev, Incarnation: f.incarnation, Seq: w.Seq, Time: w.Time,
			Volume: w.Volume, Kind: w.Kind, Extent: w.Extent, Durable: durable}
		header := j.headers[i*h : (i+1)*h]
		r.Put(header, w.Data)
		prev = r.Checksum
		j.sums = append(j.sums, prev)
		j.vecs = append(j.vecs, header)
		if len(w.Data) > 0 {
			j.vecs = append(j.vecs, w.Data)
			if odd := len(w.Data) % format.JournalAlignBytes; odd != 0 {
				j.vecs = append(j.vecs, zeroes[:format.JournalAlignBytes-odd])
			}
		}
	}
	if odd := end % format.JournalBlockBytes; odd != 0 {
		j.vecs = append(j.vecs, zeroes[:format.JournalBlockBytes-odd])
	}
}

// roll begins a new file for a record that takes up need bytes. Write token and
// lock are held; the lock is released during I/O.
func (j *Journal) roll(need int64) error {
	size := max(j.b.fileBytes, alignUp(format.JournalBlockBytes+need, format.JournalBlockBytes))
	h := format.JournalFile{Number: j.nextNumber, Oldest: max(j.oldestMarked, 1), First: j.written + 1, Prev: j.writtenSum,
		Durable: j.durable, Released: j.released, SizeBytes: size}
	j.nextNumber++
	epoch := j.epoch
	j.mu.Unlock()
	f, err := j.openFile(h)
	j.mu.Lock()
	if err != nil {
		return err
	}
	if epoch != j.epoch { // poisoned meanwhile: First no longer fits
		for _, c := range f.copies {
			j.doomed = append(j.doomed, doomed{slot: c.slot, f: c.f})
		}
		return nil
	}
	if j.current != nil {
		j.retire(j.current)
	}
	j.current = f
	j.files = append(j.files, f)
	j.b.mu.Lock()
	j.heldFiles++
	j.b.mu.Unlock()
	j.leave(f.sizeBytes - f.pos)
	j.b.wakeRun() // for a spare
	return nil
}

// retire ends the writing to f; under mu. If it is being synced, whoever does
// that closes it.
func (j *Journal) retire(f *file) {
	if !f.dirty && !j.syncing {
		f.closeCopies()
	}
}

// writeFailed handles the failure of all copies of the current file, or of the
// making of one. Under mu.
func (j *Journal) writeFailed(epoch uint64, err error) error {
	if isHold(err) {
		return err
	}
	if epoch == j.epoch {
		j.poison(err)
	}
	return j.err
}

// poison gives up all files with unsynced records: what is pending will be
// written to a fresh file, on whatever disk takes it. After retriesMax times in
// a row the journal has failed. Under mu.
func (j *Journal) poison(cause error) {
	j.epoch++
	j.retries++
	if j.retries > retriesMax {
		j.fail(fmt.Errorf("%w: no disk takes the journal any more: %w", ErrLost, cause))
		return
	}
	j.b.log.Warn("a journal file has failed; what is not durable is written to another", "group", j.group, "durable", j.durable, "err", cause)
	kept := j.files[:0]
	for _, f := range j.files {
		if f != j.current && !f.dirty && f.last <= j.durable {
			kept = append(kept, f)
			continue
		}
		until := j.written
		f.dirty = false
		f.cut(j.durable)
		for _, c := range f.copies {
			c.slot.poisoned = true
		}
		if f.last >= f.first {
			kept = append(kept, f)
			continue
		}
		for _, c := range f.copies {
			j.doomed = append(j.doomed, doomed{c.slot, c.f, until})
		}
		j.b.mu.Lock()
		j.heldFiles--
		j.b.mu.Unlock()
	}
	clear(j.files[len(kept):])
	j.files = kept
	j.current = nil
	j.written, j.writtenSum = j.durable, j.durableSum
	j.leave(0)
}

// Flush makes durable all that was enqueued before it was called. Callers that
// come while a sync is under way share the next one.
func (j *Journal) Flush(ctx context.Context) error { return j.flush(ctx, false) }

// flush with closing gives up instead of waiting for space.
func (j *Journal) flush(ctx context.Context, closing bool) error {
	waited := false
	j.mu.Lock()
	defer j.mu.Unlock()
	target := j.next
	if target > 0 {
		target--
	}
	for j.durable < target {
		if j.err != nil {
			return j.err
		}
		if j.syncing {
			w := j.syncWaiters.add(target)
			j.mu.Unlock()
			if err := j.syncWaiters.wait(ctx, &j.mu, w); err != nil {
				return err
			}
			continue
		}
		j.syncing = true
		err := j.syncOnce(ctx)
		j.syncing = false
		if isHold(err) {
			if closing {
				j.syncWaiters.wake(j.durable)
				return err
			}
			waited = true
			j.mu.Unlock()
			err = j.hold(ctx)
			j.mu.Lock()
			if err != nil {
				j.syncWaiters.wake(j.durable)
				return err
			}
			continue
		}
		j.syncWaiters.wake(j.durable)
		j.watchers.wakeReached(j.durable)
		if err != nil {
			return err
		}
		if waited {
			j.b.held()
			waited = false
		}
	}
	return nil
}

// syncOnce writes what is queued and makes durable what is written. It returns
// errHold only if nothing could be done. The caller holds the sync token and the
// lock, which is released during I/O.
func (j *Journal) syncOnce(ctx context.Context) error {
	// Take the write token and empty the queue: whatever is written when the
	// sync begins is covered by it.
	var held error
	for {
		if j.err != nil {
			return j.err
		}
		if j.writing {
			w := j.writeWaiters.add(everMore)
			j.mu.Unlock()
			if err := j.writeWaiters.wait(ctx, &j.mu, w); err != nil {
				return err
			}
			continue
		}
		if j.written+1 >= j.next {
			break
		}
		j.writing = true
		held = j.writeBatch()
		j.writing = false
		j.writeWaiters.wake(j.written)
		if held != nil {
			break
		}
	}
	if j.err != nil {
		return j.err
	}
	if j.written == j.durable {
		return held
	}
	// Nobody writes now. What comes next begins a new block, so that the bytes
	// of this sync are never written again.
	if f := j.current; f != nil {
		f.pos = min(alignUp(f.pos, format.JournalBlockBytes), f.sizeBytes)
	}
	epoch, covers := j.epoch, j.written
	coversSum := j.writtenSum
	dirty := j.dirty[:0]
	for _, f := range j.files {
		if f.dirty {
			f.dirty = false
			dirty = append(dirty, f)
		}
	}
	j.dirty = dirty
	j.mu.Unlock()
	err := j.syncFiles(dirty)
	j.mu.Lock()
	if epoch != j.epoch {
		return nil // a write has failed meanwhile; all is written and synced again
	}
	if err != nil {
		for _, f := range dirty {
			f.dirty = true // for poison to find, or to be synced again
		}
		if isHold(err) {
			clear(dirty)
			return err
		}
		j.poison(err)
		return j.err
	}
	j.retries = 0
	for _, f := range dirty {
		if f != j.current && !f.dirty {
			f.closeCopies()
		}
	}
	clear(dirty)
	for j.durable < covers {
		j.durable++
		j.unsyncedBytes -= format.JournalRecordBytes(int64(len(j.pending.at(j.durable).w.Data)))
		j.pending.pop()
	}
	j.durableSum = coversSum
	return nil
}

// syncFiles syncs all copies of the files, those on different disks at the same
// time, and gives up the copies whose sync fails. It fails if a file has none
// left, and with errHold if a disk could not be dropped for want of space on the
// others. The caller holds the sync token and not the lock.
func (j *Journal) syncFiles(files []*file) error {
	j.mu.Lock()
	jobs := j.syncs[:0]
	for _, f := range files {
		for _, c := range f.copies {
			s := syncJob{file: f, copy: c}
			if c.slot.poisoned { // it is not synced again
				s.err = errPoisoned
			}
			jobs = append(jobs, s)
		}
		if len(f.copies) == 0 {
			j.mu.Unlock()
			return errPoisoned
		}
	}
	j.syncs = jobs
	j.mu.Unlock()
	if len(jobs) == 1 && jobs[0].err == nil {
		jobs[0].err = jobs[0].copy.f.Sync()
	} else {
		syncByDisk(jobs)
	}
	var lost []error
	var held error
	for i := range jobs {
		if jobs[i].err == nil {
			continue
		}
		err := j.giveUpCopy(jobs[i].file, jobs[i].copy, jobs[i].err)
		if isHold(err) {
			held = err
		} else if err != nil {
			lost = append(lost, err)
		}
	}
	clear(jobs)
	if len(lost) == 0 {
		return held
	}
	return errors.Join(lost...)
}

// syncJob is one copy to be synced.
type syncJob struct {
	file *file
	copy *fileCopy
	err  error
	done bool
	job  *job
}

// syncByDisk syncs the copies on each disk one after the other, the disks at the
// same time. What has an error already is left out.
func syncByDisk(jobs []syncJob) {
	for {
		begun := false
		for k := range jobs {
			s := &jobs[k]
			if s.done || s.err != nil || slices.ContainsFunc(jobs[:k], func(o syncJob) bool { return o.job != nil && o.copy.slot.disk == s.copy.slot.disk }) {
				continue
			}
			s.done, begun = true, true
			s.job, s.err = s.copy.f.(*diskFile).beginSync()
		}
		if !begun {
			return
		}
		for k := range jobs {
			if s := &jobs[k]; s.job != nil {
				s.err = s.copy.slot.disk.await(s.job)
				s.job = nil
			}
		}
	}
}
