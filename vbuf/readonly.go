package vbuf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// errReadOnly: the buffer was opened to be read.
var errReadOnly = errors.New("the buffer was opened to be read only")

// ReadOptions say which buffer is read.
type ReadOptions struct {
	// Dirs are directories of the buffer; those that their labels name are found by
	// themselves.
	Dirs   []string
	FS     vfs.FS       // nil: the real one
	Logger *slog.Logger // nil: none
}

// Reading is a buffer that nobody works with, opened to look at what is in it.
// Nothing in its directories changes, whatever is found there: mirrors are not
// healed, tails not copied, labels not written, and the next agent finds it as the
// last one has left it. The directories are locked until Close.
//
// What it tells survives the death of the agent, and not a power cut: all records
// that are there count as durable, as nobody will write behind them meanwhile.
type Reading struct{ b *Buffer }

// OpenToRead opens the buffer to which the directories given belong. It fails with
// a *SetupError if somebody works with it, or if a member is missing: what only
// that one holds would be missed without a word.
func OpenToRead(ctx context.Context, opt ReadOptions) (*Reading, error) {
	if opt.FS == nil {
		opt.FS = vfs.OS()
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	for _, dir := range opt.Dirs {
		name := path.Join(dir, labelName)
		if _, err := opt.FS.Stat(name); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, &SetupError{dir, "it is no buffer directory (there is no file " + labelName + " in it)", "name a directory that an agent was given with --buffer (drc buffer list shows them)"}
			}
			return nil, &SetupError{dir, "it cannot be read: " + err.Error(), "mend that, or mount its disk"}
		}
	}
	o, err := readLabels(opt.FS, opt.Dirs)
	if err != nil {
		return nil, err
	}
	b := &Buffer{
		opt: Options{Repo: o.ruling.Repo, Host: o.ruling.Host, Logger: opt.Logger, StallAfter: defaultStallAfter, RetryEvery: time.Second},
		fs:  readOnlyFS{opt.FS}, log: opt.Logger, readOnly: true, generation: o.ruling.Generation, labelled: o.ruling.Generation,
		fileBytes: fileBytesMin,
		journals:  map[block.GroupID]*Journal{}, spools: map[block.GroupID]*Spool{}, found: map[block.GroupID][]foundFile{},
		kick: make(chan struct{}, 1), scrubNow: make(chan struct{}, 1), quit: make(chan struct{}), began: time.Now(),
	}
	r := &Reading{b}
	for _, m := range o.ruling.Members {
		at := o.at(m)
		if at == "" {
			o.close()
			close(b.quit)
			return nil, &SetupError{m.Path, fmt.Sprintf("this member of the buffer (disk %s) is missing", m.Disk),
				"make it available again and name it, for what only it holds is missed without it; if it is gone for good, take it out: drc buffer remove " + m.Path}
		}
		d := b.newDisk(DirOptions{Path: at})
		d.id = m.Disk
		b.disks = append(b.disks, d)
	}
	b.locks = o.locks
	b.countDisks()
	for _, d := range b.disks {
		err := ctx.Err()
		if err == nil {
			err = b.loadDisk(d)
		}
		if err != nil {
			r.Close()
			return nil, fmt.Errorf("read buffer directory %s: %w", d.path, err)
		}
	}
	return r, nil
}

// IsBufferDir reports whether dir is a directory of some buffer.
func IsBufferDir(files vfs.FS, dir string) bool {
	_, err := files.Stat(path.Join(dir, labelName))
	return err == nil
}

// ReadLabel is what the label in dir says of a buffer that may be in use.
func ReadLabel(files vfs.FS, dir string) (*format.Label, error) {
	name := path.Join(dir, labelName)
	raw, err := vfs.ReadFile(files, name, format.MaxLabelBytes)
	if err != nil {
		return nil, fmt.Errorf("read the label of buffer directory %s: %w", dir, err)
	}
	return format.DecodeLabel(name, raw)
}

// Disks are the disks of the buffer.
func (r *Reading) Disks() []block.ID {
	var list []block.ID
	for _, d := range r.b.disks {
		list = append(list, d.id)
	}
	return list
}

// Repo is the repository that the buffer belongs to.
func (r *Reading) Repo() block.ID { return r.b.opt.Repo }

// Host is the state folder that owns it.
func (r *Reading) Host() block.ID { return r.b.opt.Host }

// Dirs are the directories of the buffer.
func (r *Reading) Dirs() []string {
	var list []string
	for _, d := range r.b.disks {
		list = append(list, d.path)
	}
	return list
}

// Groups are the groups of which there is something in the buffer.
func (r *Reading) Groups() ([]block.GroupID, error) { return r.b.Groups() }

// Journal returns what the journal of a group holds: only to be read. Records that
// were durable and are lost are told by Journal.Damaged, and Read fails there.
func (r *Reading) Journal(ctx context.Context, g block.GroupID) (*Journal, error) {
	return r.b.journal(ctx, g, recoverDamaged)
}

// Spool returns the batches of a group: only to be read.
func (r *Reading) Spool(ctx context.Context, g block.GroupID) (*Spool, error) {
	return r.b.Spool(ctx, g)
}

// Bitmap returns the bitmap of a group: only to be read.
func (r *Reading) Bitmap(ctx context.Context, g block.GroupID) (*Bitmap, error) {
	return r.b.Bitmap(ctx, g)
}

// Close gives up the locks.
func (r *Reading) Close() {
	r.b.mu.Lock()
	closed := r.b.closed
	r.b.closed = true
	bitmaps := slices.Clone(r.b.bitmaps)
	r.b.mu.Unlock()
	if closed {
		return
	}
	for _, m := range bitmaps {
		m.Close()
	}
	for _, l := range r.b.locks {
		_ = l.Close()
	}
	close(r.b.quit)
}

// readOnlyFS refuses whatever would change a file. It guards the promise of
// Reading: what recovery would do beyond it is left out, not tried.
type readOnlyFS struct{ vfs.FS }

func (readOnlyFS) Create(name string) (vfs.File, error) { return nil, refuse("make", name) }
func (readOnlyFS) Remove(name string) error             { return refuse("remove", name) }
func (readOnlyFS) Rename(name, _ string) error          { return refuse("rename", name) }
func (readOnlyFS) MkdirAll(dir string) error            { return refuse("make", dir) }
func (readOnlyFS) SyncDir(dir string) error             { return refuse("sync", dir) }
func (readOnlyFS) Lock(name string) (io.Closer, error)  { return nil, refuse("lock", name) }

func (f readOnlyFS) Open(name string) (vfs.File, error) {
	file, err := f.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return readOnlyFile{file, name}, nil
}

type readOnlyFile struct {
	vfs.File
	name string
}

func (f readOnlyFile) WriteAt([]byte, int64) (int, error) { return 0, refuse("write", f.name) }
func (f readOnlyFile) WriteVecAt([][]byte, int64) error   { return refuse("write", f.name) }
func (f readOnlyFile) Sync() error                        { return refuse("sync", f.name) }
func (f readOnlyFile) Preallocate(int64) error            { return refuse("extend", f.name) }
func (f readOnlyFile) Truncate(int64) error               { return refuse("cut", f.name) }

func refuse(what, name string) error { return fmt.Errorf("%s %s: %w", what, name, errReadOnly) }
