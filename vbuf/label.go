package vbuf

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// openDisks locks the directories, checks that they are one whole buffer, and
// takes in those that are new. See docs/FORMAT-BUFFER.md, "The set of disks",
// for the order of the steps and what a crash between them leaves.
func (b *Buffer) openDisks() error {
	labels := make([]*format.Label, len(b.opt.Dirs))
	for i, o := range b.opt.Dirs {
		d, label, err := b.openDisk(o)
		if d != nil {
			b.disks = append(b.disks, d)
		}
		if err != nil {
			return err
		}
		labels[i] = label
	}
	// The newest label of a full member rules.
	var ruling *format.Label
	for _, l := range labels {
		if l != nil && !l.Joining && (ruling == nil || l.Generation > ruling.Generation) {
			ruling = l
		}
	}
	var members []format.Member
	rewrite, joining := false, false
	for i, d := range b.disks {
		l := labels[i]
		switch {
		case ruling != nil && l != nil && isMember(ruling, l.Disk):
			// A lower generation, or a label that still says joining, is what a
			// crash between two labels leaves.
			d.id = l.Disk
			rewrite = rewrite || l.Joining || l.Generation != ruling.Generation
			for _, o := range b.disks[:i] {
				if o.id == d.id {
					return &SetupError{d.path, fmt.Sprintf("it is a copy of %s", o.path), "name each directory once, and remove copies"}
				}
			}
		case l != nil && !l.Joining:
			return &SetupError{d.path,
				fmt.Sprintf("it was dropped from the buffer (it is of generation %d, the buffer is at %d)", l.Generation, ruling.Generation),
				"take it out of the configuration, or empty it so that it can join as a new disk"}
		default:
			d.id = block.NewID()
			joining = true
		}
		members = append(members, format.Member{Disk: d.id, Path: d.path})
	}
	if ruling != nil {
		b.generation = ruling.Generation
		for _, m := range ruling.Members {
			here := slices.ContainsFunc(members, func(o format.Member) bool { return o.Disk == m.Disk })
			switch {
			case here:
			case slices.Contains(b.opt.Forget, m.Disk):
				rewrite = true
			default:
				return &SetupError{m.Path, fmt.Sprintf("this member of the buffer (disk %s) is missing", m.Disk),
					"name it too, and make it available again: what only it holds would be lost without it"}
			}
		}
	}
	if !rewrite && !joining && ruling != nil {
		return nil
	}
	b.generation++
	label := func(d *disk, joins bool) error {
		l := format.Label{Repo: b.opt.Repo, Host: b.opt.Host, Disk: d.id, Generation: b.generation, Joining: joins, Members: members}
		if err := vfs.WriteFileAtomic(b.fs, b.path(d, labelName), l.Encode()); err != nil {
			return fmt.Errorf("label buffer directory %s: %w", d.path, err)
		}
		return nil
	}
	isNew := func(d *disk) bool { return ruling == nil || !isMember(ruling, d.id) }
	for _, d := range b.disks {
		if isNew(d) {
			if err := label(d, true); err != nil {
				return err
			}
		}
	}
	for _, d := range b.disks {
		if !isNew(d) {
			if err := label(d, false); err != nil {
				return err
			}
		}
	}
	for _, d := range b.disks {
		if isNew(d) {
			if err := label(d, false); err != nil {
				return err
			}
		}
	}
	return nil
}

func isMember(l *format.Label, id block.ID) bool {
	return slices.ContainsFunc(l.Members, func(m format.Member) bool { return m.Disk == id })
}

// openDisk makes and locks one directory and reads its label, nil if it is new.
func (b *Buffer) openDisk(o DirOptions) (*disk, *format.Label, error) {
	d := &disk{path: o.Path, quotaBytes: o.SizeBytes}
	if err := b.fs.MkdirAll(d.path); err != nil {
		return nil, nil, fmt.Errorf("make buffer directory: %w", err)
	}
	lock, err := b.fs.Lock(b.path(d, lockName))
	if errors.Is(err, vfs.ErrLocked) {
		return nil, nil, &SetupError{d.path, "another process uses it", "stop that one first"}
	} else if err != nil {
		return nil, nil, err
	}
	d.lock = lock
	info, err := b.fs.Stat(d.path)
	if err != nil {
		return d, nil, err
	}
	d.device = info.Device
	if d.quotaBytes <= 0 {
		space, err := b.fs.StatFS(d.path)
		if err != nil {
			return d, nil, err
		}
		d.quotaBytes = min(defaultQuotaBytes, space.FreeBytes/5*4)
	}
	raw, err := vfs.ReadFile(b.fs, b.path(d, labelName), format.MaxLabelBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil, b.checkEmpty(d)
	} else if err != nil {
		return d, nil, err
	}
	l, err := format.DecodeLabel(b.path(d, labelName), raw)
	switch {
	case err != nil:
		return d, nil, &SetupError{d.path, err.Error(), "restore the file from another disk's backup, or empty the directory so that it can join as a new disk"}
	case l.Repo != b.opt.Repo:
		return d, nil, &SetupError{d.path, fmt.Sprintf("it belongs to repository %s, not to %s", l.Repo, b.opt.Repo), "name another directory"}
	case l.Host != b.opt.Host:
		return d, nil, &SetupError{d.path, fmt.Sprintf("it belongs to another agent (%s, this is %s)", l.Host, b.opt.Host), "use that agent's state directory, or name another directory"}
	}
	return d, l, nil
}

// checkEmpty refuses a directory that holds something but has no label.
func (b *Buffer) checkEmpty(d *disk) error {
	entries, err := b.fs.ReadDir(d.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name {
		case lockName, labelName + vfs.TempSuffix, "lost+found":
		default:
			return &SetupError{d.path, fmt.Sprintf("it has no label and is not empty (%s)", e.Name), "name an empty directory, or restore the label"}
		}
	}
	return nil
}

// errLastDisk: there is no other disk to go on with.
var errLastDisk = errors.New("it is the last disk of the buffer")

// failDisk takes a disk on which a write failed out of the set: the survivors
// have labels of a new generation on return, so that what this disk has missed
// is never taken for the truth. A disk that alone holds something needed stays
// a member and is only read from then on. It returns errLastDisk, and does
// nothing, if there is no other; the caller holds no lock.
func (b *Buffer) failDisk(d *disk, cause error) error {
	b.setMu.Lock()
	defer b.setMu.Unlock()
	return b.failDiskLocked(d, cause)
}

func (b *Buffer) failDiskLocked(d *disk, cause error) error {
	sole := b.aloneHolds(d)
	b.mu.Lock()
	d.lastErr = cause
	if !d.usable() {
		b.mu.Unlock()
		return nil
	}
	others := 0
	for _, o := range b.disks {
		if o != d && o.usable() {
			others++
		}
	}
	if others == 0 {
		b.mu.Unlock()
		return errLastDisk
	}
	if sole {
		d.suspect = true
		b.mu.Unlock()
		b.log.Error("a buffer disk fails; it is only read from now on", "path", d.path, "err", cause)
		return nil
	}
	d.failed = cause
	b.generation++
	generation := b.generation
	var members []format.Member
	var survivors []*disk
	for _, o := range b.disks {
		if o.failed == nil {
			survivors = append(survivors, o)
			members = append(members, format.Member{Disk: o.id, Path: o.path})
		}
	}
	b.mu.Unlock()
	b.log.Error("a buffer disk failed and is dropped", "path", d.path, "err", cause, "generation", generation)
	labelled := 0
	for _, o := range survivors {
		l := format.Label{Repo: b.opt.Repo, Host: b.opt.Host, Disk: o.id, Generation: generation, Members: members}
		if err := vfs.WriteFileAtomic(b.fs, b.path(o, labelName), l.Encode()); err != nil {
			// It is stale from now on. The next generation, if there are disks to
			// hold one, says so.
			if ferr := b.failDiskLocked(o, err); ferr != nil {
				// Not errLastDisk: nothing may be acknowledged without the label.
				return fmt.Errorf("label the surviving disk %s: %w", o.path, err)
			}
			if b.generation != generation {
				return nil // the newer generation is on all that survive
			}
			continue
		}
		labelled++
	}
	if labelled == 0 {
		return fmt.Errorf("no disk took the label of generation %d", generation)
	}
	return nil
}

// aloneHolds reports whether d has the only copy of records that are needed.
func (b *Buffer) aloneHolds(d *disk) bool {
	b.mu.Lock()
	journals := make([]*Journal, 0, len(b.journals))
	for _, j := range b.journals {
		journals = append(journals, j)
	}
	b.mu.Unlock()
	for _, j := range journals {
		j.mu.Lock()
		for _, f := range j.files {
			if f.last <= j.released {
				continue
			}
			elsewhere := false
			b.mu.Lock()
			for _, c := range f.copies {
				elsewhere = elsewhere || c.slot.disk != d && c.slot.disk.failed == nil
			}
			b.mu.Unlock()
			if len(f.copies) > 0 && !elsewhere {
				j.mu.Unlock()
				return true
			}
		}
		j.mu.Unlock()
	}
	return false
}
