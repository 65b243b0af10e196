package nbd

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

func TestBudget_LargeRequestIsNotStarved(t *testing.T) {
	b := budget{limit: 100}
	if err := b.acquire(t.Context(), 10); err != nil {
		t.Fatal(err)
	}
	got := make(chan struct{})
	go func() {
		if err := b.acquire(context.Background(), 100); err != nil {
			t.Error(err)
		}
		close(got)
	}()
	for b.waiting.Load() == 0 {
		runtime.Gosched()
	}
	if b.try(1) {
		t.Fatal("a small request overtook the large one")
	}
	b.release(10)
	<-got
	b.release(100)
	if !b.try(100) {
		t.Fatal("bytes got lost")
	}
}

func TestBudget_GivenUpWaitLosesNothing(t *testing.T) {
	b := budget{limit: 10}
	b.try(10)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	go func() {
		for b.waiting.Load() == 0 {
			runtime.Gosched()
		}
		cancel(cause)
	}()
	if err := b.acquire(ctx, 5); !errors.Is(err, cause) {
		t.Fatal(err)
	}
	b.release(10)
	if !b.try(10) {
		t.Fatal("bytes got lost")
	}
}

func TestBudget_IsNeverExceeded(t *testing.T) {
	b := budget{limit: 64}
	var used, most atomic.Int64
	var wg sync.WaitGroup
	for w := range int64(8) {
		wg.Go(func() {
			for i := range int64(2000) {
				n := 1 + (w*31+i*17)%64
				if err := b.acquire(t.Context(), n); err != nil {
					t.Error(err)
					return
				}
				u := used.Add(n)
				for m := most.Load(); u > m && !most.CompareAndSwap(m, u); m = most.Load() {
				}
				used.Add(-n)
				b.release(n)
			}
		})
	}
	wg.Wait()
	if most.Load() > 64 || b.used.Load() != 0 || b.waiting.Load() != 0 {
		t.Fatalf("most %d, used %d, waiting %d", most.Load(), b.used.Load(), b.waiting.Load())
	}
}

func TestBuffer_ClassesFit(t *testing.T) {
	for _, n := range []int{1, 512, 4096, 4097, 8192, 1 << 20, 1<<20 + 1, requestBytesMax} {
		b := newBuffer(n)
		if len(b.data) != n || int64(cap(b.data)) != bufferClassBytes(b.class) || cap(b.data) >= 2*max(n, 4096) {
			t.Errorf("%d bytes: length %d, capacity %d", n, len(b.data), cap(b.data))
		}
		b.free()
	}
}
