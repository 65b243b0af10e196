package restorer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"drc/internal/object"
)

// A request that takes long compared with recent ones is made a second time,
// to another store if there is one: most often the first is stuck, and a store
// that never answers must not hold a restore up. How many second requests there
// are is bounded, so that stores which are slow for being busy do not get more
// to do.

const (
	// lateFirst is when a request is late while too few others have answered
	// to compare it with; lateMin and lateMax bound it later.
	lateFirst = 2 * time.Second
	lateMin   = 200 * time.Millisecond
	lateMax   = 10 * time.Second
	// lateFactor: late is who takes so many times as long as nearly all of the
	// last paceSamples requests did.
	lateFactor  = 3
	paceSamples = 32
	paceFew     = 8
	// smallBytes: requests up to this size are compared with each other, and
	// larger ones with each other.
	smallBytes = 128 << 10
	// Second requests are paid for with hedgeShare of one for each answer, and
	// up to hedgeSaved of them are saved up.
	hedgeShare = 0.05
	hedgeSaved = 8
	// lateLook is how often it is looked whether a request is late.
	lateLook = 50 * time.Millisecond
)

// pace is how long requests have taken of late, and how many may be made twice.
type pace struct {
	mu      sync.Mutex
	classes [2]paceClass // small requests, large ones
	started bool
	saved   float64 // second requests that may be made
}

type paceClass struct {
	ring  [paceSamples]time.Duration
	count int // ever
}

func classOf(n int64) int {
	if n <= smallBytes {
		return 0
	}
	return 1
}

// took notes a request of n bytes that got an answer.
func (p *pace) took(n int64, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &p.classes[classOf(n)]
	c.ring[c.count%paceSamples] = d
	c.count++
	p.earn()
	p.saved = min(p.saved+hedgeShare, hedgeSaved)
}

func (p *pace) earn() {
	if !p.started {
		p.started, p.saved = true, hedgeSaved
	}
}

// lateAfter is when a request of n bytes is late.
func (p *pace) lateAfter(n int64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &p.classes[classOf(n)]
	have := min(c.count, paceSamples)
	if have < paceFew {
		return lateFirst
	}
	sorted := slices.Clone(c.ring[:have])
	slices.Sort(sorted)
	return min(max(lateFactor*sorted[have-1-have/16], lateMin), lateMax)
}

// spend reports whether one more second request may be made.
func (p *pace) spend() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.earn()
	if p.saved < 1 {
		return false
	}
	p.saved--
	return true
}

// mayHedge reports whether a request to m that began at a time is late and may
// be made a second time. Once m is known to be down that costs nothing: the
// answer is not to be expected.
func (s *stores) mayHedge(m *member, n int64, began time.Time) bool {
	if m.down() != nil {
		return true
	}
	return time.Since(began) >= s.pace.lateAfter(n) && s.pace.spend()
}

// wasOvertaken notes that a second request was quicker than one to m.
func (s *stores) wasOvertaken(m *member) {
	if m.overtaken() {
		s.fell(m, errors.New("it does not answer, and others do"))
	}
}

// attempt is one store's copy being read.
type attempt[T any] struct {
	m      *member
	anyway insist
	began  time.Time
	out    T
	err    error
}

// fromAny has f read an object that lies on every store, from one after the
// other until it succeeds: first from those that are up, and from the next one
// also if the first is late. f returns a *format.CorruptError, or one for which
// aboutObject holds, if this store's copy is no good; it may run for several
// stores at once. The error is the context's, an *unreachableError if a store
// that did not answer may have a good copy, or missing, which is about all
// copies.
func fromAny[T any](ctx context.Context, s *stores, name string, f func(ctx context.Context, m *member, anyway insist) (T, error), missing func(reasons string) error) (out T, err error) {
	err = s.patiently(ctx, func() error {
		var err error
		out, err = fromAnyOnce(ctx, s, name, f, missing)
		return err
	})
	return out, err
}

func fromAnyOnce[T any](ctx context.Context, s *stores, name string, f func(ctx context.Context, m *member, anyway insist) (T, error), missing func(reasons string) error) (none T, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var turns []*attempt[T]            // who is to be asked, one after the other
	start := rand.IntN(len(s.members)) // so that the load is spread
	for i := range s.members {
		turns = append(turns, &attempt[T]{m: s.members[(start+i)%len(s.members)]})
	}
	var running, again []*attempt[T]
	come := make(chan *attempt[T], 3*len(turns)) // room for all: nobody may be here to take it
	begin := func(a *attempt[T]) {
		a.began = time.Now()
		running = append(running, a)
		go func() {
			a.out, a.err = f(ctx, a.m, a.anyway)
			come <- a
		}()
	}
	next := func() {
		if len(turns) == 0 {
			turns, again = again, nil
		}
		if len(turns) > 0 {
			a := turns[0]
			turns = turns[1:]
			begin(a)
		}
	}
	var bad, silent []error
	look := time.NewTicker(lateLook)
	defer look.Stop()
	twice := false
	for next(); len(running) > 0; {
		var a *attempt[T]
		select {
		case a = <-come:
		case <-ctx.Done():
			return none, ctx.Err()
		case <-look.C:
			last := running[len(running)-1]
			// Where every store's request is stuck, one is made once more.
			if (len(turns) > 0 || !twice) && s.mayHedge(last.m, smallBytes, last.began) {
				if len(turns) == 0 {
					turns, twice = []*attempt[T]{{m: last.m, anyway: true}}, true
				}
				next()
			}
			continue
		}
		running = slices.DeleteFunc(running, func(r *attempt[T]) bool { return r == a })
		switch {
		case a.err == nil:
			for _, r := range running {
				if r.began.Before(a.began) && r.m != a.m {
					s.wasOvertaken(r.m)
				}
			}
			return a.out, nil
		case ctx.Err() != nil:
			return none, ctx.Err()
		case isUnreachable(a.err) && !bool(a.anyway) && a.m.Store != nil:
			again = append(again, &attempt[T]{m: a.m, anyway: true}) // at last, whether it is up or not
		case isUnreachable(a.err):
			silent = append(silent, a.err)
		case errors.Is(a.err, errNoCopy):
			bad = append(bad, fmt.Errorf("%s: %w", a.m.URL(), errNoCopy))
		case aboutObject(a.err) || isDamage(a.err):
			s.found(a.m, name, a.err)
			bad = append(bad, fmt.Errorf("%s: %s", a.m.URL(), reason(a.err)))
		default:
			return none, a.err
		}
		if len(running) == 0 || len(turns) > 0 {
			next()
		}
	}
	if len(silent) > 0 {
		return none, fmt.Errorf("read %s: %w", name, errors.Join(append(silent, bad...)...))
	}
	return none, missing(joinReasons(bad))
}

// asked is what one store said.
type asked[T any] struct {
	out T
	err error
}

// stragglers is how long stores that have not answered yet are waited for when
// others have.
const stragglers = 5 * time.Second

// askAll asks all stores the same at once, and returns their answers in the
// order of the members. For those that do not answer it waits no longer than
// stragglers once another one has.
func askAll[T any](ctx context.Context, s *stores, anyway insist, f func(ctx context.Context, st object.Store) (T, error)) []asked[T] {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type numbered struct {
		i int
		asked[T]
	}
	out := make([]asked[T], len(s.members))
	come := make(chan numbered, len(s.members))
	for i, m := range s.members {
		out[i].err = &unreachableError{m.URL(), errors.New("it does not answer, and others do")}
		go func() {
			n := numbered{i: i}
			n.out, n.err = request(ctx, s, m, anyway, 0, f)
			come <- n
		}()
	}
	var late <-chan time.Time
	for range s.members {
		select {
		case n := <-come:
			out[n.i] = n.asked
			if n.err == nil && late == nil {
				timer := time.NewTimer(stragglers)
				defer timer.Stop()
				late = timer.C
			}
		case <-late:
			for i, m := range s.members {
				if out[i].err != nil && m.Store != nil && m.down() == nil {
					s.fell(m, out[i].err)
				}
			}
			return out
		case <-ctx.Done():
			return out
		}
	}
	return out
}
