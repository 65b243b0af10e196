// Package mem is an object.Store in memory. It keeps every promise of the
// interface except that nothing outlives the process; simulations and tests of
// other packages run on it.
package mem

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"drc/internal/object"
)

// Options of New. The zero value is fit for use.
type Options struct {
	// Name appears in the store's URL, so that messages tell several apart.
	Name string
	// Now is the store's clock; the default is time.Now.
	Now func() time.Time
}

// Store keeps objects in a map. Stored bytes are never changed in place, so
// readers copy them without holding the lock.
type Store struct {
	name string
	now  func() time.Time

	mu      sync.RWMutex
	objects map[string][]byte
}

var _ object.Store = (*Store)(nil)

// New returns an empty store.
func New(options Options) *Store {
	if options.Now == nil {
		options.Now = time.Now
	}
	return &Store{name: options.Name, now: options.Now, objects: map[string][]byte{}}
}

// URL implements object.Store. stores.Open does not take this URL: another
// process could not see the same objects.
func (s *Store) URL() string { return "mem:" + s.name }

// Put implements object.Store.
func (s *Store) Put(ctx context.Context, name string, body []byte) (object.Answer, error) {
	if err := s.check(ctx, "put", name); err != nil {
		return object.Answer{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if there, ok := s.objects[name]; ok {
		if !bytes.Equal(there, body) {
			return object.Answer{}, s.failed("put", name, object.ErrExists)
		}
	} else {
		s.objects[name] = slices.Clone(body)
	}
	return object.Answer{Date: s.now()}, nil
}

// Get implements object.Store.
func (s *Store) Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, object.Answer, error) {
	body, err := s.body(ctx, "get", name)
	if err != nil {
		return dst, object.Answer{}, err
	}
	if int64(len(body)) > limit {
		return dst, object.Answer{}, s.failed("get", name, fmt.Errorf("%w: %d bytes, the limit is %d", object.ErrTooLarge, len(body), limit))
	}
	return append(dst, body...), object.Answer{Date: s.now()}, nil
}

// GetRange implements object.Store.
func (s *Store) GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error) {
	if err := object.CheckRange(name, off, n); err != nil {
		return dst, err
	}
	body, err := s.body(ctx, "read", name)
	if err != nil {
		return dst, err
	}
	if off+n > int64(len(body)) {
		return dst, s.failed("read", name, fmt.Errorf("%d bytes from %d: the object has %d bytes: %w", n, off, len(body), io.ErrUnexpectedEOF))
	}
	return append(dst, body[off:off+n]...), nil
}

// Stat implements object.Store.
func (s *Store) Stat(ctx context.Context, name string) (object.Info, error) {
	body, err := s.body(ctx, "look up", name)
	if err != nil {
		return object.Info{}, err
	}
	return object.Info{Name: name, Size: int64(len(body))}, nil
}

// List implements object.Store. It yields what was there when it began.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		if err := object.CheckPrefix(prefix); err != nil {
			yield(object.Info{}, err)
			return
		}
		var infos []object.Info
		s.mu.RLock()
		for name, body := range s.objects {
			if strings.HasPrefix(name, prefix) && name > after {
				infos = append(infos, object.Info{Name: name, Size: int64(len(body))})
			}
		}
		s.mu.RUnlock()
		slices.SortFunc(infos, func(a, b object.Info) int { return strings.Compare(a.Name, b.Name) })
		for _, info := range infos {
			if err := ctx.Err(); err != nil {
				yield(object.Info{}, s.failed("list", prefix, err))
				return
			}
			if !yield(info, nil) {
				return
			}
		}
		if err := ctx.Err(); err != nil {
			yield(object.Info{}, s.failed("list", prefix, err))
		}
	}
}

// ListDirs implements object.Store.
func (s *Store) ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := object.CheckDirPrefix(prefix); err != nil {
			yield("", err)
			return
		}
		if err := ctx.Err(); err != nil {
			yield("", s.failed("list", prefix, err))
			return
		}
		seen := map[string]bool{}
		s.mu.RLock()
		for name := range s.objects {
			if rest, ok := strings.CutPrefix(name, prefix); ok {
				if element, _, isDir := strings.Cut(rest, "/"); isDir {
					seen[element] = true
				}
			}
		}
		s.mu.RUnlock()
		dirs := make([]string, 0, len(seen))
		for element := range seen {
			dirs = append(dirs, element)
		}
		slices.Sort(dirs)
		for _, element := range dirs {
			if !yield(element, nil) {
				return
			}
		}
	}
}

// Delete implements object.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := s.check(ctx, "delete", name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, name)
	return nil
}

// Close implements object.Store. The objects stay, as they would in a real
// store, so that a simulated restart finds them.
func (s *Store) Close() error { return nil }

// Tamper replaces an object's bytes by what change makes of a copy of them: it
// is the damage that a real store must never do. It returns false if there is
// no such object.
func (s *Store) Tamper(name string, change func([]byte) []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	body, ok := s.objects[name]
	if ok {
		s.objects[name] = change(slices.Clone(body))
	}
	return ok
}

// Clone returns a store with the same objects that changes on its own, for
// trying several continuations from one state.
func (s *Store) Clone() *Store {
	s.mu.RLock()
	defer s.mu.RUnlock()
	clone := New(Options{Name: s.name, Now: s.now})
	for name, body := range s.objects {
		clone.objects[name] = body
	}
	return clone
}

func (s *Store) body(ctx context.Context, verb, name string) ([]byte, error) {
	if err := s.check(ctx, verb, name); err != nil {
		return nil, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	body, ok := s.objects[name]
	if !ok {
		return nil, s.failed(verb, name, object.ErrNotFound)
	}
	return body, nil
}

func (s *Store) check(ctx context.Context, verb, name string) error {
	if err := object.CheckName(name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return s.failed(verb, name, err)
	}
	return nil
}

func (s *Store) failed(verb, name string, err error) error {
	return fmt.Errorf("%s %s in %s: %w", verb, name, s.URL(), err)
}
