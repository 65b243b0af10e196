package vbuf

import (
	"context"
	"fmt"

	"drc/internal/format"
)

// Reserve waits until there is room for a write of payloadBytes, and for the
// memory it needs until it is durable. Each Enqueue uses up one Reserve of just
// its payload; what is not enqueued after all goes back with Unreserve. A full buffer is no
// error: the caller is held back, which Stats shows, until Release or Drop makes
// room or ctx ends. It fails with ErrTooLarge if waiting cannot help.
func (j *Journal) Reserve(ctx context.Context, payloadBytes int64) error {
	b, need := j.b, format.JournalRecordBytes(payloadBytes)
	if payloadBytes > format.MaxJournalPayloadBytes {
		return fmt.Errorf("%d bytes: %w", payloadBytes, ErrTooLarge)
	}
	b.mu.Lock()
	for waited := false; ; {
		if b.closed {
			b.mu.Unlock()
			return ErrClosed
		}
		if b.admits(j, need) {
			j.reserved += need
			if waited {
				b.waiting--
				b.space.wake(0) // there may be room for the next one too
			}
			b.mu.Unlock()
			break
		}
		if j.holdsNothing() && !b.couldHold(need) {
			if waited {
				b.waiting--
			}
			b.mu.Unlock()
			return fmt.Errorf("%d bytes: %w", payloadBytes, ErrTooLarge)
		}
		if !waited {
			waited = true
			b.waiting++
		}
		w := b.space.add(everMore)
		b.mu.Unlock()
		// What was released may not have been given back yet.
		did, err := b.reclaimAll()
		if did {
			b.roomChanged()
		}
		if err == nil {
			err = j.Err()
		}
		if err == nil {
			err = b.space.wait(ctx, &b.mu, w)
		} else {
			b.mu.Lock()
			b.space.leave(w)
		}
		if err != nil {
			b.waiting--
			b.mu.Unlock()
			return err
		}
	}
	for {
		j.mu.Lock()
		unsynced, err := j.unsyncedBytes, j.err
		j.mu.Unlock()
		if err == nil && (unsynced == 0 || unsynced+need <= b.opt.MaxUnsyncedBytes) {
			return nil
		}
		if err == nil {
			err = j.Flush(ctx)
		}
		if err != nil {
			j.Unreserve(payloadBytes)
			return err
		}
	}
}

// Unreserve gives back what Reserve took, if the write is not enqueued after
// all.
func (j *Journal) Unreserve(payloadBytes int64) {
	b := j.b
	b.mu.Lock()
	j.reserved = max(0, j.reserved-format.JournalRecordBytes(payloadBytes))
	b.space.wake(0)
	b.mu.Unlock()
}

// admits reports whether need more bytes may be promised to j. What its current
// file has left serves it alone; the rest comes from files that all journals
// share. Under mu.
func (b *Buffer) admits(j *Journal, need int64) bool {
	var fromShared int64
	for _, o := range b.journals {
		r := o.reserved
		if o == j {
			r += need
		}
		if r > o.leftBytes {
			fromShared += r - o.leftBytes
		}
	}
	return fromShared <= 0 || fromShared <= b.sharedBytes(false)
}

// couldHold reports whether an empty buffer would have room for need bytes.
// Under mu.
func (b *Buffer) couldHold(need int64) bool { return need <= b.sharedBytes(true) }

// sharedBytes is what records can take up in files that do not exist yet or are
// free; with empty, if no file was in use. Under mu.
func (b *Buffer) sharedBytes(empty bool) int64 {
	var sum, most, disks int64
	for _, d := range b.disks {
		n := d.slotsLeft(b.fileBytes)
		if empty && d.usable() {
			n = d.journalMaxBytes() / b.fileBytes
		}
		if d.usable() {
			disks++
		}
		sum, most = sum+n, max(most, n)
	}
	files := sum
	if disks > 1 { // every file is on two of them
		files = min(sum/2, sum-most)
	}
	return files * (b.fileBytes - format.JournalBlockBytes)
}

// holdsNothing reports whether no record of j takes up room. Under Buffer.mu.
func (j *Journal) holdsNothing() bool { return j.reserved == 0 && j.heldFiles == 0 }

// roomChanged tells who waits for room to look again.
func (b *Buffer) roomChanged() {
	b.mu.Lock()
	b.space.wakeAll()
	b.mu.Unlock()
}

// held is told, after some calls of hold, that what was held has found room.
func (b *Buffer) held() {
	b.mu.Lock()
	was := b.holding
	b.holding = false
	b.mu.Unlock()
	if was {
		b.log.Info("the buffer's file system has room again")
	}
}

// hold waits a while, or for room, because the file system below is full.
func (b *Buffer) hold(ctx context.Context) error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return ErrClosed
	}
	first := !b.holding
	b.holding = true
	b.waiting++
	w := b.space.add(everMore)
	b.mu.Unlock()
	if first {
		b.log.Warn("the buffer's file system is full: nothing is lost, and it goes on by itself when there is room; make room there, or bring the stores back")
	}
	timed, cancel := context.WithTimeout(ctx, b.opt.RetryEvery)
	defer cancel()
	_ = b.space.wait(timed, &b.mu, w)
	b.waiting--
	b.mu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}
