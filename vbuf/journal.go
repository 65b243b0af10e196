package vbuf

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// Journal is the ordered durable log of the writes of one group. All methods
// may be called from many goroutines at once, but Enqueue must be called in the
// order of Seq.
//
// Positions: released <= durable <= written < next at all times, and the writes
// behind durable are in pending, in order, without holes.
//
// Two tokens order the I/O: who holds writing appends to files, who holds
// syncing syncs them. Both are taken by whichever caller comes first and finds
// work to do, so that a single writer never waits for another goroutine.
type Journal struct {
	b     *Buffer
	group block.GroupID

	mu      sync.Mutex
	files   []*file // in order; not one that holds nothing needed, but the current
	current *file   // takes records; nil: the next write begins one
	doomed  []doomed
	damaged []Range

	next       block.Seq // number of the next record; 0: not known yet
	written    block.Seq
	writtenSum uint32 // checksum of record written
	durable    block.Seq
	durableSum uint32
	released   block.Seq
	first      block.Seq // of the records that are there; 0 if there are none

	pending       queue
	unsyncedBytes int64

	writing bool
	syncing bool
	epoch   uint64 // counts poisonings: what began in an earlier epoch does not count
	retries int    // poisonings since the last success
	err     error

	writeWaiters waiters
	syncWaiters  waiters
	watchers     waiters // of durable

	nextNumber   uint64 // of the next file
	oldestMarked uint64 // files below are free by a durable mark
	markTries    int    // in a row that no disk took a mark
	markMu       sync.Mutex
	mark         format.JournalMark // the last one written; guarded by markMu
	markSlots    map[*disk]int      // where the next one goes, see mark.go; guarded by markMu

	hint readHint

	// Guarded by Buffer.mu.
	reserved  int64 // promised by Reserve and not in a file yet
	leftBytes int64 // in the current file
	heldFiles int   // files in use
	diverted  error // what who waits for room gets instead

	// Owned by the holder of the write token.
	batch   []block.Write
	sums    []uint32
	offs    []int64
	headers []byte
	vecs    [][]byte

	writeErrs []error

	// Owned by the holder of the sync token.
	dirty []*file
	syncs []syncJob
}

// doomed is a journal file on one disk that can be removed once until is
// durable elsewhere.
type doomed struct {
	slot  *slot
	f     vfs.File // if it is open
	until block.Seq
}

// Group is the group whose journal this is.
func (j *Journal) Group() block.GroupID { return j.group }

// First is the number of the first record that is there and not released, Last
// that of the last one that is enqueued; both are 0 if there is none.
func (j *Journal) First() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.next == 0 || j.released+1 >= j.next {
		return 0
	}
	return max(j.first, j.released+1)
}

// Last: see First. Of a journal whose records are all released it is 0 as well;
// Next still tells where it goes on.
func (j *Journal) Last() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.next == 0 || j.released+1 >= j.next {
		return 0
	}
	return j.next - 1
}

// Next is the number that the next record must have, 0 if that is not known:
// then SetNext comes before Enqueue.
func (j *Journal) Next() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.next
}

// SetNext says, durably, which number the first record of an empty journal will
// have: a journal of which Next is 0 later is not this one. It fails if there are
// records that are not released.
func (j *Journal) SetNext(next block.Seq) error {
	j.mu.Lock()
	have, released := j.next, j.released
	j.mu.Unlock()
	switch {
	case next == 0:
		return errors.New("a journal cannot begin at 0")
	case next == have:
		return nil
	case have != 0 && released+1 < have:
		return fmt.Errorf("the journal holds records %d to %d: reset it to begin at %d", released+1, have-1, next)
	case next < have:
		return fmt.Errorf("the journal was at %d already: reset it to begin at %d", have-1, next)
	}
	return j.reset(next)
}

// restart makes the journal begin at next, with nothing before; under mu.
func (j *Journal) restart(next block.Seq) {
	j.next, j.first = next, 0
	j.released, j.durable, j.written = next-1, next-1, next-1
	j.durableSum, j.writtenSum = 0, 0
	j.pending.reset(next)
	j.unsyncedBytes = 0
	j.damaged = nil
	j.epoch++
}

// Damaged is what recovery found lost; see JournalDamaged.
func (j *Journal) Damaged() []Range {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]Range(nil), j.damaged...)
}

// Err is non-nil once the journal can take no more writes because every disk has
// failed: an ErrLost. What was not durable then is still in memory, see Unsynced.
func (j *Journal) Err() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.err
}

// Durable is the last record that survives a power cut.
func (j *Journal) Durable() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.durable
}

// WaitDurable waits until Durable is at or behind seq. It makes nothing durable
// itself.
func (j *Journal) WaitDurable(ctx context.Context, seq block.Seq) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.durable < seq {
		if j.err != nil {
			return j.err
		}
		w := j.watchers.add(seq)
		j.mu.Unlock()
		if err := j.watchers.wait(ctx, &j.mu, w); err != nil { // takes the lock
			return err
		}
	}
	return nil
}

// UnsyncedBytes is what is enqueued and not durable.
func (j *Journal) UnsyncedBytes() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.unsyncedBytes
}

// Unsynced calls visit for the writes that are enqueued and not durable, in
// order: after Err the only copy of them that is left. Data is the caller's of
// Enqueue.
func (j *Journal) Unsynced(visit func(block.Write) error) error {
	j.mu.Lock()
	var list []block.Write
	for seq := j.durable + 1; seq < j.next; seq++ {
		list = append(list, j.pending.at(seq).w)
	}
	j.mu.Unlock()
	for _, w := range list {
		if err := visit(w); err != nil {
			return err
		}
	}
	return nil
}

// Enqueue appends w to what is to be written. It does no I/O and never waits;
// w.Data must stay unchanged until w is durable. Numbers out of order or a write
// that is no valid one are a bug of the caller.
func (j *Journal) Enqueue(w block.Write) {
	switch {
	case w.Kind == block.KindData && int64(len(w.Data)) == w.Extent.Len && w.Extent.Len <= format.MaxJournalPayloadBytes:
	case w.Kind == block.KindZero && len(w.Data) == 0:
	default:
		panic(fmt.Sprintf("vbuf: write %d is not valid: %v of %v with %d bytes", w.Seq, w.Kind, w.Extent, len(w.Data)))
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if w.Seq == 0 || w.Seq != j.next {
		panic(fmt.Sprintf("vbuf: write %d is enqueued where %d is due", w.Seq, j.next))
	}
	j.next++
	if j.first == 0 {
		j.first = w.Seq
	}
	j.pending.push(w)
	j.pending.at(w.Seq).promisedBytes = j.b.roomFor(format.JournalRecordBytes(int64(len(w.Data))))
	before := j.unsyncedBytes
	j.unsyncedBytes += format.JournalRecordBytes(int64(len(w.Data)))
	if half := j.b.opt.MaxUnsyncedBytes / 2; before <= half && j.unsyncedBytes > half {
		j.b.wakeRun()
	}
}

// fail makes err the end of the journal; under mu.
func (j *Journal) fail(err error) {
	if j.err == nil {
		j.err = err
		j.b.log.Error("the journal can take no more writes", "group", j.group, "durable", j.durable, "err", err)
	}
	j.writeWaiters.wakeAll()
	j.syncWaiters.wakeAll()
	j.watchers.wakeAll()
	j.b.roomChanged() // who waits for room finds it out
}

// close makes all durable, notes it and closes the files. What a diverted journal
// has not written is not waited for: it is elsewhere.
func (j *Journal) close() error {
	j.b.mu.Lock()
	diverted := j.diverted != nil
	j.b.mu.Unlock()
	j.mu.Lock()
	failed := j.err
	idle := j.written == j.durable && j.next == j.written+1
	begun := j.next > 0 // else a mark would say where it is
	j.mu.Unlock()
	var err error
	if failed == nil && !idle {
		if err = j.flush(context.Background(), true); diverted {
			err = nil
		}
	}
	if err == nil && failed == nil {
		if _, err = j.reclaim(); err == nil && begun {
			err = j.writeMark()
		}
		if isNoSpace(err) || isHold(err) {
			// All is durable. The next open finds its end as after a death.
			j.b.log.Warn("where the journal ends could not be noted, as the file system of the buffer is full: the next start looks for it", "group", j.group, "err", err)
			err = nil
		}
	}
	if diverted && (isNoSpace(err) || isHold(err)) {
		err = nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, f := range j.files {
		f.closeCopies()
	}
	for _, d := range j.doomed {
		if d.f != nil {
			_ = d.f.Close()
		}
	}
	j.doomed = nil
	if j.err == nil {
		j.err = ErrClosed
	}
	j.fail(j.err)
	return err
}

func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func isHold(err error) bool { return errors.Is(err, errHold) }
