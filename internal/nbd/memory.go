package nbd

import (
	"context"
	"math/bits"
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
}

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
	if b.try(n) {
		return nil
	}
	w := &budgetWaiter{n: n, granted: make(chan struct{})}
	b.mu.Lock()
	b.queue = append(b.queue, w)
	b.waiting.Add(1)
	b.grant()
	b.mu.Unlock()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, q := range b.queue {
		if q == w {
			b.queue = append(b.queue[:i], b.queue[i+1:]...)
			b.waiting.Add(-1)
			b.grant() // who stood behind w may fit
			return context.Cause(ctx)
		}
	}
	b.used.Add(-n) // granted at the same moment: give it back
	b.grant()
	return context.Cause(ctx)
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
	for len(b.queue) > 0 && b.take(b.queue[0].n) {
		close(b.queue[0].granted)
		b.queue = b.queue[1:]
		b.waiting.Add(-1)
	}
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
