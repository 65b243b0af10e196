package vbuf

import (
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// window reads records from one copy of a journal file, through a buffer. Bytes
// that cannot be read are treated as bytes that are wrong.
type window struct {
	f    vfs.File
	size int64
	buf  []byte
	off  int64
	n    int
	err  error // the last one of the disk
}

const windowBytes = 256 << 10

var windowBuffers = sync.Pool{New: func() any { p := make([]byte, windowBytes); return &p }}

// at returns the n bytes at off, valid until the next call, or nil.
func (w *window) at(off, n int64) []byte {
	if off < 0 || n < 0 || off+n > w.size {
		return nil
	}
	if off >= w.off && off+n <= w.off+int64(w.n) {
		i := off - w.off
		return w.buf[i : i+n : i+n]
	}
	if int64(len(w.buf)) < n {
		w.buf = make([]byte, alignUp(n, windowBytes))
	}
	want := min(int64(len(w.buf)), w.size-off)
	got, err := w.f.ReadAt(w.buf[:want], off)
	if err != nil && !errors.Is(err, io.EOF) {
		w.err = err
		if errors.Is(err, errStalled) {
			w.buf = nil // the disk may write into it one day
			w.n = 0
			return nil
		}
	}
	w.off, w.n = off, got
	if int64(got) < n {
		return nil
	}
	return w.buf[:n:n]
}

// record returns the record at off if there is a whole and correct one of this
// incarnation. raw is header and payload, valid until the next call.
func (w *window) record(off int64, incarnation uint64) (r format.JournalRecord, raw []byte, ok bool) {
	header := w.at(off, format.JournalRecordHeaderBytes)
	if header == nil {
		return r, nil, false
	}
	r, ok = format.ParseJournalRecord(header, incarnation)
	if !ok {
		return r, nil, false
	}
	raw = w.at(off, format.JournalRecordHeaderBytes+r.PayloadBytes())
	if raw == nil {
		return r, nil, false
	}
	return r, raw, r.Check(raw[:format.JournalRecordHeaderBytes], raw[format.JournalRecordHeaderBytes:])
}

// readHint remembers where the last Read ended, for the next one to go on.
type readHint struct {
	file *file
	seq  block.Seq
	off  int64
}

// Read calls visit for the durable records from on, in order, until they have
// taken up limitBytes, at least one if there is one, and returns the number
// after the last one visited. w.Data is valid during visit only. What a mirror
// has wrong is read from the other; it fails with a *DamageError where no copy
// is right, with the disk's error where none can be read, and with visit's.
func (j *Journal) Read(from block.Seq, limitBytes int64, visit func(block.Write) error) (next block.Seq, err error) {
	next = from
	var taken int64
	for {
		j.mu.Lock()
		if next > j.durable || (taken >= limitBytes && taken > 0) {
			j.mu.Unlock()
			return next, nil
		}
		f, err := j.holding(next)
		if err != nil {
			j.mu.Unlock()
			return next, err
		}
		f.readers++
		hint := j.hint
		last := min(f.last, j.durable)
		copies := f.copies
		off := f.seek(next) // under mu: writers add to the index
		j.mu.Unlock()

		if hint.file == f && hint.seq <= next && hint.seq >= off.seq {
			off = indexEntry{hint.seq, hint.off}
		}
		at, end, err := j.readFile(f, copies, off, next, last, limitBytes, &taken, visit)
		next = at

		j.mu.Lock()
		f.readers--
		j.hint = readHint{f, at, end}
		j.mu.Unlock()
		if err != nil {
			return next, err
		}
	}
}

// holding returns the file that has record seq; under mu.
func (j *Journal) holding(seq block.Seq) (*file, error) {
	i := sort.Search(len(j.files), func(i int) bool { return j.files[i].last >= seq })
	if i < len(j.files) && j.files[i].first <= seq {
		return j.files[i], nil
	}
	for _, d := range j.damaged {
		if d.From <= seq && seq <= d.To {
			return nil, &DamageError{j.group, []Range{d}}
		}
	}
	return nil, fmt.Errorf("record %d of group %s is not in the journal any more: it holds %d to %d", seq, j.group, j.released+1, j.next-1)
}

// readFile visits the records next to last of f, up to the limit. start is a
// record not behind next. It returns the number after the last one visited and
// where that is.
func (j *Journal) readFile(f *file, copies []*fileCopy, start indexEntry, next, last block.Seq, limitBytes int64,
	taken *int64, visit func(block.Write) error) (block.Seq, int64, error) {
	wins := make([]*window, 0, 2)
	defer func() {
		for _, w := range wins {
			w.close()
		}
	}()
	var openErr error
	for _, c := range copies {
		w, err := j.b.openWindow(c.slot)
		if err != nil {
			openErr = err
			continue
		}
		wins = append(wins, w)
	}
	seq, off := start.seq, start.off
	for seq <= last && (seq < next || *taken < limitBytes || *taken == 0) {
		r, raw, at, ok := findRecord(wins, off, f.incarnation, seq)
		if !ok {
			for _, w := range wins {
				if w.err != nil {
					openErr = w.err
				}
			}
			if openErr != nil { // not known to be lost
				return max(seq, next), off, fmt.Errorf("read record %d of group %s: %w", seq, j.group, openErr)
			}
			return max(seq, next), off, &DamageError{j.group, []Range{{seq, seq}}}
		}
		if seq >= next {
			w := block.Write{Seq: r.Seq, Time: r.Time, Volume: r.Volume, Kind: r.Kind, Extent: r.Extent}
			if r.Kind == block.KindData {
				w.Data = raw[format.JournalRecordHeaderBytes:]
			}
			if err := visit(w); err != nil {
				return seq, off, err
			}
			*taken += r.SizeBytes()
		}
		seq++
		off = at + r.SizeBytes()
	}
	return seq, off, nil
}

// findRecord looks for record seq at off and at the next block, in each copy.
func findRecord(wins []*window, off int64, incarnation uint64, seq block.Seq) (r format.JournalRecord, raw []byte, at int64, ok bool) {
	places := [2]int64{off, alignUp(off, format.JournalBlockBytes)}
	for i, at := range places {
		if i == 1 && at == off {
			break
		}
		for _, w := range wins {
			if r, raw, ok := w.record(at, incarnation); ok && r.Seq == seq {
				return r, raw, at, true
			}
		}
	}
	return r, nil, 0, false
}

// openWindow opens a copy for reading.
func (b *Buffer) openWindow(s *slot) (*window, error) {
	f, err := s.disk.fs.Open(s.name)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &window{f: f, size: size, buf: *windowBuffers.Get().(*[]byte)}, nil
}

// close closes the file and gives back the buffer.
func (w *window) close() {
	_ = w.f.Close()
	if len(w.buf) == windowBytes {
		buf := w.buf
		windowBuffers.Put(&buf)
	}
	w.buf = nil
}
