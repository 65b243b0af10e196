package overlay

import (
	"errors"
	"fmt"
	"syscall"

	"drc/internal/block"
)

// Errors by which callers decide. Damage of the sidecar is a
// *format.CorruptError.
var (
	// ErrNotOverlay: the file exists and is not an overlay. Nothing was touched.
	ErrNotOverlay = errors.New("it is not an overlay that DRC made")
	// ErrNoFile: the sidecar is there, and the file with the data is not.
	ErrNoFile = errors.New("the file with the written data is missing")
	// ErrInUse: another process has the overlay open.
	ErrInUse = errors.New("in use by another process")
	// ErrNeedsBase: the overlay is not complete, and no base was given.
	ErrNeedsBase = errors.New("a part of the volume is still in the stores only")
)

// OtherBaseError says that an overlay belongs to another base than the one that
// it was to be opened over.
type OtherBaseError struct {
	File  string
	Is    Identity // what it is an overlay of
	Asked Identity
}

func (e *OtherBaseError) Error() string {
	is, asked := e.Is.short(), e.Asked.short()
	for _, x := range []struct {
		what      string
		is, asked fmt.Stringer
	}{
		{"repository", e.Is.Repo, e.Asked.Repo}, {"group", e.Is.Group, e.Asked.Group}, {"volume", e.Is.Volume, e.Asked.Volume},
		{"branch", e.Is.Branch, e.Asked.Branch}, {"entry", e.Is.Hash, e.Asked.Hash},
	} {
		if x.is.String() != x.asked.String() { // the widest difference says most
			is += fmt.Sprintf(" (%s %s)", x.what, x.is)
			asked += fmt.Sprintf(" (%s %s)", x.what, x.asked)
			break
		}
	}
	return fmt.Sprintf("%s is an overlay of another base: it is of %s, and %s was asked for: ask for the checkpoint that it is of, or choose another file", e.File, is, asked)
}

// short is what a person calls the base.
func (i Identity) short() string {
	return fmt.Sprintf("volume %q at seq %s, log entry %d, of %d bytes", i.VolumeName, i.Seq, i.Entry, i.SizeBytes)
}

// SyncError says that a sync of one of an overlay's files failed. What was
// written since the last flush that succeeded may be lost.
type SyncError struct {
	File string
	Err  error
}

func (e *SyncError) Error() string {
	return fmt.Sprintf("syncing %s failed, so what was written since the last flush may be lost, and no more writes are taken: "+
		"check the disk, then stop serving the volume and serve it again: %v", e.File, e.Err)
}

func (e *SyncError) Unwrap() error { return e.Err }

// baseError is an error of the base.
type baseError struct{ err error }

func (e *baseError) Error() string {
	return "read what was not written here from the stores: " + e.err.Error()
}
func (e *baseError) Unwrap() error { return e.err }

// isNoSpace reports whether a local file cannot take more.
func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

// local makes an error of doing something to a local file plain.
func local(doing, name string, err error) error {
	if err == nil {
		return nil
	}
	if isNoSpace(err) {
		return fmt.Errorf("%w: there is no room for %s: free some space on its file system; the volume goes on working: %w", block.ErrNoSpace, name, err)
	}
	return fmt.Errorf("%s %s: %w", doing, name, err)
}
