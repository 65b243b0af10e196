package sim

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"drc/internal/object"
	"drc/internal/object/mem"
)

var (
	errStore  = errors.New("the simulated store has failed")
	errAnswer = errors.New("the answer of the simulated store was lost")
)

// weather is how a store is for some time.
type weather struct {
	until time.Time
	kind  string // "down": fails at once; "silent": never answers; "full": takes no puts; "lists": only says which groups there are; "puts": takes puts and nothing else
	sure  bool   // what fails is not carried out later
}

// store is a simulated store. What is on it is in mem; agents use it through
// clients.
type store struct {
	w     *world
	index int
	mem   *mem.Store

	mu    sync.Mutex
	asked map[asked]int
	now   weather
}

// asked is what a store may be asked for more than once.
type asked struct{ op, name string }

// client is a store as one process sees it.
type client struct {
	s *store
	l *life
}

var _ object.Store = (*client)(nil)

// fate is what becomes of one request.
type fate struct {
	pause  time.Duration
	err    error
	done   bool          // it is carried out
	late   time.Duration // carried out so much later; 0: not
	silent bool
}

// fate draws what becomes of a request.
func (s *store) fate(l *life, op, name string) fate {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := asked{op, name}
	n := s.asked[key]
	s.asked[key]++
	rng := s.w.dice.of("store", s.index, l.number, op, name, n)
	f := fate{pause: between(rng, 200*time.Microsecond, 20*time.Millisecond), done: true}
	if !s.w.faulty.Load() {
		return f
	}
	if oneIn(rng, 40) {
		f.pause = between(rng, 20*time.Millisecond, 3*time.Second)
	}
	if time.Now().Before(s.now.until) {
		switch {
		case s.now.kind == "silent":
			f.silent, f.done = true, false
		case s.now.kind == "lists" && op == "listdirs", s.now.kind == "puts" && op == "put":
		case s.now.kind == "down" || s.now.kind == "lists" || s.now.kind == "puts" || op == "put":
			f.err, f.done = errStore, false
		}
		if op == "put" && !s.now.sure && oneIn(rng, 4) { // it had arrived all the same
			f.late = between(rng, time.Second, 90*time.Second)
		}
		return f
	}
	switch roll := rng.IntN(1000); {
	case roll < s.w.plan.storeErrors:
		f.err, f.done = errStore, false
	case roll < 2*s.w.plan.storeErrors:
		f.err = errAnswer
	case roll < 3*s.w.plan.storeErrors:
		f.err, f.done, f.late = errAnswer, false, between(rng, time.Millisecond, 90*time.Second)
	}
	return f
}

// do carries a request out by apply, and what comes late by late, if that is not
// nil: nobody waits for it then.
func (c *client) do(ctx context.Context, op, name string, apply func() error, late func()) error {
	f := c.s.fate(c.l, op, name)
	later := func(after time.Duration) {
		if late == nil {
			return
		}
		time.AfterFunc(after, func() {
			c.s.w.trace("store %d late %s %s", c.s.index, op, name)
			late()
		})
	}
	gone := func(err error) error { // the caller is: the request may be on its way
		rng := c.s.w.dice.of("gone", c.s.index, op, name)
		if !f.silent && f.err == nil && oneIn(rng, 2) {
			later(between(rng, 0, 30*time.Second))
		}
		return err
	}
	if f.silent {
		if f.late > 0 {
			later(f.late)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.l.died:
			return errPower
		case <-time.After(10 * time.Minute):
			return errStore
		}
	}
	t := time.NewTimer(f.pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return gone(ctx.Err())
	case <-c.l.died:
		return gone(errPower)
	case <-t.C:
	}
	select {
	case <-c.l.died:
		return errPower
	default:
	}
	if f.late > 0 {
		later(f.late)
	}
	if !f.done {
		return f.err
	}
	err := apply()
	if late != nil { // it changes something
		c.s.w.trace("store %d %s %s: %v, %v", c.s.index, op, name, f.err != nil, err != nil)
	}
	if f.err != nil && err == nil {
		return f.err
	}
	return err
}

func (c *client) URL() string  { return c.s.mem.URL() }
func (c *client) Close() error { return nil }

func (c *client) Put(ctx context.Context, name string, body []byte) (a object.Answer, err error) {
	body = append([]byte(nil), body...) // it may be put after the caller is gone
	put := c.s.w.plant.put(c.s, name, body)
	err = c.do(ctx, "put", name, func() error {
		var err error
		a, err = put()
		return err
	}, func() { _, _ = put() })
	return a, err
}

func (c *client) Get(ctx context.Context, name string, limit int64, dst []byte) (out []byte, a object.Answer, err error) {
	out = dst
	err = c.do(ctx, "get", name, func() error {
		var err error
		out, a, err = c.s.mem.Get(context.Background(), name, limit, dst)
		return err
	}, nil)
	return out, a, err
}

func (c *client) GetRange(ctx context.Context, name string, off, n int64, dst []byte) (out []byte, err error) {
	out = dst
	err = c.do(ctx, "range", name, func() error {
		var err error
		out, err = c.s.mem.GetRange(context.Background(), name, off, n, dst)
		return err
	}, nil)
	return out, err
}

func (c *client) Stat(ctx context.Context, name string) (i object.Info, err error) {
	err = c.do(ctx, "stat", name, func() error {
		var err error
		i, err = c.s.mem.Stat(context.Background(), name)
		return err
	}, nil)
	return i, err
}

func (c *client) Delete(ctx context.Context, name string) error {
	return c.do(ctx, "delete", name, func() error { return c.s.mem.Delete(context.Background(), name) }, nil)
}

func (c *client) List(ctx context.Context, prefix, after string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		var list []object.Info
		err := c.do(ctx, "list", prefix+" "+after, func() error {
			for i, err := range c.s.mem.List(context.Background(), prefix, after) {
				if err != nil {
					return err
				}
				list = append(list, i)
			}
			return nil
		}, nil)
		if err != nil {
			yield(object.Info{}, err)
			return
		}
		for _, i := range list {
			if !yield(i, nil) {
				return
			}
		}
	}
}

func (c *client) ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		var list []string
		err := c.do(ctx, "listdirs", prefix, func() error {
			for i, err := range c.s.mem.ListDirs(context.Background(), prefix) {
				if err != nil {
					return err
				}
				list = append(list, i)
			}
			return nil
		}, nil)
		if err != nil {
			yield("", err)
			return
		}
		for _, i := range list {
			if !yield(i, nil) {
				return
			}
		}
	}
}

// storm has the weather of a store change.
func (s *store) storm(rng *rand.Rand) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = weather{
		until: time.Now().Add(pick(rng, time.Second, 10*time.Second, 2*time.Minute, 6*time.Hour)),
		kind:  pick(rng, "down", "down", "silent", "full"),
	}
	s.w.trace("store %d is %s until %s", s.index, s.now.kind, s.now.until.Format(time.TimeOnly))
}

// is has the weather be what a story says, for a day. What fails fails for good.
func (s *store) is(kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = weather{until: time.Now().Add(24 * time.Hour), kind: kind, sure: true}
}

func (s *store) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = weather{}
}

func isLog(name string) bool   { return strings.Contains(name, "/log/") }
func isShard(name string) bool { return strings.Contains(name, "/seg") }
