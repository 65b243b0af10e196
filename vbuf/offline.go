package vbuf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"

	"drc/internal/format"
	"drc/internal/vfs"
)

// offline is a buffer that nobody works with, as its labels tell it.
type offline struct {
	ruling *format.Label
	labels map[string]*format.Label // by path; those that can be read
	locks  []io.Closer
}

func (o *offline) close() {
	for _, l := range o.locks {
		_ = l.Close()
	}
}

// readLabels reads the labels of the directories given and of those that they
// name, and locks them: nobody may be working there.
func readLabels(fsys vfs.FS, dirs []string) (*offline, error) {
	o := &offline{labels: map[string]*format.Label{}}
	seen := map[string]bool{}
	for todo := slices.Clone(dirs); len(todo) > 0; todo = todo[1:] {
		dir := path.Clean(todo[0])
		if seen[dir] {
			continue
		}
		seen[dir] = true
		name := path.Join(dir, labelName)
		raw, err := vfs.ReadFile(fsys, name, format.MaxLabelBytes)
		var l *format.Label
		if err == nil {
			l, err = format.DecodeLabel(name, raw)
		}
		if err != nil {
			continue // missing, for whatever reason
		}
		lock, err := fsys.Lock(path.Join(dir, lockName))
		if errors.Is(err, vfs.ErrLocked) {
			o.close()
			return nil, &SetupError{dir, "another process uses it", "stop that one first, or ask it: pass the --state DIR that it was started with"}
		}
		if err != nil {
			continue
		}
		o.locks = append(o.locks, lock)
		o.labels[dir] = l
		if !l.Joining && (o.ruling == nil || l.Generation > o.ruling.Generation) {
			o.ruling = l
		}
		for _, m := range l.Members {
			todo = append(todo, m.Path)
		}
	}
	if o.ruling == nil {
		o.close()
		return nil, fmt.Errorf("no directory of a buffer was found at %v: pass the --state DIR of the agent, or mount its disks", dirs)
	}
	return o, nil
}

// at returns the path where a member is now, "" if it is missing.
func (o *offline) at(m format.Member) string {
	for p, l := range o.labels {
		if l.Disk == m.Disk {
			return p
		}
	}
	return ""
}

// ListOffline tells of a buffer that no agent works with, by the labels of the
// directories given and of those that these name: which are members, and which of
// them are missing, and how much there is in their files. The quotas are not known.
// It changes nothing.
func ListOffline(fsys vfs.FS, dirs []string) ([]DiskStats, error) {
	o, err := readLabels(fsys, dirs)
	if err != nil {
		return nil, err
	}
	defer o.close()
	var list []DiskStats
	for _, m := range o.ruling.Members {
		d := DiskStats{Path: m.Path, ID: m.Disk, State: "missing"}
		if p := o.at(m); p != "" {
			d.Path, d.State = p, "ok"
			if info, err := fsys.Stat(p); err == nil {
				d.Device = info.Device
			}
			d.JournalBytes, d.SegmentBytes = holds(fsys, p)
			d.UsedBytes = d.JournalBytes + d.SegmentBytes
		}
		list = append(list, d)
	}
	return list, nil
}

// holds is how much is in the files of a directory of a buffer. Which of the
// journal's files are free only a start finds out: they count as if they were not.
func holds(fsys vfs.FS, dir string) (journalBytes, segmentBytes int64) {
	sum := func(folder string) (n int64) {
		entries, _ := fsys.ReadDir(folder)
		for _, e := range entries {
			if info, err := fsys.Stat(path.Join(folder, e.Name)); err == nil && !e.IsDir {
				n += info.SizeBytes
			}
		}
		return n
	}
	groups, _ := fsys.ReadDir(path.Join(dir, spoolFolder))
	for _, g := range groups {
		if g.IsDir {
			segmentBytes += sum(path.Join(dir, spoolFolder, g.Name))
		}
	}
	return sum(path.Join(dir, journalFolder)), segmentBytes
}

// RemoveOffline takes a directory out of a buffer that no agent works with, durably:
// the others have labels of a new generation on return. One that is there is taken
// out by force only, as what it alone holds is then lost; what only a missing one
// held is lost already. A crash on the way leaves the old set or the new one.
func RemoveOffline(fsys vfs.FS, dirs []string, r RemoveOptions) error {
	o, err := readLabels(fsys, dirs)
	if err != nil {
		return err
	}
	defer o.close()
	l := *o.ruling
	l.Generation++
	l.Members = nil
	found := false
	var survivors []format.Member
	for _, m := range o.ruling.Members {
		at := o.at(m)
		if path.Clean(m.Path) == path.Clean(r.Path) || at != "" && at == path.Clean(r.Path) {
			if at != "" && !r.Force {
				return fmt.Errorf("buffer directory %s is there: what only it holds would be lost: start the agent and use drc buffer drain, or pass --force", at)
			}
			found = true
			continue
		}
		l.Members = append(l.Members, m)
		if at != "" {
			survivors = append(survivors, m)
		}
	}
	switch {
	case !found:
		return fmt.Errorf("%s %w: drc buffer list shows those there are", r.Path, ErrNoDisk)
	case len(survivors) == 0:
		return fmt.Errorf("buffer directory %s: %w that is there: make another one available first", r.Path, errLastDisk)
	}
	for _, m := range survivors {
		l.Disk = m.Disk
		if err := vfs.WriteFileAtomic(fsys, path.Join(o.at(m), labelName), l.Encode()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("label buffer directory %s: %w: try again", o.at(m), err)
		}
	}
	return nil
}
