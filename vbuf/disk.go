package vbuf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// Names in a directory of the buffer.
const (
	labelName     = "label"
	lockName      = "lock"
	journalFolder = "journal"
	spoolFolder   = "spool"
	fileSuffix    = ".jrn"
	badSuffix     = ".bad"
	markSuffix    = ".mark"
)

// disk is one directory of the buffer. The fields below the line are guarded by
// Buffer.mu.
type disk struct {
	id         block.ID
	path       string
	device     string
	quotaBytes int64
	lock       io.Closer
	b          *Buffer
	fs         vfs.FS // of the buffer, with patience that ends

	jobs    chan *job    // to workers that wait for one
	flying  atomic.Int32 // operations under way
	since   atomic.Int64 // when the last of them ended, or the first began; since Buffer.began
	stuck   atomic.Int32 // operations that were given up
	out     atomic.Bool  // failed: nothing is tried there any more
	refused atomic.Bool  // the file system had no room for the last write into a file

	failed       error     // out of the set since then
	suspect      bool      // a write failed, but it alone holds something: read only
	draining     bool      // gets no new files; what it holds moves to the others
	moved        int       // attempts in a row to move something from there that failed
	fullSince    time.Time // the file system has had no room since then; zero: it has
	lastErr      error
	free         []*slot // filled files of the standard size, ready for use
	journalBytes int64   // all journal files, free ones included
	shardBytes   int64
	nextName     uint64
}

// slot is one journal file on one disk.
type slot struct {
	disk      *disk
	name      string
	sizeBytes int64
	// poisoned: a write or sync of it has failed. It is never written again and
	// is removed instead of being used again.
	poisoned bool
}

// foundFile is a journal file with a valid header, as seen at Open.
type foundFile struct {
	slot   *slot
	header *format.JournalFile
}

func (d *disk) journalMaxBytes() int64 { return d.quotaBytes / 4 * journalShare }

// batchReserve is the room that the journals leave to the next batch however much
// is in segments already: else a full journal could keep out the one batch that
// would have it released.
func (d *disk) batchReserve() int64 { return d.quotaBytes / 8 }

// usable reports whether new files may be put there.
func (d *disk) usable() bool { return d.failed == nil && !d.suspect && !d.draining }

// isThere fails with errVanished if the directory is not the buffer's any more: it
// was removed, or its file system is not mounted.
func (d *disk) isThere() error {
	_, err := d.fs.Stat(d.b.path(d, labelName))
	if errors.Is(err, fs.ErrNotExist) {
		return errVanished
	}
	return err
}

// slotsLeft is how many more journal files of the standard size there may be in
// use, free ones included.
func (d *disk) slotsLeft(fileBytes int64) int64 {
	if !d.usable() {
		return 0
	}
	room := min(d.journalMaxBytes()-d.journalBytes, d.quotaBytes-d.journalBytes-d.shardBytes-d.batchReserve())
	return int64(len(d.free)) + max(0, room)/fileBytes
}

// loadDisk takes stock of what is on a disk.
func (b *Buffer) loadDisk(d *disk) error {
	for _, folder := range []string{journalFolder, spoolFolder} {
		if b.readOnly {
			break
		}
		if err := d.fs.MkdirAll(b.path(d, folder)); err != nil {
			return err
		}
	}
	entries, err := b.readDir(d, journalFolder)
	if err != nil {
		return err
	}
	removed := false
	for _, e := range entries {
		name := b.path(d, journalFolder, e.Name)
		if strings.HasSuffix(e.Name, vfs.TempSuffix) {
			if b.readOnly {
				continue
			}
			removed = true
			if err := d.fs.Remove(name); err != nil {
				return err
			}
			continue
		}
		info, err := d.fs.Stat(name)
		if err != nil {
			return err
		}
		if strings.HasSuffix(e.Name, badSuffix) {
			d.shardBytes += info.SizeBytes // takes up room until a human removes it
			continue
		}
		number, ok := strings.CutSuffix(e.Name, fileSuffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(number, 16, 64)
		if err != nil {
			continue
		}
		d.nextName = max(d.nextName, n+1)
		header, fresh, err := b.readFileHeader(d, name, info.SizeBytes)
		var corrupt *format.CorruptError
		switch {
		case err != nil && !errors.As(err, &corrupt):
			// What cannot be read must not be taken for nothing.
			return fmt.Errorf("%w; mend or replace the disk and put back what was on it", err)
		case err != nil && b.readOnly:
			// Nothing that can be read is in it.
		case err != nil && fresh:
			// Made and never used: whether it was filled to its end is not known.
			removed = true
			if err := d.fs.Remove(name); err != nil {
				return err
			}
		case err != nil:
			b.log.Warn("a journal file's header is damaged; the file is put aside and can be removed once the agent runs well",
				"file", name+badSuffix, "err", err)
			removed = true
			if err := d.fs.Rename(name, name+badSuffix); err != nil {
				return err
			}
			d.shardBytes += info.SizeBytes
		default:
			if header.Repo != b.opt.Repo {
				return &SetupError{d.path, fmt.Sprintf("the journal file %s belongs to repository %s", name, header.Repo), "restore the directory as it was"}
			}
			d.journalBytes += info.SizeBytes
			b.found[header.Group] = append(b.found[header.Group],
				foundFile{&slot{disk: d, name: name, sizeBytes: info.SizeBytes}, header})
		}
	}
	if removed {
		if err := d.fs.SyncDir(b.path(d, journalFolder)); err != nil {
			return err
		}
	}
	return b.countShards(d)
}

// headerCopyOffset is where the second copy of a file's header is, in a sector
// of its own.
const headerCopyOffset = 2048

// headerBlock is the first block of a journal file.
func headerBlock(h *format.JournalFile) []byte {
	p := make([]byte, format.JournalBlockBytes)
	raw := h.Encode()
	copy(p, raw)
	copy(p[headerCopyOffset:], raw)
	return p
}

// readFileHeader reads the header of a journal file. On error, fresh tells that
// the file never had one.
func (b *Buffer) readFileHeader(d *disk, name string, sizeBytes int64) (h *format.JournalFile, fresh bool, err error) {
	f, err := d.fs.Open(name)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	p := make([]byte, format.JournalBlockBytes)
	if n, err := f.ReadAt(p, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, false, err
	} else if n < len(p) {
		return nil, true, format.Corrupt(name, "it has %d bytes only", n)
	}
	h, err = format.DecodeJournalFile(name, p)
	if err != nil {
		var err2 error
		if h, err2 = format.DecodeJournalFile(name, p[headerCopyOffset:]); err2 != nil {
			for _, c := range p {
				if c != 0 {
					return nil, false, err
				}
			}
			return nil, true, err
		}
	}
	if h.SizeBytes > sizeBytes {
		// A crash took the size of an unfinished file with it. What it should
		// hold beyond is missing; recovery decides what that means.
		b.log.Warn("a journal file is shorter than its header says", "file", name, "bytes", sizeBytes, "header", h.SizeBytes)
	}
	return h, false, nil
}

// newSlot makes a journal file of sizeBytes on d: from the free ones, or a new
// one, whose space is reserved but which is not filled. The name is durable on
// return. It returns errHold if the file system has no space.
func (b *Buffer) newSlot(d *disk, sizeBytes int64) (*slot, vfs.File, error) {
	b.mu.Lock()
	if n := len(d.free); n > 0 && sizeBytes == b.fileBytes {
		s := d.free[n-1]
		d.free = d.free[:n-1]
		b.mu.Unlock()
		f, err := s.disk.fs.Open(s.name)
		if err != nil {
			b.dropSlot(s)
		}
		return s, f, err
	}
	// A file of another size takes the place of free ones.
	var excess []*slot
	for over := d.journalBytes + sizeBytes - min(d.journalMaxBytes(), d.quotaBytes-d.shardBytes-d.batchReserve()); len(d.free) > 0 && over > 0; {
		s := d.free[len(d.free)-1]
		d.free = d.free[:len(d.free)-1]
		over -= s.sizeBytes
		excess = append(excess, s)
	}
	b.mu.Unlock()
	for _, s := range excess {
		b.dropSlot(s)
	}
	return b.createSlot(d, sizeBytes, nil)
}

// createSlot makes a new journal file, filled by fill if that is not nil.
func (b *Buffer) createSlot(d *disk, sizeBytes int64, fill func(vfs.File) error) (*slot, vfs.File, error) {
	b.mu.Lock()
	name := b.path(d, journalFolder, fmt.Sprintf("%08x%s", d.nextName, fileSuffix))
	d.nextName++
	d.journalBytes += sizeBytes
	b.mu.Unlock()
	s := &slot{disk: d, name: name, sizeBytes: sizeBytes}
	f, err := d.fs.Create(name)
	if err == nil {
		if err = f.Preallocate(sizeBytes); err == nil && fill != nil {
			if err = fill(f); err == nil {
				err = f.Sync()
			}
		}
		if err == nil {
			err = d.fs.SyncDir(path.Dir(name))
		}
		if err != nil {
			_ = f.Close()
		}
	}
	if err == nil || isNoSpace(err) {
		b.noteRoom(d, err == nil)
	}
	if err != nil {
		b.dropSlot(s)
		if isNoSpace(err) {
			err = fmt.Errorf("%w: %w", errHold, err)
		}
		return nil, nil, err
	}
	return s, f, nil
}

// dropSlot removes a journal file and forgets it. That it may come back after a
// crash does no harm: it is free or rubbish then too.
func (b *Buffer) dropSlot(s *slot) {
	if !s.disk.out.Load() {
		if err := s.disk.fs.Remove(s.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			b.log.Warn("a journal file could not be removed", "file", s.name, "err", err)
		}
	}
	b.mu.Lock()
	s.disk.journalBytes -= s.sizeBytes
	b.mu.Unlock()
}

// recycle makes a file that holds nothing needed ready for its next use.
func (b *Buffer) recycle(s *slot) {
	b.mu.Lock()
	ok := s.disk.usable() && !s.poisoned && s.sizeBytes == b.fileBytes &&
		s.disk.journalBytes <= s.disk.journalMaxBytes() && s.disk.journalBytes+s.disk.shardBytes <= s.disk.quotaBytes
	if ok {
		s.disk.free = append(s.disk.free, s)
	}
	b.mu.Unlock()
	if !ok {
		b.dropSlot(s)
	}
}

// prepareSpare fills one journal file ahead of need, if a disk has none: writing
// into a file that was written before costs a sync half of what it costs in a
// new one.
func (b *Buffer) prepareSpare() (did bool, err error) {
	b.mu.Lock()
	var d *disk
	if len(b.journals) > 0 {
		for _, c := range b.disks {
			if len(c.free) == 0 && !c.isFull() && c.slotsLeft(b.fileBytes) > 0 {
				d = c
				break
			}
		}
	}
	b.mu.Unlock()
	if d == nil {
		return false, nil
	}
	s, f, err := b.createSlot(d, b.fileBytes, func(f vfs.File) error {
		zeroes := make([]byte, min(b.fileBytes, 1<<20))
		for off := int64(0); off < b.fileBytes; off += int64(len(zeroes)) {
			if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), b.fileBytes-off)], off); err != nil {
				return err
			}
		}
		return nil
	})
	if errors.Is(err, errHold) {
		return false, nil
	}
	if err != nil {
		err = fmt.Errorf("prepare a journal file: %w", err)
		if b.failDisk(d, err) == nil {
			err = nil
		}
		return err == nil, err
	}
	_ = f.Close()
	b.mu.Lock()
	d.free = append(d.free, s)
	b.mu.Unlock()
	b.roomChanged()
	return true, nil
}
