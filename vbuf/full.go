package vbuf

import (
	"fmt"
	"slices"
	"time"

	"drc/internal/format"
	"drc/internal/vfs"
)

// A disk whose file system is full below the quota.
//
// Writers wait for room there first, rather than do without the second copy: what
// fills a file system often goes away again. Where it does not, they would wait for
// ever although other disks have room. So a disk that has been full for FullAfter is
// tried once more, and then taken out of the set as one that fails (failDisk): what
// it alone holds is read from there and brought to the others. That is not done while
// no disk on another device has room: then nothing would be gained, and a copy lost.

// fullAfterDefault is for Options.FullAfter.
const fullAfterDefault = 30 * time.Second

// noteRoom notes whether the file system of d had room just now.
func (b *Buffer) noteRoom(d *disk, has bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case has:
		d.fullSince = time.Time{}
	case d.fullSince.IsZero():
		d.fullSince = time.Now()
	}
}

// isFull reports whether the file system had no room when it was last asked. Under
// mu of the buffer.
func (d *disk) isFull() bool { return !d.fullSince.IsZero() }

// takeOutFull takes a disk out of the set that has been full for too long, if there
// is one. The caller holds no lock.
func (b *Buffer) takeOutFull() {
	if !b.takingOut.TryLock() {
		return
	}
	defer b.takingOut.Unlock()
	d, since := b.longFull()
	if d == nil {
		return
	}
	if !since.IsZero() && b.hasRoom(d) {
		return
	}
	cause := fmt.Errorf("its file system has been full for %s, and other disks have room", time.Since(since).Round(time.Second))
	if err := b.failDisk(d, cause); err != nil {
		b.log.Warn("a full buffer disk cannot be taken out yet; it is tried again", "path", d.path, "err", err)
	}
}

// longFull is a disk that is to be taken out; or one that has been, and whose
// absence no label says yet.
func (b *Buffer) longFull() (d *disk, since time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.disks {
		if d.failed != nil && d.isFull() && b.labelled != b.generation {
			return d, time.Time{}
		}
		if !d.usable() || !d.isFull() || time.Since(d.fullSince) < b.opt.FullAfter {
			continue
		}
		for _, o := range b.disks {
			if o.usable() && !o.isFull() && o.device != d.device {
				return d, d.fullSince
			}
		}
	}
	return nil, time.Time{}
}

// anyFull reports whether a disk of the set is full.
func (b *Buffer) anyFull() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.disks, func(d *disk) bool { return d.usable() && d.isFull() })
}

// hasRoom tries whether the file system of d has room again.
func (b *Buffer) hasRoom(d *disk) bool {
	s, f, err := b.createSlot(d, b.fileBytes, func(f vfs.File) error {
		_, err := f.WriteAt(make([]byte, format.JournalBlockBytes), 0)
		return err
	})
	if err != nil {
		return false
	}
	_ = f.Close()
	b.dropSlot(s)
	return true
}
