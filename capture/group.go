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

	times []mark // times of some Seqs, for lag; oldest first

	volumes   []*Volume
	marks     Marks         // not nil: writes go past the journal
	switching chan struct{} // not nil: no writes are taken until it is closed
	held      bool          // switching was set by Hold
	flushing  sync.Mutex    // held while backings are synced for a flush of such writes
	directly  sync.RWMutex  // held shared while a write goes straight to its backing

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
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refusal != nil {
		return 0, g.refusal
	}
	if g.switching != nil || g.marks != nil {
		return 0, ErrDiverted
	}
	return g.enqueue(w, now, insert), nil
}

// enqueue is the part of number that is done under mu.
func (g *Group) enqueue(w block.Write, now time.Time, insert func(block.Write)) block.Seq {
	w.Time = now.UnixNano()
	g.captured++
	w.Seq = g.captured
	insert(w)
	g.journal.Enqueue(w)
	g.bytes.Add(w.Extent.Len)
	if n := len(g.times); n == 0 || now.Sub(g.times[n-1].at) >= markEvery {
		g.times = append(g.times, mark{w.Seq, now})
	}
	if g.waiting {
		close(g.arrived)
		g.arrived = make(chan struct{})
		g.waiting = false
	}
	return w.Seq
}

// OldestAfter is when the first write behind seq was captured, or somewhat
// earlier; zero if there is none. Callers ask with a seq that never decreases.
func (g *Group) OldestAfter(seq block.Seq) time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.captured <= seq {
		g.times = nil
		return time.Time{}
	}
	for len(g.times) > 1 && g.times[1].seq <= seq+1 {
		g.times = g.times[1:]
	}
	if len(g.times) == 0 {
		return time.Time{}
	}
	return g.times[0].at
}
