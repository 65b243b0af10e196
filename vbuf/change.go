package vbuf

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"drc/internal/block"
	"drc/internal/format"
)

// ErrNoDisk means: no directory of the buffer has that path. Stats names those
// there are.
var ErrNoDisk = errors.New("is no directory of the buffer")

// errNotJoined: another disk failed while one was to join, and may have been dropped.
var errNotJoined = errors.New("another disk of the buffer has failed meanwhile")

var (
	errDrained = errors.New("it was drained")
	errRemoved = errors.New("it was removed by hand")
)

// Add takes a new, empty directory into the set, durably, while the buffer works;
// what there is only once is then brought there in the background. It fails with
// a *SetupError if the directory cannot join. If it fails in any other way the
// directory may hold a label that says joining: such a one is as good as empty. See
// the head of set.go for the order of the steps.
func (b *Buffer) Add(ctx context.Context, o DirOptions) error {
	err := errNotJoined
	for tries := 0; errors.Is(err, errNotJoined) && tries < format.MaxBufferDisks; tries++ {
		b.setMu.Lock()
		var losses []Loss
		losses, err = b.addLocked(ctx, o)
		b.setMu.Unlock()
		b.report(losses)
	}
	if errors.Is(err, errUnlabelled) {
		// Nothing that the old disks hold could be told from what they held before:
		// as when the next write had found out.
		b.loseAll(err)
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	if err != nil {
		return err
	}
	// Where the journals are must be known there, too, before it can become the
	// only disk that is left.
	var errs []error
	for _, j := range b.openJournals() {
		if err := j.noteAgain(); err != nil {
			errs = append(errs, err)
		}
	}
	b.roomChanged()
	b.mendSoon()
	return errors.Join(errs...)
}

func (b *Buffer) addLocked(ctx context.Context, o DirOptions) (losses []Loss, err error) {
	b.mu.Lock()
	closed, n := b.closed, len(b.disks)
	for _, d := range b.disks {
		if d.path == path.Clean(o.Path) && d.failed == nil {
			b.mu.Unlock()
			return nil, &SetupError{d.path, "it is a directory of the buffer already", "name another one"}
		}
	}
	b.mu.Unlock()
	switch {
	case closed:
		return nil, ErrClosed
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case n >= format.MaxBufferDisks:
		return nil, fmt.Errorf("the buffer has %d directories already, and cannot have more", n)
	}
	d, label, err := b.openDisk(o)
	defer func() {
		if err != nil && d != nil {
			d.unlock()
		}
	}()
	if err != nil {
		return nil, err
	}
	_, members, old := b.members()
	switch {
	case label == nil:
	case slices.ContainsFunc(old, func(o *disk) bool { return o.id == label.Disk }):
		return nil, &SetupError{d.path, "it is a copy of a directory of the buffer", "name an empty directory"}
	case !label.Joining:
		return nil, &SetupError{d.path, fmt.Sprintf("it was a directory of this buffer until generation %d, and what it holds is stale", label.Generation), "empty it, so that it can join as a new disk"}
	}
	d.id = block.NewID()
	if d.quotaBytes < quotaBytesMin || d.journalMaxBytes() < 2*b.fileBytes {
		return nil, b.tooSmall(d)
	}
	members = append(members, format.Member{Disk: d.id, Path: d.path})
	b.mu.Lock()
	b.generation++
	generation := b.generation
	b.mu.Unlock()
	if err := b.writeLabel(d, generation, true, members); err != nil {
		return nil, err
	}
	for _, o := range old {
		err := b.writeLabel(o, generation, false, members)
		if err == nil || b.isSuspect(o) { // which is only read, and whose label may be an older one
			continue
		}
		// Some disks may name the new one by now: a newer generation without it
		// makes them one again. A disk that took no label is dealt with on the way.
		b.mu.Lock()
		b.generation++
		b.mu.Unlock()
		losses, lerr := b.labelSet(nil)
		if lerr == nil {
			lerr = errNotJoined // and those that are left are one again
		}
		return losses, errors.Join(fmt.Errorf("the directory %s does not join: %w", d.path, err), lerr)
	}
	// It is a member from here on.
	b.mu.Lock()
	b.labelled = generation
	for _, o := range b.disks {
		if o.path == d.path { // what failed there before is forgotten
			o.unlock()
		}
	}
	b.disks = append(slices.DeleteFunc(slices.Clone(b.disks), func(o *disk) bool { return o.path == d.path }), d)
	b.countDisks()
	b.mu.Unlock()
	err = b.writeLabel(d, generation, false, members)
	if err == nil {
		err = b.loadDisk(d)
	}
	if err == nil {
		b.log.Info("a directory has joined the buffer", "path", d.path, "device", d.device, "capacity", d.quotaBytes, "generation", generation)
		return nil, nil
	}
	losses, ferr := b.failDiskLocked(d, err)
	lock := d.lock
	d.lock = nil // Close would give it up as well
	if lock != nil {
		_ = lock.Close()
	}
	return losses, errors.Join(err, ferr)
}

func (b *Buffer) tooSmall(d *disk) error {
	return &SetupError{d.path, fmt.Sprintf("its size of %d bytes is too small", d.quotaBytes),
		fmt.Sprintf("give it at least %d bytes", max(quotaBytesMin, 4*b.fileBytes))}
}

// find returns the disk of a path, one of the set before one that has failed.
func (b *Buffer) find(dir string) (*disk, error) {
	dir = path.Clean(dir)
	b.mu.Lock()
	defer b.mu.Unlock()
	var found *disk
	for _, d := range b.disks {
		if path.Clean(d.path) == dir && (found == nil || found.failed != nil) {
			found = d
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s %w", dir, ErrNoDisk)
	}
	return found, nil
}

// Drain begins to move what a directory holds to the others; nothing new goes
// there. When it is empty it is taken out of the set and its files are removed; then
// Stats does not name it any more. What has no room waits for room. It is forgotten
// when the process ends. It fails if there is no other disk to move to.
func (b *Buffer) Drain(dir string) error {
	d, err := b.find(dir)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	others := slices.ContainsFunc(b.disks, func(o *disk) bool { return o != d && o.usable() })
	switch {
	case d.failed != nil:
		return fmt.Errorf("buffer directory %s has failed and is out of the set already: take it off the list with drc buffer remove %s", d.path, d.path)
	case d.suspect || d.draining:
		return nil // what it holds is being moved
	case !others:
		return fmt.Errorf("buffer directory %s: %w: add another one first with drc buffer add", d.path, errLastDisk)
	}
	d.draining, d.moved = true, 0
	b.log.Info("a buffer directory is drained", "path", d.path)
	b.mendDue.Store(true)
	b.wakeRun()
	return nil
}

// RemoveOptions say how a directory is removed.
type RemoveOptions struct {
	Path string
	// Force takes it out at once: what it alone holds is lost, which OnLoss is told.
	Force bool
}

// Remove takes a directory out of the set. What it holds is brought to the others
// first, also from what these hold themselves; if that cannot be, the directory
// stays and the error says why. With Force that is not tried. One that has failed
// is taken off the list.
func (b *Buffer) Remove(ctx context.Context, o RemoveOptions) error {
	d, err := b.find(o.Path)
	if err != nil {
		return err
	}
	b.mu.Lock()
	failed, suspect, was := d.failed != nil, d.suspect, d.draining
	others := slices.ContainsFunc(b.disks, func(o *disk) bool { return o != d && o.usable() })
	if !failed && others && !o.Force {
		d.draining = true
		b.mendDue.Store(true)
	}
	b.mu.Unlock()
	switch {
	case failed:
		b.forget(d)
		return nil
	case !others:
		return fmt.Errorf("buffer directory %s: %w: add another one first with drc buffer add", d.path, errLastDisk)
	case o.Force:
		b.setMu.Lock()
		losses, err := b.drop(d, errRemoved)
		b.setMu.Unlock()
		b.report(losses)
		if err != nil {
			return err
		}
		b.forget(d)
		return nil
	}
	for {
		b.mu.Lock()
		gone := d.failed != nil
		b.mu.Unlock()
		if gone { // it was empty, or failed meanwhile
			b.forget(d)
			return nil
		}
		did, err := b.mend(ctx)
		if did && err == nil {
			continue
		}
		b.mu.Lock()
		if d.failed != nil {
			b.mu.Unlock()
			continue
		}
		d.draining = was
		if suspect {
			d.suspect = true
		}
		b.mu.Unlock()
		b.roomChanged()
		if err == nil {
			err = errors.New("the other directories have no room for what it holds")
		}
		return fmt.Errorf("buffer directory %s stays: %w: make room, or lose what only it holds with --force", d.path, err)
	}
}

// finish takes a disk out of the set that holds nothing any more.
func (b *Buffer) finish(d *disk) error {
	b.setMu.Lock()
	b.mu.Lock()
	cause, suspect := errDrained, d.suspect
	if suspect {
		cause = d.lastErr
	}
	ok := d.failed == nil && (d.suspect || d.draining)
	b.mu.Unlock()
	if !ok {
		b.setMu.Unlock()
		return nil
	}
	losses, err := b.drop(d, cause)
	b.setMu.Unlock()
	b.report(losses)
	if err != nil || suspect {
		return err
	}
	b.clean(d)
	b.forget(d)
	b.log.Info("a buffer directory is out of the set", "path", d.path)
	return nil
}

// forget takes a disk that is out of the set off the list.
func (b *Buffer) forget(d *disk) {
	b.mu.Lock()
	b.disks = slices.DeleteFunc(slices.Clone(b.disks), func(o *disk) bool { return o == d })
	lock := d.lock
	d.lock = nil
	b.mu.Unlock()
	if lock != nil {
		_ = lock.Close()
	}
}

// clean removes the buffer's files from a directory that was drained, its label
// last: until then it says that it was dropped. What cannot be removed stays.
func (b *Buffer) clean(d *disk) {
	remove := func(parts ...string) {
		if err := b.fs.Remove(b.path(d, parts...)); err != nil {
			b.log.Warn("a file of a drained directory could not be removed", "path", b.path(d, parts...), "err", err)
		}
	}
	entries, _ := b.fs.ReadDir(b.path(d, journalFolder))
	for _, e := range entries {
		remove(journalFolder, e.Name)
	}
	groups, _ := b.fs.ReadDir(b.path(d, spoolFolder))
	for _, g := range groups {
		entries, _ := b.fs.ReadDir(b.path(d, spoolFolder, g.Name))
		for _, e := range entries {
			remove(spoolFolder, g.Name, e.Name)
		}
		remove(spoolFolder, g.Name)
	}
	bitmaps, _ := b.fs.ReadDir(b.path(d, bitmapFolder))
	for _, e := range bitmaps {
		remove(bitmapFolder, e.Name)
	}
	if len(bitmaps) > 0 {
		remove(bitmapFolder)
	}
	remove(journalFolder)
	remove(spoolFolder)
	remove(labelName)
	_ = b.fs.SyncDir(d.path)
}

// mendSoon has Run look for what is to be mended.
func (b *Buffer) mendSoon() {
	b.mendDue.Store(true)
	b.wakeRun()
}

// Renew begins anew on empty directories after the buffer was lost (ErrLost) while
// its owner lives. On return they are the set, durably, with a generation above
// the lost one's, so that the old directories are refused should they come back.
// Batches that are in memory live on; of those that were in files OnLoss is told.
// Journals stay failed until ResetJournal says where each begins: with the Seq
// behind all that was captured.
//
// What the owner does, in this order: hold up its writers; write what it has in
// memory (its overlay, Journal.Unsynced) to the volumes and sync them; note
// durably that the volumes must be compared with their history; Renew; ResetJournal
// for each group; let the writers go on. A crash before the reset leaves a buffer
// that holds nothing of the group, which a start after that note finds.
func (b *Buffer) Renew(ctx context.Context, dirs []DirOptions) error {
	b.setMu.Lock()
	losses, err := b.renewLocked(ctx, dirs)
	b.setMu.Unlock()
	b.report(losses)
	if err != nil {
		return err
	}
	for _, s := range b.openSpools() {
		s.noteLost(ErrLost)
	}
	b.roomChanged()
	b.mendSoon()
	return nil
}

func (b *Buffer) renewLocked(ctx context.Context, dirs []DirOptions) (losses []Loss, err error) {
	lost := false
	for _, j := range b.openJournals() {
		lost = lost || errors.Is(j.Err(), ErrLost)
	}
	if !lost {
		return nil, errors.New("the buffer is not lost: add directories with drc buffer add")
	}
	if len(dirs) == 0 || len(dirs) > format.MaxBufferDisks {
		return nil, fmt.Errorf("a buffer has 1 to %d directories, not %d", format.MaxBufferDisks, len(dirs))
	}
	old := b.all()
	var fresh []*disk
	defer func() {
		if err != nil {
			for _, d := range fresh {
				d.unlock()
			}
		}
	}()
	var members []format.Member
	for _, o := range dirs {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		// A directory may have been replaced by an empty one of the same name.
		for _, d := range old {
			if path.Clean(d.path) == path.Clean(o.Path) {
				d.unlock()
			}
		}
		d, label, err := b.openDisk(o)
		if d != nil {
			fresh = append(fresh, d)
		}
		if err != nil {
			return nil, err
		}
		if label != nil && !label.Joining {
			return nil, &SetupError{d.path, "it holds files of the buffer that was lost", "empty it, or name another directory"}
		}
		d.id = block.NewID()
		if d.quotaBytes < quotaBytesMin || d.journalMaxBytes() < 2*b.fileBytes {
			return nil, b.tooSmall(d)
		}
		members = append(members, format.Member{Disk: d.id, Path: d.path})
	}
	b.mu.Lock()
	b.generation++
	generation := b.generation
	b.mu.Unlock()
	for _, joining := range []bool{true, false} {
		for _, d := range fresh {
			if err := b.writeLabel(d, generation, joining, members); err != nil {
				return nil, err
			}
		}
	}
	for _, d := range fresh {
		if err := b.loadDisk(d); err != nil {
			return nil, fmt.Errorf("open buffer directory %s: %w", d.path, err)
		}
	}
	b.mu.Lock()
	b.labelled = generation
	b.disks = fresh
	for _, d := range old {
		if d.failed == nil {
			d.failed = ErrLost
		}
	}
	b.countDisks()
	b.mu.Unlock()
	for _, d := range old {
		losses = append(losses, b.strip(d)...)
		go d.unlock() // it may hang
	}
	return losses, nil
}

// noteAgain writes the mark to every disk, whatever it says: one of them lacks it.
func (j *Journal) noteAgain() error {
	j.mu.Lock()
	begun, failed := j.next > 0, j.err
	j.mu.Unlock()
	if !begun || failed != nil {
		return nil
	}
	j.markMu.Lock()
	j.mark.Oldest = 0
	j.markMu.Unlock()
	return j.writeMark()
}
