package dir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"drc/internal/object"

	"golang.org/x/sys/unix"
)

// pieceSize is how much is read, written or compared between two looks at the
// context.
const pieceSize = 1 << 20

// Options of Open. The zero value is fit for use.
type Options struct {
	// Create makes the root directory, and what is missing above it, durably.
	// Without it a missing root is object.ErrNoBucket when it is used: it may be
	// a file system that is not mounted, which must not be written around.
	Create bool
}

// Store is an object.Store below one directory.
type Store struct {
	root string

	// durable holds the folders below the root, as slash-separated paths,
	// whose own entries were synced by this Store: it saves a sync of each
	// level on every Put. It is forgotten when this Store takes a folder away:
	// who makes that one again may be somebody who has not synced it yet.
	durable sync.Map

	mu   sync.Mutex
	used fs.FileInfo // the root when it was last seen in use; nil: not yet
}

var _ object.Store = (*Store)(nil)

// Open returns the store below root, an absolute path. It removes temporary
// files that dead writers left long ago.
func Open(root string, options Options) (*Store, error) {
	if !filepath.IsAbs(root) {
		return nil, fmt.Errorf("directory %q of a store must be an absolute path", root)
	}
	s := &Store{root: filepath.Clean(root)}
	if options.Create {
		if err := createRoot(s.root); err != nil {
			return nil, fmt.Errorf("create the store's directory %s: %w", s.root, err)
		}
	}
	s.cleanTemporary(time.Now())
	if info, err := os.Stat(s.root); err == nil {
		s.used = info
	}
	return s, nil
}

// uncovered reports whether another directory, that was never used as a store,
// is where the root was: the file system that was mounted there is gone. What
// is put into the directory below it would be hidden when it is back, and what
// is on it would be taken for lost.
func (s *Store) uncovered() bool {
	info, err := os.Stat(s.root)
	if err != nil || !info.IsDir() {
		return false // which shows by itself
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used != nil && !os.SameFile(s.used, info) {
		if _, err := os.Lstat(filepath.Join(s.root, temporaryDir)); errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	s.used = info // the first one, the same, or the store mounted anew
	return false
}

// errUncovered says so.
func (s *Store) errUncovered() error {
	return fmt.Errorf("%w: %s is another directory than before and was never used as a store; is it mounted?", object.ErrNoBucket, s.root)
}

// URL implements object.Store.
func (s *Store) URL() string { return (&url.URL{Scheme: "file", Path: s.root}).String() }

// Get implements object.Store.
func (s *Store) Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, object.Answer, error) {
	file, size, err := s.open(ctx, "get", name)
	if err != nil {
		return dst, object.Answer{}, err
	}
	defer file.Close()
	if size > limit {
		return dst, object.Answer{}, s.failed("get", name, fmt.Errorf("%w: %d bytes, the limit is %d", object.ErrTooLarge, size, limit))
	}
	body, err := readAt(ctx, file, 0, size, dst)
	if err != nil {
		return dst, object.Answer{}, s.failed("get", name, err)
	}
	return body, object.Answer{Date: time.Now()}, nil
}

// GetRange implements object.Store.
func (s *Store) GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error) {
	if err := object.CheckRange(name, off, n); err != nil {
		return dst, err
	}
	file, size, err := s.open(ctx, "read", name)
	if err != nil {
		return dst, err
	}
	defer file.Close()
	if off+n > size {
		return dst, s.failed("read", name, fmt.Errorf("%d bytes from %d: the object has %d bytes: %w", n, off, size, io.ErrUnexpectedEOF))
	}
	body, err := readAt(ctx, file, off, n, dst)
	if err != nil {
		return dst, s.failed("read", name, err)
	}
	return body, nil
}

// Stat implements object.Store.
func (s *Store) Stat(ctx context.Context, name string) (object.Info, error) {
	if err := s.check(ctx, "look up", name); err != nil {
		return object.Info{}, err
	}
	info, err := os.Stat(s.path(name))
	if err == nil && !info.Mode().IsRegular() {
		err = object.ErrNotFound
	}
	if err != nil {
		return object.Info{}, s.failed("look up", name, err)
	}
	return object.Info{Name: name, Size: info.Size()}, nil
}

// Delete implements object.Store. It takes folders away that hold nothing any
// more; a writer that is about to use one makes it again.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := s.check(ctx, "delete", name); err != nil {
		return err
	}
	path := s.path(name)
	err := unix.Unlink(path)
	if err != nil {
		err = s.failed("delete", name, &fs.PathError{Op: "unlink", Path: path, Err: err})
		if errors.Is(err, object.ErrNotFound) {
			return nil
		}
		return err
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		if err := syncPath(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s.failed("delete", name, err)
		}
		if dir == s.root || os.Remove(dir) != nil {
			return nil
		}
		s.durable.Clear()
	}
}

// Close implements object.Store. There is nothing to release.
func (s *Store) Close() error { return nil }

func (s *Store) path(name string) string { return filepath.Join(s.root, filepath.FromSlash(name)) }

func (s *Store) check(ctx context.Context, verb, name string) error {
	if err := object.CheckName(name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return s.failed(verb, name, err)
	}
	return nil
}

// open returns the object's file and its size.
func (s *Store) open(ctx context.Context, verb, name string) (*os.File, int64, error) {
	if err := s.check(ctx, verb, name); err != nil {
		return nil, 0, err
	}
	// O_NONBLOCK: a fifo of that name must not hang the call.
	file, err := os.OpenFile(s.path(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, s.failed(verb, name, err)
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = object.ErrNotFound
	}
	if err != nil {
		file.Close()
		return nil, 0, s.failed(verb, name, err)
	}
	return file, info.Size(), nil
}

// failed gives a system error the store's vocabulary and names the object.
func (s *Store) failed(verb, name string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR):
		err = s.missing(err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		err = fmt.Errorf("%w: %w", object.ErrDenied, err)
	}
	if verb == "put" && errors.Is(err, object.ErrNotFound) {
		// A folder or the temporary file vanished under the put. Callers of Put do
		// not expect ErrNotFound; the next attempt makes them again.
		err = errors.New(err.Error())
	}
	return fmt.Errorf("%s %s in %s: %w", verb, strings.TrimSuffix(name, "/"), s.URL(), err)
}

// missing says which is missing: the object or the root directory.
func (s *Store) missing(err error) error {
	info, rootErr := os.Stat(s.root)
	switch {
	case errors.Is(rootErr, fs.ErrNotExist), errors.Is(rootErr, unix.ENOTDIR):
		return fmt.Errorf("%w: %s; is it mounted?", object.ErrNoBucket, s.root)
	case rootErr != nil:
		return rootErr
	case !info.IsDir():
		return fmt.Errorf("%w: %s is not a directory", object.ErrNoBucket, s.root)
	case s.uncovered():
		return s.errUncovered()
	}
	return fmt.Errorf("%w: %w", object.ErrNotFound, err)
}

// readAt appends n bytes from off to dst. The file was seen to reach that far,
// so an early end means that someone cut it while it was read.
func readAt(ctx context.Context, file *os.File, off, n int64, dst []byte) ([]byte, error) {
	start := len(dst)
	dst = append(dst, make([]byte, n)...)
	for rest := dst[start:]; len(rest) > 0; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		piece := rest[:min(len(rest), pieceSize)]
		if _, err := file.ReadAt(piece, off); err != nil {
			if errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("the file became shorter while it was read")
			}
			return nil, err
		}
		rest, off = rest[len(piece):], off+int64(len(piece))
	}
	return dst, nil
}
