package dir

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"drc/internal/object"

	"golang.org/x/sys/unix"
)

const (
	// temporaryDir holds unfinished files. The tilde is in no object's name, so
	// no object can be in there.
	temporaryDir = ".tmp~"
	// temporaryAge is when a temporary file can no longer belong to a writer.
	temporaryAge = 24 * time.Hour
	// linkAttempts bounds how often Put makes a folder that someone removed.
	linkAttempts = 3
)

// Put implements object.Store.
func (s *Store) Put(ctx context.Context, name string, body []byte) (object.Answer, error) {
	if err := s.check(ctx, "put", name); err != nil {
		return object.Answer{}, err
	}
	final := s.path(name)
	// A name that is taken needs no temporary file.
	if _, err := os.Lstat(final); err == nil {
		return s.compare(ctx, name, body)
	}
	temporary, err := s.writeTemporary(ctx, body)
	if err != nil {
		return object.Answer{}, s.failed("put", name, err)
	}
	// After the link this removes the second name, after the rename nothing.
	defer os.Remove(temporary)

	for attempt := 1; ; attempt++ {
		if err := s.makeDirs(path.Dir(name)); err != nil {
			return object.Answer{}, s.failed("put", name, err)
		}
		err = linkNoReplace(temporary, final)
		if !errors.Is(err, fs.ErrNotExist) || attempt == linkAttempts {
			break
		}
		// Someone removed the folder or the temporary file. Only the folder can
		// be made again.
		if _, statErr := os.Lstat(temporary); statErr != nil {
			break
		}
		s.durable.Clear()
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		return s.compare(ctx, name, body)
	case err != nil:
		return object.Answer{}, s.failed("put", name, err)
	}
	if err := syncPath(filepath.Dir(final)); err != nil {
		return object.Answer{}, s.failed("put", name, err)
	}
	return object.Answer{Date: time.Now()}, nil
}

// compare decides about a Put that met an existing object. Its writer may have
// died between link and sync, so an equal object is synced here too before it
// counts.
func (s *Store) compare(ctx context.Context, name string, body []byte) (object.Answer, error) {
	file, size, err := s.open(ctx, "compare", name)
	if err != nil {
		if errors.Is(err, object.ErrNotFound) {
			// A folder, or an object that was deleted a moment ago.
			if info, statErr := os.Stat(s.path(name)); statErr == nil && info.IsDir() {
				return object.Answer{}, fmt.Errorf("put %s in %s: %w: it is a folder of other objects", name, s.URL(), object.ErrExists)
			}
			return object.Answer{}, fmt.Errorf("put %s in %s: the object was deleted at the same time", name, s.URL())
		}
		return object.Answer{}, err
	}
	defer file.Close()
	equal := size == int64(len(body))
	buffer := make([]byte, min(len(body), pieceSize))
	for off := 0; equal && off < len(body); {
		if err := ctx.Err(); err != nil {
			return object.Answer{}, s.failed("put", name, err)
		}
		piece := buffer[:min(len(body)-off, pieceSize)]
		if _, err := file.ReadAt(piece, int64(off)); err != nil && !errors.Is(err, io.EOF) {
			return object.Answer{}, s.failed("put", name, err)
		}
		equal = bytes.Equal(piece, body[off:off+len(piece)])
		off += len(piece)
	}
	if !equal {
		return object.Answer{}, s.failed("put", name, object.ErrExists)
	}
	if err := file.Sync(); err != nil {
		return object.Answer{}, s.failed("put", name, err)
	}
	if err := s.makeDirs(path.Dir(name)); err != nil {
		return object.Answer{}, s.failed("put", name, err)
	}
	if err := syncPath(filepath.Dir(s.path(name))); err != nil {
		return object.Answer{}, s.failed("put", name, err)
	}
	return object.Answer{Date: time.Now()}, nil
}

// writeTemporary writes and syncs a file under a name that nobody else has.
func (s *Store) writeTemporary(ctx context.Context, body []byte) (_ string, err error) {
	if s.uncovered() {
		return "", s.errUncovered()
	}
	dir := filepath.Join(s.root, temporaryDir)
	// Not MkdirAll: a missing root stays missing.
	if err := os.Mkdir(dir, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	name := filepath.Join(dir, rand.Text())
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(name)
		}
	}()
	for rest := body; len(rest) > 0; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := file.Write(rest[:min(len(rest), pieceSize)])
		if err != nil {
			return "", err
		}
		rest = rest[n:]
	}
	if err := file.Sync(); err != nil {
		return "", err
	}
	return name, file.Close()
}

// makeDirs makes the folders of a relative slash-separated path below the root
// and syncs the entry of each, up to the root. The one that exists may be
// another writer's who has not synced it yet.
func (s *Store) makeDirs(relative string) error {
	if relative == "." {
		return nil
	}
	if _, ok := s.durable.Load(relative); ok {
		return nil
	}
	parent := path.Dir(relative)
	if err := s.makeDirs(parent); err != nil {
		return err
	}
	if err := os.Mkdir(s.path(relative), 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncPath(s.path(parent)); err != nil {
		return err
	}
	s.durable.Store(relative, nil)
	return nil
}

// cleanTemporary removes what dead writers left. Failing at it is no failure:
// the files cost only space, and a missing root shows when it is used.
func (s *Store) cleanTemporary(now time.Time) {
	dir := filepath.Join(s.root, temporaryDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() && now.Sub(info.ModTime()) > temporaryAge {
			os.Remove(filepath.Join(dir, entry.Name()))
		}
	}
}

// createRoot makes root and what is missing above it, and syncs what it made.
func createRoot(root string) error {
	err := os.Mkdir(root, 0o777)
	switch {
	case errors.Is(err, fs.ErrExist):
		info, err := os.Stat(root)
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s is not a directory", root)
		}
		return err
	case errors.Is(err, fs.ErrNotExist) && filepath.Dir(root) != root:
		if err := createRoot(filepath.Dir(root)); err != nil {
			return err
		}
		if err := os.Mkdir(root, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	case err != nil:
		return err
	}
	return syncPath(filepath.Dir(root))
}

// linkNoReplace gives the file from the name to, unless to exists: then it
// returns an error that is fs.ErrExist. File systems without hard links mostly
// have a rename that does not replace.
func linkNoReplace(from, to string) error {
	err := os.Link(from, to)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) {
		return renameNoReplace(from, to)
	}
	return err
}

func renameNoReplace(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: the file system of %s has neither hard links nor a rename that does not replace (%w); use ext4, xfs, btrfs or zfs",
			object.ErrUnsupported, filepath.Dir(to), err)
	case err != nil:
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// syncPath makes the entries of a directory durable.
func syncPath(dir string) error {
	file, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer file.Close()
	return file.Sync()
}
