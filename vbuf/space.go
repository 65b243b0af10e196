package vbuf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"drc/internal/block"
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
	if err := j.awaitRoom(ctx, need); err != nil {
		if errors.Is(err, ErrTooLarge) {
			return fmt.Errorf("%d bytes: %w", payloadBytes, err)
		}
		return err
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

// awaitRoom waits until there is room for a record of need bytes, and promises it.
func (j *Journal) awaitRoom(ctx context.Context, need int64) error {
	b, files := j.b, j.b.filesFor(need)
	b.mu.Lock()
	defer b.mu.Unlock()
	for waited := false; ; {
		switch {
		case b.closed:
			return ErrClosed
		case b.admits(j, need):
			j.reserved += b.roomFor(need)
			return nil
		case j.holdsNothing() && !b.couldHold(need):
			return ErrTooLarge
		case j.diverted != nil:
			return j.diverted
		}
		first := !waited
		if first {
			waited = true
			b.waiting++
			if files > 1 {
				b.waitingFiles[files]++
			}
			defer b.waitsNoMore(files)
		}
		w := b.space.add(everMore)
		b.mu.Unlock()
		if first {
			b.tellHeld(j.group)
			j.writeEnqueued()
		}
		// What was released may not have been given back yet.
		if did, _ := b.reclaimAll(); did { // Run tries again what fails
			b.roomChanged()
		}
		if err := j.Err(); err != nil {
			b.mu.Lock()
			b.space.leave(w)
			return err
		}
		if err := b.space.wait(ctx, &b.mu, w); err != nil {
			return err
		}
	}
}

// waitsNoMore takes one who waited for the place of so many files off the count. Under
// mu.
func (b *Buffer) waitsNoMore(files int64) {
	b.waiting--
	if files > 1 {
		if b.waitingFiles[files]--; b.waitingFiles[files] == 0 {
			delete(b.waitingFiles, files)
		}
	}
	b.space.wakeAll()
}

// writeEnqueued writes what is enqueued and has room: what it takes is counted
// exactly then.
func (j *Journal) writeEnqueued() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for !j.writing && j.written+1 < j.next && j.err == nil {
		j.writing = true
		err := j.writeBatch()
		j.writing = false
		j.writeWaiters.wake(j.written)
		if err != nil {
			return // who waits for the records tries again
		}
	}
}

// Divert has everybody who waits for room for the journal, and who would have to
// from now on, fail with err instead; nil lifts it. What is enqueued stays in the
// queue, and what there is room for is written all the same.
func (j *Journal) Divert(err error) {
	j.b.mu.Lock()
	j.diverted = err
	j.b.space.wakeAll()
	j.b.mu.Unlock()
}

func (b *Buffer) tellHeld(g block.GroupID) {
	if b.opt.Held != nil {
		b.opt.Held(g)
	}
}

// Unreserve gives back what Reserve took, if the write is not enqueued after
// all.
func (j *Journal) Unreserve(payloadBytes int64) {
	b := j.b
	b.mu.Lock()
	j.reserved = max(0, j.reserved-b.roomFor(format.JournalRecordBytes(payloadBytes)))
	b.space.wakeAll()
	b.mu.Unlock()
}

// The quota holds only if what is promised finds room however it comes to be
// written: each record may be synced alone, and then takes up whole blocks; and
// what a file has left is lost if the next record does not fit. So promises are
// counted at the worst that a record can take, and what they have taken is counted
// exactly once it is written.
//
// The worst of a record that is small beside a file are its blocks; what it loses of
// a file is taken off the files instead, see smallPart. A larger one may lose as much
// as it has. One that needs a file of its own, which is larger than the others and so
// in the place of several of one disk, is promised room only while nothing else is.

// smallPart is which part of a file a record may take up, in whole blocks, to count
// as small: so much of each file may be lost at its end.
const smallPart = 8

// allRoom is more than any buffer has.
const allRoom = 1 << 56

// roomFor is the worst that a record of need bytes takes of the room for records.
func (b *Buffer) roomFor(need int64) int64 {
	blocks := alignUp(need, format.JournalBlockBytes)
	switch {
	case b.filesFor(need) > 1:
		return allRoom
	case blocks > b.usableBytes()/smallPart:
		return 2 * blocks
	default:
		return blocks
	}
}

// filesFor is in the place of how many files a record of need bytes is that begins
// one.
func (b *Buffer) filesFor(need int64) int64 {
	return (alignUp(need, format.JournalBlockBytes) + format.JournalBlockBytes + b.fileBytes - 1) / b.fileBytes
}

// usableBytes is what a file has for records.
func (b *Buffer) usableBytes() int64 { return b.fileBytes - format.JournalBlockBytes }

// admits reports whether room for a record of need bytes may be promised to j. What
// its current file has left serves it alone; the rest comes from files that all
// journals share. Under mu.
func (b *Buffer) admits(j *Journal, need int64) bool {
	lost := b.usableBytes() / smallPart
	var fromShared, promised int64
	for _, o := range b.journals {
		promised += o.reserved
		r := o.reserved
		if o == j {
			r += b.roomFor(need)
		}
		if r > o.leftBytes {
			fromShared += r - max(0, o.leftBytes-lost)
		}
	}
	if promised == 0 && alignUp(need, format.JournalBlockBytes) <= j.leftBytes {
		return true
	}
	if fromShared <= 0 && len(b.waitingFiles) == 0 {
		return true
	}
	files := b.filesFor(need)
	sum, large := b.sharedFiles(false)
	if files > 1 {
		return promised == 0 && files <= large
	}
	for f := range b.waitingFiles {
		if f <= large {
			return false // that one waits for what is promised only, and would for ever
		}
	}
	if promised == 0 { // what one record takes is known
		return files <= sum
	}
	return fromShared <= 0 || fromShared <= sum*(b.usableBytes()-lost)
}

// couldHold reports whether an empty buffer would have room for a record of need
// bytes. Under mu.
func (b *Buffer) couldHold(need int64) bool {
	sum, large := b.sharedFiles(true)
	if files := b.filesFor(need); files > 1 {
		return files <= large
	}
	return sum > 0
}

// sharedFiles is how many files of records there may be that do not exist yet or
// are free, and in the place of how many of them one large file may be; with empty,
// if no file was in use. Under mu.
func (b *Buffer) sharedFiles(empty bool) (sum, large int64) {
	slots := func(d *disk) int64 {
		if empty && d.usable() {
			return d.journalMaxBytes() / b.fileBytes
		}
		return d.slotsLeft(b.fileBytes)
	}
	var places []place
	for _, d := range b.disks {
		if d.usable() {
			places = b.addTo(places, d, slots(d))
		}
	}
	if len(places) < 2 {
		for _, p := range places {
			return p.sum, p.most
		}
		return 0, 0
	}
	// Every file is in two places.
	slices.SortFunc(places, func(p, q place) int { return cmp.Compare(q.most, p.most) })
	large = places[1].most
	most := int64(0)
	for _, p := range places {
		sum, most = sum+p.sum, max(most, p.sum)
	}
	return min(sum/2, sum-most), large
}

// place is where one copy of a file can be, apart from the other: the disks on one
// device; or one disk, if all of them are on one device.
type place struct {
	key  string
	sum  int64 // files that all its disks have room for
	most int64 // files that one of them has
}

// addTo counts a disk with so many slots to its place.
func (b *Buffer) addTo(places []place, d *disk, slots int64) []place {
	key := b.placeOf(d)
	i := slices.IndexFunc(places, func(p place) bool { return p.key == key })
	if i < 0 {
		places, i = append(places, place{key: key}), len(places)
	}
	places[i].sum += slots
	places[i].most = max(places[i].most, slots)
	return places
}

// placeOf is the place that a usable disk belongs to.
func (b *Buffer) placeOf(d *disk) string {
	for _, o := range b.disks {
		if o.usable() && o.device != d.device {
			return d.device
		}
	}
	return d.path
}

// leave notes what the current file has left, in whole blocks. Under mu of the
// journal.
func (j *Journal) leave(bytes int64) {
	j.b.mu.Lock()
	j.leftBytes = bytes - bytes%format.JournalBlockBytes
	j.b.mu.Unlock()
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
func (j *Journal) hold(ctx context.Context) error {
	b := j.b
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return ErrClosed
	}
	if err := j.diverted; err != nil {
		b.mu.Unlock()
		return err
	}
	first := !b.holding
	b.holding = true
	b.waiting++
	w := b.space.add(everMore)
	b.mu.Unlock()
	b.tellHeld(j.group)
	if first {
		b.log.Warn("the buffer's file system is full: nothing is lost, and it goes on by itself when there is room; make room there; once the volumes are served, stores that are back make room, too")
	}
	timed, cancel := context.WithTimeout(ctx, b.opt.RetryEvery)
	defer cancel()
	_ = b.space.wait(timed, &b.mu, w)
	b.waiting--
	b.mu.Unlock()
	b.takeOutFull()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}
