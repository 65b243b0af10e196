package uploader_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object/fault"
	"drc/uploader"
)

// schedule is a random run of two hosts that take the log over from each other,
// on stores that come and go, lose answers, and lag by more than is remembered.
type schedule struct {
	*logHost
	rng    *rand.Rand
	hosts  []*hostState
	older  []*uploader.Tails // that a power cut may bring back, by host
	back   []func()          // brings a store back; nil: it is there
	acked  map[uint64]format.Hash
	writes bool // the running host is in office
}

// begin starts a host, and waits for office for at most an hour.
func (s *schedule) begin(host int) {
	s.state = s.hosts[host]
	s.run(s.t.Context())
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Hour)
	defer cancel()
	err := s.log.TakeOffice(ctx)
	s.writes = err == nil
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		s.t.Fatalf("host %d: %v", host, err)
	}
	if n, _, _ := s.log.Next(); s.writes && n <= uint64(len(s.acked)) {
		s.t.Fatalf("host %d goes on at entry %d, and %d were decided", host, n, len(s.acked))
	}
}

// some has entries decided, until that takes too long; then the host is not used
// any more, as its last entry may yet be decided.
func (s *schedule) some(count int) {
	for range count {
		n, parent, epoch := s.log.Next()
		value := draft(s.logHost, n, parent, epoch)
		ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Minute)
		err := s.log.Append(ctx, value)
		cancel()
		if err != nil {
			s.writes = false
			return
		}
		if old, ok := s.acked[n]; ok && old != format.HashOf(value) {
			s.t.Fatalf("entry %d was decided twice", n)
		}
		s.acked[n] = format.HashOf(value)
		if s.rng.IntN(4) > 0 { // a kill may come before
			if err := s.log.Save(); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

func (s *schedule) step() {
	host := s.rng.IntN(len(s.hosts))
	switch s.rng.IntN(10) {
	case 0, 1: // a store goes or comes
		i := s.rng.IntN(len(s.faults))
		if s.back[i] != nil {
			s.back[i]()
			s.back[i] = nil
			return
		}
		rule := fault.Rule{Before: fault.ErrInjected}
		if s.rng.IntN(3) == 0 { // it can be read, and not written
			rule.Op = fault.Put
		}
		s.back[i] = s.faults[i].Add(rule)
	case 2: // answers are lost
		s.faults[s.rng.IntN(len(s.faults))].Add(fault.Rule{Op: fault.Put, Name: "*/log/*", Skip: s.rng.IntN(10), Times: 1 + s.rng.IntN(3), After: fault.ErrInjected})
	case 3, 4: // a start, perhaps of the other host, perhaps with what it knew before
		s.stop()
		if t := s.older[host]; t != nil && s.rng.IntN(3) == 0 {
			s.hosts[host].tails = t
		}
		if s.rng.IntN(8) == 0 {
			s.hosts[host].tails = nil
		}
		s.older[host] = s.hosts[host].tails
		s.begin(host)
	case 5: // time for stores that lag
		time.Sleep(time.Duration(s.rng.IntN(120)) * time.Second)
	default:
		if s.writes {
			s.some(1 + s.rng.IntN(100)*s.rng.IntN(2))
		}
	}
}

func draft(h *logHost, n uint64, parent format.Hash, epoch format.Epoch) []byte {
	return grouplog.Draft{Group: logGroup, N: n, Parent: parent, Epoch: epoch, Keys: logKeys, Items: &format.Items{}}.Make(h.agent)
}

// Whatever happens, there is one history, all that a writer was told to be
// decided is in it, and at the end every store has all of it.
func TestSchedule_OneHistoryOnAllStores(t *testing.T) {
	t.Parallel()
	base := uint64(time.Now().UnixNano())
	for stores := 1; stores <= 3; stores++ {
		for run := range uint64(1) { // go test -count makes more
			t.Run(fmt.Sprintf("%d stores, seed %d", stores, base+run), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := &schedule{logHost: newLogHost(t, stores), rng: rand.New(rand.NewPCG(base+run, uint64(stores))),
						hosts: []*hostState{{}, {}}, older: make([]*uploader.Tails, 2), back: make([]func(), stores), acked: map[uint64]format.Hash{}}
					s.forced = true
					s.begin(0)
					for range 40 {
						s.step()
					}
					for i, f := range s.faults {
						f.Clear()
						s.back[i] = nil
					}
					s.stop()
					s.begin(0)
					if !s.writes {
						t.Fatalf("no office with all stores there: %+v", s.log.Status())
					}
					s.some(1)
					last, _, _ := s.log.Next()
					ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
					defer cancel()
					if err := s.log.AwaitSafe(ctx, stores-1, last-2); err != nil {
						t.Fatalf("not on every store: %v: %+v", err, s.log.Status())
					}
					s.stop()
					history := s.whole(t.Context(), last-1)
					for n, hash := range s.acked {
						if history[n] != hash {
							t.Fatalf("entry %d was decided with another value than the history has", n)
						}
					}
					t.Logf("%d entries, of which %d were known to be decided", last-1, len(s.acked))
				})
			})
		}
	}
}
