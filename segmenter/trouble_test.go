package segmenter_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/segmenter"
)

// faulty is a Source, and a Baseline, whose reads fail while it says so.
type faulty struct {
	journal
	faultMu  sync.Mutex
	fault    error
	attempts int
}

func (f *faulty) fail(err error) {
	f.faultMu.Lock()
	defer f.faultMu.Unlock()
	f.fault, f.attempts = err, 0
}

func (f *faulty) tries() int {
	f.faultMu.Lock()
	defer f.faultMu.Unlock()
	return f.attempts
}

func (f *faulty) now() error {
	f.faultMu.Lock()
	defer f.faultMu.Unlock()
	f.attempts++
	return f.fault
}

func (f *faulty) Read(from, upTo block.Seq, limit int64, visit func(block.Write) error) (block.Seq, error) {
	if err := f.now(); err != nil {
		return from, err
	}
	return f.journal.Read(from, upTo, limit, visit)
}

// faultyHistory is a Baseline without anything in it.
type faultyHistory struct{ *faulty }

func (h faultyHistory) Extents(context.Context, block.VolumeIndex, block.Extent) ([]manifest.Extent, error) {
	return nil, h.now()
}

// safeBatches is batches for several goroutines.
type safeBatches struct {
	mu  sync.Mutex
	all []*batch.Batch
}

func (b *safeBatches) Put(_ context.Context, x *batch.Batch) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, x)
	return nil
}

func (b *safeBatches) last() *batch.Batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.all) == 0 {
		return nil
	}
	return b.all[len(b.all)-1]
}

func runs(t *testing.T, s *segmenter.Segmenter) {
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestRun_GoesOnAfterTheJournalCouldNotBeRead has the disk fail for a while: it
// is said, it is not tried without a pause, and nothing is missing later.
func TestRun_GoesOnAfterTheJournalCouldNotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, sink := &faulty{}, &safeBatches{}
		j.add(1, 0, data(1, 4096))
		s := segmenter.New(config(1<<20), j, sink, nothing{})
		j.fail(errors.New("the disk is sulking"))
		runs(t, s)
		time.Sleep(time.Minute)
		if err := s.Trouble(); err == nil || !strings.Contains(err.Error(), "sulking") {
			t.Errorf("trouble: %v", err)
		}
		if n := j.tries(); n < 5 || n > 30 {
			t.Errorf("tried %d times in a minute", n)
		}
		j.fail(nil)
		time.Sleep(time.Minute)
		if err := s.Trouble(); err != nil {
			t.Errorf("trouble that is over: %v", err)
		}
		if b := sink.last(); b == nil || b.From != 1 || b.To != 1 {
			t.Errorf("the last batch is %+v", b)
		}
	})
}

// TestRun_WritesGoOnWhileAResyncCannot keeps a resync from reading the history:
// the writes of clients are cut as ever, and the resync ends once it can.
func TestRun_WritesGoOnWhileAResyncCannot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, stores, sink := &faulty{}, &faulty{}, &safeBatches{}
		s := segmenter.New(config(1<<20), j, sink, nothing{})
		d := &disk{content: data(2, 1<<20)}
		s.AddResync(segmenter.Resync{Volume: 1, Backing: d, Remaining: []block.Extent{{Len: 1 << 20}}})
		stores.fail(errors.New("the stores are gone"))
		s.StartResync(1, faultyHistory{stores})
		runs(t, s)
		for n := block.Seq(1); n <= 3; n++ {
			j.add(1, 0, data(uint64(n), 4096))
			s.Announce(func(*format.Items) {}) // wakes it: this journal wakes nobody
			time.Sleep(time.Minute)
			if b := sink.last(); b == nil || b.To != n || len(b.Items.Partials) != 1 {
				t.Fatalf("write %d is not in a batch: %+v", n, b)
			}
		}
		if err := s.ResyncTrouble(1); err == nil || !strings.Contains(err.Error(), "gone") {
			t.Errorf("trouble of the resync: %v", err)
		}
		if err := s.Trouble(); err != nil {
			t.Errorf("trouble of the writes: %v", err)
		}
		if n := stores.tries(); n < 10 || n > 60 {
			t.Errorf("tried %d times in three minutes", n)
		}
		stores.fail(nil)
		time.Sleep(time.Minute)
		if left, err := s.ResyncRemaining(1), s.ResyncTrouble(1); left != 0 || err != nil {
			t.Errorf("%d bytes left: %v", left, err)
		}
		if b := sink.last(); len(b.Items.GapEnds) != 1 {
			t.Errorf("the last batch does not end the gap: %+v", b.Items)
		}
	})
}

// TestStartResync_AnotherBaselineWhileItIsRead: a start and a way back out of bitmap
// mode may both give one.
func TestStartResync_AnotherBaselineWhileItIsRead(t *testing.T) {
	j, sink := &faulty{}, &safeBatches{}
	s := segmenter.New(config(1<<20), j, sink, nothing{})
	s.AddResync(segmenter.Resync{Volume: 1, Backing: &disk{content: data(2, 8<<20)}, Remaining: []block.Extent{{Len: 8 << 20}}})
	s.StartResync(1, faultyHistory{&faulty{}})
	given := make(chan struct{})
	go func() {
		defer close(given)
		for range 1000 {
			s.StartResync(1, faultyHistory{&faulty{}})
		}
	}()
	for step(t, s) {
	}
	<-given
	if n := s.ResyncRemaining(1); n != 0 {
		t.Errorf("%d bytes are left", n)
	}
}
