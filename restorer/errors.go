package restorer

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/object"
)

// Errors by which callers decide (exit status 3). Damage is a
// *format.CorruptError (exit status 4).
var (
	// ErrNoEntries: an agent has taken office in the group and has not written
	// history yet. It may be at work, or have died before it could.
	ErrNoEntries = errors.New("nothing of it is in the history yet")
	// ErrBehind: what the stores that answer hold ends before Config.UpTo. Others,
	// which do not answer now, hold more.
	ErrBehind = errors.New("the stores that answer are behind")
	// ErrNoSuchVolume: no group of the repository has a volume of that name.
	ErrNoSuchVolume = errors.New("no such volume")
	// ErrNoSuchPoint: the volume has no checkpoint there. The message says what
	// there is.
	ErrNoSuchPoint = errors.New("no such point")
)

// unreachableError says that a store did not answer, or not with what was
// asked for. The same request may succeed later.
type unreachableError struct {
	store string
	err   error
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("%s cannot be reached: %v", e.store, e.err)
}
func (e *unreachableError) Unwrap() error { return e.err }

func isUnreachable(err error) bool {
	var u *unreachableError
	return errors.As(err, &u)
}

// aboutObject reports whether err is the honest answer of a store that works:
// the object is absent or has another size.
func aboutObject(err error) bool {
	return errors.Is(err, object.ErrNotFound) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, object.ErrTooLarge)
}

// isDamage reports whether err says that what was read is not what was
// written.
func isDamage(err error) bool {
	var corrupt *format.CorruptError
	return errors.As(err, &corrupt) || errors.Is(err, crypt.ErrForged)
}

// Damage is an object that is missing or damaged on one store. The data was
// had from elsewhere.
type Damage struct {
	Object string // the object's name on the store
	Store  string // the store's URL
	Reason string
}

func (d Damage) String() string { return fmt.Sprintf("%s in %s: %s", d.Object, d.Store, d.Reason) }

// damageLimit bounds the list; what goes beyond it is only counted.
const damageLimit = 10000

// damageList collects damage, each object once.
type damageList struct {
	mu   sync.Mutex
	seen map[[2]string]bool
	list []Damage
}

func (l *damageList) add(d Damage) (fresh bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := [2]string{d.Object, d.Store}
	if l.seen[key] || len(l.list) >= damageLimit {
		return false
	}
	if l.seen == nil {
		l.seen = map[[2]string]bool{}
	}
	l.seen[key] = true
	l.list = append(l.list, d)
	return true
}

func (l *damageList) all() []Damage {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Damage(nil), l.list...)
}

// reason is what is wrong with an object, without its name.
func reason(err error) string {
	var corrupt *format.CorruptError
	switch {
	case errors.As(err, &corrupt):
		return corrupt.Reason
	case errors.Is(err, object.ErrNotFound):
		return "it is missing"
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "it is too short"
	case errors.Is(err, object.ErrTooLarge):
		return "it is too long"
	}
	return err.Error()
}

// joinReasons makes one line of several failures, each once.
func joinReasons(errs []error) string {
	var parts []string
	for _, e := range errs {
		if text := e.Error(); !slices.Contains(parts, text) {
			parts = append(parts, text)
		}
	}
	return strings.Join(parts, "; ")
}
