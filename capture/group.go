package capture

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"drc/internal/block"
)

// Group puts the writes of its volumes in one order.
type Group struct {
	journal Journal
	now     func() time.Time

	mu       sync.Mutex // orders Seqs: held while a write gets its number, its place in the overlay and in the journal's queue
	captured block.Seq
	refusal  error // why no writes are taken, or nil
	arrived  chan struct{}
	waiting  bool

	marks []mark // times of some Seqs, for lag; oldest first

	bytes atomic.Int64 // of all writes captured
}

// mark says when a Seq was captured.
type mark struct {
	seq block.Seq
	at  time.Time
}

// markEvery is how exactly the age of a write is known.
const markEvery = 50 * time.Millisecond

// NewGroup returns a group whose newest write is last.
func NewGroup(j Journal, last block.Seq, now func() time.Time) *Group {
	if now == nil {
		now = time.Now
	}
	return &Group{journal: j, captured: last, now: now, arrived: make(chan struct{})}
}

// Captured is the newest write's Seq.
func (g *Group) Captured() block.Seq {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.captured
}

// CapturedBytes counts the bytes of all writes since the start.
func (g *Group) CapturedBytes() int64 { return g.bytes.Load() }

// WaitCaptured returns when a write behind after has been captured.
func (g *Group) WaitCaptured(ctx context.Context, after block.Seq) error {
	for {
		g.mu.Lock()
		ok, arrived := g.captured > after, g.arrived
		g.waiting = g.waiting || !ok
		g.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-arrived:
		}
	}
}

// Refuse makes every later write fail with err; reads go on. A nil err lifts
// it.
func (g *Group) Refuse(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.refusal = err
}

// Refusal is why no writes are taken, or nil.
func (g *Group) Refusal() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refusal
}

// number gives w its Seq and calls insert, which makes it visible to readers,
// before it goes to the journal: all three in one order.
func (g *Group) number(w block.Write, insert func(block.Write)) (block.Seq, error) {
	now := g.now()
	w.Time = now.UnixNano()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refusal != nil {
		return 0, g.refusal
	}
	g.captured++
	w.Seq = g.captured
	insert(w)
	g.journal.Enqueue(w)
	g.bytes.Add(w.Extent.Len)
	if n := len(g.marks); n == 0 || now.Sub(g.marks[n-1].at) >= markEvery {
		g.marks = append(g.marks, mark{w.Seq, now})
	}
	if g.waiting {
		close(g.arrived)
		g.arrived = make(chan struct{})
		g.waiting = false
	}
	return w.Seq, nil
}

// OldestAfter is when the first write behind seq was captured, or somewhat
// earlier; zero if there is none. Callers ask with a seq that never decreases.
func (g *Group) OldestAfter(seq block.Seq) time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.captured <= seq {
		g.marks = nil
		return time.Time{}
	}
	for len(g.marks) > 1 && g.marks[1].seq <= seq+1 {
		g.marks = g.marks[1:]
	}
	if len(g.marks) == 0 {
		return time.Time{}
	}
	return g.marks[0].at
}
