package restorer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"drc/internal/object"
	"drc/internal/repo"
)

const (
	// requestsDefault is how many requests to one store are under way at a time.
	requestsDefault = 32
	// requestTimeout bounds a request, beside the time that its bytes take at
	// slowestBytesPerSecond.
	requestTimeout        = 20 * time.Second
	slowestBytesPerSecond = 64 << 10
	// A store that failed is left alone for downMin, and longer with each
	// failure in a row.
	downMin = 2 * time.Second
	downMax = time.Minute
	// slotLook is how often who waits for a slot looks whether it is worth it.
	slotLook = time.Second
	// overdueMax: a store with so many requests in a row that have no answer,
	// and for which others were quicker, is taken for one that hangs.
	overdueMax = 4
	// patienceDefault is how long a read goes on trying when too few stores
	// can be reached.
	patienceDefault = 30 * time.Second
)

// stores is the way to the repository's stores: bounded, counted, and with a
// memory of which ones are down.
type stores struct {
	members  []*member
	patience time.Duration
	logger   *slog.Logger
	damage   damageList
	requests atomic.Int64
	bytes    atomic.Int64
	pace     pace
}

type member struct {
	repo.Member
	number int           // index in the repository's record
	slots  chan struct{} // one for each request under way; its own, so that a hanging store holds up no other

	mu       sync.Mutex
	until    time.Time // down until then
	pause    time.Duration
	err      error
	answered time.Time // when it did last
	overdue  int       // requests in a row that others were quicker for
}

func newStores(cfg *Config) *stores {
	s := &stores{patience: cfg.Patience, logger: cfg.Logger}
	for i, m := range cfg.Repo.Members {
		mm := &member{Member: m, number: i, slots: make(chan struct{}, cfg.Requests)}
		if m.Store != nil && m.Err != nil {
			mm.failed(m.Err) // it has just been tried
		}
		s.members = append(s.members, mm)
	}
	return s
}

// failed notes that the store failed and reports whether it was up before.
func (m *member) failed(err error) (wasUp bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	wasUp = m.pause == 0
	now := time.Now()
	if now.Before(m.until) {
		m.err = err
		return false // requests that were under way together fail together
	}
	m.pause = min(max(2*m.pause, downMin), downMax)
	m.until = now.Add(m.pause)
	m.err = err
	return wasUp
}

func (m *member) worked() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.until, m.pause, m.err, m.overdue, m.answered = time.Time{}, 0, nil, 0, time.Now()
}

func (m *member) answeredLast() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.answered
}

// overtaken notes that others were quicker than a request to this store that
// still has no answer, and reports whether it is time to leave it alone.
func (m *member) overtaken() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.overdue++
	return m.overdue >= overdueMax
}

// down returns why the store is left alone for now, or nil.
func (m *member) down() error {
	if m.Store == nil {
		return m.Err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil && time.Now().Before(m.until) {
		return m.err
	}
	return nil
}

// insist makes do try a store even if it is down.
type insist bool

// request makes one request of about n bytes. Its error is an
// *unreachableError, the context's, or one for which aboutObject holds. It ends
// when its context or its time does, also if the store takes no notice: what f
// returns is its own, and f must not write to anything that outlives it. Such
// an f keeps its slot until the store lets go, so their number is bounded.
func request[T any](ctx context.Context, s *stores, m *member, anyway insist, n int64, f func(ctx context.Context, st object.Store) (T, error)) (out T, err error) {
	if err := m.down(); err != nil && (m.Store == nil || !bool(anyway)) {
		return out, &unreachableError{m.URL(), err}
	}
	if err := m.slot(ctx, anyway); err != nil {
		return out, err
	}
	limited, cancel := context.WithTimeout(ctx, requestTime(n))
	defer cancel()
	s.requests.Add(1)
	began := time.Now()
	type result struct {
		out T
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-m.slots }()
		var r result
		r.out, r.err = f(limited, m.Store)
		done <- r
	}()
	var r result
	select {
	case r = <-done:
	case <-limited.Done():
		r.err = limited.Err()
	}
	if r.err == nil || aboutObject(r.err) {
		m.worked()
		s.pace.took(n, time.Since(began))
		return r.out, r.err
	}
	if ctx.Err() != nil {
		return out, ctx.Err()
	}
	if errors.Is(r.err, context.DeadlineExceeded) {
		r.err = fmt.Errorf("it did not answer in %s", time.Since(began).Round(time.Second))
	}
	s.fell(m, r.err)
	return out, &unreachableError{m.URL(), r.err}
}

// requestTime is how long a request of n bytes may take.
func requestTime(n int64) time.Duration {
	return requestTimeout + time.Duration(n)*time.Second/slowestBytesPerSecond
}

// fell notes that a store failed.
func (s *stores) fell(m *member, err error) {
	if m.failed(err) {
		s.logger.Warn("a store fails; going on without it for a while", "store", m.URL(), "error", err)
	}
}

// slot waits for one of the member's slots. A store whose slots are all taken
// by requests that get no answer is given up: by those who do not insist as
// soon as it is known to be down, by the others after the time of a request.
func (m *member) slot(ctx context.Context, anyway insist) error {
	select {
	case m.slots <- struct{}{}:
		return nil
	default:
	}
	since := time.Now()
	look := time.NewTicker(slotLook)
	defer look.Stop()
	for {
		select {
		case m.slots <- struct{}{}:
			if err := m.down(); err != nil && !bool(anyway) {
				<-m.slots
				return &unreachableError{m.URL(), err}
			}
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-look.C:
		}
		if err := m.down(); err != nil && !bool(anyway) {
			return &unreachableError{m.URL(), err}
		}
		if last := m.answeredLast(); time.Since(since) > requestTimeout && time.Since(last) > requestTimeout {
			return &unreachableError{m.URL(), errors.New("none of the requests that are under way gets an answer")}
		}
	}
}

// get returns a whole object of at most limit bytes.
func (s *stores) get(ctx context.Context, m *member, anyway insist, name string, limit int64) ([]byte, error) {
	raw, err := request(ctx, s, m, anyway, min(limit, 1<<20), func(ctx context.Context, st object.Store) ([]byte, error) {
		raw, _, err := st.Get(ctx, name, limit, nil)
		return raw, err
	})
	if err != nil {
		return nil, err
	}
	s.bytes.Add(int64(len(raw)))
	return raw, nil
}

// getRange returns n bytes from off of an object. They are the caller's.
func (s *stores) getRange(ctx context.Context, m *member, anyway insist, name string, off, n int64) ([]byte, error) {
	p, err := request(ctx, s, m, anyway, n, func(ctx context.Context, st object.Store) ([]byte, error) {
		p, err := st.GetRange(ctx, name, off, n, make([]byte, 0, n))
		if err == nil && int64(len(p)) != n {
			err = fmt.Errorf("the store returned %d bytes of %d", len(p), n)
		}
		return p, err
	})
	if err != nil {
		return nil, err
	}
	s.bytes.Add(n)
	return p, nil
}

// found notes a missing or damaged object.
func (s *stores) found(m *member, name string, err error) {
	if s.damage.add(Damage{Object: name, Store: m.URL(), Reason: reason(err)}) {
		s.logger.Warn("an object is missing or damaged", "object", name, "store", m.URL(), "error", reason(err))
	}
}

// patiently repeats f while it fails for want of a store.
func (s *stores) patiently(ctx context.Context, f func() error) error {
	end := time.Now().Add(s.patience)
	pause := 200 * time.Millisecond
	for {
		err := f()
		if err == nil || !isUnreachable(err) || !s.anyGiven() || time.Now().Add(pause).After(end) {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// anyGiven reports whether a store that was given does not answer: only then
// is there something to wait for.
func (s *stores) anyGiven() bool {
	for _, m := range s.members {
		if m.Store != nil && m.down() != nil {
			return true
		}
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
