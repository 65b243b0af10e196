package restorer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
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
}

type member struct {
	repo.Member
	number int           // index in the repository's record
	slots  chan struct{} // one for each request under way; its own, so that a hanging store holds up no other

	mu    sync.Mutex
	until time.Time // down until then
	pause time.Duration
	err   error
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
	m.until, m.pause, m.err = time.Time{}, 0, nil
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

// do makes one request of about n bytes. Its error is an *unreachableError,
// the context's, or one for which aboutObject holds.
func (s *stores) do(ctx context.Context, m *member, anyway insist, n int64, f func(ctx context.Context, st object.Store) error) error {
	if err := m.down(); err != nil && (m.Store == nil || !bool(anyway)) {
		return &unreachableError{m.URL(), err}
	}
	select {
	case m.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-m.slots }()
	limited, cancel := context.WithTimeout(ctx, requestTimeout+time.Duration(n)*time.Second/slowestBytesPerSecond)
	defer cancel()
	s.requests.Add(1)
	err := f(limited, m.Store)
	if err == nil || aboutObject(err) {
		m.worked()
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if m.failed(err) {
		s.logger.Warn("a store fails; going on without it for a while", "store", m.URL(), "error", err)
	}
	return &unreachableError{m.URL(), err}
}

// get returns a whole object of at most limit bytes.
func (s *stores) get(ctx context.Context, m *member, anyway insist, name string, limit int64) (raw []byte, err error) {
	err = s.do(ctx, m, anyway, min(limit, 1<<20), func(ctx context.Context, st object.Store) error {
		raw, _, err = st.Get(ctx, name, limit, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.bytes.Add(int64(len(raw)))
	return raw, nil
}

// getRange fills p from off of an object.
func (s *stores) getRange(ctx context.Context, m *member, anyway insist, name string, off int64, p []byte) error {
	err := s.do(ctx, m, anyway, int64(len(p)), func(ctx context.Context, st object.Store) error {
		out, err := st.GetRange(ctx, name, off, int64(len(p)), p[:0:len(p)])
		if err != nil {
			return err
		}
		if len(out) != len(p) {
			return fmt.Errorf("the store returned %d bytes of %d", len(out), len(p))
		}
		if len(p) > 0 && &out[0] != &p[0] {
			copy(p, out)
		}
		return nil
	})
	if err == nil {
		s.bytes.Add(int64(len(p)))
	}
	return err
}

// found notes a missing or damaged object.
func (s *stores) found(m *member, name string, err error) {
	if s.damage.add(Damage{Object: name, Store: m.URL(), Reason: reason(err)}) {
		s.logger.Warn("an object is missing or damaged", "object", name, "store", m.URL(), "error", reason(err))
	}
}

// fromAny has f read an object that lies on every store, from one after the
// other until it succeeds: first from those that are up. f returns a
// *format.CorruptError, or one for which aboutObject holds, if this store's
// copy is no good. The result is nil, the context's error, an
// *unreachableError if a store that did not answer may have a good copy, or
// missing, which is about all copies.
func (s *stores) fromAny(ctx context.Context, name string, f func(m *member, anyway insist) error, missing func(reasons string) error) error {
	return s.patiently(ctx, func() error {
		start := rand.IntN(len(s.members)) // so that the load is spread
		var bad, silent []error
		var later []*member
		try := func(m *member, anyway insist) (done bool, err error) {
			err = f(m, anyway)
			switch {
			case err == nil:
				return true, nil
			case ctx.Err() != nil:
				return true, ctx.Err()
			case isUnreachable(err):
				if !anyway && m.Store != nil {
					later = append(later, m)
				} else {
					silent = append(silent, err)
				}
				return false, nil
			case aboutObject(err) || isDamage(err):
				s.found(m, name, err)
				bad = append(bad, fmt.Errorf("%s: %s", m.URL(), reason(err)))
				return false, nil
			}
			return true, err
		}
		for i := range s.members {
			if done, err := try(s.members[(start+i)%len(s.members)], false); done {
				return err
			}
		}
		for _, m := range later {
			if done, err := try(m, true); done {
				return err
			}
		}
		if len(silent) > 0 {
			return fmt.Errorf("read %s: %w", name, errors.Join(append(silent, bad...)...))
		}
		return missing(joinReasons(bad))
	})
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
