package vbuf

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// Scrubbing.
//
// In a long outage sealed batches lie here for days, and a disk can lose bytes of
// them without a word. Nobody would know before they are uploaded, when the other
// copy, or the parity, may have rotted too. So Run reads all files of shards now and
// then, slowly, and compares them with the sums in the batches' records.
//
// A copy that has rotted is written again, whole and by rename, from another copy,
// from the other shards of its segment here, or with those that are on stores. The
// same is done with a record. What cannot be made again for certain, because more
// shards of a segment are rotten or gone everywhere than its parity covers, is given
// up: first the record is written without the copies, durably, so that the next start
// knows; then their files are removed; then the loss is reported. A file that cannot
// be read just now is no proof of anything, and neither is a store out of reach: then
// all stays as it is and is tried again.

const (
	// scrubBytesPerSec is how fast batches are read, at most.
	scrubBytesPerSec = 4 << 20
	// scrubEvery is how long a batch is believed that was found right, or was
	// just written.
	scrubEvery = 6 * time.Hour
	// scrubRetry is how long it is after something rotten could not be mended.
	scrubRetry = 10 * time.Minute
	// scrubPause is how long Run waits before the first batch, and when none is due.
	scrubPause = time.Minute
)

// ScrubStats counts what scrubbing has found since the start.
type ScrubStats struct {
	CheckedBytes int64 // read and compared
	Rotten       int64 // copies of shards and records that were not what was written
	Mended       int64 // of these, written again
	Lost         int64 // shards that could not be made again from anywhere
}

// SetElsewhere names who can get other shards of a segment from elsewhere, whole and
// by index, for a shard that cannot be made again from what is here. It may take long,
// until ctx ends, and is called without locks.
func (s *Spool) SetElsewhere(others func(ctx context.Context, segment block.SegmentID, index int) (map[int][]byte, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.elsewhere = others
}

// runScrub is the part of Run that scrubs.
func (b *Buffer) runScrub(ctx context.Context) {
	pause := scrubPause
	t := time.NewTimer(pause)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-b.scrubNow:
		}
		n, err := b.Scrub(ctx, time.Now())
		if err != nil && ctx.Err() == nil {
			b.log.Warn("sealed batches in the buffer could not be checked or mended; tried again", "err", err)
		}
		if pause = time.Duration(n) * time.Second / scrubBytesPerSec; n == 0 {
			pause = scrubPause
		}
		t.Reset(pause)
	}
}

// Scrub checks, and mends, the batch that was not checked for longest, if one is due
// at the time now, and returns how many bytes it has read.
func (b *Buffer) Scrub(ctx context.Context, now time.Time) (readBytes int64, err error) {
	var due *Batch
	var of *Spool
	var at time.Time
	for _, s := range b.openSpools() {
		s.mu.Lock()
		for _, batch := range s.batches {
			if batch.s.persisted && !batch.s.unknown && !batch.s.scrubAt.After(now) && (due == nil || batch.s.scrubAt.Before(at)) {
				due, of, at = batch, s, batch.s.scrubAt
			}
		}
		s.mu.Unlock()
	}
	if due == nil || b.readOnly {
		return 0, nil
	}
	n, mended, err := of.scrub(ctx, due)
	next := scrubEvery
	if err != nil || !mended {
		next = scrubRetry
	}
	of.mu.Lock()
	due.s.scrubAt = now.Add(next)
	of.mu.Unlock()
	b.mu.Lock()
	b.scrubbed.CheckedBytes += n
	b.mu.Unlock()
	// Never 0, which says that nothing was due.
	return max(n, 1), err
}

// scrubSoon has a batch checked next, of which a shard could not be read: it is mended
// then, or found to be lost.
func (s *Spool) scrubSoon(batch *Batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if soon := time.Now(); batch.s.scrubAt.After(soon.Add(scrubRetry)) {
		batch.s.scrubAt = soon
		select {
		case s.b.scrubNow <- struct{}{}:
		default:
		}
	}
}

// scrub checks one batch. mended is false if something is left to be tried again.
func (s *Spool) scrub(ctx context.Context, batch *Batch) (n int64, mended bool, err error) {
	mended = true
	rotten := map[int][]*disk{}
	dead := map[block.SegmentID][]int{} // shards of which each copy is rotten, or there is none
	for i := range batch.Shards {       // not a copy of them: Placed may be changing the rest
		sh := &batch.Shards[i]
		if err := ctx.Err(); err != nil {
			return n, false, err
		}
		bad, left, read := s.rottenCopies(batch, i)
		n += read
		if len(bad) > 0 {
			rotten[i] = bad
		}
		if !left {
			dead[sh.Segment] = append(dead[sh.Segment], i)
		}
	}
	for i := range batch.Shards {
		sh, bad := &batch.Shards[i], rotten[i]
		if len(bad) == 0 {
			continue
		}
		s.count(func(c *ScrubStats) { c.Rotten += int64(len(bad)) })
		data, err := s.readAnywhere(ctx, sh.Segment, sh.Index)
		switch {
		case err == nil:
			err = s.mendCopies(batch, i, bad, data)
		case len(dead[sh.Segment]) > sh.Parity:
			continue // given up below, with the others
		}
		if err != nil {
			mended = false
			s.b.log.Warn("a shard in the buffer has rotted and cannot be made again now; tried again", "segment", sh.Segment, "index", sh.Index, "err", err)
		}
	}
	for segment, list := range dead {
		if len(list) > batch.Shards[list[0]].Parity {
			if err := s.giveUpRotten(batch, segment, list, rotten); err != nil {
				return n, false, err
			}
		}
	}
	if err := s.scrubRecord(batch); err != nil {
		return n, false, err
	}
	return n, mended, nil
}

// rottenCopies reads the copies of a shard. left is false if it is certain that none
// is any good and the shard is on no store: a copy that cannot be read may be.
func (s *Spool) rottenCopies(batch *Batch, i int) (bad []*disk, left bool, readBytes int64) {
	s.mu.Lock()
	sh, sum, on := batch.Shards[i], batch.s.sums[i], slices.Clone(batch.s.copies[i])
	s.mu.Unlock()
	left = sh.Placed || sh.Data != nil
	if sh.Placed {
		return nil, true, 0
	}
	for _, d := range on {
		if !s.b.isWritten(d) {
			left = true // it is seen to already
			continue
		}
		isRight := func() (bool, error) {
			data, err := vfs.ReadFile(d.fs, s.shardName(d, sh.Segment, sh.Index), sh.SizeBytes)
			readBytes += int64(len(data))
			if errors.Is(err, fs.ErrNotExist) {
				return false, d.isThere()
			}
			return err == nil && int64(len(data)) == sh.SizeBytes && crc32.Checksum(data, format.Castagnoli) == sum, err
		}
		right, err := isRight()
		if err == nil && !right {
			right, err = isRight() // once more: not by accident
		}
		if err != nil || right {
			left = true
			continue
		}
		bad = append(bad, d)
	}
	return bad, left, readBytes
}

// isWritten reports whether d takes writes.
func (b *Buffer) isWritten(d *disk) bool {
	return slices.Contains(b.writtenDisks(), d)
}

// readAnywhere is ReadShard, with the help of what is on stores if need be.
func (s *Spool) readAnywhere(ctx context.Context, segment block.SegmentID, index int) ([]byte, error) {
	data, err := s.ReadShard(segment, index)
	s.mu.Lock()
	elsewhere := s.elsewhere
	s.mu.Unlock()
	if err == nil || elsewhere == nil {
		return data, err
	}
	others, oerr := elsewhere(ctx, segment, index)
	if oerr != nil {
		return nil, errors.Join(err, oerr)
	}
	return s.Rebuild(segment, index, others)
}

// mendCopies writes a shard again where it has rotted.
func (s *Spool) mendCopies(batch *Batch, i int, bad []*disk, data []byte) error {
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	sh := &batch.Shards[i]
	for _, d := range bad {
		s.mu.Lock()
		wanted := !batch.s.dropped && !batch.Shards[i].Placed && slices.Contains(batch.s.copies[i], d)
		s.mu.Unlock()
		if !wanted {
			continue
		}
		name := s.shardName(d, sh.Segment, sh.Index)
		err := d.isThere()
		if err == nil {
			err = vfs.WriteFileAtomic(d.fs, name, data)
		}
		if isNoSpace(err) {
			return err
		}
		if err != nil {
			if ferr := s.b.failDisk(d, err); ferr != nil {
				return fmt.Errorf("write %s again: %w", name, err)
			}
			continue
		}
		s.count(func(c *ScrubStats) { c.Mended++ })
		s.b.log.Warn("a shard in the buffer had rotted and was made again; if this goes on the disk is failing: drc buffer drain", "file", name)
	}
	return nil
}

// giveUpRotten gives up the copies of shards of a segment that cannot be made again.
func (s *Spool) giveUpRotten(batch *Batch, segment block.SegmentID, list []int, rotten map[int][]*disk) error {
	s.ioMu.Lock()
	plan := make([][]*disk, len(batch.Shards))
	gone := make([][]*disk, len(batch.Shards))
	s.mu.Lock()
	missing := 0
	for _, i := range list {
		if !batch.Shards[i].Placed {
			missing++
		}
	}
	// It may have changed since it was read.
	if batch.s.dropped || missing <= batch.Shards[list[0]].Parity {
		s.mu.Unlock()
		s.ioMu.Unlock()
		return nil
	}
	for i := range plan {
		plan[i] = batch.s.copies[i]
		if batch.Shards[i].Segment != segment || !slices.Contains(list, i) {
			continue
		}
		left := slices.DeleteFunc(slices.Clone(plan[i]), func(d *disk) bool { return slices.Contains(rotten[i], d) })
		if len(left) < len(plan[i]) {
			gone[i] = slices.DeleteFunc(slices.Clone(plan[i]), func(d *disk) bool { return slices.Contains(left, d) })
			plan[i] = left
		}
	}
	s.mu.Unlock()
	if _, err := s.writeRecord(batch, plan); err != nil {
		s.ioMu.Unlock()
		return fmt.Errorf("note that shards of segment %s are lost: %w", segment, err)
	}
	lost := int64(0)
	s.mu.Lock()
	for i, disks := range gone {
		if len(disks) == 0 {
			continue
		}
		batch.s.copies[i] = plan[i]
		s.diskBytes -= batch.Shards[i].SizeBytes * int64(len(disks))
		if len(plan[i]) == 0 {
			batch.s.gone[i] = true
			lost++
		}
	}
	s.mu.Unlock()
	s.removeShards(batch, gone)
	s.ioMu.Unlock()
	if lost > 0 {
		s.count(func(c *ScrubStats) { c.Lost += lost })
		s.noteLost(fmt.Errorf("%d shards of segment %s have rotted on the buffer's disks, more than its parity covers", len(list), segment))
	}
	return nil
}

// scrubRecord writes the record of a batch again where it has rotted and another disk
// has it right.
func (s *Spool) scrubRecord(batch *Batch) error {
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	s.mu.Lock()
	if batch.s.dropped || batch.s.unknown {
		s.mu.Unlock()
		return nil
	}
	id, serial := batch.s.id, batch.s.serial
	var on []*disk
	for d, noted := range batch.s.noted {
		if noted {
			on = append(on, d)
		}
	}
	s.mu.Unlock()
	bad, good := 0, 0
	for _, d := range on {
		name := s.recordName(d, id)
		raw, err := vfs.ReadFile(d.fs, name, format.MaxSpoolFileBytes)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue // no proof of anything
		}
		var rec *format.SpooledBatch
		if err == nil {
			rec, err = format.DecodeSpooledBatch(name, raw)
		}
		if err != nil || rec.ID != id || rec.Serial != serial {
			bad++
		} else {
			good++
		}
	}
	if bad == 0 {
		return nil
	}
	s.count(func(c *ScrubStats) { c.Rotten += int64(bad) })
	s.mu.Lock()
	known := batch.Logged // then there is nothing in it that is not in memory
	s.mu.Unlock()
	if good == 0 && !known {
		s.b.log.Error("the record of a sealed batch has rotted on all disks of the buffer", "from", batch.From, "to", batch.To)
		return fmt.Errorf("seqs %s to %s: %w", batch.From, batch.To, ErrRecordLost)
	}
	if err := s.updateRecord(batch); err != nil {
		return err
	}
	s.count(func(c *ScrubStats) { c.Mended += int64(bad) })
	return nil
}

func (s *Spool) count(add func(*ScrubStats)) {
	s.b.mu.Lock()
	add(&s.b.scrubbed)
	s.b.mu.Unlock()
}
