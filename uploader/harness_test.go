package uploader_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/manifest"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/internal/repo"
	"drc/restorer"
	"drc/segmenter"
	"drc/uploader"
)

// journal is a segmenter.Source over writes in memory.
type journal struct {
	mu      sync.Mutex
	writes  []block.Write // seq i is at i-1
	durable block.Seq     // what Read may return; writes behind it are held back
}

func (j *journal) Captured() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.durable
}
func (j *journal) CapturedBytes() int64                          { return 0 }
func (j *journal) WaitCaptured(context.Context, block.Seq) error { return nil }
func (j *journal) Flush(context.Context) error                   { return nil }
func (j *journal) Durable() block.Seq                            { return j.Captured() }
func (j *journal) Read(from, upTo block.Seq, _ int64, visit func(block.Write) error) (block.Seq, error) {
	j.mu.Lock()
	writes := j.writes[from-1 : upTo]
	j.mu.Unlock()
	for _, w := range writes {
		if err := visit(w); err != nil {
			return 0, err
		}
	}
	return upTo + 1, nil
}

// chunkIndex is the dedup index of a group.
type chunkIndex struct {
	mu sync.Mutex
	m  map[crypt.ChunkID]segmenter.Location
}

func (x *chunkIndex) Lookup(id crypt.ChunkID) (segmenter.Location, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l, ok := x.m[id]
	return l, ok
}

// hostState is the state of an agent's host.
type hostState struct {
	mu     sync.Mutex
	epochs []format.Epoch
	tails  *uploader.Tails
	fail   error // of everything that is to be kept
}

func (s *hostState) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *hostState) Epochs() []format.Epoch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.epochs)
}
func (s *hostState) AddEpoch(e format.Epoch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.epochs = append(s.epochs, e)
	return nil
}
func (s *hostState) Tails() *uploader.Tails {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tails
}
func (s *hostState) SaveTails(t *uploader.Tails) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		s.tails = t
	}
	return s.fail
}

// memorySpool is a buffer that keeps shards in memory.
type memorySpool struct {
	mu      sync.Mutex
	m       map[string][]byte
	records map[*batch.Batch][]byte
	shards  []uploader.Shard // in the order in which they were given
	fail    error            // of Persist
	tries   int              // of Persist
	room    int              // how many batches it holds; 0: no end
}

func (s *memorySpool) key(seg block.SegmentID, i int) string { return fmt.Sprint(seg, i) }
func (s *memorySpool) Persist(ctx context.Context, id, b *batch.Batch) error {
	for s.isFull() { // as the buffer, which waits for room itself
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tries++
	if s.fail != nil {
		return s.fail
	}
	if s.records == nil {
		s.records = map[*batch.Batch][]byte{}
	}
	s.records[id] = b.Encode()
	for _, g := range b.Segments {
		for i, p := range g.Shards {
			if p != nil {
				s.m[s.key(g.Row.ID, i)] = p
				s.shards = append(s.shards, uploader.Shard{Segment: g.Row.ID, Index: i})
			}
		}
	}
	return nil
}

// held is which shards were given to the spool, and how often a batch was.
func (s *memorySpool) held() (shards []uploader.Shard, tries int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.shards), s.tries
}

func (s *memorySpool) Load(id *batch.Batch) (*batch.Batch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return batch.Decode("spooled", s.records[id])
}
func (s *memorySpool) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

// take loses a shard.
func (s *memorySpool) take(x uploader.Shard) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.m[s.key(x.Segment, x.Index)]
	delete(s.m, s.key(x.Segment, x.Index))
	return p
}

// give brings a lost shard back.
func (s *memorySpool) give(x uploader.Shard, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.m[s.key(x.Segment, x.Index)] = p
}

func (s *memorySpool) ReadShard(seg block.SegmentID, i int) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := s.m[s.key(seg, i)]; ok {
		return p, nil
	}
	return nil, errors.New("no such shard")
}
func (s *memorySpool) Placed(block.SegmentID, int) {}
func (s *memorySpool) Logged(b *batch.Batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.room > 0 {
		delete(s.records, b)
	}
}

func (s *memorySpool) isFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.room > 0 && len(s.records) >= s.room
}

// clock is the agent's wall clock, which tests set forward and which runs on by
// itself: how long a store has been away is told by it.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time  { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) set(t time.Time) { c.ahead.Store(int64(time.Until(t))) }

// failer is what a test and a rapid test have in common.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Context() context.Context
}

// entries is what a host remembers of entries, in memory.
type entries struct {
	mu sync.Mutex
	m  map[uint64]noted
}

type noted struct {
	hash  format.Hash
	named bool
}

func (e *entries) Note(n uint64, hash format.Hash, named bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.m == nil {
		e.m = map[uint64]noted{}
	}
	e.m[n] = noted{hash, named}
	return nil
}

func (e *entries) Entry(n uint64) (format.Hash, bool, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	x, ok := e.m[n]
	return x.hash, x.named, ok
}

// forget loses what is known of entries from to to.
func (e *entries) forget(from, to uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n := from; n <= to; n++ {
		delete(e.m, n)
	}
}

// world is a repository on stores in memory with one group, its history, and
// what each volume shall be at each seq.
type world struct {
	t       failer
	ctx     context.Context
	stores  []*mem.Store
	faults  []*fault.Store // over stores, in the same order
	id      *crypt.Identity
	agent   *crypt.Agent
	repo    *repo.Repository
	ring    *crypt.Ring     // of the writer: each start has one of its own
	saved   []*crypt.KeySet // in the state, of all starts
	groupID block.GroupID
	group   format.Group
	volumes []format.Volume
	journal journal
	index   chunkIndex
	state   hostState
	entries entries
	noMerge bool  // the writers do not merge
	memory  int64 // of the uploader; 0: the default
	clock   clock
	rng     *rand.Rand
	w       *writer
	logged  map[block.ID]bool // key sets in the log
}

type options struct {
	stores  int
	profile format.Profile // zero: the default
	volumes []int64        // sizes
	seed    uint64
}

func newWorld(t failer, o options) *world {
	t.Helper()
	if o.stores == 0 {
		o.stores = 1
	}
	if o.volumes == nil {
		o.volumes = []int64{1 << 20}
	}
	if o.profile.Data == 0 {
		o.profile = repo.DefaultProfile(o.stores)
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	w := &world{t: t, ctx: t.Context(), rng: rand.New(rand.NewPCG(o.seed, 1)), logged: map[block.ID]bool{}}
	w.clock.set(time.Unix(1_700_000_000, 0))
	w.index.m = map[crypt.ChunkID]segmenter.Location{}
	var err error
	w.id, err = crypt.NewIdentity()
	w.must(err)
	w.agent, err = crypt.NewAgent(w.id.Root, 1)
	w.must(err)
	var list []object.Store
	for i := range o.stores {
		s := mem.New(mem.Options{Name: string(rune('a' + i))})
		w.stores = append(w.stores, s)
		f := fault.New(s)
		w.faults = append(w.faults, f)
		list = append(list, f)
	}
	w.repo, err = repo.Create(w.ctx, list, w.id.Root, o.profile, w.id.Recipients(), 1)
	w.must(err)
	w.repo = uploader.Gated(w.repo)
	w.ring = crypt.NewAgentRing(w.agent, w.id.RootPublic)
	w.groupID = block.GroupID(block.NewID())
	w.group = format.Group{Name: "g", Branch: block.BranchID(block.NewID()), ChunkIDKey: [32]byte{1, 2, 3},
		Polynomial: 0x3DA3358B4DC173, MinChunk: 16 << 10, AvgBits: 16, MaxChunk: 256 << 10}
	for i, size := range o.volumes {
		w.volumes = append(w.volumes, format.Volume{Index: block.VolumeIndex(i), ID: block.VolumeID(block.NewID()),
			Name: fmt.Sprintf("v%d", i), SizeBytes: size, SectorSize: 512})
	}
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// runLog makes a Log and runs it until stop is called.
func runLog(ctx context.Context, cfg uploader.LogConfig) (l *uploader.Log, stop func()) {
	l = uploader.NewLog(cfg)
	run, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.Run(run)
	}()
	return l, func() { cancel(); <-done }
}

// writer is one start of an agent.
type writer struct {
	world  *world
	keys   *crypt.KeySet
	log    *uploader.Log
	up     *uploader.Uploader
	seg    *segmenter.Segmenter
	spool  *memorySpool
	cancel context.CancelFunc
	done   chan error
}

// start begins to write the history.
func (w *world) start() *writer {
	w.t.Helper()
	keys, err := crypt.NewKeySet(w.agent, w.id.Recipients(), 1)
	w.must(err)
	w.saved = append(w.saved, keys)
	w.ring = crypt.NewAgentRing(w.agent, w.id.RootPublic) // as of a new process
	w.ring.AddOwn(keys)
	first := len(w.logged) == 0
	log := uploader.NewLog(uploader.LogConfig{
		Repo: w.repo, Group: w.groupID, Agent: w.agent, Ring: w.ring, State: &w.state, Takeover: true,
		Now: w.clock.now, OnEntry: func(e *grouplog.Entry) error {
			return w.entries.Note(e.N, e.Hash, len(e.Items.Checkpoints) > 0)
		},
		KeySet: func(id block.ID) error {
			for _, ks := range w.saved {
				if ks.ID == id {
					w.ring.AddOwn(ks)
					return nil
				}
			}
			return fmt.Errorf("key set %s is not in the state", id)
		},
	})
	logged := map[block.ID]bool{}
	for k := range w.logged {
		logged[k] = true
	}
	noMerge := w.noMerge
	spool := &memorySpool{m: map[string][]byte{}}
	cfg := uploader.Config{
		Repo: w.repo, Group: w.groupID, Branch: w.group.Branch, Agent: w.agent, Ring: w.ring, Keys: keys, Log: log,
		Spool: spool, LoggedKeySets: logged, DegradeAfter: time.Millisecond, MemoryBytes: w.memory, Now: w.clock.now,
		OnLogged: func(b *batch.Batch, n uint64) error {
			if noMerge { // else the uploader does it
				_, hash, _ := log.Next()
				w.must(w.entries.Note(n, hash, len(b.Items.Checkpoints) > 0))
			}
			w.index.mu.Lock()
			defer w.index.mu.Unlock()
			for _, v := range b.Volumes {
				for _, x := range v.Extents {
					if !x.Zero {
						w.index.m[x.ChunkID] = segmenter.Location{Segment: x.Segment, Chunk: x.Chunk, Len: x.ChunkLen}
					}
				}
			}
			return nil
		},
	}
	if !w.noMerge {
		cfg.Entries = &w.entries
	}
	up := uploader.New(cfg)
	seg := segmenter.New(segmenter.Config{
		Group: w.group, Branch: w.group.Branch, Profile: w.repo.Profile(), Keys: keys, RPO: time.Second, BatchBytes: 1 << 40,
		Next: w.journal.Captured() + 1, Now: w.clock.now,
	}, &w.journal, up, &w.index)
	if first {
		group := w.group
		seg.Announce(func(it *format.Items) { it.Group, it.Volumes = &group, w.volumes })
	}
	ctx, cancel := context.WithCancel(w.ctx)
	x := &writer{world: w, keys: keys, log: log, up: up, seg: seg, spool: spool, cancel: cancel, done: make(chan error, 1)}
	go func() { x.done <- up.Run(ctx) }()
	w.logged[keys.ID] = true
	w.w = x
	return x
}

// begin begins to write the history, of which one small batch is on the stores
// when it returns.
func (w *world) begin() *writer {
	w.t.Helper()
	x := w.start()
	w.batches(1)
	w.must(x.up.AwaitIdle(w.ctx))
	return x
}

// stop waits until everything is on the stores and ends the writer.
func (x *writer) stop() {
	x.world.t.Helper()
	ctx, cancel := context.WithTimeout(x.world.ctx, time.Minute)
	defer cancel()
	x.world.must(uploader.AwaitOffice(ctx, x.log))
	idle := make(chan error, 1)
	go func() { idle <- x.up.AwaitIdle(ctx) }()
	select {
	case err := <-idle:
		x.world.must(err)
	case err := <-x.done:
		x.world.t.Fatalf("the uploader ended: %v", err)
	}
	x.merged()
	next, _, _ := x.log.Next() // not only on enough stores: on all
	if err := x.log.AwaitSafe(ctx, len(x.world.stores)-1, next-2); err != nil {
		x.world.t.Fatalf("entry %d does not reach every store: %+v: %v", next-1, x.log.Status(), err)
	}
	x.world.must(x.up.AwaitIdle(ctx))
	x.kill()
}

// merged waits until all is logged and everything is merged that is due.
func (x *writer) merged() {
	x.world.t.Helper()
	ctx, cancel := context.WithTimeout(x.world.ctx, time.Minute)
	defer cancel()
	x.world.must(x.up.AwaitIdle(ctx))
	x.world.must(uploader.AwaitMerged(ctx, x.up))
}

// inherit gives the writer the shards that the buffer kept for an earlier one,
// to be brought to their stores.
func (x *writer) inherit(old *writer) {
	var shards []uploader.HeldShard
	for _, s := range old.spool.shards {
		p := old.spool.m[x.spool.key(s.Segment, s.Index)]
		x.spool.give(s, p)
		shards = append(shards, uploader.HeldShard{Shard: s, SizeBytes: int64(len(p))})
	}
	x.up.Heal(shards)
}

// kill ends the writer as it is.
func (x *writer) kill() {
	x.cancel()
	if err := <-x.done; err != nil && !errors.Is(err, context.Canceled) {
		x.world.t.Fatal(err)
	}
}

// Extents is the baseline of resyncs: nothing is known.
func (w *world) Extents(context.Context, block.VolumeIndex, block.Extent) ([]manifest.Extent, error) {
	return nil, nil
}

// write adds a write to the journal.
func (w *world) write(v block.VolumeIndex, off int64, data []byte) {
	w.add(block.Write{Volume: v, Kind: block.KindData, Extent: block.Extent{Off: off, Len: int64(len(data))}, Data: data})
}

func (w *world) zero(v block.VolumeIndex, e block.Extent) {
	w.add(block.Write{Volume: v, Kind: block.KindZero, Extent: e})
}

func (w *world) add(x block.Write) {
	w.journal.mu.Lock()
	defer w.journal.mu.Unlock()
	x.Seq = block.Seq(len(w.journal.writes) + 1)
	x.Time = w.clock.now().UnixNano()
	w.journal.writes = append(w.journal.writes, x)
	w.journal.durable = x.Seq
}

// cut makes a batch of what was written since the last one, a second later.
func (w *world) cut() {
	w.t.Helper()
	w.clock.set(w.clock.now().Add(time.Second))
	_, err := w.w.seg.Step(w.ctx)
	w.must(err)
}

// batches makes n small batches, each of one random change.
func (w *world) batches(n int) {
	w.t.Helper()
	for range n {
		w.random(4 << 10)
		w.cut()
	}
}

// noise writes bytes that do not compress over a range of a volume.
func (w *world) noise(v block.VolumeIndex, off, n int64) {
	p := make([]byte, n)
	for i := 0; i < len(p); i += 8 {
		x := w.rng.Uint64()
		for j := range min(8, len(p)-i) {
			p[i+j] = byte(x >> (8 * j))
		}
	}
	w.write(v, off, p)
}

// random makes a random change of a random volume.
func (w *world) random(maxBytes int64) {
	v := w.volumes[w.rng.IntN(len(w.volumes))]
	n := 512 * (1 + w.rng.Int64N(min(maxBytes, v.SizeBytes)/512))
	off := 512 * w.rng.Int64N((v.SizeBytes-n)/512+1)
	switch w.rng.IntN(8) {
	case 0:
		w.zero(v.Index, block.Extent{Off: off, Len: n})
	case 1: // compressible, and with zeroes in it
		p := make([]byte, n)
		for i := range p[:n/2] {
			p[i] = byte(i >> 9)
		}
		w.write(v.Index, off, p)
	case 2: // what has been written before: deduplication
		w.journal.mu.Lock()
		old := w.journal.writes[w.rng.IntN(max(1, len(w.journal.writes)))%max(1, len(w.journal.writes)):][:min(1, len(w.journal.writes))]
		w.journal.mu.Unlock()
		if len(old) == 1 && old[0].Data != nil && int64(len(old[0].Data)) <= v.SizeBytes {
			w.write(v.Index, 512*w.rng.Int64N((v.SizeBytes-int64(len(old[0].Data)))/512+1), old[0].Data)
			return
		}
		fallthrough
	default:
		w.noise(v.Index, off, n)
	}
}

// model is the content of volume v after the first seq writes.
func (w *world) model(v block.VolumeIndex, seq block.Seq) []byte {
	out := make([]byte, w.volumes[v].SizeBytes)
	for _, x := range w.journal.writes[:seq] {
		applyWrite(out, v, x)
	}
	return out
}

func applyWrite(out []byte, v block.VolumeIndex, x block.Write) {
	if x.Volume != v {
		return
	}
	if x.Kind == block.KindZero {
		clear(out[x.Extent.Off:x.Extent.End()])
	} else {
		copy(out[x.Extent.Off:], x.Data)
	}
}

// open opens the repository anew from some of its stores, as another host
// would, and reads the history.
func (w *world) config(stores ...object.Store) restorer.Config {
	w.t.Helper()
	if len(stores) == 0 {
		for _, f := range w.faults {
			stores = append(stores, f)
		}
	}
	r, err := repo.Open(w.ctx, stores, w.id.RootPublic)
	w.must(err)
	return restorer.Config{Repo: r, Ring: crypt.NewRing(w.id), Patience: -1}
}

func (w *world) history(stores ...object.Store) *restorer.History {
	w.t.Helper()
	h, err := restorer.OpenHistory(w.ctx, w.config(stores...), w.groupID)
	w.must(err)
	return h
}

// content is what extents were read to hold: what one refers to never changes.
type content map[manifest.Extent][]byte

// check compares every checkpoint of every volume with the model.
func (w *world) check(h *restorer.History) {
	w.t.Helper()
	w.checkKnowing(h, content{})
}

// checkKnowing is check, and reads of each checkpoint what is not known yet. The
// newest one of each volume is read whole as well.
func (w *world) checkKnowing(h *restorer.History, known content) {
	w.t.Helper()
	for _, v := range h.Volumes() {
		points := checkpoints(w.t, h, v)
		if len(points) == 0 {
			w.t.Fatalf("volume %s has no checkpoints", v.Name)
		}
		model := make([]byte, v.SizeBytes)
		at := block.Seq(0)
		for _, c := range points {
			for ; at < c.Seq; at++ {
				applyWrite(model, v.Index, w.journal.writes[at])
			}
			point := "seq:" + c.Seq.String()
			im, err := restorer.OpenImage(w.ctx, h, v.Name, point)
			w.must(err)
			w.same(fmt.Sprintf("volume %s at %s", v.Name, point), w.read(im, known), model)
		}
		w.checkPoint(h, v.Name, "seq:"+points[len(points)-1].Seq.String(), model)
	}
}

// read returns the content of an image: what no extent covers reads as zeroes.
func (w *world) read(im *restorer.Image, known content) []byte {
	w.t.Helper()
	g := im.Geometry()
	out, sector := make([]byte, g.SizeBytes), int64(g.SectorSize)
	extents, err := im.Extents(w.ctx, block.Extent{Len: g.SizeBytes})
	w.must(err)
	for _, x := range extents {
		if old, ok := known[x]; ok {
			copy(out[x.Off:], old)
			continue
		}
		from, to := x.Off/sector*sector, (x.End()+sector-1)/sector*sector // whole sectors
		w.must(im.ReadAt(w.ctx, out[from:to], from))
		known[x] = out[x.Off:x.End()]
	}
	return out
}

func (w *world) checkPoint(h *restorer.History, volume, point string, want []byte) *restorer.Image {
	w.t.Helper()
	im, err := restorer.OpenImage(w.ctx, h, volume, point)
	w.must(err)
	got := make([]byte, len(want))
	w.must(im.ReadAt(w.ctx, got, 0))
	w.same(fmt.Sprintf("volume %s at %s", volume, point), got, want)
	return im
}

func (w *world) same(what string, got, want []byte) {
	w.t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			w.t.Fatalf("%s: byte %d differs", what, i)
		}
	}
	w.t.Fatalf("%s: has %d bytes, want %d", what, len(got), len(want))
}

// checkpoints lists the checkpoints of a volume.
func checkpoints(t failer, h *restorer.History, v restorer.Volume) []restorer.Checkpoint {
	t.Helper()
	all, err := h.AllCheckpoints(context.Background(), v)
	if err != nil {
		t.Fatal(err)
	}
	return all
}
