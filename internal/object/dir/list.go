package dir

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"slices"
	"strings"

	"drc/internal/object"

	"golang.org/x/sys/unix"
)

// List implements object.Store. It holds one folder's entries for each level in
// memory, and does not open folders that cannot have anything to yield.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		if err := object.CheckPrefix(prefix); err != nil {
			yield(object.Info{}, err)
			return
		}
		// The walk begins at the deepest folder that holds all of the prefix.
		folder := prefix[:strings.LastIndexByte(prefix, '/')+1]
		err := s.walk(ctx, folder, prefix, after, func(info object.Info) bool { return yield(info, nil) })
		if err != nil && !errors.Is(err, errStopped) {
			yield(object.Info{}, s.failed("list", prefix, err))
		}
	}
}

// ListDirs implements object.Store. Folders without any object are left out.
func (s *Store) ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := object.CheckDirPrefix(prefix); err != nil {
			yield("", err)
			return
		}
		entries, err := s.readDir(ctx, prefix)
		if err != nil {
			yield("", s.failed("list", prefix, err))
			return
		}
		dirs := make([]string, 0, len(entries))
		for _, entry := range entries {
			if element, isDir := strings.CutSuffix(entry, "/"); isDir {
				dirs = append(dirs, element)
			}
		}
		slices.Sort(dirs)
		for _, element := range dirs {
			folder := prefix + element + "/"
			err := s.walk(ctx, folder, folder, "", func(object.Info) bool { return false })
			switch {
			case err == nil: // nothing in there
			case !errors.Is(err, errStopped):
				yield("", s.failed("list", prefix, err))
				return
			case !yield(element, nil):
				return
			}
		}
	}
}

// errStopped says that whoever receives the objects wants no more.
var errStopped = errors.New("listing stopped")

// walk calls visit for the objects in folder, which is empty or ends in a slash,
// in bytewise order of their full names.
func (s *Store) walk(ctx context.Context, folder, prefix, after string, visit func(object.Info) bool) error {
	entries, err := s.readDir(ctx, folder)
	if err != nil {
		return err
	}
	// Folders carry a slash at the end, so sorting entries sorts the full names
	// below them: "a.b" comes before "a/c", "a0" after it.
	slices.Sort(entries)
	for _, entry := range entries {
		name := folder + entry
		if strings.HasSuffix(name, "/") {
			// All names in there sort before after if name does and is not a
			// beginning of it.
			if name < after && !strings.HasPrefix(after, name) || !strings.HasPrefix(name, prefix) && !strings.HasPrefix(prefix, name) {
				continue
			}
			if err := s.walk(ctx, name, prefix, after, visit); err != nil {
				return err
			}
			continue
		}
		if name <= after || !strings.HasPrefix(name, prefix) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := os.Stat(s.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted since
		}
		if err != nil {
			return err
		}
		if !visit(object.Info{Name: name, Size: info.Size()}) {
			return errStopped
		}
	}
	return nil
}

// readDir returns the entries of a folder that can be part of an object's name,
// folders with a slash at the end, in no order. A folder that is not there has
// no entries, a root that is not there is an error.
func (s *Store) readDir(ctx context.Context, folder string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	file, err := os.Open(s.path(folder))
	if err != nil {
		return nil, s.ignoreAbsent(err)
	}
	defer file.Close()
	found, err := file.ReadDir(-1)
	if err != nil {
		return nil, s.ignoreAbsent(err)
	}
	entries := make([]string, 0, len(found))
	for _, entry := range found {
		name, mode := entry.Name(), entry.Type()
		if object.CheckElement(name) != nil {
			continue
		}
		if mode&fs.ModeSymlink != 0 {
			// An administrator may have put part of the store elsewhere.
			info, err := os.Stat(file.Name() + "/" + name)
			if err != nil {
				continue
			}
			mode = info.Mode().Type()
		}
		switch {
		case mode.IsDir():
			entries = append(entries, name+"/")
		case mode.IsRegular():
			entries = append(entries, name)
		}
	}
	return entries, nil
}

// ignoreAbsent returns nil for the error of a folder that is not there, or is a
// file, in a root that is there.
func (s *Store) ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		if missing := s.missing(err); !errors.Is(missing, object.ErrNotFound) {
			return missing
		}
		return nil
	}
	return err
}
