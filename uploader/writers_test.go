package uploader_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/internal/repo"
	"drc/uploader"
)

// contest is several writers of one group on stores that misbehave.
type contest struct {
	t      *testing.T
	rng    *rand.Rand
	id     *crypt.Identity
	agent  *crypt.Agent
	group  block.GroupID
	faulty []*fault.Store
	repo   *repo.Repository

	everywhere bool // a writer ends when all stores have what it has written

	clock atomic.Int64 // the order of events
	mu    sync.Mutex
	acked []ack
}

// ack is a value whose Append returned nil.
type ack struct {
	value      format.Hash
	start, end int64
}

func newContest(t *testing.T, stores int, rng *rand.Rand) *contest {
	c := &contest{t: t, rng: rng, id: crypttest.Identity(t), agent: crypttest.Agent(t), group: block.GroupID{9}}
	var all []object.Store
	for i := range stores {
		f := fault.New(mem.New(mem.Options{Name: fmt.Sprint(i)}))
		c.faulty = append(c.faulty, f)
		all = append(all, f)
	}
	var err error
	if c.repo, err = repo.Create(t.Context(), all, c.id.Root, format.Profile{Data: 1, Parity: 1}, c.id.Recipients(), 1); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *contest) ring() *crypt.Ring {
	ring := crypt.NewAgentRing(c.agent, c.id.RootPublic)
	ring.AddOwn(crypttest.Keys())
	return ring
}

// write takes office with a fresh state and appends values until ctx ends or
// it is fenced.
func (c *contest) write(ctx context.Context, id int, values int) error {
	l, stop := runLog(ctx, uploader.LogConfig{
		Repo: c.repo, Group: c.group, Agent: c.agent, Ring: c.ring(), State: &hostState{}, Takeover: true,
		OnEntry: func(*grouplog.Entry) error { return nil },
	})
	defer stop()
	defer func() {
		if ctx.Err() != nil {
			buf := make([]byte, 1<<20)
			c.t.Logf("writer %d: %+v\n%s", id, l.Status(), buf[:runtime.Stack(buf, true)])
		}
	}()
	if err := l.TakeOffice(ctx); err != nil {
		return err
	}
	for i := range values {
		n, parent, epoch := l.Next()
		items := &format.Items{Range: &format.Range{From: block.Seq(n), To: block.Seq(n), Time: int64(id)<<32 | int64(i)}}
		value := grouplog.Draft{Group: c.group, N: n, Parent: parent, Epoch: epoch, Keys: crypttest.Keys(), Items: items}.Make(c.agent)
		a := ack{value: format.HashOf(value), start: c.clock.Add(1)}
		if err := l.Append(ctx, value); err != nil {
			return err
		}
		a.end = c.clock.Add(1)
		c.mu.Lock()
		c.acked = append(c.acked, a)
		c.mu.Unlock()
	}
	if c.everywhere {
		n, _, _ := l.Next()
		return l.AwaitSafe(ctx, len(c.faulty)-1, n-2)
	}
	return nil
}

// misbehave puts random faults on the stores and returns what takes them away.
func (c *contest) misbehave() func() {
	var undo []func()
	for _, f := range c.faulty {
		switch c.rng.IntN(5) {
		case 0: // gone for some calls
			undo = append(undo, f.Add(fault.Rule{Name: "*", Times: 1 + c.rng.IntN(3), Before: fault.ErrInjected}))
		case 1: // puts are applied and their answers lost
			undo = append(undo, f.Add(fault.Rule{Op: fault.Put, Name: "*log*", Times: 1 + c.rng.IntN(3), After: fault.ErrInjected}))
		case 2: // slow
			undo = append(undo, f.Add(fault.Rule{Name: "*", Skip: c.rng.IntN(4), Times: 2, Delay: time.Duration(c.rng.IntN(30)) * time.Millisecond}))
		}
	}
	return func() {
		for _, u := range undo {
			u()
		}
	}
}

// history reads the decided entries as one more writer finds them.
func (c *contest) history() []*grouplog.Entry {
	var out []*grouplog.Entry
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	l, stop := runLog(ctx, uploader.LogConfig{
		Repo: c.repo, Group: c.group, Agent: c.agent, Ring: c.ring(), State: &hostState{}, Takeover: true,
		OnEntry: func(e *grouplog.Entry) error { out = append(out, e); return nil },
	})
	defer stop()
	if err := l.TakeOffice(ctx); err != nil {
		c.t.Fatalf("read the history: %v", err)
	}
	return out
}

// TestWriters_OneHistory lets many writers take over from each other at random
// moments, with faults, and checks that there is one history and that it has
// every value that a writer was told to be decided, in order.
func TestWriters_OneHistory(t *testing.T) {
	for _, stores := range []int{1, 2, 3, 5} {
		t.Run(fmt.Sprintf("%d stores", stores), func(t *testing.T) {
			t.Parallel()
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d (goroutines are not repeatable)", seed)
			rng := rand.New(rand.NewPCG(seed, uint64(stores)))
			acked, fenced := 0, 0
			for range 12 {
				c := newContest(t, stores, rng)
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				var wg sync.WaitGroup
				var mu sync.Mutex
				for id := range 2 + rng.IntN(3) {
					n := 1 + rng.IntN(8)
					pause := time.Duration(rng.IntN(40)) * time.Millisecond
					wg.Go(func() {
						time.Sleep(pause) // not to synchronise: to let writers begin at different moments
						if err := c.write(ctx, id, n); errors.Is(err, uploader.ErrFenced) {
							mu.Lock()
							fenced++
							mu.Unlock()
						} else if ctx.Err() != nil {
							t.Errorf("writer %d came to no end: %v", id, err)
						} else if err != nil {
							t.Errorf("writer %d: %v", id, err)
						}
					})
				}
				undo := c.misbehave()
				wg.Wait()
				cancel()
				undo()
				t.Logf("round took %s", time.Since(began))
				c.check()
				acked += len(c.acked)
			}
			t.Logf("%d values decided, %d writers fenced", acked, fenced)
			if acked == 0 {
				t.Error("nothing was decided: the test shows nothing")
			}
		})
	}
}

func (c *contest) check() {
	c.t.Helper()
	entries := c.history()
	place := map[format.Hash]int{}
	var parent format.Hash
	for i, e := range entries {
		if e.N != uint64(i+1) || e.Parent != parent {
			c.t.Fatalf("entry %d does not follow the one before it", e.N)
		}
		if _, twice := place[e.Hash]; twice {
			c.t.Fatalf("entry %d is in the history twice", e.N)
		}
		place[e.Hash], parent = i, e.Hash
	}
	for _, a := range c.acked {
		i, ok := place[a.value]
		if !ok {
			c.t.Fatalf("a value that was decided is not in the history of %d entries", len(entries))
		}
		for _, later := range c.acked {
			if a.end < later.start && place[later.value] < i {
				c.t.Fatalf("entry %d was begun after entry %d was decided", place[later.value]+1, i+1)
			}
		}
	}
}

// TestRolledBackStore_HasNoVote: a store that lost the end of its log while no
// agent ran must not be appended to behind the hole.
func TestRolledBackStore_HasNoVote(t *testing.T) {
	c := newContest(t, 3, rand.New(rand.NewPCG(1, 1)))
	// Every store must have everything before one of them loses it: of what it never
	// had the others can tell nothing.
	c.everywhere = true
	if err := c.write(t.Context(), 0, 5); err != nil {
		t.Fatal(err)
	}
	before := len(c.history())
	var names []string
	for info, err := range c.faulty[1].List(t.Context(), format.LogPrefix(c.group), "") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, info.Name)
	}
	// The newest objects of the other stores may not know the very last ones.
	names = names[len(names)-5:]
	for _, name := range names {
		if err := c.faulty[1].Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	l, stop := runLog(t.Context(), uploader.LogConfig{
		Repo: c.repo, Group: c.group, Agent: c.agent, Ring: c.ring(), State: &hostState{}, Takeover: true,
		OnEntry: func(*grouplog.Entry) error { return nil },
	})
	defer stop()
	if err := l.TakeOffice(t.Context()); err != nil {
		t.Fatal(err)
	}
	n, parent, epoch := l.Next()
	if n != uint64(before+1) {
		t.Fatalf("the next entry is %d, not %d", n, before+1)
	}
	value := grouplog.Draft{Group: c.group, N: n, Parent: parent, Epoch: epoch, Keys: crypttest.Keys(), Items: &format.Items{}}.Make(c.agent)
	if err := l.Append(t.Context(), value); err != nil {
		t.Fatal(err)
	}
	// Each store is worked on by its own goroutine: wait for the one.
	for end := time.Now().Add(30 * time.Second); l.Status()[1].State != "damaged"; {
		if time.Now().After(end) {
			t.Fatal("the store that was rolled back still has a vote")
		}
		time.Sleep(time.Millisecond)
	}
	for _, name := range names {
		if _, err := c.faulty[1].Stat(t.Context(), name); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("something was written into the hole at %s: %v", name, err)
		}
	}
}
