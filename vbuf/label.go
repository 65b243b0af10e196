package vbuf

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// openDisks locks the directories, checks that they are one whole buffer, and
// takes in those that are new. See docs/FORMAT-BUFFER.md, "The set of disks",
// for the order of the steps and what a crash between them leaves.
func (b *Buffer) openDisks() error {
	labels := make([]*format.Label, len(b.opt.Dirs))
	defer b.countDisks()
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
		case l != nil && !l.Joining && !isMember(l, ruling.Disk):
			// Either may be the one that counts: a start with the wrong directory
			// makes a buffer of it.
			other := b.disks[slices.Index(labels, ruling)].path
			return &SetupError{d.path, fmt.Sprintf("it and %s are of two different buffers", other),
				"start with the directories of one of them, the one that the agent used last before it was stopped or died: take the others out of the configuration (--buffer, [[buffer]]), or with drc buffer remove if they are not in there; empty neither as long as the agent does not protect its volumes again: it may hold the only copy of acknowledged writes"}
		case l != nil && !l.Joining:
			return &SetupError{d.path,
				fmt.Sprintf("it was dropped from the buffer (it is of generation %d, the buffer is at %d)", l.Generation, ruling.Generation),
				"take it out of the configuration, or empty it and name it again, so that it joins as a new disk"}
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
					"make it available again and name it (--buffer or [[buffer]]), for what only it holds is lost without it; if it is gone for good, take it out: drc buffer remove " + m.Path}
			}
		}
	}
	if !rewrite && !joining && ruling != nil {
		return nil
	}
	b.generation++
	label := func(d *disk, joins bool) error { return b.writeLabel(d, b.generation, joins, members) }
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
	d := b.newDisk(o)
	for _, other := range b.all() {
		inner, outer := d.path, other.path
		if len(inner) < len(outer) {
			inner, outer = outer, inner
		}
		if strings.HasPrefix(path.Clean(inner), strings.TrimSuffix(path.Clean(outer), "/")+"/") {
			return nil, nil, &SetupError{d.path, fmt.Sprintf("it and %s are one inside the other", other.path), "name a directory beside it"}
		}
	}
	if parent := path.Dir(path.Clean(d.path)); parent != "." {
		// The one above may be a disk that is not mounted.
		if _, err := d.fs.Stat(parent); errors.Is(err, fs.ErrNotExist) {
			return nil, nil, &SetupError{d.path, fmt.Sprintf("%s does not exist", parent), "mount the disk, or make that directory first"}
		}
	}
	if err := d.fs.MkdirAll(d.path); err != nil {
		return nil, nil, fmt.Errorf("make buffer directory: %w", err)
	}
	lock, err := d.fs.Lock(b.path(d, lockName))
	if errors.Is(err, vfs.ErrLocked) {
		return nil, nil, &SetupError{d.path, "another process uses it", "stop that one first"}
	} else if err != nil {
		return nil, nil, err
	}
	d.lock = lock
	info, err := d.fs.Stat(d.path)
	if err != nil {
		return d, nil, err
	}
	d.device = info.Device
	if d.quotaBytes <= 0 {
		space, err := d.fs.StatFS(d.path)
		if err != nil {
			return d, nil, err
		}
		d.quotaBytes = min(defaultQuotaBytes, space.FreeBytes/5*4)
	}
	raw, err := vfs.ReadFile(d.fs, b.path(d, labelName), format.MaxLabelBytes)
	isNew := errors.Is(err, fs.ErrNotExist)
	if isNew {
		err = b.checkEmpty(d)
	}
	if err != nil {
		return d, nil, err
	}
	// A process that was killed may have left names that a power cut takes away.
	if err := vfs.SyncTree(d.fs, d.path, nil); err != nil {
		return d, nil, fmt.Errorf("make durable what is in the buffer directory: %w", err)
	}
	if isNew {
		return d, nil, nil
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
	entries, err := d.fs.ReadDir(d.path)
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
