package nbd

import (
	"context"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

// budget hands out up to limit bytes and makes the rest wait, first come first
// served, so that a large request is not starved by small ones.
//
// Invariant: used <= limit at all times.
type budget struct {
	limit   int64
	used    atomic.Int64
	waiting atomic.Int32 // len(queue), readable without mu

	mu    sync.Mutex
	queue []*budgetWaiter
}

type budgetWaiter struct {
	n       int64
	granted chan struct{}
	by      atomic.Pointer[budget] // who has granted it; givenUp: nobody shall
}

// givenUp is what by says of a wait that has ended without memory.
var givenUp budget

// try takes n bytes if they are free and nobody waits.
func (b *budget) try(n int64) bool {
	return b.waiting.Load() == 0 && b.take(n)
}

func (b *budget) take(n int64) bool {
	for {
		used := b.used.Load()
		if used+n > b.limit {
			return false
		}
		if b.used.CompareAndSwap(used, used+n) {
			return true
		}
	}
}

// acquire takes n bytes, waiting until they are free or ctx ends. n must not
// exceed the limit, or it would wait for ever.
func (b *budget) acquire(ctx context.Context, n int64) error {
	_, err := acquireAny(ctx, n, b)
	return err
}

// acquireAny takes n bytes of one of several budgets, the first that has them,
// and returns which. n must not exceed the limit of all.
func acquireAny(ctx context.Context, n int64, budgets ...*budget) (*budget, error) {
	for _, b := range budgets {
		if b.try(n) {
			return b, nil
		}
	}
	w := &budgetWaiter{n: n, granted: make(chan struct{})}
	for _, b := range budgets {
		b.mu.Lock()
		b.queue = append(b.queue, w)
		b.waiting.Add(1)
		b.grant()
		b.mu.Unlock()
	}
	var err error
	select {
	case <-w.granted:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil && !w.by.CompareAndSwap(nil, &givenUp) {
		w.by.Load().release(n) // granted at the same moment: give it back
	}
	for _, b := range budgets {
		b.leave(w)
	}
	return w.by.Load(), err
}

// leave takes w out of the queue, if it stands there.
func (b *budget) leave(w *budgetWaiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(b.queue, w); i >= 0 {
		b.queue = slices.Delete(b.queue, i, i+1)
		b.waiting.Add(-1)
		b.grant() // who stood behind w may fit
	}
}

// release gives n bytes back.
func (b *budget) release(n int64) {
	b.used.Add(-n)
	if b.waiting.Load() > 0 {
		b.mu.Lock()
		b.grant()
		b.mu.Unlock()
	}
}

// grant serves the queue from its front; the caller holds mu.
func (b *budget) grant() {
	for len(b.queue) > 0 {
		w := b.queue[0]
		if w.by.Load() == nil {
			if !b.take(w.n) {
				return
			}
			if w.by.CompareAndSwap(nil, b) {
				close(w.granted)
			} else {
				b.used.Add(-w.n)
			}
		}
		b.queue = b.queue[1:]
		b.waiting.Add(-1)
	}
}

// share is the memory of all connections to one export. Besides its part of
// what all exports share it has own, which nobody can take from it.
type share struct {
	budget
	own budget
}

// Payload buffers come in powers of two, each size with a pool of its own.
const (
	bufferShiftMin = 12 // 4 KiB
	bufferShiftMax = 25 // 32 MiB, requestBytesMax
)

var bufferPools [bufferShiftMax - bufferShiftMin + 1]sync.Pool

// buffer is a pooled piece of memory. Its capacity is what counts against the
// budgets.
type buffer struct {
	data  []byte // the payload; data[:cap(data)] is the whole buffer
	class int
	from  *budget // the server's, or the own one of the export's share
}

func bufferClass(n int) int {
	if n <= 1<<bufferShiftMin {
		return 0
	}
	return bits.Len(uint(n-1)) - bufferShiftMin
}

func bufferClassBytes(class int) int64 { return 1 << (class + bufferShiftMin) }

// newBuffer returns a buffer of n bytes (at most requestBytesMax) with
// arbitrary content.
func newBuffer(n int) *buffer {
	class := bufferClass(n)
	b, _ := bufferPools[class].Get().(*buffer)
	if b == nil {
		b = &buffer{data: make([]byte, bufferClassBytes(class)), class: class}
	}
	b.data = b.data[:n]
	return b
}

// free returns b to its pool. The caller holds no slice of it any more.
func (b *buffer) free() { bufferPools[b.class].Put(b) }
