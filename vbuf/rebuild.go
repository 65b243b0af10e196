package vbuf

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"iter"
	"maps"
	"slices"

	"drc/internal/block"
	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/vfs"
)

// strip forgets the copies of shards on d, which is out of the set.
func (s *Spool) strip(d *disk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, batch := range s.batches {
		delete(batch.s.noted, d)
		s.charge(batch, d, 0)
		for i, on := range batch.s.copies {
			if k := slices.Index(on, d); k >= 0 {
				batch.s.copies[i] = slices.Concat(on[:k], on[k+1:])
				s.diskBytes -= batch.Shards[i].SizeBytes
				s.b.giveBack(d, batch.Shards[i].SizeBytes)
			}
		}
	}
}

// isOn reports whether a batch needs something on d.
func (s *Spool) isOn(d *disk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.batches, func(batch *Batch) bool {
		return slices.ContainsFunc(batch.s.copies, func(on []*disk) bool { return slices.Contains(on, d) })
	})
}

// aloneHolds reports whether a batch would be lost without d that is not lost yet.
func (s *Spool) aloneHolds(d *disk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	return slices.ContainsFunc(s.batches, func(batch *Batch) bool {
		return batch.s.persisted && !batch.s.lost && batch.isLost(d) && !batch.isLost(nil)
	})
}

// isLost reports whether, without d, some segment of the batch has fewer shards
// here and on its stores than its code needs, or its record is nowhere; under
// Spool.mu and Buffer.mu.
func (batch *Batch) isLost(d *disk) bool {
	if batch.s.persisted && !batch.Logged {
		there := false
		for c := range batch.s.charged {
			there = there || c != d && c.failed == nil
		}
		if !there {
			return true
		}
	}
	missing := map[block.SegmentID]int{}
	for i, sh := range batch.Shards {
		if sh.Placed || sh.Data != nil || slices.ContainsFunc(batch.s.copies[i], func(c *disk) bool { return c != d && c.failed == nil }) {
			continue
		}
		if missing[sh.Segment]++; missing[sh.Segment] > sh.Parity {
			return true
		}
	}
	return false
}

// Lost returns the batches of which too little is left: not all that they hold can
// be had from here and the stores. They stay until they are dropped.
func (s *Spool) Lost() []*Batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*Batch
	for _, batch := range s.batches {
		if batch.s.lost {
			list = append(list, batch)
		}
	}
	return list
}

// noteLost looks for batches that have become lost, and reports them once.
func (s *Spool) noteLost(cause error) {
	b := s.b
	var losses []Loss
	s.mu.Lock()
	b.mu.Lock()
	for _, batch := range s.batches {
		if batch.s.persisted && !batch.s.lost && batch.isLost(nil) {
			batch.s.lost = true
			losses = append(losses, Loss{Group: s.group, Range: Range{batch.From, batch.To}, Batch: batch, Cause: cause})
		}
	}
	j := b.journals[s.group]
	b.mu.Unlock()
	s.mu.Unlock()
	for i := range losses {
		losses[i].InJournal = j != nil && j.holds(losses[i].Range)
	}
	b.report(losses)
}

// errDisksLost is why shards are lost that no disk failed to read.
var errDisksLost = errors.New("the disks that held it are gone")

// What a batch lacks.
const (
	lacksNothing = iota
	lacksRecord  // on some disk
	lacksShards  // copies, on disks that stay
)

// lacks says what has to be done for a batch to be safe again; under Spool.mu.
func (s *Spool) lacks(batch *Batch) int {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if !batch.s.persisted || batch.s.dropped || batch.s.unknown {
		return lacksNothing
	}
	var usable []*disk
	for _, d := range s.b.disks {
		if d.usable() {
			usable = append(usable, d)
		}
	}
	if len(usable) == 0 {
		return lacksNothing
	}
	type count struct{ alone map[*disk]int }
	counts := map[block.SegmentID]*count{}
	for i, sh := range batch.Shards {
		if sh.Placed || batch.s.gone[i] {
			continue
		}
		on := batch.s.copies[i]
		if len(on) == 0 || slices.ContainsFunc(on, func(d *disk) bool { return !d.usable() }) {
			return lacksShards
		}
		c := counts[sh.Segment]
		if c == nil {
			c = &count{alone: map[*disk]int{}}
			counts[sh.Segment] = c
		}
		if len(on) == 1 {
			if c.alone[on[0]]++; c.alone[on[0]] > sh.Parity && len(usable) > 1 {
				return lacksShards
			}
		}
	}
	for _, d := range usable {
		if !batch.s.noted[d] {
			return lacksRecord
		}
	}
	return lacksNothing
}

// mend makes one batch safe again whose disks have changed.
func (s *Spool) mend(ctx context.Context) (did bool, err error) {
	s.noteLost(errDisksLost)
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	for _, batch := range s.Batches() {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		s.mu.Lock()
		what := s.lacks(batch)
		s.mu.Unlock()
		switch what {
		case lacksRecord:
			err := s.updateRecord(batch)
			if isNoSpace(err) {
				s.b.wanting.Store(true)
				continue
			}
			if errors.Is(err, ErrRecordLost) && !s.isRecordAwaited(batch) {
				s.loseRecord(batch, err)
				err = nil
			}
			return true, err
		case lacksShards:
			did, err := s.replace(batch)
			if errors.Is(err, ErrRecordLost) && !s.isRecordAwaited(batch) {
				s.loseRecord(batch, err)
				did, err = true, nil
			}
			if errors.Is(err, ErrFull) {
				s.b.wanting.Store(true)
				continue
			}
			if did || err != nil {
				return did, err
			}
		}
	}
	return false, nil
}

// replace brings the shards of a batch where they would be if it were persisted
// now: new files, durable; then the record that counts them; then the old files
// go. Under ioMu.
func (s *Spool) replace(batch *Batch) (did bool, err error) {
	b := s.b
	s.mu.Lock()
	wanted := make([]bool, len(batch.Shards))
	old := make([][]*disk, len(batch.Shards))
	for i, sh := range batch.Shards {
		old[i] = batch.s.copies[i]
		wanted[i] = !sh.Placed && !batch.s.gone[i]
	}
	s.mu.Unlock()
	plan, err := b.placement(batch.Shards, wanted, 0)
	if err != nil {
		return false, err
	}
	fresh := make([][]*disk, len(plan)) // what is to be written
	for i, on := range plan {
		for _, d := range on {
			if slices.Contains(old[i], d) {
				b.giveBack(d, batch.Shards[i].SizeBytes) // it has its room already
			} else {
				fresh[i] = append(fresh[i], d)
			}
		}
		if !wanted[i] {
			plan[i] = old[i]
		}
	}
	if slices.EqualFunc(plan, old, func(a, b []*disk) bool {
		return len(a) == len(b) && !slices.ContainsFunc(a, func(d *disk) bool { return !slices.Contains(b, d) })
	}) {
		return false, nil // it is as well as it can be
	}
	failed, err := s.writeFresh(batch, plan, fresh)
	if err == nil {
		failed, err = s.writeRecord(batch, plan)
	}
	if err != nil {
		s.removeShards(batch, fresh)
		if isNoSpace(err) {
			return false, fmt.Errorf("%w: %w", ErrFull, err)
		}
		if failed == nil {
			return false, err
		}
		return true, b.failDisk(failed, err)
	}
	gone := make([][]*disk, len(plan))
	s.mu.Lock()
	for i, on := range plan {
		for _, d := range old[i] {
			if !slices.Contains(on, d) && d.failed == nil {
				gone[i] = append(gone[i], d)
			}
		}
		s.diskBytes += batch.Shards[i].SizeBytes * int64(len(on)-len(batch.s.copies[i]))
		batch.s.copies[i] = on
	}
	s.mu.Unlock()
	s.removeShards(batch, gone)
	return true, nil
}

// writeFresh writes the shards that are not on their new disks yet and makes them
// durable with their names. What can be had neither from a file nor from the other
// shards is left out of the plan.
func (s *Spool) writeFresh(batch *Batch, plan, fresh [][]*disk) (*disk, error) {
	dirs := map[*disk]bool{}
	for i, on := range fresh {
		if len(on) == 0 {
			continue
		}
		sh := batch.Shards[i]
		data, err := s.ReadShard(sh.Segment, sh.Index)
		if errors.Is(err, ErrShardLost) {
			if s.isAwaited(batch, i) {
				return nil, err
			}
			s.b.log.Error("a shard in the buffer is lost", "segment", sh.Segment, "index", sh.Index, "err", err)
			for _, d := range on {
				s.b.giveBack(d, sh.SizeBytes)
			}
			fresh[i], plan[i] = nil, nil
			s.mu.Lock()
			batch.s.gone[i] = true
			s.diskBytes -= sh.SizeBytes * int64(len(batch.s.copies[i]))
			batch.s.copies[i] = nil
			s.mu.Unlock()
			continue
		} else if err != nil {
			return nil, err
		}
		for _, d := range on {
			if !dirs[d] {
				if err := s.makeDir(d); err != nil {
					return d, err
				}
				dirs[d] = true
			}
			if err := writeSynced(d.fs, s.shardName(d, sh.Segment, sh.Index), data); err != nil {
				return d, err
			}
		}
	}
	for _, d := range s.b.all() {
		if !dirs[d] {
			continue
		}
		if err := d.fs.SyncDir(s.dir(d)); err != nil {
			return d, err
		}
	}
	return nil, nil
}

// isAwaited reports whether a shard that cannot be read is on a disk that is worth
// another try: one that is drained, or has not failed movedMax times.
func (s *Spool) isAwaited(batch *Batch, i int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.areAwaited(slices.Values(batch.s.copies[i]))
}

// isRecordAwaited is isAwaited of the record of a batch.
func (s *Spool) isRecordAwaited(batch *Batch) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.areAwaited(maps.Keys(batch.s.charged))
}

// loseRecord gives up a batch whose record cannot be read: what its shards belong
// to cannot be told.
func (s *Spool) loseRecord(batch *Batch, cause error) {
	s.mu.Lock()
	batch.s.unknown = true
	for i := range batch.Shards {
		batch.s.gone[i] = true
		s.diskBytes -= batch.Shards[i].SizeBytes * int64(len(batch.s.copies[i]))
		for _, d := range batch.s.copies[i] {
			s.b.giveBack(d, batch.Shards[i].SizeBytes)
		}
		batch.s.copies[i] = nil
	}
	for _, d := range slices.Collect(maps.Keys(batch.s.charged)) {
		s.charge(batch, d, 0)
	}
	s.mu.Unlock()
	s.noteLost(cause)
}

func (b *Buffer) areAwaited(disks iter.Seq[*disk]) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for d := range disks {
		if d.failed == nil && (d.draining || d.suspect) {
			if d.moved++; d.draining || d.moved < movedMax {
				return true
			}
			d.moved = 0
		}
	}
	return false
}

// rebuild makes a shard of which no copy can be read from the other shards of its
// segment that are here or in others. It fails with ErrShardLost if there are too
// few.
func (s *Spool) rebuild(batch *Batch, i int, others map[int][]byte) ([]byte, error) {
	want := batch.Shards[i]
	if want.Parity == 0 {
		return nil, ErrShardLost
	}
	s.mu.Lock()
	e := batch.s.ends[i]
	s.mu.Unlock()
	total := 0
	// What the code covers of each.
	have := map[int][]byte{}
	add := func(index int, data []byte) {
		if int64(len(data)) == want.SizeBytes {
			have[index] = data[len(e.head) : len(data)-len(e.tail)]
		}
	}
	for index, data := range others {
		total = max(total, index+1)
		add(index, data)
	}
	for k, sh := range batch.Shards {
		if sh.Segment != want.Segment {
			continue
		}
		total = max(total, sh.Index+1)
		if k == i {
			continue
		}
		if data, err := s.readCopy(batch, k); err == nil {
			add(sh.Index, data)
		}
	}
	delete(have, want.Index)
	// Shards at the end that were on their stores before the batch was kept here
	// are not known here. The checksum tells whether the number is right.
	for n := total; n <= total+want.Parity; n++ {
		p := format.Profile{Data: n - want.Parity, Parity: want.Parity}
		if p.Data < 1 || len(have) < p.Data {
			continue
		}
		shards := make([][]byte, n)
		for k, data := range have {
			shards[k] = data
		}
		if erasure.Reconstruct(p, shards, false) != nil {
			continue
		}
		if data := slices.Concat(e.head, shards[want.Index], e.tail); crc32.Checksum(data, format.Castagnoli) == batch.s.sums[i] {
			return data, nil
		}
	}
	return nil, fmt.Errorf("%w: %d of the others can be had", ErrShardLost, len(have))
}

// readCopy returns a shard from memory or from whichever file has it right.
func (s *Spool) readCopy(batch *Batch, i int) ([]byte, error) {
	s.mu.Lock()
	sh := batch.Shards[i]
	sum := batch.s.sums[i]
	copies := slices.Clone(batch.s.copies[i])
	s.mu.Unlock()
	if sh.Data != nil {
		return sh.Data, nil
	}
	// Disks that are to go last: they are the ones that fail.
	slices.SortStableFunc(copies, func(x, y *disk) int {
		s.b.mu.Lock()
		defer s.b.mu.Unlock()
		switch {
		case x.usable() == y.usable():
			return 0
		case x.usable():
			return -1
		}
		return 1
	})
	errs := []error{fmt.Errorf("shard %d of segment %s: %w", sh.Index, sh.Segment, ErrShardLost)}
	for _, d := range copies {
		name := s.shardName(d, sh.Segment, sh.Index)
		data, err := vfs.ReadFile(d.fs, name, sh.SizeBytes)
		if err == nil && (int64(len(data)) != sh.SizeBytes || crc32.Checksum(data, format.Castagnoli) != sum) {
			err = format.Corrupt(name, "its checksum is wrong")
		}
		if err == nil {
			return data, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			s.b.log.Warn("a shard in the buffer cannot be read", "file", name, "err", err)
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}
