package vbuf

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"drc/internal/block"
	"drc/internal/format"
)

// recoverMode says what to do about lost records.
type recoverMode int

const (
	recoverStrict  recoverMode = iota // fail with a *DamageError, and change nothing
	recoverDamaged                    // go on around them
	recoverNothing                    // do not even look
)

// oldFile is one use of a journal file as recovery finds it: the copies of it,
// and what is in them together.
type oldFile struct {
	header *format.JournalFile
	slots  []*slot
	wins   []*window
	bad    []bool // per copy: something that another copy has is wrong in it

	first   block.Seq // of the records that count; behind header.First if the beginning is lost
	start   int64     // where that is
	startBy uint32    // what it chains to
	last    block.Seq
	lastSum uint32
	end     int64 // behind the last record
	index   []indexEntry
	durable block.Seq // the highest durable mark in the file, behind a break too
	beyond  []resume  // records behind a break
}

// resume is a place behind a break where records go on.
type resume struct {
	seq  block.Seq
	off  int64
	prev uint32
}

// recoverJournal opens the journal of g. See docs/FORMAT-BUFFER.md, "Recovery",
// for the rules. The caller holds openMu.
func (b *Buffer) recoverJournal(ctx context.Context, g block.GroupID, mode recoverMode) (*Journal, error) {
	j := &Journal{b: b, group: g, nextNumber: 1}
	marked, uneven, err := j.readMarks()
	b.mu.Lock()
	found := b.found[g]
	b.mu.Unlock()
	if err != nil {
		// The headers of the files know enough, if there are any: too low a
		// mark makes recovery miss files, never take too few for all.
		if mode == recoverStrict && len(found) == 0 {
			return nil, err
		}
		b.log.Warn("the mark of a journal is damaged", "group", g, "err", err)
	}
	oldest := max(j.mark.Oldest, 1)
	j.oldestMarked = oldest
	files, free := groupFiles(found, oldest)
	for _, f := range found {
		j.nextNumber = max(j.nextNumber, f.header.Number+1)
	}
	j.nextNumber = max(j.nextNumber, oldest)
	if mode == recoverNothing {
		for _, f := range found {
			j.doomed = append(j.doomed, doomed{slot: f.slot})
		}
		b.adopt(j)
		return j, nil
	}
	r := &recovery{j: j, mode: mode, files: files, released: j.mark.Released, durableSeen: j.mark.Durable}
	defer r.close()
	if err := r.scan(ctx); err != nil {
		return nil, err
	}
	r.link()
	if len(r.damaged) > 0 {
		if mode == recoverStrict {
			return nil, &DamageError{g, r.damaged}
		}
		b.log.Error("a journal is opened in spite of lost records", "group", g, "lost", fmt.Sprint(r.damaged))
	}
	// From here on things change.
	if marked || len(files) > 0 {
		if err := r.apply(marked); err != nil {
			return nil, err
		}
	}
	if b.readOnly {
		b.adopt(j)
		return j, nil
	}
	for _, s := range free {
		b.recycle(s)
	}
	b.adopt(j)
	j.keepMarks()
	if err := j.flush(ctx, false); err != nil {
		b.mu.Lock()
		delete(b.journals, g)
		b.mu.Unlock()
		return nil, fmt.Errorf("make the tail of the journal of group %s durable: %w", g, err)
	}
	// Without room for a mark the older ones stand, which only makes the next
	// recovery read more.
	if _, err := j.reclaim(); err != nil && !isHold(err) {
		return nil, err
	}
	if uneven {
		j.markMu.Lock()
		j.mark.Oldest = 0 // write it whatever it says
		j.markMu.Unlock()
		if err := j.writeMark(); err != nil && !isHold(err) {
			return nil, err
		}
	}
	return j, nil
}

// adopt makes j known.
func (b *Buffer) adopt(j *Journal) {
	b.mu.Lock()
	delete(b.found, j.group)
	b.journals[j.group] = j
	b.mu.Unlock()
	b.mendSoon()
}

// groupFiles puts the copies of each use together, in order, and sorts out those
// that hold nothing needed.
func groupFiles(found []foundFile, oldest uint64) (files []*oldFile, free []*slot) {
	for _, f := range found {
		oldest = max(oldest, f.header.Oldest)
	}
	for _, f := range found {
		if f.header.Number < oldest {
			free = append(free, f.slot)
			continue
		}
		i := slices.IndexFunc(files, func(o *oldFile) bool { return *o.header == *f.header })
		if i < 0 {
			files = append(files, &oldFile{header: f.header})
			i = len(files) - 1
		}
		files[i].slots = append(files[i].slots, f.slot)
	}
	sort.SliceStable(files, func(a, b int) bool { return files[a].header.Number < files[b].header.Number })
	return files, free
}

// recovery works out what a journal holds.
type recovery struct {
	j           *Journal
	mode        recoverMode
	files       []*oldFile
	released    block.Seq
	durableSeen block.Seq  // the highest mark seen anywhere
	chain       []*oldFile // what counts, in order
	damaged     []Range
}

func (r *recovery) close() {
	for _, f := range r.files {
		for _, w := range f.wins {
			if w != nil {
				w.close()
			}
		}
	}
}

// scan reads all files.
func (r *recovery) scan(ctx context.Context) error {
	for _, f := range r.files {
		r.released = max(r.released, f.header.Released)
		r.durableSeen = max(r.durableSeen, f.header.Durable)
	}
	for _, f := range r.files {
		if err := ctx.Err(); err != nil {
			return err
		}
		f.bad = make([]bool, len(f.slots))
		var failed error
		for i, s := range f.slots {
			w, err := r.j.b.openWindow(s)
			if err != nil {
				failed = fmt.Errorf("read journal file %s: %w", s.name, err)
				f.bad[i] = true
			}
			f.wins = append(f.wins, w)
		}
		f.scan()
		readable := false
		for i, w := range f.wins {
			if w != nil && w.err != nil {
				failed = fmt.Errorf("read journal file %s: %w", f.slots[i].name, w.err)
			}
			readable = readable || w != nil && w.err == nil
		}
		switch {
		case failed == nil:
		case !readable && r.mode == recoverStrict:
			// What cannot be read must not be taken for the end.
			return failed
		default:
			r.j.b.log.Warn("a copy of the journal cannot be read", "err", failed)
		}
		r.durableSeen = max(r.durableSeen, f.durable)
	}
	return nil
}

// scan follows the chain of a file and looks at what is behind its end.
func (f *oldFile) scan() {
	f.first, f.start, f.startBy = f.header.First, format.JournalBlockBytes, f.header.Checksum()
	_ = f.follow(everMore, nil) // without a visitor it cannot fail
	f.lookBeyond()
}

// follow walks from start as long as records chain, up to stop, and sets last,
// lastSum, end and index. With visit it shows each record and which copies have
// it right.
func (f *oldFile) follow(stop block.Seq, visit func(off int64, raw []byte, r format.JournalRecord, right []bool) error) error {
	f.last, f.end, f.index = f.first-1, f.start, nil
	f.lastSum = f.startBy
	if f.first == f.header.First {
		f.lastSum = f.header.Prev
	}
	prev := f.startBy
	right := make([]bool, len(f.wins))
	for seq := f.first; seq <= stop; seq++ {
		rec, raw, off, ok := f.find(f.end, seq, prev, right)
		if !ok {
			return nil
		}
		for i, ok := range right {
			f.bad[i] = f.bad[i] || !ok
		}
		if visit != nil {
			if err := visit(off, raw, rec, right); err != nil {
				return err
			}
		}
		f.durable = max(f.durable, rec.Durable)
		f.last, f.lastSum, f.end = seq, rec.Checksum, off+rec.SizeBytes()
		if n := len(f.index); n == 0 || off-f.index[n-1].off >= indexEveryBytes {
			f.index = append(f.index, indexEntry{seq, off})
		}
		prev = rec.Checksum
	}
	return nil
}

// find returns the record seq that chains to prev, at off or at the next block,
// from whatever copy has it, and notes in right which copies do.
func (f *oldFile) find(off int64, seq block.Seq, prev uint32, right []bool) (rec format.JournalRecord, raw []byte, at int64, ok bool) {
	for i, place := range [2]int64{off, alignUp(off, format.JournalBlockBytes)} {
		if i == 1 && place == off {
			break
		}
		for k, w := range f.wins {
			right[k] = false
			if w == nil {
				continue
			}
			r, bytes, good := w.record(place, f.header.Incarnation)
			if !good || r.Seq != seq || r.Prev != prev {
				continue
			}
			right[k] = true
			if !ok {
				rec, raw, at, ok = r, bytes, place, true
			}
		}
		if ok {
			return rec, raw, at, true
		}
	}
	return rec, nil, 0, false
}

// lookBeyond looks for records behind the end of the chain: their marks tell
// whether the end is where writing ended or where something was lost.
func (f *oldFile) lookBeyond() {
	limit := int64(0)
	for _, w := range f.wins {
		if w != nil {
			limit = max(limit, w.size)
		}
	}
	for off := alignUp(f.end, format.JournalAlignBytes); off < limit; {
		var step int64
		for _, w := range f.wins {
			if w == nil {
				continue
			}
			if r, _, ok := w.record(off, f.header.Incarnation); ok {
				f.durable = max(f.durable, r.Durable)
				f.beyond = append(f.beyond, resume{r.Seq, off, r.Prev})
				step = r.SizeBytes()
				break
			}
		}
		off += max(step, format.JournalAlignBytes)
	}
}

// sumOf is the checksum of record seq, which f has or begins behind.
func (f *oldFile) sumOf(seq block.Seq) uint32 {
	switch seq {
	case f.last:
		return f.lastSum
	case f.header.First - 1:
		return f.header.Prev
	}
	saved := *f
	_ = f.follow(seq, nil)
	sum := f.lastSum
	f.last, f.lastSum, f.end, f.index = saved.last, saved.lastSum, saved.end, saved.index
	return sum
}

// link puts the files into a chain without holes; where durable records are
// missing it notes damage and goes on behind.
func (r *recovery) link() {
	rest := r.files
	for {
		due := r.released + 1 // the next record that is wanted
		if n := len(r.chain); n > 0 {
			due = max(due, r.chain[n-1].last+1)
		}
		if i := r.fitting(rest); i >= 0 {
			r.append(rest[i])
			rest = rest[i+1:]
			continue
		}
		if due > r.durableSeen {
			return // the end: whatever else there is was never durable
		}
		// Something durable is missing. Go on in the same file, if records of it
		// were durable in this use, or with the next file.
		var next *oldFile
		if n := len(r.chain); n > 0 {
			next = r.chain[n-1].resumed(due, r.chain[n-1].durable)
		}
		for next == nil && len(rest) > 0 {
			if f := rest[0]; f.last >= due && f.last >= f.first {
				next = f
			} else if f.last < f.first {
				next = f.resumed(due, f.durable)
			}
			rest = rest[1:]
		}
		if n := len(r.chain); next == nil && n > 0 {
			// No later file has it: what was flushed last is durable by no mark that
			// can be seen.
			next = r.chain[n-1].resumed(due, everMore)
		}
		if next == nil {
			r.lost(due, r.durableSeen)
			return
		}
		if next.first > due {
			r.lost(due, next.first-1)
		}
		r.chain = append(r.chain, next)
	}
}

// lost notes that records are gone.
func (r *recovery) lost(from, to block.Seq) {
	if from = max(from, r.released+1); from <= to {
		r.damaged = append(r.damaged, Range{from, to})
	}
}

// fitting returns the first of the files that goes on where the chain ends, or
// replaces the end of it by as much or more; -1 if none does.
func (r *recovery) fitting(rest []*oldFile) int {
	for i, f := range rest {
		if len(r.chain) == 0 {
			if f.first <= r.released+1 {
				return i
			}
			continue
		}
		end := r.chain[len(r.chain)-1]
		if f.first > end.last+1 || f.last < end.last {
			continue
		}
		if sum, ok := r.sumOf(f.first - 1); ok && sum == f.header.Prev {
			return i
		}
	}
	return -1
}

// sumOf is the checksum of a record of the chain.
func (r *recovery) sumOf(seq block.Seq) (uint32, bool) {
	for i := len(r.chain) - 1; i >= 0; i-- {
		f := r.chain[i]
		if f.first <= seq+1 && seq <= f.last {
			if f.first == seq+1 && i > 0 && r.chain[i-1].last == seq {
				continue // the record itself is in the file before
			}
			return f.sumOf(seq), true
		}
	}
	return 0, false
}

// append makes f the end of the chain, in place of what overlaps it.
func (r *recovery) append(f *oldFile) {
	r.cut(f.first - 1)
	r.chain = append(r.chain, f)
}

// cut takes the records behind last out of the chain.
func (r *recovery) cut(last block.Seq) {
	for n := len(r.chain); n > 0; n = len(r.chain) {
		f := r.chain[n-1]
		if f.last <= last {
			return
		}
		if f.first > last {
			r.chain = r.chain[:n-1]
			continue
		}
		_ = f.follow(last, nil)
		return
	}
}

// resumed is the rest of f from the first record from due to limit on, as a file
// of its own, or nil. While there are later files the limit is what was durable in
// this use: what was not may have been written anew elsewhere, with the same
// numbers.
func (f *oldFile) resumed(due, limit block.Seq) *oldFile {
	for _, at := range f.beyond {
		if at.seq < due || at.seq > limit {
			continue
		}
		c := *f
		c.first, c.start, c.startBy = at.seq, at.off, at.prev
		c.beyond = nil
		for _, o := range f.beyond {
			if o.seq > at.seq {
				c.beyond = append(c.beyond, o)
			}
		}
		_ = c.follow(everMore, nil) // what was flushed last is durable by no mark that can be seen
		return &c
	}
	return nil
}

// apply makes the journal what was found: heals the mirrors, takes the tail that
// is not known durable into memory, to be written to a new file, and gives up
// what is not part of the chain.
// Where the journal of which there is no mark is, is known by its records only.
func (r *recovery) apply(marked bool) error {
	j := r.j
	last := r.released
	if n := len(r.chain); n > 0 {
		last = max(last, r.chain[n-1].last)
	}
	if n := len(r.damaged); n > 0 {
		last = max(last, r.damaged[n-1].To)
	}
	durable := max(min(last, r.durableSeen), r.released)
	if j.b.readOnly {
		durable = max(last, r.released) // nobody writes behind it meanwhile
	}
	j.released, j.damaged = r.released, r.damaged
	j.durable, j.written, j.next = durable, durable, durable+1
	j.pending.reset(durable + 1)
	if last == 0 {
		if !marked {
			j.next = 0
		}
		return nil
	}
	for _, f := range r.chain {
		if f.last <= durable || f.last < f.first {
			continue
		}
		err := f.follow(f.last, func(_ int64, raw []byte, rec format.JournalRecord, _ []bool) error {
			if rec.Seq <= durable {
				return nil
			}
			w := block.Write{Seq: rec.Seq, Time: rec.Time, Volume: rec.Volume, Kind: rec.Kind, Extent: rec.Extent}
			if rec.Kind == block.KindData {
				w.Data = append([]byte{}, raw[format.JournalRecordHeaderBytes:]...)
			}
			if w.Seq != j.next {
				return fmt.Errorf("record %d follows %d in the tail", w.Seq, j.next-1)
			}
			j.pending.push(w)
			j.next++
			j.unsyncedBytes += rec.SizeBytes()
			return nil
		})
		if err != nil {
			return err
		}
	}
	sum, _ := r.sumOf(durable)
	j.durableSum, j.writtenSum = sum, sum
	r.cut(durable)
	counts := map[*slot]bool{}
	for _, f := range r.chain {
		if f.last < f.first {
			continue
		}
		// One that is wholly released stays until a mark says so: its header
		// may not be durable that let us know.
		if !j.b.readOnly {
			if err := r.heal(f); err != nil {
				return err
			}
		}
		live := &file{number: f.header.Number, incarnation: f.header.Incarnation, first: f.first,
			sum: f.header.Checksum(), sizeBytes: f.header.SizeBytes, last: f.last, pos: f.end, index: f.index}
		for _, s := range f.slots {
			counts[s] = true
			live.copies = append(live.copies, &fileCopy{slot: s})
		}
		if j.first == 0 {
			j.first = max(f.first, r.released+1)
		}
		j.files = append(j.files, live)
	}
	if j.first == 0 && j.next > durable+1 {
		j.first = durable + 1
	}
	j.heldFiles = len(j.files)
	for _, f := range r.files {
		for _, s := range f.slots {
			if !counts[s] {
				counts[s] = true
				j.doomed = append(j.doomed, doomed{slot: s, until: j.next - 1})
			}
		}
	}
	return nil
}

// heal makes the copies of f equal, and makes a second one if it has one only
// and there is a disk for it. That there is no space is no reason not to start.
func (r *recovery) heal(f *oldFile) error {
	b := r.j.b
	var fresh *fileCopy
	if usable := b.usableDisks(); len(f.slots) == 1 && usable > 1 {
		d := b.pickDisk([]*fileCopy{{slot: f.slots[0]}}, map[*disk]bool{f.slots[0].disk: true}, f.header.SizeBytes)
		if d != nil {
			s, file, err := b.newSlot(d, f.header.SizeBytes)
			switch {
			case isHold(err):
				b.log.Warn("there is no space for the second copy of a journal file", "group", r.j.group, "err", err)
			case err != nil:
				return r.healFailed(&fileCopy{slot: &slot{disk: d}}, err)
			default:
				fresh = &fileCopy{s, file}
				if _, err := file.WriteAt(headerBlock(f.header), 0); err != nil {
					return r.healFailed(fresh, err)
				}
			}
		}
	}
	if fresh == nil && !slices.Contains(f.bad, true) {
		return nil
	}
	touched := map[int]bool{}
	var failed *fileCopy
	var cause error
	err := f.follow(f.last, func(off int64, raw []byte, rec format.JournalRecord, right []bool) error {
		for i, ok := range right {
			if ok || f.wins[i] == nil {
				continue
			}
			touched[i] = true
			if _, err := f.wins[i].f.WriteAt(raw, off); err != nil {
				failed, cause = &fileCopy{slot: f.slots[i]}, err
				return err
			}
		}
		if fresh != nil {
			if _, err := fresh.f.WriteAt(raw, off); err != nil {
				failed, cause = fresh, err
				return err
			}
		}
		return nil
	})
	if err != nil {
		return r.healFailed(failed, cause)
	}
	for i := range touched {
		b.log.Warn("a damaged copy of the journal was healed from the other", "file", f.slots[i].name)
		f.wins[i].n = 0 // read again
		if err := f.wins[i].f.Sync(); err != nil {
			return r.healFailed(&fileCopy{slot: f.slots[i]}, err)
		}
	}
	if fresh != nil {
		if err := fresh.f.Sync(); err != nil {
			return r.healFailed(fresh, err)
		}
		_ = fresh.f.Close()
		f.slots = append(f.slots, fresh.slot)
		f.wins = append(f.wins, nil)
		f.bad = append(f.bad, false)
	}
	return nil
}

// healFailed gives up the disk that could not be written. What could not be read
// or written there is left out; the other copy is enough.
func (r *recovery) healFailed(c *fileCopy, cause error) error {
	if c.f != nil {
		_ = c.f.Close()
		c.slot.poisoned = true
		r.j.b.dropSlot(c.slot)
	}
	if err := r.j.b.failDisk(c.slot.disk, cause); err != nil && !errors.Is(err, errLastDisk) {
		return err
	}
	return nil
}

// usableDisks counts the disks that can be written to.
func (b *Buffer) usableDisks() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, d := range b.disks {
		if d.usable() {
			n++
		}
	}
	return n
}
