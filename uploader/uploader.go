package uploader

import (
	"context"
	"errors"
	"log/slog"
	"math/bits"
	"slices"
	"sync"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/repo"
)

const (
	// DefaultMemoryBytes bounds the shards that wait in memory.
	DefaultMemoryBytes = 64 << 20
	// degradeAfter is how long a store must have failed before an entry goes
	// out without the shards that belong on it.
	degradeAfter = 5 * time.Second
)

// Config is what an Uploader works by.
type Config struct {
	Repo   *repo.Repository // with the gates of the Log's, see Gated
	Group  block.GroupID
	Branch block.BranchID
	// Begin is the entry with which the branch begins; 0 means 1. Entries before it are
	// of others.
	Begin  uint64
	Agent  *crypt.Agent
	Ring   *crypt.Ring
	Keys   *crypt.KeySet // this start's key set: seals values and manifests
	Log    *Log
	Spool  Spool
	Now    func() time.Time
	Logger *slog.Logger
	// LoggedKeySets are the key sets that the log is known to hold.
	LoggedKeySets map[block.ID]bool
	// Volumes are the group's volumes, and Committed the newest checkpoint of
	// each that is known to be on the stores already.
	Committed map[block.VolumeIndex]block.Seq
	// Logged is the end of the newest entry that is known to be decided.
	Logged       block.Seq
	MemoryBytes  int64
	BytesPerSec  int64 // bandwidth limit over all stores; 0: none
	DegradeAfter time.Duration
	// OnLogged is told of each batch once its entry n is decided, in order,
	// with the batch's rows as readers will see them.
	OnLogged func(b *batch.Batch, n uint64) error
	// Batches that end at or before HolesUpTo may stand behind a hole: what was
	// captured between them and the end of the log was in batches that are lost, and of
	// which the buffer does not know. OnHole is told when such a batch is next. It is
	// not logged, nor is anything behind it, until it is given up (GiveUp).
	HolesUpTo block.Seq
	OnHole    func()
	// Entries is what the host remembers of decided entries; without it nothing
	// is merged.
	Entries Entries
}

// Uploader makes one group's batches part of the history.
type Uploader struct {
	cfg     Config
	putters []*putter

	mu        monitor
	queue     []*pending
	memory    int64
	logged    []loggedEntry              // decided entries that are not safe yet
	lastTo    block.Seq                  // end of the newest decided entry
	described map[block.VolumeIndex]bool // volumes that the log describes
	committed map[block.VolumeIndex]block.Seq
	stats     Stats
	merger    *merger   // nil if nothing is merged
	digester  *digester // and then there are no digests either
	troubles  [troubleKinds]error
	refused   int             // shards that can never be placed, since the start
	lost      map[Shard]error // shards of batches that are not logged, and cannot be read now
	keeps     *pending        // the batch that is being persisted
	givingUp  bool            // see GiveUp
	gone      []*pending      // what was given up

	persisting chan struct{} // holds a token while a batch is being persisted
}

// New returns an Uploader. It starts nothing.
func New(cfg Config) *Uploader {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MemoryBytes <= 0 {
		cfg.MemoryBytes = DefaultMemoryBytes
	}
	if cfg.DegradeAfter <= 0 {
		cfg.DegradeAfter = degradeAfter
	}
	if cfg.LoggedKeySets == nil {
		cfg.LoggedKeySets = map[block.ID]bool{}
	}
	cfg.Begin = max(cfg.Begin, 1)
	cfg.Repo = Gated(cfg.Repo)
	u := &Uploader{cfg: cfg, persisting: make(chan struct{}, 1), lost: map[Shard]error{}, committed: map[block.VolumeIndex]block.Seq{}, described: map[block.VolumeIndex]bool{}}
	for v, seq := range cfg.Committed {
		u.committed[v] = seq
	}
	u.lastTo = cfg.Logged
	limit := newLimiter(cfg.BytesPerSec)
	for _, m := range cfg.Repo.Members {
		u.putters = append(u.putters, newPutter(m, cfg.Logger, cfg.Now, limit))
	}
	if cfg.Entries != nil {
		u.merger = newMerger(u)
		u.digester = &digester{m: u.merger, u: u, logger: cfg.Logger}
	}
	return u
}

// Put takes the next batch and begins to put its shards. It blocks while the
// memory for waiting shards is used up: then it has batches made durable in
// the buffer, oldest first, and goes on as fast as the buffer allows.
func (u *Uploader) Put(ctx context.Context, b *batch.Batch) error {
	p := newPending(b, make([]uint64, len(b.Segments)))
	p.memory, p.since = held(b), u.cfg.Now()
	if err := u.makeRoom(ctx, p.memory); err != nil {
		return err
	}
	u.enqueue(p)
	return nil
}

// Resume takes a batch that the buffer kept over a restart. Batches are
// resumed in order, before the first Put. placed says for each segment which
// shards are on their stores already (bit i: shard i).
func (u *Uploader) Resume(b *batch.Batch, placed []uint64) {
	p := newPending(b, placed)
	p.spooled, p.persisted, p.resumed = true, true, true
	u.mu.Lock()
	u.outline(p)
	u.mu.Unlock()
	u.enqueue(p)
}

func (u *Uploader) enqueue(p *pending) {
	jobs := u.puts(p)
	u.mu.Lock()
	u.memory += p.memory
	if u.givingUp {
		u.leave(p)
		u.mu.Unlock()
		return
	}
	u.queue = append(u.queue, p)
	u.mu.notify()
	u.mu.Unlock()
	for _, add := range jobs {
		add()
	}
}

// LoggedKeySets are the ids of the key sets that the log holds. It may be
// called from OnLogged only.
func (u *Uploader) LoggedKeySets() map[block.ID]bool { return u.cfg.LoggedKeySets }

// Run takes office and logs batches in order until ctx ends (nil), or another
// writer has taken over (ErrFenced, *LockedError), or something is wrong that
// trying again does not mend.
func (u *Uploader) Run(ctx context.Context) error {
	work, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = u.cfg.Log.Run(work) })
	for _, p := range u.putters {
		wg.Go(func() { p.run(work) })
	}
	wg.Go(func() { u.watchCommitted(work) })
	wg.Go(func() { u.passSafe(work) })
	wg.Go(func() { u.keepWaiting(work) })
	if err := u.cfg.Log.TakeOffice(work); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if u.merger != nil {
		wg.Go(func() { u.merger.run(work) })
		wg.Go(func() { u.merger.healer.run(work) })
		wg.Go(func() { u.digester.run(work) })
	}
	for {
		if err := u.logOne(work); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// logOne makes the head of the queue the next entry of the log.
func (u *Uploader) logOne(ctx context.Context) error {
	var p *pending
	if err := u.mu.await(ctx, 0, func() bool {
		if len(u.queue) == 0 {
			return false
		}
		p = u.queue[0]
		return true
	}); err != nil {
		return err
	}
	whole, err := u.load(ctx, p)
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	if u.isBehindHole(whole) {
		u.cfg.OnHole()
		return u.mu.await(ctx, 0, func() bool { return p.gone })
	}
	b := u.unlogged(whole)
	if p.resumed {
		b.Items.Handover = nil // whoever wrote it has come back, and takes writes
	}
	var degraded []format.Degraded
	if len(b.Segments) > 0 {
		if degraded, err = u.awaitPlaced(ctx, p); err != nil {
			return err
		}
	}
	u.mu.Lock()
	gone := p.gone
	p.appending = !gone
	u.mu.Unlock()
	if gone {
		return nil
	}
	e, err := u.entry(ctx, b, degraded)
	if err != nil {
		return err
	}
	if err := u.cfg.Log.Append(ctx, e.value); err != nil {
		return err
	}
	if err := u.decided(ctx, p, b, e); err != nil {
		return err
	}
	if err := u.cfg.OnLogged(b, e.n); err != nil {
		return err
	}
	if err := u.cfg.Log.Save(); err != nil {
		u.cfg.Logger.Warn("save how far the logs were read; a restart will read them again", "error", err)
	}
	return nil
}

// decided takes note that p, of which b was new to the log, is in it as e.
func (u *Uploader) decided(ctx context.Context, p *pending, b *batch.Batch, e entry) error {
	for _, ks := range e.keySets {
		u.cfg.LoggedKeySets[ks.ID] = true
	}
	if u.merger != nil {
		u.merger.decided(e.n, format.HashOf(e.value), len(e.items.Checkpoints) > 0)
		u.digester.decided(e.n)
	}
	end := b.To
	if e.items.Range != nil {
		end = e.items.Range.To
	}
	logged := loggedEntry{n: e.n, oldest: b.Oldest, bytes: b.Bytes, ends: map[block.VolumeIndex]block.Seq{}}
	u.mu.Lock()
	u.queue[0] = nil
	u.queue = u.queue[1:]
	p.logged, p.unwanted = true, len(b.Segments) < len(p.b.Segments)
	for i, all := range p.wanted() {
		if p.unwanted {
			break
		}
		p.exposed += bits.OnesCount64(all &^ p.placed[i])
	}
	u.cfg.Log.expose(p.exposed)
	u.foundAll(p)
	u.outline(p)
	u.lastTo = max(u.lastTo, end)
	for _, v := range e.items.Volumes {
		u.committed[v.Index] = 0
		u.described[v.Index] = true
	}
	for v := range u.committed {
		if !slices.ContainsFunc(e.items.Partials, func(x format.Partial) bool { return x.Volume == v }) {
			logged.ends[v] = end
		}
	}
	u.remember(logged)
	u.stats.Entries++
	u.stats.LastEntryBytes = int64(len(e.value))
	if len(e.items.Degraded) > 0 {
		u.stats.Degraded++
	}
	u.mu.Unlock()
	// What was persisting it has seen that it is logged. Nobody waits for a younger
	// batch that is being persisted: there may be no room for it before this one has
	// given up its own.
	if err := u.mu.await(ctx, 0, func() bool { return u.keeps != p }); err != nil {
		return err
	}
	u.mu.Lock()
	spooled, exposed := p.spooled, p.exposed > 0
	u.mu.Unlock()
	if exposed {
		for _, x := range u.putters {
			x.deferring(p)
		}
	}
	if spooled {
		u.cfg.Spool.Logged(p.b)
	}
	return nil
}
