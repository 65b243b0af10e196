// Package fault is an object.Store that passes every call on to another one and
// misbehaves where rules say so: it fails calls, loses answers, delays and
// blocks, damages what is read and hides objects. It also records the calls.
// Without rules it behaves like the store below.
package fault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"drc/internal/object"
)

// ErrInjected is what a rule's own errors may wrap; to the callers of a store it
// is a temporary error like any other.
var ErrInjected = errors.New("injected fault")

// Op names an operation of a store.
type Op string

// The operations of object.Store that rules can match.
const (
	Put      Op = "put"
	Get      Op = "get"
	GetRange Op = "getrange"
	Stat     Op = "stat"
	List     Op = "list"
	ListDirs Op = "listdirs"
	Delete   Op = "delete"
)

// Call describes one call of a store.
type Call struct {
	Op   Op
	Name string // the object's name; the prefix for List and ListDirs
	Off  int64  // of GetRange
	Size int64  // bytes to put, or of the range to get
}

// Rule says which calls to spoil and how. The zero value of each field means
// that it does nothing, or that it matches everything. A call is spoiled by all
// rules that match it, in the order in which they were added: first they delay
// and block it, then the first error wins.
type Rule struct {
	// Op is the operation; empty matches each one.
	Op Op
	// Name is a pattern for the whole name in which * stands for any text,
	// slashes included; empty matches each name.
	Name string
	// Skip lets that many matching calls pass first.
	Skip int
	// Times is how many matching calls are spoiled after that; 0 is all.
	Times int

	// Delay waits that long, or until the context ends.
	Delay time.Duration
	// Block waits until the channel is closed, or until the context ends.
	Block <-chan struct{}
	// Before is returned without calling the store below.
	Before error
	// After is returned although the store below did what was asked: the
	// answer was lost. If the store below fails, its error is returned.
	After error
	// Hook is called before the store below; its error is returned as Before
	// is. It is called without any lock held.
	Hook func(context.Context, Call) error
	// Alter changes the bytes of the object that Get and GetRange return: it is
	// given the bytes that were asked for and may change them in place or
	// return fewer.
	Alter func([]byte) []byte
	// Hide makes the object absent for Get, GetRange, Stat and listings. For
	// listings Name is compared with each object, Op must be List or empty, and
	// Skip and Times do not apply.
	Hide bool
}

// FlipBit returns an Alter that changes the bit at that position, counted from
// the first byte's lowest one and modulo the size.
func FlipBit(bit int) func([]byte) []byte {
	return func(body []byte) []byte {
		if len(body) > 0 {
			body[bit/8%len(body)] ^= 1 << (bit % 8)
		}
		return body
	}
}

// Truncate returns an Alter that leaves at most n bytes.
func Truncate(n int) func([]byte) []byte {
	return func(body []byte) []byte { return body[:min(n, len(body))] }
}

// Store is the misbehaving store. It is safe for concurrent use, rules may come
// and go while calls are under way.
type Store struct {
	below object.Store

	mu      sync.Mutex
	rules   []*activeRule
	calls   []Call
	changed chan struct{} // closed and replaced when calls grows
}

type activeRule struct {
	Rule
	matched int
}

var _ object.Store = (*Store)(nil)

// New returns a store that passes calls on to below and owns it.
func New(below object.Store) *Store {
	return &Store{below: below, changed: make(chan struct{})}
}

// Add adds a rule and returns what takes it away again.
func (s *Store) Add(rule Rule) (remove func()) {
	active := &activeRule{Rule: rule}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = append(s.rules, active)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rules = slices.DeleteFunc(s.rules, func(r *activeRule) bool { return r == active })
	}
}

// Clear takes all rules away. Calls that are blocked stay so.
func (s *Store) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = nil
}

// Calls returns the calls so far, in the order in which they began.
func (s *Store) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Forget empties the record of calls.
func (s *Store) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
}

// Count returns how many calls matched op and pattern, as in Rule.
func (s *Store) Count(op Op, pattern string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count(op, pattern)
}

// Wait returns when at least n calls that match op and pattern have begun, or
// with the context's error.
func (s *Store) Wait(ctx context.Context, op Op, pattern string, n int) error {
	for {
		s.mu.Lock()
		count, changed := s.count(op, pattern), s.changed
		s.mu.Unlock()
		if count >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %d calls of %s %s, saw %d: %w", n, op, pattern, count, ctx.Err())
		}
	}
}

// URL implements object.Store.
func (s *Store) URL() string { return s.below.URL() }

// Put implements object.Store.
func (s *Store) Put(ctx context.Context, name string, body []byte) (object.Answer, error) {
	spoil, err := s.begin(ctx, Call{Op: Put, Name: name, Size: int64(len(body))})
	if err != nil {
		return object.Answer{}, err
	}
	answer, err := s.below.Put(ctx, name, body)
	if err == nil && spoil.after != nil {
		return object.Answer{}, spoil.after
	}
	return answer, err
}

// Get implements object.Store.
func (s *Store) Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, object.Answer, error) {
	spoil, err := s.begin(ctx, Call{Op: Get, Name: name})
	if err != nil {
		return dst, object.Answer{}, err
	}
	body, answer, err := s.below.Get(ctx, name, limit, dst)
	if err != nil {
		return dst, answer, err
	}
	if spoil.after != nil {
		return dst, object.Answer{}, spoil.after
	}
	if len(spoil.alters) == 0 {
		return body, answer, nil
	}
	return append(body[:len(dst)], spoil.change(body[len(dst):])...), answer, nil
}

// GetRange implements object.Store. Where an Alter leaves fewer bytes, the
// object appears to end there.
func (s *Store) GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error) {
	spoil, err := s.begin(ctx, Call{Op: GetRange, Name: name, Off: off, Size: n})
	if err != nil {
		return dst, err
	}
	body, err := s.below.GetRange(ctx, name, off, n, dst)
	if err != nil {
		return dst, err
	}
	if spoil.after != nil {
		return dst, spoil.after
	}
	if len(spoil.alters) == 0 {
		return body, nil
	}
	changed := spoil.change(body[len(dst):])
	if int64(len(changed)) < n {
		return dst, fmt.Errorf("read %s in %s: %d bytes from %d: %w", name, s.URL(), n, off, io.ErrUnexpectedEOF)
	}
	return append(body[:len(dst)], changed...), nil
}

// Stat implements object.Store.
func (s *Store) Stat(ctx context.Context, name string) (object.Info, error) {
	spoil, err := s.begin(ctx, Call{Op: Stat, Name: name})
	if err != nil {
		return object.Info{}, err
	}
	info, err := s.below.Stat(ctx, name)
	if err == nil && spoil.after != nil {
		return object.Info{}, spoil.after
	}
	return info, err
}

// List implements object.Store. An After comes behind the last object.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		spoil, err := s.begin(ctx, Call{Op: List, Name: prefix})
		if err != nil {
			yield(object.Info{}, err)
			return
		}
		for info, err := range s.below.List(ctx, prefix, after) {
			if err == nil && s.hidden(List, info.Name) {
				continue
			}
			if !yield(info, err) || err != nil {
				return
			}
		}
		if spoil.after != nil {
			yield(object.Info{}, spoil.after)
		}
	}
}

// ListDirs implements object.Store. An After comes behind the last folder; a
// folder of which all objects are hidden is still there.
func (s *Store) ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		spoil, err := s.begin(ctx, Call{Op: ListDirs, Name: prefix})
		if err != nil {
			yield("", err)
			return
		}
		for element, err := range s.below.ListDirs(ctx, prefix) {
			if !yield(element, err) || err != nil {
				return
			}
		}
		if spoil.after != nil {
			yield("", spoil.after)
		}
	}
}

// Delete implements object.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	spoil, err := s.begin(ctx, Call{Op: Delete, Name: name})
	if err != nil {
		return err
	}
	if err := s.below.Delete(ctx, name); err != nil {
		return err
	}
	return spoil.after
}

// Close implements object.Store. It closes the store below.
func (s *Store) Close() error { return s.below.Close() }

// spoil is what is left to do to a call that may go on.
type spoil struct {
	after  error
	alters []func([]byte) []byte
}

func (s spoil) change(body []byte) []byte {
	for _, alter := range s.alters {
		body = alter(body)
	}
	return body
}

// begin records the call and applies what comes before the store below.
func (s *Store) begin(ctx context.Context, call Call) (spoil, error) {
	s.mu.Lock()
	s.calls = append(s.calls, call)
	close(s.changed)
	s.changed = make(chan struct{})
	var rules []Rule
	for _, rule := range s.rules {
		if !matches(rule.Rule, call.Op, call.Name) || rule.Hide && (call.Op == List || call.Op == ListDirs) {
			continue
		}
		rule.matched++
		if rule.matched > rule.Skip && (rule.Times == 0 || rule.matched <= rule.Skip+rule.Times) {
			rules = append(rules, rule.Rule)
		}
	}
	s.mu.Unlock()

	var result spoil
	for _, rule := range rules {
		if err := wait(ctx, rule); err != nil {
			return spoil{}, fmt.Errorf("%s %s in %s: %w", call.Op, call.Name, s.URL(), err)
		}
		if result.after == nil {
			result.after = rule.After
		}
		if rule.Alter != nil {
			result.alters = append(result.alters, rule.Alter)
		}
	}
	for _, rule := range rules {
		if rule.Hook != nil {
			if err := rule.Hook(ctx, call); err != nil {
				return spoil{}, err
			}
		}
		if rule.Before != nil {
			return spoil{}, rule.Before
		}
		if rule.Hide && (call.Op == Get || call.Op == GetRange || call.Op == Stat) {
			return spoil{}, fmt.Errorf("%s %s in %s: %w", call.Op, call.Name, s.URL(), object.ErrNotFound)
		}
	}
	return result, nil
}

// wait applies a rule's Delay and Block.
func wait(ctx context.Context, rule Rule) error {
	if rule.Delay > 0 {
		timer := time.NewTimer(rule.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if rule.Block != nil {
		select {
		case <-rule.Block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (s *Store) hidden(op Op, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rule := range s.rules {
		if rule.Hide && matches(rule.Rule, op, name) {
			return true
		}
	}
	return false
}

// count needs the lock.
func (s *Store) count(op Op, pattern string) int {
	n := 0
	for _, call := range s.calls {
		if matches(Rule{Op: op, Name: pattern}, call.Op, call.Name) {
			n++
		}
	}
	return n
}

func matches(rule Rule, op Op, name string) bool {
	return (rule.Op == "" || rule.Op == op) && (rule.Name == "" || matchName(rule.Name, name))
}

// matchName says whether pattern, in which * stands for any text, is name.
func matchName(pattern, name string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == name
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(name) < len(first)+len(last) || !strings.HasPrefix(name, first) || !strings.HasSuffix(name, last) {
		return false
	}
	middle := name[len(first) : len(name)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		_, rest, ok := strings.Cut(middle, part)
		if !ok {
			return false
		}
		middle = rest
	}
	return true
}
