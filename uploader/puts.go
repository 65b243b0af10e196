package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"drc/internal/object"
	"drc/internal/object/gate"
	"drc/internal/repo"
)

const (
	// putConcurrency is how many puts to one store are under way at a time.
	putConcurrency = 4
	// putHangs is how long a put may be under way before its store counts as
	// failing. A store that fails in an orderly way is known to long before.
	putHangs = 2 * time.Minute
)

// errNoSource: an object's bytes must come from another store, or from the
// buffer, and cannot be had now. The put is tried again after the others; its own store is not to
// blame.
var errNoSource = errors.New("no copy of it can be read now")

// errUnwanted: no entry refers to the object, nor will: it need not be put.
var errUnwanted = errors.New("it is not wanted any more")

// errTaken: the store holds other bytes under the object's name. As nothing is
// ever overwritten the object can never be placed there.
var errTaken = errors.New("other bytes lie there under its name")

// put is one object that must come to lie on one store. Of placed and refused
// one is called, once.
type put struct {
	name    string
	owner   any                    // who may drop or defer it; nil: nobody
	size    int64                  // of the bytes
	heals   bool                   // it waits for nothing: what it belongs to is logged
	body    func() ([]byte, error) // the bytes; the same at every call
	placed  func()                 // told when the store has it
	refused func(err error)        // told when the store can never have it
}

// putter brings objects to one store, in the order in which they were queued,
// some at a time, for as long as it takes. While the store fails, one put at a
// time is tried, with growing pauses.
//
// What entries wait for, and what heals those that are logged, stand in queues of
// their own: a store that is back after a long outage lacks so much that new
// entries would wait for hours behind it. One worker sees to what heals, the
// others to what is waited for, and to the other queue if their own is empty.
type putter struct {
	member repo.Member
	logger *slog.Logger
	now    func() time.Time
	limit  limiter

	mu       monitor
	queues   [2][]put // what is waited for; what heals
	active   int
	held     int64                     // bytes of what is queued or under way
	began    [putConcurrency]time.Time // by worker: since when a put is under way
	downFrom time.Time
	lastErr  error
	damage   error // the first object that was refused
	requests int64
	bytes    int64
}

func newPutter(m repo.Member, logger *slog.Logger, now func() time.Time, limit limiter) *putter {
	return &putter{member: m, logger: logger, now: now, limit: limit}
}

// queue is the queue to which j belongs; p.mu is held.
func (p *putter) queue(j *put) *[]put {
	if j.heals {
		return &p.queues[1]
	}
	return &p.queues[0]
}

func (p *putter) add(j put) {
	p.mu.Lock()
	q := p.queue(&j)
	*q = append(*q, j)
	p.held += j.size
	p.mu.notify()
	p.mu.Unlock()
}

// drop takes the puts of owner that are not under way from the queue. They are
// told nothing.
func (p *putter) drop(owner any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.queues {
		p.queues[i] = slices.DeleteFunc(p.queues[i], func(j put) bool {
			if j.owner == owner {
				p.held -= j.size
			}
			return j.owner == owner
		})
	}
}

// deferring says that nothing waits for the puts of owner any more: they heal.
func (p *putter) deferring(owner any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, j := range p.queues[0] {
		if j.owner == owner {
			j.heals = true
			p.queues[1] = append(p.queues[1], j)
		}
	}
	p.queues[0] = slices.DeleteFunc(p.queues[0], func(j put) bool { return j.owner == owner })
}

// down reports since when the store has been failing, or zero. One that does not
// answer at all fails, too.
func (p *putter) down() (since time.Time, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	since, err = p.downFrom, p.lastErr
	for _, t := range p.began {
		if !t.IsZero() && p.now().Sub(t) >= putHangs && (since.IsZero() || t.Before(since)) {
			since = t
			if err == nil {
				err = fmt.Errorf("put on %s: no answer since %s", p.member.URL(), t.UTC().Format(time.RFC3339))
			}
		}
	}
	return since, err
}

// waiting is how many puts have not succeeded yet.
func (p *putter) waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queues[0]) + len(p.queues[1]) + p.active
}

// run works until ctx ends.
func (p *putter) run(ctx context.Context) {
	if p.member.Store == nil {
		p.mu.Lock()
		p.downFrom, p.lastErr = p.now(), p.member.Err
		p.mu.Unlock()
		<-ctx.Done()
		return
	}
	var wg sync.WaitGroup
	for i := range putConcurrency {
		wg.Go(func() { p.work(ctx, i) })
	}
	wg.Wait()
}

// work takes puts from the queue, as one of the workers. Only the first one, the
// prober, works while the store is down.
func (p *putter) work(ctx context.Context, worker int) {
	prober := worker == 0
	var noSource backoff
	for {
		j, err := p.take(ctx, prober)
		if err != nil {
			return
		}
		if p.try(ctx, j, worker) {
			noSource.reset()
		} else {
			_ = noSource.wait(ctx) // take looks at ctx
		}
	}
}

// take takes the first put, and waits for one if there is none.
func (p *putter) take(ctx context.Context, prober bool) (j put, err error) {
	err = p.mu.await(ctx, 0, func() bool {
		if ctx.Err() != nil || (!p.downFrom.IsZero() && !prober) {
			return false
		}
		q, other := &p.queues[0], &p.queues[1]
		if prober {
			q, other = other, q
		}
		if len(*q) == 0 {
			q = other
		}
		if len(*q) == 0 {
			return false
		}
		j = (*q)[0]
		(*q)[0] = put{} // what it holds is not held by the queue
		*q = (*q)[1:]
		p.active++
		return true
	})
	return j, err
}

// try puts j until it is placed or ctx ends. A worker that is not the prober
// hands j back at the first failure. It returns false if j went to the end of
// the queue because its bytes cannot be had.
func (p *putter) try(ctx context.Context, j put, worker int) bool {
	var pause backoff
	var body []byte // read once: it may have to come from another store
	for {
		err := p.once(ctx, j, worker, &body)
		if err == nil {
			p.answered(j, nil)
			j.placed()
			return true
		}
		if ctx.Err() != nil {
			p.giveBack(j)
			return true
		}
		if errors.Is(err, errNoSource) {
			p.putLast(j, err)
			return false
		}
		if errors.Is(err, errTaken) {
			p.logger.Error("a store holds other bytes under an object's name: the object cannot be put there", "object", j.name, "store", p.member.URL())
			p.answered(j, err)
			j.refused(err)
			return true
		}
		p.failed(err)
		if worker != 0 {
			p.giveBack(j)
			return true
		}
		if later(ctx, p.member, gate.Writes, &pause) != nil {
			p.giveBack(j)
			return true
		}
	}
}

func (p *putter) once(ctx context.Context, j put, worker int, bytes *[]byte) (err error) {
	if *bytes == nil {
		if *bytes, err = j.body(); errors.Is(err, errUnwanted) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	body := *bytes
	if err := p.limit.wait(ctx, len(body)); err != nil {
		return err
	}
	p.mu.Lock()
	p.began[worker] = p.now()
	p.mu.Unlock()
	_, err = p.member.Store.Put(ctx, j.name, body)
	if errors.Is(err, object.ErrExists) {
		// Names are random, so this object is ours: a try of ours was torn, or
		// somebody changed it. Nothing mends that here.
		err = fmt.Errorf("put %s on %s: %w", j.name, p.member.URL(), errTaken)
	}
	p.mu.Lock()
	p.began[worker] = time.Time{}
	p.requests++
	if err == nil {
		p.bytes += int64(len(body))
	}
	p.mu.Unlock()
	return err
}

func (p *putter) giveBack(j put) {
	p.mu.Lock()
	q := p.queue(&j)
	*q = append([]put{j}, *q...)
	p.active--
	p.mu.notify()
	p.mu.Unlock()
}

func (p *putter) putLast(j put, err error) {
	p.mu.Lock()
	q := p.queue(&j)
	*q = append(*q, j)
	p.active--
	p.mu.notify()
	p.mu.Unlock()
	p.logger.Warn("an object cannot be put, as no copy of it can be read; trying again", "object", j.name, "store", p.member.URL(), "error", err)
}

func (p *putter) failed(err error) {
	since, err := failure(err, p.now())
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.downFrom.IsZero() {
		p.downFrom = since
		p.logger.Warn("a store does not take objects; trying again", "store", p.member.URL(), "error", err)
	}
	p.lastErr = err
}

// answered notes that put j is over, as the store has it or refused it: either
// way it is there.
func (p *putter) answered(j put, refused error) {
	p.mu.Lock()
	p.held -= j.size
	if p.damage == nil {
		p.damage = refused
	}
	wasDown := !p.downFrom.IsZero()
	if wasDown {
		p.logger.Info("a store takes objects again", "store", p.member.URL(), "down_for", p.now().Sub(p.downFrom).Round(time.Second).String())
	}
	p.downFrom, p.lastErr = time.Time{}, nil
	p.active--
	if wasDown {
		p.mu.notify()
	}
	p.mu.Unlock()
}
