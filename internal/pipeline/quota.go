package pipeline

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"

	"drc/internal/control"
	"drc/internal/vfs"
	"drc/vbuf"
)

// Quotas of buffer directories.
const (
	// What a directory may take up if nothing else is said, or four fifths of
	// what it could take up now, if that is less.
	defaultQuotaBytes = 10 << 30
	// The least default: on a file system that is full an agent starts, and holds
	// writers back, rather than not at all.
	defaultQuotaMinBytes = 64 << 20
	// The least that may be asked for: some journal files and a batch.
	quotaMinBytes = 1 << 20
)

// withQuotas gives each buffer directory a quota, and refuses quotas that no
// buffer could have.
func withQuotas(files vfs.FS, dirs []vbuf.DirOptions) ([]vbuf.DirOptions, error) {
	refused := func(format string, args ...any) error {
		return &control.CodedError{Code: 2, Err: fmt.Errorf(format, args...)}
	}
	out := make([]vbuf.DirOptions, len(dirs))
	for i, d := range dirs {
		total, free, err := room(files, d.Path)
		if err != nil {
			return nil, fmt.Errorf("buffer directory %s: %w", d.Path, err)
		}
		switch {
		case d.SizeBytes == 0:
			own, err := usedBytes(d.Path)
			if err != nil {
				return nil, fmt.Errorf("buffer directory %s: %w", d.Path, err)
			}
			d.SizeBytes = max(defaultQuotaMinBytes, min(defaultQuotaBytes, (free+own)/5*4))
		case d.SizeBytes < quotaMinBytes:
			return nil, refused("buffer directory %s: its size of %d bytes is too small: give it at least %d bytes", d.Path, d.SizeBytes, int64(quotaMinBytes))
		case d.SizeBytes > total:
			return nil, refused("buffer directory %s: its size of %d bytes is more than its whole file system has, which is %d: give it less", d.Path, d.SizeBytes, total)
		}
		out[i] = d
	}
	return out, nil
}

// room is the size of the file system in which path is or will be, and what is
// free there.
func room(files vfs.FS, path string) (total, free int64, err error) {
	for {
		space, err := files.StatFS(path)
		if err == nil {
			return space.TotalBytes, space.FreeBytes, nil
		}
		up := filepath.Dir(path)
		if !errors.Is(err, fs.ErrNotExist) || up == path {
			return 0, 0, fmt.Errorf("look how large its file system is: %w", err)
		}
		path = up
	}
}

// usedBytes is what a directory takes up, 0 if there is none.
func usedBytes(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			var info fs.FileInfo
			if info, err = e.Info(); err == nil {
				n += info.Sys().(*syscall.Stat_t).Blocks * 512
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("look how much is in it: %w", err)
	}
	return n, nil
}
