package vbuf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"syscall"

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

	failed       error // out of the set since then
	suspect      bool  // a write failed, but it alone holds something: read only
	noSpace      bool  // the file system was full at the last attempt
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

// usable reports whether new files may be put there.
func (d *disk) usable() bool { return d.failed == nil && !d.suspect }

// slotsLeft is how many more journal files of the standard size there may be in
// use, free ones included.
func (d *disk) slotsLeft(fileBytes int64) int64 {
	if !d.usable() {
		return 0
	}
	room := min(d.journalMaxBytes()-d.journalBytes, d.quotaBytes-d.journalBytes-d.shardBytes)
	return int64(len(d.free)) + max(0, room)/fileBytes
}

// loadDisk takes stock of what is on a disk.
func (b *Buffer) loadDisk(d *disk) error {
	for _, folder := range []string{journalFolder, spoolFolder} {
		if err := b.fs.MkdirAll(b.path(d, folder)); err != nil {
			return err
		}
	}
	entries, err := b.fs.ReadDir(b.path(d, journalFolder))
	if err != nil {
		return err
	}
	removed := false
	for _, e := range entries {
		name := b.path(d, journalFolder, e.Name)
		if strings.HasSuffix(e.Name, vfs.TempSuffix) {
			removed = true
			if err := b.fs.Remove(name); err != nil {
				return err
			}
			continue
		}
		info, err := b.fs.Stat(name)
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
		header, fresh, err := b.readFileHeader(name, info.SizeBytes)
		var corrupt *format.CorruptError
		switch {
		case err != nil && !errors.As(err, &corrupt):
			// What cannot be read must not be taken for nothing.
			return fmt.Errorf("%w; mend or replace the disk and put back what was on it", err)
		case err != nil && fresh:
			// Made and never used: whether it was filled to its end is not known.
			removed = true
			if err := b.fs.Remove(name); err != nil {
				return err
			}
		case err != nil:
			b.log.Warn("a journal file's header is damaged; the file is put aside and can be removed once the agent runs well",
				"file", name+badSuffix, "err", err)
			removed = true
			if err := b.fs.Rename(name, name+badSuffix); err != nil {
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
		if err := b.fs.SyncDir(b.path(d, journalFolder)); err != nil {
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
func (b *Buffer) readFileHeader(name string, sizeBytes int64) (h *format.JournalFile, fresh bool, err error) {
	f, err := b.fs.Open(name)
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
		f, err := b.fs.Open(s.name)
		if err != nil {
			b.dropSlot(s)
		}
		return s, f, err
	}
	b.mu.Unlock()
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
	f, err := b.fs.Create(name)
	if err == nil {
		if err = f.Preallocate(sizeBytes); err == nil && fill != nil {
			if err = fill(f); err == nil {
				err = f.Sync()
			}
		}
		if err == nil {
			err = b.fs.SyncDir(path.Dir(name))
		}
		if err != nil {
			_ = f.Close()
		}
	}
	b.mu.Lock()
	d.noSpace = errors.Is(err, syscall.ENOSPC)
	b.mu.Unlock()
	if err != nil {
		b.dropSlot(s)
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			err = fmt.Errorf("%w: %w", errHold, err)
		}
		return nil, nil, err
	}
	return s, f, nil
}

// dropSlot removes a journal file and forgets it. That it may come back after a
// crash does no harm: it is free or rubbish then too.
func (b *Buffer) dropSlot(s *slot) {
	if err := b.fs.Remove(s.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.log.Warn("a journal file could not be removed", "file", s.name, "err", err)
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
			if len(c.free) == 0 && !c.noSpace && c.slotsLeft(b.fileBytes) > 0 {
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
		return false, fmt.Errorf("prepare a journal file: %w", err)
	}
	_ = f.Close()
	b.mu.Lock()
	d.free = append(d.free, s)
	b.mu.Unlock()
	b.roomChanged()
	return true, nil
}
