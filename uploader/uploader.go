package uploader

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/manifest"
	"drc/internal/repo"
)

const (
	// inlineManifestBytes is the largest manifest that travels in its entry.
	inlineManifestBytes = 64 << 10
	// DefaultMemoryBytes bounds the shards that wait in memory.
	DefaultMemoryBytes = 64 << 20
	// degradeAfter is how long a store must have failed before an entry goes
	// out without the shards that belong on it.
	degradeAfter = 5 * time.Second
)

// Spool keeps batches in the buffer, durably, when the stores cannot take
// them. Its methods name batches by their To and shards by segment and index.
type Spool interface {
	// Persist makes the record and shards of whole durable: any one disk can be
	// lost. It waits for room if need be. Batches are persisted in order; b is
	// what Load and Logged will be given for it. After an error it is called
	// again for the same batch, unless that is logged without.
	Persist(ctx context.Context, b, whole *batch.Batch) error
	// Load returns the record of a batch that was persisted.
	Load(b *batch.Batch) (*batch.Batch, error)
	// ReadShard returns a shard of a batch that was persisted.
	ReadShard(seg block.SegmentID, index int) ([]byte, error)
	// Placed says that a shard is on its store: its local copy can go.
	Placed(seg block.SegmentID, index int)
	// Logged says that the batch is in a decided entry: its record can go, and
	// its shards that are not placed stay. Persist was called for it, and may
	// have failed.
	Logged(b *batch.Batch)
}

// Config is what an Uploader works by.
type Config struct {
	Repo   *repo.Repository
	Group  block.GroupID
	Branch block.BranchID
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
	// Entries is what the host remembers of decided entries; without it nothing
	// is merged.
	Entries Entries
}

// Uploader makes one group's batches part of the history.
type Uploader struct {
	cfg     Config
	putters []*putter

	mu        sync.Mutex
	changed   chan struct{}
	queue     []*pending
	memory    int64
	logged    []loggedEntry              // decided entries that are not safe yet
	lastTo    block.Seq                  // end of the newest decided entry
	described map[block.VolumeIndex]bool // volumes that the log describes
	committed map[block.VolumeIndex]block.Seq
	stats     Stats
	merger    *merger // nil if nothing is merged
	trouble   error   // why a batch cannot be kept in the buffer, or read back

	persisting chan struct{} // holds a token while a batch is being persisted
}

// loggedMax bounds the decided entries that are remembered until they are safe:
// beyond it neighbours are taken together, and become safe together.
const loggedMax = 1024

// loggedEntry is a decided entry that is not safe yet, or some neighbours.
type loggedEntry struct {
	n      uint64                          // the newest
	ends   map[block.VolumeIndex]block.Seq // the newest checkpoint of each volume
	oldest int64
	bytes  int64
}

// Stats are counts since the start.
type Stats struct {
	Entries        int64
	PutBytes       int64
	Requests       int64
	Degraded       int64
	WaitingPuts    int
	QueuedBatches  int
	QueuedBytes    int64
	LastEntryBytes int64
}

// pending is a batch on its way.
type pending struct {
	b         *batch.Batch
	placed    []uint64 // for each segment: bit i says that shard i is placed
	missing   int      // puts that have not succeeded
	memory    int64    // what it holds in memory, bytes
	spooled   bool     // the buffer knows of it
	persisted bool     // the buffer has it durably; b is its outline only
	logged    bool     // it is in a decided entry; b is its outline only
	unwanted  bool     // the log had its writes already, and its entry has no segments
}

// extentBytes is about what an extent of a batch takes in memory.
const extentBytes = 128

// held is about what a batch takes in memory, in bytes.
func held(b *batch.Batch) int64 {
	n := int64(0)
	for _, s := range b.Segments {
		n += int64(len(s.Inline))
		for _, shard := range s.Shards {
			n += int64(len(shard))
		}
	}
	for _, v := range b.Volumes {
		n += extentBytes * int64(len(v.Extents))
	}
	return n
}

// outline makes the batch give up all that the buffer can tell again; u.mu is
// held. Its slices may be in use elsewhere, and are left alone.
func (u *Uploader) outline(p *pending) {
	segments := slices.Clone(p.b.Segments)
	for i := range segments {
		segments[i].Inline, segments[i].Shards = nil, nil
	}
	p.b.Segments, p.b.Volumes, p.b.Items = segments, nil, format.Items{}
	u.memory -= p.memory
	p.memory = 0
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
	u := &Uploader{cfg: cfg, changed: make(chan struct{}), persisting: make(chan struct{}, 1), committed: map[block.VolumeIndex]block.Seq{}, described: map[block.VolumeIndex]bool{}}
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
	}
	return u
}

func (u *Uploader) notify() {
	close(u.changed)
	u.changed = make(chan struct{})
}

// await calls ready, with u.mu held, until it returns true: after each change
// and, if poll is not zero, that often.
func (u *Uploader) await(ctx context.Context, poll time.Duration, ready func() bool) error {
	for {
		u.mu.Lock()
		ok, changed := ready(), u.changed
		u.mu.Unlock()
		if ok {
			return nil
		}
		if err := changedOrLater(ctx, changed, poll); err != nil {
			return err
		}
	}
}

// changedOrLater returns when changed is closed or, if poll is not zero, that
// time has passed.
func changedOrLater(ctx context.Context, changed <-chan struct{}, poll time.Duration) error {
	var tick <-chan time.Time
	if poll > 0 {
		t := time.NewTimer(poll)
		defer t.Stop()
		tick = t.C
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-changed:
	case <-tick:
	}
	return nil
}

// Put takes the next batch and begins to put its shards. It blocks while the
// memory for waiting shards is used up: then it has batches made durable in
// the buffer, oldest first, and goes on as fast as the buffer allows.
func (u *Uploader) Put(ctx context.Context, b *batch.Batch) error {
	p := &pending{b: b, placed: make([]uint64, len(b.Segments))}
	p.memory = held(b)
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
	p := &pending{b: b, placed: placed, spooled: true, persisted: true}
	u.mu.Lock()
	u.outline(p)
	u.mu.Unlock()
	u.enqueue(p)
}

// LoggedKeySets are the ids of the key sets that the log holds. It may be
// called from OnLogged only.
func (u *Uploader) LoggedKeySets() map[block.ID]bool { return u.cfg.LoggedKeySets }

// Learn says what decided entries up to n hold that this Uploader has not
// logged: the end of what they cover, the newest checkpoint of each volume, and
// volumes that they describe. They may not be on enough stores yet to count as
// committed.
func (u *Uploader) Learn(n uint64, to block.Seq, checkpoints map[block.VolumeIndex]block.Seq, volumes []format.Volume) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.lastTo = max(u.lastTo, to)
	for _, v := range volumes {
		u.described[v.Index] = true
	}
	if last := len(u.logged) - 1; last < 0 || u.logged[last].n < n {
		u.remember(loggedEntry{n: n, ends: checkpoints})
	}
}

// remember has an entry become committed once it is safe; u.mu is held.
func (u *Uploader) remember(e loggedEntry) {
	u.logged = append(u.logged, e)
	if len(u.logged) > loggedMax {
		u.logged = halved(u.logged)
	}
	u.notify()
}

// unlogged returns what of a batch the log does not have. A host that lost its
// progress in a power cut cuts seqs again that are history already. What the log
// holds beyond the batch's end must not be overlaid with the older writes of the
// batch, and the log's end never goes back: of such a batch only its statements
// are left. What is returned can be changed: it shares only payloads with b.
func (u *Uploader) unlogged(b *batch.Batch) *batch.Batch {
	u.mu.Lock()
	defer u.mu.Unlock()
	left := *b
	left.Segments, left.Volumes = slices.Clone(b.Segments), slices.Clone(b.Volumes)
	for i := range left.Volumes {
		left.Volumes[i].Extents = slices.Clone(left.Volumes[i].Extents)
	}
	left.Items.Volumes = nil
	for _, v := range b.Items.Volumes {
		if !u.described[v.Index] {
			left.Items.Volumes = append(left.Items.Volumes, v)
		}
	}
	if rg := b.Items.Range; rg != nil && rg.To < u.lastTo {
		end := *rg
		end.To = u.lastTo
		left.Items.Range = &end
		left.Volumes, left.Segments, left.Bytes = nil, nil, 0
	}
	return &left
}

// Shard names one shard of a segment.
type Shard struct {
	Segment block.SegmentID
	Index   int
}

// Heal brings shards to their stores whose entry is decided already, and which
// the buffer has kept since.
func (u *Uploader) Heal(shards []Shard) {
	for _, s := range shards {
		u.putters[repo.ShardMember(s.Segment, s.Index, len(u.putters))].add(put{
			name: format.SegmentName(u.cfg.Group, s.Segment, format.ExpiryNone, s.Index),
			body: func() ([]byte, error) {
				raw, err := u.cfg.Spool.ReadShard(s.Segment, s.Index)
				if err != nil {
					err = fmt.Errorf("%w: %w", errNoSource, err)
				}
				return raw, err
			},
			placed: func() { u.cfg.Spool.Placed(s.Segment, s.Index) },
		})
	}
}

func (u *Uploader) enqueue(p *pending) {
	jobs := u.puts(p)
	u.mu.Lock()
	u.queue = append(u.queue, p)
	u.memory += p.memory
	u.notify()
	u.mu.Unlock()
	for _, add := range jobs {
		add()
	}
}

// puts prepares the puts of the shards of p that are not placed.
func (u *Uploader) puts(p *pending) (jobs []func()) {
	for i, s := range p.b.Segments {
		if s.Row.Inline != 0 {
			continue
		}
		for shard := range s.Row.Profile.Total() {
			if p.placed[i]&(1<<shard) != 0 {
				continue
			}
			p.missing++
			member := repo.ShardMember(s.Row.ID, shard, len(u.putters))
			j := put{
				name:   format.SegmentName(u.cfg.Group, s.Row.ID, s.Row.Expiry, shard),
				body:   func() ([]byte, error) { return u.shard(p, i, shard) },
				placed: func() { u.shardPlaced(p, i, shard) },
			}
			jobs = append(jobs, func() { u.putters[member].add(j) })
		}
	}
	return jobs
}

// shard returns the bytes of a shard, from memory or from the buffer.
func (u *Uploader) shard(p *pending, segment, shard int) ([]byte, error) {
	u.mu.Lock()
	s, unwanted := p.b.Segments[segment], p.unwanted
	u.mu.Unlock()
	if unwanted {
		return nil, errUnwanted
	}
	if s.Shards != nil && s.Shards[shard] != nil {
		return s.Shards[shard], nil
	}
	raw, err := u.cfg.Spool.ReadShard(s.Row.ID, shard)
	if err != nil {
		return nil, fmt.Errorf("%w: read shard %d of segment %s from the buffer: %w", errNoSource, shard, s.Row.ID, err)
	}
	return raw, nil
}

func (u *Uploader) shardPlaced(p *pending, segment, shard int) {
	u.mu.Lock()
	s := &p.b.Segments[segment]
	p.placed[segment] |= 1 << shard
	p.missing--
	spooled := p.spooled
	if s.Shards != nil && s.Shards[shard] != nil {
		n := int64(len(s.Shards[shard]))
		s.Shards[shard] = nil
		p.memory -= n
		u.memory -= n
	}
	id := s.Row.ID
	u.notify()
	u.mu.Unlock()
	if spooled {
		u.cfg.Spool.Placed(id, shard)
	}
}

// makeRoom waits until n more bytes of shards may be in memory. While a store
// is failing it does not wait for it but persists the oldest batches.
func (u *Uploader) makeRoom(ctx context.Context, n int64) error {
	for {
		var oldest *pending
		err := u.await(ctx, time.Second, func() bool {
			oldest = nil
			if u.memory == 0 || u.memory+n <= u.cfg.MemoryBytes {
				return true
			}
			if u.troubled(u.cfg.DegradeAfter / 2) {
				for _, p := range u.queue {
					if !p.persisted { // in order, also what holds no memory
						oldest = p
						return true
					}
				}
				// All that can be in the buffer is there. What is left belongs to
				// the batch that is being logged, and waiting for that is waiting
				// for the stores.
				return true
			}
			return false
		})
		if err != nil || oldest == nil {
			return err
		}
		if err := u.persist(ctx, oldest, func() bool { return u.memory == 0 || u.memory+n <= u.cfg.MemoryBytes }); err != nil {
			return err
		}
	}
}

// troubled reports whether some store has been failing for at least d.
func (u *Uploader) troubled(d time.Duration) bool {
	for _, p := range u.putters {
		if since, _ := p.down(); !since.IsZero() && u.cfg.Now().Sub(since) >= d {
			return true
		}
	}
	for _, s := range u.cfg.Log.Status() {
		if !s.Since.IsZero() && u.cfg.Now().Sub(s.Since) >= d {
			return true
		}
	}
	return false
}

// persist makes a batch durable in the buffer and drops what it holds in memory.
// It tries for as long as it takes, or until enough is true, which is called
// with u.mu held, or the batch is logged: then it returns nil all the same. The
// only error is that ctx has ended.
func (u *Uploader) persist(ctx context.Context, p *pending, enough func() bool) error {
	try, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if u.await(try, 0, func() bool { return p.logged || enough() }) == nil {
			cancel()
		}
	}()
	defer func() { cancel(); <-watched }()
	var pause backoff
	for {
		err := u.persistOnce(try, p)
		if try.Err() != nil {
			err = nil
		}
		u.setTrouble(err)
		if err == nil {
			return ctx.Err()
		}
		if pause.wait(try) != nil {
			u.setTrouble(nil)
			return ctx.Err()
		}
	}
}

// persistOnce is one try of persist.
func (u *Uploader) persistOnce(ctx context.Context, p *pending) error {
	select {
	case u.persisting <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-u.persisting }()
	u.mu.Lock()
	if p.persisted || p.logged {
		u.mu.Unlock()
		return nil
	}
	whole := *p.b
	whole.Segments = slices.Clone(p.b.Segments)
	for i := range whole.Segments {
		whole.Segments[i].Shards = slices.Clone(p.b.Segments[i].Shards)
	}
	p.spooled = true
	u.mu.Unlock()
	err := u.cfg.Spool.Persist(ctx, p.b, &whole)
	u.mu.Lock()
	type shard struct {
		segment block.SegmentID
		index   int
	}
	var placedMeanwhile []shard // before the buffer knew of them
	for i := range whole.Segments {
		for k := range whole.Segments[i].Shards {
			if p.placed[i]&(1<<k) != 0 {
				placedMeanwhile = append(placedMeanwhile, shard{whole.Segments[i].Row.ID, k})
			}
		}
	}
	if err == nil {
		p.persisted = true
		u.outline(p)
	}
	u.notify()
	u.mu.Unlock()
	for _, x := range placedMeanwhile {
		u.cfg.Spool.Placed(x.segment, x.index)
	}
	if err != nil {
		return fmt.Errorf("keep seqs %s to %s in the buffer: %w", p.b.From, p.b.To, err)
	}
	return nil
}

// setTrouble notes what the buffer fails at; nil: nothing.
func (u *Uploader) setTrouble(err error) {
	u.mu.Lock()
	before := u.trouble
	u.trouble = err
	u.mu.Unlock()
	if err != nil && before == nil {
		u.cfg.Logger.Warn("the buffer fails; trying again", "error", err)
	}
}

// Trouble is what keeps this host from bringing history to the stores, other
// than stores that are out of reach; nil if nothing does. It is tried again.
func (u *Uploader) Trouble() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.trouble != nil {
		return u.trouble
	}
	return u.cfg.Log.Trouble()
}

// load returns the whole batch without its shards: from the buffer, if it is in
// memory only in outline.
func (u *Uploader) load(ctx context.Context, p *pending) (*batch.Batch, error) {
	var pause backoff
	for {
		u.mu.Lock()
		whole := *p.b
		persisted := p.persisted
		u.mu.Unlock()
		if !persisted {
			return &whole, nil
		}
		b, err := u.cfg.Spool.Load(p.b)
		u.setTrouble(err)
		if err == nil {
			return b, nil
		}
		if pause.wait(ctx) != nil {
			return nil, ctx.Err()
		}
	}
}

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
	if err := u.cfg.Log.TakeOffice(work); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if u.merger != nil {
		wg.Go(func() { u.merger.run(work) })
		wg.Go(func() { u.merger.healer.run(work) })
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
	if err := u.await(ctx, 0, func() bool {
		if len(u.queue) == 0 {
			return false
		}
		p = u.queue[0]
		return true
	}); err != nil {
		return err
	}
	whole, err := u.load(ctx, p)
	if err != nil {
		return err
	}
	b := u.unlogged(whole)
	var degraded []format.Degraded
	if len(b.Segments) > 0 {
		if degraded, err = u.awaitPlaced(ctx, p); err != nil {
			return err
		}
	}
	n, parent, epoch := u.cfg.Log.Next()
	u.resolve(b, n)
	items := b.Items
	if n > 1 {
		items.Group = nil // a start that had lost its progress announced it again
	}
	if items.Range != nil {
		items.Range.Dates = u.cfg.Log.Dates()
	}
	items.Degraded = degraded
	for _, s := range b.Segments {
		if s.Inline != nil {
			items.Segments = append(items.Segments, format.InlineSegment{ID: s.Row.ID, Payload: s.Inline})
		}
	}
	if err := u.manifest(ctx, b, n, &items); err != nil {
		return err
	}
	sets, err := u.keySets(b)
	if err != nil {
		return err
	}
	draft := grouplog.Draft{Group: u.cfg.Group, N: n, Parent: parent, Epoch: epoch, Keys: u.cfg.Keys, Items: &items}
	for _, ks := range sets {
		draft.KeySets = append(draft.KeySets, ks.Raw)
	}
	value := draft.Make(u.cfg.Agent)
	if len(value) > format.MaxValueBytes {
		return fmt.Errorf("entry %d would have %d bytes: this is a bug in drc", n, len(value))
	}
	if err := u.cfg.Log.Append(ctx, value); err != nil {
		return err
	}
	for _, ks := range sets {
		u.cfg.LoggedKeySets[ks.ID] = true
	}
	if u.merger != nil {
		u.merger.decided(n, format.HashOf(value), len(items.Checkpoints) > 0)
	}
	end := b.To
	if items.Range != nil {
		end = items.Range.To
	}
	entry := loggedEntry{n: n, oldest: b.Oldest, bytes: b.Bytes, ends: map[block.VolumeIndex]block.Seq{}}
	u.mu.Lock()
	u.queue[0] = nil
	u.queue = u.queue[1:]
	p.logged, p.unwanted = true, len(b.Segments) < len(p.b.Segments)
	u.outline(p)
	u.lastTo = max(u.lastTo, end)
	for _, v := range items.Volumes {
		u.committed[v.Index] = 0
		u.described[v.Index] = true
	}
	for v := range u.committed {
		if !slices.ContainsFunc(items.Partials, func(x format.Partial) bool { return x.Volume == v }) {
			entry.ends[v] = end
		}
	}
	u.remember(entry)
	u.stats.Entries++
	u.stats.LastEntryBytes = int64(len(value))
	if len(degraded) > 0 {
		u.stats.Degraded++
	}
	u.notify()
	u.mu.Unlock()
	select {
	case u.persisting <- struct{}{}: // what was persisting it has seen that it is logged
	case <-ctx.Done():
		return ctx.Err()
	}
	<-u.persisting
	u.mu.Lock()
	spooled := p.spooled
	u.mu.Unlock()
	if spooled {
		u.cfg.Spool.Logged(p.b)
	}
	if err := u.cfg.OnLogged(b, n); err != nil {
		return err
	}
	if err := u.cfg.Log.Save(); err != nil {
		u.cfg.Logger.Warn("save how far the logs were read; a restart will read them again", "error", err)
	}
	return nil
}

// halved takes neighbours together.
func halved(all []loggedEntry) []loggedEntry {
	var out []loggedEntry
	for i, e := range all {
		if i%2 == 0 {
			out = append(out, e)
			continue
		}
		x := &out[len(out)-1]
		x.n = e.n
		maps.Copy(x.ends, e.ends)
		if x.oldest == 0 || (e.oldest != 0 && e.oldest < x.oldest) {
			x.oldest = e.oldest
		}
		x.bytes += e.bytes
	}
	return out
}

// resolve puts the entry's number in the rows of segments that travel in it.
func (u *Uploader) resolve(b *batch.Batch, n uint64) {
	for i := range b.Segments {
		if b.Segments[i].Inline != nil {
			b.Segments[i].Row.Inline = n
		}
	}
	inline := map[block.SegmentID]bool{}
	for _, s := range b.Segments {
		inline[s.Row.ID] = s.Inline != nil
	}
	for _, v := range b.Volumes {
		for i := range v.Extents {
			if x := &v.Extents[i]; !x.Zero && inline[x.Segment.ID] {
				x.Segment.Inline = n
			}
		}
	}
}

// awaitPlaced waits until every shard of p is on its store. If a store has
// been failing for long, at least k shards of each segment placed are enough,
// once the others are durable in the buffer: then it returns what is placed.
func (u *Uploader) awaitPlaced(ctx context.Context, p *pending) ([]format.Degraded, error) {
	for {
		enough, persisted := false, false
		err := u.await(ctx, time.Second, func() bool {
			if p.missing == 0 {
				return true
			}
			enough, persisted = u.troubled(u.cfg.DegradeAfter) && u.enoughPlaced(p), p.persisted
			return enough
		})
		if err != nil || !enough {
			return nil, err
		}
		if persisted {
			break
		}
		// Should the stores be back before the buffer has room, they will do.
		if err := u.persist(ctx, p, func() bool { return p.missing == 0 }); err != nil {
			return nil, err
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []format.Degraded
	for i, s := range p.b.Segments {
		if all := uint64(1)<<s.Row.Profile.Total() - 1; s.Row.Inline == 0 && p.placed[i] != all {
			out = append(out, format.Degraded{Segment: s.Row.ID, Placed: p.placed[i]})
		}
	}
	return out, nil
}

// enoughPlaced reports whether each segment has at least k shards placed, and
// every shard that is missing belongs to a store that fails; u.mu is held.
func (u *Uploader) enoughPlaced(p *pending) bool {
	for i, s := range p.b.Segments {
		if s.Row.Inline != 0 {
			continue
		}
		have := 0
		for shard := range s.Row.Profile.Total() {
			if p.placed[i]&(1<<shard) != 0 {
				have++
				continue
			}
			if since, _ := u.putters[repo.ShardMember(s.Row.ID, shard, len(u.putters))].down(); since.IsZero() {
				return false
			}
		}
		if have < s.Row.Profile.Data {
			return false
		}
	}
	return true
}

// manifest makes the entry's manifest, and puts it on the stores if it is too
// large to travel inline.
func (u *Uploader) manifest(ctx context.Context, b *batch.Batch, n uint64, items *format.Items) error {
	if len(b.Volumes) == 0 {
		return nil
	}
	build := manifest.NewBuilder(format.ManifestHeader{
		Group: u.cfg.Group, Branch: u.cfg.Branch, FromN: n, ToN: n, From: b.From, To: b.To,
	}, u.cfg.Agent, u.cfg.Keys)
	for _, v := range b.Volumes {
		for _, x := range v.Extents {
			build.Add(v.Volume, x)
		}
	}
	raw := build.Finish()
	if len(raw) <= inlineManifestBytes {
		items.Manifest = raw
		return nil
	}
	name := format.ManifestName{Branch: u.cfg.Branch, From: n, To: n, ID: build.ID()}
	items.Reference = &format.ManifestReference{ID: build.ID(), Bytes: int64(len(raw)), Hash: format.HashOf(raw)}
	if u.merger != nil {
		u.merger.recent.keep(name.Name(u.cfg.Group), raw)
	}
	return u.putEverywhere(ctx, name.Name(u.cfg.Group), raw)
}

// keySets returns the key sets that the entry needs and the log may not have.
func (u *Uploader) keySets(b *batch.Batch) ([]*crypt.KeySet, error) {
	var out []*crypt.KeySet
	for _, id := range []block.ID{u.cfg.Keys.ID, b.KeySet} {
		if u.cfg.LoggedKeySets[id] || (len(out) > 0 && out[0].ID == id) {
			continue
		}
		ks, ok := u.cfg.Ring.Set(id)
		if !ok {
			return nil, fmt.Errorf("key set %s of seqs %s to %s is not at hand", id, b.From, b.To)
		}
		out = append(out, ks)
	}
	return out, nil
}

// watchCommitted notes which decided entries are safe: on more stores than may
// be lost.
func (u *Uploader) watchCommitted(ctx context.Context) {
	lost := u.cfg.Repo.Tolerates()
	for {
		var safe uint64
		err := u.await(ctx, 0, func() bool {
			safe = u.cfg.Log.Safe(lost)
			return len(u.logged) > 0 && u.logged[0].n <= safe
		})
		if err != nil {
			return
		}
		u.mu.Lock()
		for len(u.logged) > 0 && u.logged[0].n <= safe {
			e := u.logged[0]
			u.logged = u.logged[1:]
			for v, end := range e.ends {
				u.committed[v] = max(u.committed[v], end)
			}
		}
		u.notify()
		u.mu.Unlock()
	}
}

// passSafe wakes those who wait here whenever more of the log has become safe.
func (u *Uploader) passSafe(ctx context.Context) {
	lost, safe := u.cfg.Repo.Tolerates(), uint64(0)
	for u.cfg.Log.AwaitSafe(ctx, lost, safe) == nil {
		safe = u.cfg.Log.Safe(lost)
		u.mu.Lock()
		u.notify()
		u.mu.Unlock()
	}
}

// Logged is the end of the newest decided entry.
func (u *Uploader) Logged() block.Seq {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.lastTo
}

// Committed is the newest checkpoint of a volume that is on more stores than
// may be lost.
func (u *Uploader) Committed(v block.VolumeIndex) block.Seq {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.committed[v]
}

// AwaitCommitted waits until a volume's newest checkpoint is at or behind seq.
func (u *Uploader) AwaitCommitted(ctx context.Context, v block.VolumeIndex, seq block.Seq) error {
	return u.await(ctx, 0, func() bool { return u.committed[v] >= seq })
}

// AwaitIdle waits until every batch that was put is logged and every put has
// succeeded.
func (u *Uploader) AwaitIdle(ctx context.Context) error {
	return u.await(ctx, 100*time.Millisecond, func() bool {
		if len(u.queue) > 0 || len(u.logged) > 0 {
			return false
		}
		for _, p := range u.putters {
			if p.waiting() > 0 {
				return false
			}
		}
		return true
	})
}

// Waiting describes what was put and is not committed: when its oldest write
// was captured (ns since 1970 UTC, 0 if there is none), and its bytes.
func (u *Uploader) Waiting() (oldest, bytes int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	take := func(at, n int64) {
		if at != 0 && (oldest == 0 || at < oldest) {
			oldest = at
		}
		bytes += n
	}
	for _, e := range u.logged {
		take(e.oldest, e.bytes)
	}
	for _, p := range u.queue {
		take(p.b.Oldest, p.b.Bytes)
	}
	return oldest, bytes
}

// Stats returns a copy of the counts.
func (u *Uploader) Stats() Stats {
	u.mu.Lock()
	st := u.stats
	st.QueuedBatches = len(u.queue)
	st.QueuedBytes = u.memory
	u.mu.Unlock()
	for _, p := range u.putters {
		p.mu.Lock()
		st.PutBytes += p.bytes
		st.Requests += p.requests
		st.WaitingPuts += len(p.queue) + p.active
		p.mu.Unlock()
	}
	return st
}

// StoreTrouble is since when a store has failed to take objects, and how.
func (u *Uploader) StoreTrouble(i int) (time.Time, error) { return u.putters[i].down() }
