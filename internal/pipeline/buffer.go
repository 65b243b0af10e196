package pipeline

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"drc/internal/control"
	"drc/internal/state"
	"drc/vbuf"
)

// bufferFile remembers what became of the buffer's directories at work.
const bufferFile = "buffer.json"

// bufferNotes are what a start must know of the buffer beside its configuration.
// Who is a member the labels in the directories say; these notes only say where
// they are.
type bufferNotes struct {
	Dirs []bufferDir `json:"dirs"` // of the last start, kept up to date
	// Tried were given to a start that could not use them together: one that is
	// missing is taken out of a buffer that nothing else tells of.
	Tried []bufferDir `json:"tried,omitempty"`
	Added []bufferDir `json:"added"` // by drc buffer add; used beside those of the configuration
	// Removed were taken out by drc buffer drain or remove: if the configuration
	// still names one, the next start would take it in again, empty.
	Removed []string `json:"removed"`
}

type bufferDir struct {
	Path      string `json:"path"`
	SizeBytes int64  `json:"size_bytes,omitempty"`
}

func loadBufferNotes(dir *state.Dir) (n bufferNotes, err error) {
	_, err = dir.LoadJSON(&n, bufferFile)
	return n, err
}

func without(list []bufferDir, path string) []bufferDir {
	return slices.DeleteFunc(slices.Clone(list), func(d bufferDir) bool { return d.Path == path })
}

// BufferDirs are the directories that a start uses: those given by flags or
// configuration (or the default one, buffer in the state folder) and those that
// were added at work. It refuses one that was taken out at work and is still given.
func BufferDirs(dir *state.Dir, given []vbuf.DirOptions) ([]vbuf.DirOptions, error) {
	n, err := loadBufferNotes(dir)
	if err != nil {
		return nil, err
	}
	if own := dir.Path("buffer"); len(given) == 0 && !slices.Contains(n.Removed, own) {
		given = []vbuf.DirOptions{{Path: own}}
	}
	all := slices.Clone(given)
	for _, d := range given {
		if slices.Contains(n.Removed, d.Path) {
			return nil, &control.CodedError{Code: 2, Err: fmt.Errorf("buffer directory %s was taken out with drc buffer drain or remove, and is still given: take it out of the configuration (--buffer, [[buffer]]); to use it again start without it and run drc buffer add %s", d.Path, d.Path)}
		}
	}
	for _, d := range n.Added {
		if !slices.ContainsFunc(given, func(o vbuf.DirOptions) bool { return o.Path == d.Path }) {
			all = append(all, vbuf.DirOptions{Path: d.Path, SizeBytes: d.SizeBytes})
		}
	}
	return all, nil
}

// noteBuffer remembers with which directories the buffer was opened, or could not be.
func noteBuffer(dir *state.Dir, dirs []vbuf.DirOptions, opened bool) error {
	n, err := loadBufferNotes(dir)
	if err != nil {
		return err
	}
	var now []bufferDir
	for _, d := range dirs {
		now = append(now, bufferDir{Path: d.Path})
	}
	before := n
	if opened {
		n.Dirs, n.Tried = now, nil
	} else {
		n.Tried = now
	}
	if slices.Equal(n.Dirs, before.Dirs) && slices.Equal(n.Tried, before.Tried) {
		return nil
	}
	return dir.SaveJSON(n, bufferFile)
}

// Buffer implements control.Agent: it adds, drains or removes a directory of the
// buffer. A drain goes on when the caller has gone.
func (a *Agent) Buffer(ctx context.Context, r control.BufferRequest) (control.Buffer, error) {
	a.buffering.Lock()
	defer a.buffering.Unlock()
	if !a.IsServing() {
		return control.Buffer{}, errNotServing
	}
	var err error
	switch r.Action {
	case "add":
		err = a.addBuffer(ctx, r)
	case "drain":
		err = a.drainBuffer(r)
	case "remove":
		if err = a.buffer.Remove(ctx, vbuf.RemoveOptions{Path: r.Path, Force: r.Force}); err == nil {
			err = a.noteGone(r.Path)
		}
	default:
		err = &control.CodedError{Code: 2, Err: fmt.Errorf("the buffer cannot %q: it can add, drain and remove", r.Action)}
	}
	if errors.Is(err, vbuf.ErrNoDisk) {
		err = &control.CodedError{Code: 3, Err: fmt.Errorf("%w: drc buffer list shows those there are", err)}
	}
	if err != nil {
		return control.Buffer{}, err
	}
	return a.Status().Buffer, nil
}

func (a *Agent) addBuffer(ctx context.Context, r control.BufferRequest) error {
	dirs, err := withQuotas(a.cfg.State.Files(), []vbuf.DirOptions{{Path: r.Path, SizeBytes: r.SizeBytes}})
	if err != nil {
		return err
	}
	a.buffer.Look() // an idle agent may not have noticed
	anew := a.isLost()
	if anew {
		err = a.renewBuffer(ctx, dirs[0])
	} else {
		err = a.buffer.Add(ctx, dirs[0])
		if errors.Is(err, vbuf.ErrLost) { // nobody had noticed until now
			anew = true
			err = a.renewBuffer(ctx, dirs[0])
		}
	}
	if err != nil {
		return err
	}
	a.notes.Lock()
	defer a.notes.Unlock()
	n, err := loadBufferNotes(a.cfg.State)
	if err == nil {
		if anew { // what was there before is gone
			for _, old := range n.Dirs {
				if old.Path != r.Path && !slices.Contains(n.Removed, old.Path) {
					n.Removed = append(n.Removed, old.Path)
				}
			}
			n.Dirs, n.Added = nil, nil
		}
		d := bufferDir{Path: r.Path, SizeBytes: r.SizeBytes}
		n.Dirs = append(without(n.Dirs, r.Path), bufferDir{Path: r.Path})
		n.Added = append(without(n.Added, r.Path), d)
		n.Removed = slices.DeleteFunc(n.Removed, func(p string) bool { return p == r.Path })
		err = a.cfg.State.SaveJSON(n, bufferFile)
	}
	if err != nil {
		return fmt.Errorf("%s has joined the buffer, but that could not be noted: %w: put it into the configuration before the next start", r.Path, err)
	}
	return nil
}

// drainPoll is how often it is looked whether a directory is empty.
const drainPoll = 200 * time.Millisecond

func (a *Agent) drainBuffer(r control.BufferRequest) error {
	if err := a.buffer.Drain(r.Path); err != nil {
		return err
	}
	a.mu.Lock()
	background := a.background
	a.mu.Unlock()
	if background == nil {
		return errNotServing
	}
	background(func(ctx context.Context) {
		t := time.NewTicker(drainPoll)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			disks := a.buffer.Stats().Disks
			i := slices.IndexFunc(disks, func(d vbuf.DiskStats) bool { return d.Path == r.Path })
			if i >= 0 && disks[i].State == "draining" {
				continue
			}
			if i < 0 {
				if err := a.noteGone(r.Path); err != nil {
					a.cfg.Logger.Warn("a drained directory could not be noted; take it out of the configuration before the next start", "path", r.Path, "error", err)
				}
			}
			return
		}
	})
	return nil
}

// noteGone remembers that a directory was taken out.
func (a *Agent) noteGone(path string) error {
	a.notes.Lock()
	defer a.notes.Unlock()
	return forgetBuffer(a.cfg.State, path)
}

func forgetBuffer(dir *state.Dir, path string) error {
	n, err := loadBufferNotes(dir)
	if err != nil {
		return err
	}
	n.Dirs, n.Added, n.Tried = without(n.Dirs, path), without(n.Added, path), without(n.Tried, path)
	if !slices.Contains(n.Removed, path) {
		n.Removed = append(n.Removed, path)
	}
	return dir.SaveJSON(n, bufferFile)
}

// knownDirs are the directories in which a buffer of this state folder is looked
// for.
func knownDirs(dir *state.Dir) ([]string, error) {
	n, err := loadBufferNotes(dir)
	if err != nil {
		return nil, err
	}
	dirs := []string{dir.Path("buffer")}
	for _, d := range slices.Concat(n.Dirs, n.Added) {
		dirs = append(dirs, d.Path)
	}
	return dirs, nil
}

// triedDirs are knownDirs and those with which the last start failed.
func triedDirs(dir *state.Dir) ([]string, error) {
	dirs, err := knownDirs(dir)
	if err != nil {
		return nil, err
	}
	n, err := loadBufferNotes(dir)
	for _, d := range n.Tried {
		if !slices.Contains(dirs, d.Path) {
			dirs = append(dirs, d.Path)
		}
	}
	return dirs, err
}

// ListBufferOffline tells of the buffer of a state folder whose agent does not run.
func ListBufferOffline(dir *state.Dir) (control.Buffer, error) {
	b := control.Buffer{Disks: []control.Disk{}}
	dirs, err := triedDirs(dir)
	if err != nil {
		return b, err
	}
	list, err := vbuf.ListOffline(dir.Files(), dirs)
	if err != nil {
		return b, err
	}
	for _, d := range list {
		b.Disks = append(b.Disks, diskStatus(d))
	}
	return b, nil
}

// RemoveBufferOffline takes a directory out of the buffer of a state folder whose
// agent does not run. One that is no member of the buffer, as it was dropped or
// belongs to another one, is no longer used by a start; nothing in it is changed.
func RemoveBufferOffline(dir *state.Dir, r control.BufferRequest) error {
	dirs, err := triedDirs(dir)
	if err != nil {
		return err
	}
	err = vbuf.RemoveOffline(dir.Files(), dirs, vbuf.RemoveOptions{Path: r.Path, Force: r.Force})
	if errors.Is(err, vbuf.ErrNoDisk) && !slices.Contains(dirs[1:], r.Path) {
		return &control.CodedError{Code: 3, Err: err}
	}
	if err != nil && !errors.Is(err, vbuf.ErrNoDisk) {
		return err
	}
	return forgetBuffer(dir, r.Path)
}

func diskStatus(d vbuf.DiskStats) control.Disk {
	return control.Disk{
		Path: d.Path, ID: d.ID.String(), Device: d.Device, State: d.State, CapacityBytes: d.CapacityBytes, UsedBytes: d.UsedBytes,
		JournalBytes: d.JournalBytes, SegmentBytes: d.SegmentBytes, LastError: d.LastError,
	}
}
