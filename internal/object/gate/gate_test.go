package gate_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/gate"
	"drc/internal/object/mem"
)

// gated is a gate over a store that a test makes fail.
func gated() (*gate.Store, *fault.Store) {
	f := fault.New(mem.New(mem.Options{}))
	return gate.Of(f), f
}

// knock has n callers want something of the store until they get it, each in its
// own way, and returns what waits for all of them.
func knock(ctx context.Context, g *gate.Store, n int) (wait func()) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				kind, err := gate.Reads, error(nil)
				if i%2 == 0 {
					kind = gate.Writes
					_, err = g.Put(ctx, fmt.Sprint("x", i), []byte("body"))
				} else {
					_, err = g.Stat(ctx, fmt.Sprint("x", i-1))
				}
				if err == nil || errors.Is(err, object.ErrNotFound) {
					return
				}
				_ = g.Wait(ctx, kind)
			}
		})
	}
	return wg.Wait
}

// However many want something of a dead store, it is asked by one of them at a
// time, less and less often, and all go on as soon as it is back.
func TestGate_OneProbeAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, f := gated()
		most, now := 0, 0
		var mu sync.Mutex
		back := f.Add(fault.Rule{Before: fault.ErrInjected, Hook: func(context.Context, fault.Call) error {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(5 * time.Second) // as a time-out takes
			mu.Lock()
			now--
			mu.Unlock()
			return fault.ErrInjected
		}})
		if _, err := g.Put(t.Context(), "first", nil); !errors.Is(err, fault.ErrInjected) {
			t.Fatal(err)
		}
		wait := knock(t.Context(), g, 200)
		time.Sleep(time.Hour)
		if n := len(f.Calls()); n > 250 || n < 90 {
			t.Errorf("200 callers made %d requests in an hour to a store that is dead", n)
		}
		mu.Lock()
		if most > 1 {
			t.Errorf("%d requests were under way at a time", most)
		}
		mu.Unlock()
		if since, err := g.Down(); time.Since(since) < time.Hour || !errors.Is(err, fault.ErrInjected) {
			t.Errorf("it is down since %s: %v", since, err)
		}
		back()
		began := time.Now()
		wait()
		if d := time.Since(began); d > gate.PauseMax+5*time.Second {
			t.Errorf("all went on %s after the store was back", d)
		}
		if since, err := g.Down(); !since.IsZero() || err != nil {
			t.Errorf("the store that is back is called down since %s: %v", since, err)
		}
	})
}

// A call that is not the probe fails at once and says since when and why.
func TestGate_FailsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, f := gated()
		f.Add(fault.Rule{Before: fault.ErrInjected})
		_, _ = g.Stat(t.Context(), "a")
		began := time.Now()
		for _, err := range g.List(t.Context(), "", "") {
			var down *gate.DownError
			if !errors.As(err, &down) || !errors.Is(err, fault.ErrInjected) || !down.Since.Equal(began) {
				t.Errorf("%v", err)
			}
		}
		if !time.Now().Equal(began) || len(f.Calls()) != 1 {
			t.Errorf("it took %s and %d requests", time.Since(began), len(f.Calls()))
		}
	})
}

// A store that can be read and not written is read at full speed, and its writes
// are probed ever more rarely.
func TestGate_ReadsPassWhereWritesFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, f := gated()
		f.Add(fault.Rule{Op: fault.Put, Before: fault.ErrInjected})
		wait := knock(t.Context(), g, 20)
		time.Sleep(time.Minute)
		for range 600 { // somebody who reads all the time
			if _, err := g.Stat(t.Context(), "a"); !errors.Is(err, object.ErrNotFound) {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := f.Count(fault.Put, "*"); n > 70 {
			t.Errorf("%d puts in eleven minutes", n)
		}
		f.Clear()
		wait()
	})
}

// A probe whose caller goes away, or that is stuck, does not keep the gate shut.
func TestGate_AProbeThatNeverEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, f := gated()
		back := f.Add(fault.Rule{Before: fault.ErrInjected})
		_, _ = g.Stat(t.Context(), "a")
		back()
		time.Sleep(time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		f.Add(fault.Rule{Times: 1, Block: make(chan struct{})})
		stuck := make(chan error)
		go func() {
			_, err := g.Stat(ctx, "a")
			stuck <- err
		}()
		synctest.Wait()
		began := time.Now()
		knock(t.Context(), g, 4)()
		if d := time.Since(began); d > gate.PauseMax {
			t.Errorf("a probe that was stuck kept others for %s", d)
		}
		cancel()
		if err := <-stuck; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if since, _ := g.Down(); !since.IsZero() {
			t.Error("a caller that went away makes the store look dead")
		}
	})
}
