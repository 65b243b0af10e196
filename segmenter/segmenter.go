package segmenter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/segment"
)

// Config is what a Segmenter works by.
type Config struct {
	Group   format.Group
	Branch  block.BranchID
	Profile format.Profile
	Keys    *crypt.KeySet
	// RPO is the wanted recovery point: how much lag between a write and its
	// checkpoint on the stores is allowed. A batch is cut at half of it, so
	// that the other half is left for sealing and putting.
	RPO time.Duration
	// BatchBytes is about how many bytes of writes a batch takes at most.
	BatchBytes int64
	// Coarse, if not nil, tells that room for batches is short, by how many bytes of
	// writes a batch should wait for then; 0 if it is not. History gets coarser so,
	// and takes up less: what is overwritten within a batch is in none.
	Coarse func() int64
	// Patience, if not nil, tells how long a batch should wait because very many wait
	// for the stores already; each takes memory. What is no longer than RPO/2 changes
	// nothing.
	Patience func() time.Duration
	// Next is the first Seq that is in no batch yet.
	Next block.Seq
	// Dropped, if it is not before Next, is the last Seq that the journal lacks:
	// see Segmenter.Drop.
	Dropped block.Seq
	// Now is the clock, for the times in batches.
	Now func() time.Time
}

// DefaultRPO is the wanted lag where the configuration names none.
const DefaultRPO = time.Second

// DefaultBatchBytes keeps a batch and what it is sealed into within the
// agent's memory budget.
const DefaultBatchBytes = 24 << 20

// paceInterval is how often a waiting Run looks at how much has been captured.
const paceInterval = 20 * time.Millisecond

// Segmenter cuts one group's writes into batches.
type Segmenter struct {
	cfg    Config
	source Source
	sink   Sink
	index  Index
	cut    *cutter
	hasher *crypt.ChunkHasher
	writer *segment.Writer
	joined []byte // see builder
	wake   chan struct{}
	// inherited: writes up to here were captured by an earlier process
	inherited block.Seq

	mu       sync.Mutex
	next     block.Seq // first Seq in no batch
	dropped  block.Seq // of those, the journal lacks the ones up to here
	cutBytes int64     // bytes of writes of this process that are in batches
	names    []format.NamedCheckpoint
	extra    []func(*format.Items) // to be added to the next batch
	resyncs  []*resync
	trouble  error // why the last Step of Run failed
	stats    Stats

	suspended, stepping bool
}

// Stats are counts since the start, for status and metrics.
type Stats struct {
	Batches       int64
	Bytes         int64 // of writes and resynced regions taken
	NewChunkBytes int64 // stored anew, after compression and sealing
	Segments      int64
}

// New returns a Segmenter. It starts nothing.
func New(cfg Config, source Source, sink Sink, index Index) *Segmenter {
	if cfg.RPO <= 0 {
		cfg.RPO = DefaultRPO
	}
	if cfg.BatchBytes <= 0 {
		cfg.BatchBytes = DefaultBatchBytes
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Segmenter{
		cfg: cfg, source: source, sink: sink, index: index, next: cfg.Next, dropped: cfg.Dropped, inherited: source.Captured(),
		cut: newCutter(cfg.Group), hasher: crypt.NewChunkHasher(cfg.Group.ChunkIDKey),
		writer: segment.NewWriter(cfg.Keys), wake: make(chan struct{}, 1),
	}
}

// Sealed is the end of the last batch that was handed to the sink.
func (s *Segmenter) Sealed() block.Seq {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next - 1
}

// Stats returns a copy of the counts.
func (s *Segmenter) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Checkpoint asks for a named checkpoint of what is captured now, and returns
// its Seq. A batch will end exactly there; if it is in a batch already, the
// name travels with the next one.
func (s *Segmenter) Checkpoint(name string, at time.Time) block.Seq {
	s.mu.Lock()
	// Under the lock under which Step decides where a batch may end: a batch
	// that is being cut ends at or before this Seq.
	seq := s.source.Captured()
	s.names = append(s.names, format.NamedCheckpoint{Name: name, Seq: seq, Time: at.UnixNano()})
	s.mu.Unlock()
	s.poke()
	return seq
}

// Announce has add put something into the items of the next batch, and asks
// for that batch now even if there are no writes.
func (s *Segmenter) Announce(add func(*format.Items)) {
	s.mu.Lock()
	s.extra = append(s.extra, add)
	s.mu.Unlock()
	s.poke()
}

func (s *Segmenter) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Step cuts one batch if there is anything to cut, and hands it to the sink.
func (s *Segmenter) Step(ctx context.Context) (worked bool, err error) {
	if !s.begin() {
		return false, nil
	}
	defer s.end()
	s.mu.Lock()
	next, limit := s.next, s.limit()
	names, extra := len(s.names), len(s.extra)
	first := max(next, s.dropped+1) // in the journal
	rs := s.openResync()
	s.mu.Unlock()

	captured := s.source.Captured()
	if captured < next && names == 0 && extra == 0 && rs == nil {
		return false, nil
	}
	d, journal := newDraft(), newDraft()
	defer d.release()
	defer journal.release()
	var progress *resyncProgress
	if rs != nil && next > s.inherited && limit >= captured && s.source.CapturedBytes()-s.cutSoFar() < s.cfg.BatchBytes {
		progress, err = s.readRegions(ctx, rs, d)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		s.resyncRead(rs, err)
		if err != nil {
			// The history or the backing cannot be read now. The writes go on.
			progress = nil
			d.clear()
		}
		captured = s.source.Captured()
	}
	if captured >= next {
		if err := s.source.Flush(ctx); err != nil {
			return false, fmt.Errorf("flush the journal for a batch: %w", err)
		}
	}
	// What was flushed before cutTime is durable now, and so in this batch.
	s.mu.Lock()
	cutTime := s.cfg.Now().UnixNano()
	upTo := min(s.source.Durable(), s.limit())
	names, extra = s.namesUpTo(upTo), len(s.extra)
	s.mu.Unlock()
	to, ownBytes := max(next-1, min(upTo, first-1)), int64(0)
	if upTo >= first {
		last := cutTime
		take, limit := journal.add, s.cfg.BatchBytes
		if n := s.coarse(); n > limit {
			take, limit = journal.replace, n
		}
		after, err := s.source.Read(first, upTo, limit, func(w block.Write) error {
			if limit > s.cfg.BatchBytes && journal.memory.bytes > s.cfg.BatchBytes {
				return errEnough
			}
			take(w)
			last = w.Time
			if w.Seq > s.inherited {
				ownBytes += w.Extent.Len
			}
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return false, fmt.Errorf("read the journal from seq %s: %w", first, err)
		}
		if to = after - 1; to < upTo {
			cutTime, names = min(cutTime, last), 0 // full before it reached the end
		}
	}
	if progress != nil && (to < captured || s.isSuspended()) {
		// The batch ends before the regions had been read, or they may hold what
		// went past the journal: they belong to a later one and are read again.
		progress = nil
		d.clear()
	}
	d.overlay(journal)

	b := &batch.Batch{From: next, To: to, KeySet: s.cfg.Keys.ID, Bytes: d.bytes, Oldest: d.oldest}
	if err := s.seal(d, b); err != nil {
		return false, fmt.Errorf("seal seqs %s to %s: %w", b.From, b.To, err)
	}
	d.release() // putting may take long
	took := s.items(b, cutTime, progress, names, extra)
	if b.To < b.From && len(b.Volumes) == 0 && !took {
		return false, nil // nothing was durable yet and there is nothing to say
	}
	// Once the sink has the batch, uploader changes it.
	cut := summarize(b)
	if err := s.sink.Put(ctx, b); err != nil {
		return false, err
	}
	s.done(cut, ownBytes, progress, extra)
	return true, nil
}

// limit is the last Seq that a batch from s.next on may have; s.mu is held.
func (s *Segmenter) limit() block.Seq {
	limit := s.boundary()
	if len(s.names) > 0 {
		limit = min(limit, max(s.names[0].Seq, s.next-1))
	}
	return limit
}

// namesUpTo is how many of the names asked for belong to a batch that ends at
// upTo; s.mu is held.
func (s *Segmenter) namesUpTo(upTo block.Seq) int {
	n := 0
	for n < len(s.names) && s.names[n].Seq <= max(upTo, s.next-1) {
		n++
	}
	return n
}

// items fills in what the log entry of b will say besides its extents, and
// reports whether that is anything at all.
func (s *Segmenter) items(b *batch.Batch, cutTime int64, progress *resyncProgress, names, extra int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	it := &b.Items
	for _, add := range s.extra[:extra] {
		add(it)
	}
	it.Checkpoints = append(it.Checkpoints, s.names[:names]...)
	s.resyncItems(it, progress)
	it.Range = &format.Range{Branch: s.cfg.Branch, From: b.From, To: b.To, Time: cutTime}
	if it.Handover != nil {
		it.Handover.Seq = b.To
	}
	return extra > 0 || names > 0 || progress != nil
}

// cutBatch is what done must know of a batch that the sink has.
type cutBatch struct {
	from, to block.Seq
	names    int // checkpoints in it
	bytes    int64
	segments int64
	payload  int64
}

func summarize(b *batch.Batch) cutBatch {
	c := cutBatch{from: b.From, to: b.To, names: len(b.Items.Checkpoints), bytes: b.Bytes, segments: int64(len(b.Segments))}
	for _, seg := range b.Segments {
		c.payload += seg.Row.Payload
	}
	return c
}

// UncutBytes is how many bytes of writes of this process are in no batch yet.
func (s *Segmenter) UncutBytes() int64 { return max(0, s.source.CapturedBytes()-s.cutSoFar()) }

// done takes note that the sink has a batch.
func (s *Segmenter) done(b cutBatch, journalBytes int64, progress *resyncProgress, extra int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = b.to + 1
	s.cutBytes += journalBytes
	s.extra = s.extra[extra:]
	s.names = s.names[b.names:]
	s.resyncDone(b.from, progress)
	s.stats.Batches++
	s.stats.Bytes += b.bytes
	s.stats.Segments += b.segments
	s.stats.NewChunkBytes += b.payload
}

func (s *Segmenter) cutSoFar() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cutBytes
}

const (
	// retryMin and retryMax bound the pause after a Step that failed, and after
	// regions that could not be read.
	retryMin = 100 * time.Millisecond
	retryMax = 10 * time.Second
)

// Run cuts batches until ctx ends. It waits for writes without a timer, and
// paces itself by RPO while there are some. It returns nil when ctx has ended.
// What fails is tried again, less and less often: Trouble tells.
func (s *Segmenter) Run(ctx context.Context) error {
	pause := time.Duration(0)
	for {
		if err := s.wait(ctx); err != nil {
			return nil
		}
		for {
			worked, err := s.Step(ctx)
			if ctx.Err() != nil {
				return nil
			}
			s.mu.Lock()
			s.trouble = err
			s.mu.Unlock()
			if err != nil {
				pause = longer(pause)
				t := time.NewTimer(pause)
				select {
				case <-ctx.Done():
					t.Stop()
					return nil
				case <-t.C:
				}
				continue
			}
			pause = 0
			if !worked || !s.pressing() {
				break
			}
		}
	}
}

// longer is the pause after one of d.
func longer(d time.Duration) time.Duration { return min(max(2*d, retryMin), retryMax) }

// Trouble is why Run gets no further at present, nil if it does.
func (s *Segmenter) Trouble() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble
}

// pressing reports whether the next batch must not wait for its age.
func (s *Segmenter) pressing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.names) > 0 || len(s.extra) > 0 || s.openResync() != nil || s.next <= s.inherited ||
		s.source.CapturedBytes()-s.cutBytes >= max(s.cfg.BatchBytes, s.coarse())
}

// errEnough ends the reading of a batch that has as much as it may.
var errEnough = errors.New("the batch is full")

// coarse is how many bytes of writes a batch waits for because room is short.
func (s *Segmenter) coarse() int64 {
	if s.cfg.Coarse == nil {
		return 0
	}
	return s.cfg.Coarse()
}

// coarsePause is how long a batch waits for more to be overwritten while room is
// short.
const coarsePause = 30 * time.Second

// wait returns when a batch is due.
func (s *Segmenter) wait(ctx context.Context) error {
	if err := s.awaitResumed(ctx); err != nil {
		return err
	}
	if s.pressing() {
		return ctx.Err()
	}
	arrived := make(chan error, 1)
	waiting, cancel := context.WithCancel(ctx)
	after := s.Sealed()
	go func() { arrived <- s.source.WaitCaptured(waiting, after) }()
	var err error
	select {
	case err = <-arrived:
		cancel()
	case <-s.wake:
		cancel()
		// Ended by cancel, or by a write, which the next Step sees.
		if err := <-arrived; err != nil {
			return ctx.Err()
		}
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	due := time.NewTimer(s.cfg.RPO / 2)
	defer due.Stop()
	began := s.cfg.Now()
	tick := time.NewTicker(paceInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-due.C:
			wanted := time.Duration(0)
			if s.coarse() > 0 {
				wanted = coarsePause
			}
			if s.cfg.Patience != nil {
				wanted = max(wanted, s.cfg.Patience())
			}
			if left := wanted - s.cfg.Now().Sub(began); left > 0 {
				due.Reset(min(left, max(s.cfg.RPO/2, paceInterval)))
				continue
			}
			return nil
		case <-s.wake:
			return nil
		case <-tick.C:
			if s.pressing() {
				return nil
			}
		}
	}
}
