package restorer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

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
	"drc/internal/segment"
	"drc/restorer"
	"drc/segmenter"
	"drc/uploader"
)

func TestMain(m *testing.M) {
	if folder := os.Getenv(childFolder); folder != "" {
		if err := restoreChild(folder); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The compressor is one for all tests, and must not be born in a bubble of
	// synctest.
	packed, c := segment.Compress(nil, make([]byte, 4096))
	if _, err := segment.Decompress(nil, packed, c, 4096); err != nil {
		panic(err)
	}
	// Under the race detector collecting costs more than the memory: each large
	// piece that comes or goes is mapped anew. What bounds memory is tested with
	// explicit collections.
	debug.SetGCPercent(800)
	goleak.VerifyTestMain(m)
}

// scaled is how much of something a test does: few, or many where
// DRC_LONG_TESTS is set.
func scaled(few, many int) int {
	if os.Getenv("DRC_LONG_TESTS") != "" {
		return many
	}
	return few
}

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
}

func (s *hostState) Epochs() []format.Epoch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.epochs)
}
func (s *hostState) AddEpoch(e format.Epoch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epochs = append(s.epochs, e)
	return nil
}
func (s *hostState) Tails() *uploader.Tails { return s.tails }
func (s *hostState) SaveTails(t *uploader.Tails) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tails = t
	return nil
}

// memorySpool is a buffer that keeps shards in memory.
type memorySpool struct {
	mu      sync.Mutex
	m       map[string][]byte
	records map[*batch.Batch][]byte
}

func (s *memorySpool) key(seg block.SegmentID, i int) string { return fmt.Sprint(seg, i) }
func (s *memorySpool) Persist(_ context.Context, id, b *batch.Batch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.records == nil {
		s.records = map[*batch.Batch][]byte{}
	}
	s.records[id] = b.Encode()
	for _, g := range b.Segments {
		for i, p := range g.Shards {
			if p != nil {
				s.m[s.key(g.Row.ID, i)] = p
			}
		}
	}
	return nil
}
func (s *memorySpool) Load(id *batch.Batch) (*batch.Batch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return batch.Decode("spooled", s.records[id])
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
func (s *memorySpool) Logged(*batch.Batch)         {}

// entries is what the writer remembers of entries.
type entries struct {
	mu     sync.Mutex
	hashes map[uint64]format.Hash
	named  map[uint64]bool
}

func (e *entries) Note(n uint64, hash format.Hash, named bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.hashes == nil {
		e.hashes, e.named = map[uint64]format.Hash{}, map[uint64]bool{}
	}
	e.hashes[n], e.named[n] = hash, named
	return nil
}

func (e *entries) Entry(n uint64) (format.Hash, bool, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	hash, ok := e.hashes[n]
	return hash, e.named[n], ok
}

// clock is the agent's wall clock, which tests set.
type clock struct{ ns atomic.Int64 }

func (c *clock) now() time.Time  { return time.Unix(0, c.ns.Load()) }
func (c *clock) set(t time.Time) { c.ns.Store(t.UnixNano()) }

// world is a repository on stores in memory with one group, its history, and
// what each volume shall be at each seq.
type world struct {
	t       testing.TB
	ctx     context.Context
	stores  []*mem.Store
	faults  []*fault.Store // over stores, in the same order
	id      *crypt.Identity
	agent   *crypt.Agent
	repo    *repo.Repository
	ring    *crypt.Ring // of the writer
	groupID block.GroupID
	group   format.Group
	volumes []format.Volume
	branch  block.BranchID // that is written
	begin   uint64         // its first entry
	ended   map[block.BranchID][]block.Write
	journal journal
	index   chunkIndex
	state   hostState
	clock   clock
	rng     *rand.Rand
	w       *writer
	logged  map[block.ID]bool // key sets in the log
	noted   *entries          // nil: nothing is merged, and there are no digests
	scratch []byte
}

// buffer returns n bytes, zero or not, that are the caller's until the next
// call: under the race detector a large allocation costs more than its use.
func (w *world) buffer(n int64) []byte {
	if int64(cap(w.scratch)) < n {
		w.scratch = make([]byte, n)
	}
	return w.scratch[:n]
}

type options struct {
	stores  int
	profile format.Profile // zero: the default
	volumes []int64        // sizes
	seed    uint64
	digests bool // digests are written, and manifests merged
}

func newWorld(t testing.TB, o options) *world {
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
	t.Logf("seed %d", o.seed)
	w := &world{t: t, ctx: t.Context(), rng: rand.New(rand.NewPCG(o.seed, 1)), logged: map[block.ID]bool{}}
	if o.digests {
		w.noted = &entries{}
	}
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
	w.ring = crypt.NewAgentRing(w.agent, w.id.RootPublic)
	w.groupID = block.GroupID(block.NewID())
	w.group = format.Group{Name: "g", Branch: block.BranchID(block.NewID()), ChunkIDKey: [32]byte{1, 2, 3},
		Polynomial: 0x3DA3358B4DC173, MinChunk: 16 << 10, AvgBits: 16, MaxChunk: 256 << 10}
	w.branch, w.begin, w.ended = w.group.Branch, 1, map[block.BranchID][]block.Write{}
	for i, size := range o.volumes {
		w.volumes = append(w.volumes, format.Volume{Index: block.VolumeIndex(i), ID: block.VolumeID(block.NewID()),
			Name: fmt.Sprintf("v%d", i), SizeBytes: size, SectorSize: 512})
	}
	return w
}

// templates are worlds that several tests begin with: to write a history costs
// more than what most tests do with it.
var templates struct {
	mu sync.Mutex
	m  map[string]*world
}

// forked returns a world with the same history as build makes: stores of its
// own, which hold the same. No writer goes on with it.
func forked(t testing.TB, key string, build func() *world) *world {
	t.Helper()
	templates.mu.Lock()
	defer templates.mu.Unlock()
	from := templates.m[key]
	if from == nil {
		if templates.m == nil {
			templates.m = map[string]*world{}
		}
		from = build()
		templates.m[key] = from
	}
	seed := rand.Uint64()
	t.Logf("seed %d of what is done to a shared history", seed)
	w := &world{t: t, ctx: t.Context(), rng: rand.New(rand.NewPCG(seed, 1)), id: from.id, agent: from.agent, ring: from.ring,
		groupID: from.groupID, group: from.group, volumes: from.volumes, branch: from.branch, begin: from.begin, ended: from.ended, repo: from.repo}
	w.clock.set(from.clock.now())
	w.journal.writes, w.journal.durable = from.journal.writes, from.journal.durable
	for _, s := range from.stores {
		s = s.Clone()
		w.stores = append(w.stores, s)
		w.faults = append(w.faults, fault.New(s))
	}
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// writer is one start of an agent.
type writer struct {
	world  *world
	keys   *crypt.KeySet
	log    *uploader.Log
	up     *uploader.Uploader
	seg    *segmenter.Segmenter
	cancel context.CancelFunc
	done   chan error
}

// start begins to write the history.
func (w *world) start() *writer {
	w.t.Helper()
	keys, err := crypt.NewKeySet(w.agent, w.id.Recipients(), 1)
	w.must(err)
	w.ring.AddOwn(keys)
	first := len(w.logged) == 0
	log := uploader.NewLog(uploader.LogConfig{
		Repo: w.repo, Group: w.groupID, Agent: w.agent, Ring: w.ring, State: &w.state, Takeover: true,
		Now: w.clock.now, OnEntry: func(*grouplog.Entry) error { return nil },
	})
	logged := map[block.ID]bool{}
	for k := range w.logged {
		logged[k] = true
	}
	cfg := uploader.Config{
		Repo: w.repo, Group: w.groupID, Branch: w.branch, Begin: w.begin, Agent: w.agent, Ring: w.ring, Keys: keys, Log: log,
		Spool: &memorySpool{m: map[string][]byte{}}, LoggedKeySets: logged, DegradeAfter: time.Millisecond,
		OnLogged: func(b *batch.Batch, n uint64) error {
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
	if w.noted != nil {
		cfg.Entries = w.noted
	}
	up := uploader.New(cfg)
	seg := segmenter.New(segmenter.Config{
		Group: w.group, Branch: w.branch, Profile: w.repo.Profile(), Keys: keys, RPO: time.Second, BatchBytes: 1 << 40,
		Next: w.journal.Captured() + 1, Now: w.clock.now,
	}, &w.journal, up, &w.index)
	if first {
		group := w.group
		seg.Announce(func(it *format.Items) { it.Group, it.Volumes = &group, w.volumes })
	}
	ctx, cancel := context.WithCancel(w.ctx)
	x := &writer{world: w, keys: keys, log: log, up: up, seg: seg, cancel: cancel, done: make(chan error, 1)}
	go func() { x.done <- up.Run(ctx) }()
	w.logged[keys.ID] = true
	w.w = x
	return x
}

// beginBranch takes office and appends the entry that begins a branch, whatever it says.
func (w *world) beginBranch(b format.Branch) {
	w.t.Helper()
	keys, err := crypt.NewKeySet(w.agent, w.id.Recipients(), 1)
	w.must(err)
	w.ring.AddOwn(keys)
	log := uploader.NewLog(uploader.LogConfig{
		Repo: w.repo, Group: w.groupID, Agent: w.agent, Ring: w.ring, State: &w.state, Takeover: true,
		Now: w.clock.now, OnEntry: func(*grouplog.Entry) error { return nil },
	})
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	go func() { done <- log.Run(ctx) }()
	defer func() { cancel(); <-done }()
	w.must(log.TakeOffice(ctx))
	w.begin, err = log.BeginBranch(ctx, b, keys)
	w.must(err)
	w.logged[keys.ID] = true
}

// fork begins a branch at a checkpoint, after the writer has ended: one that starts goes
// on from there.
func (w *world) fork(h *restorer.History, p restorer.Point) {
	w.t.Helper()
	b := format.Branch{ID: block.BranchID(block.NewID()), Parent: p.Volume.Branch, ForkN: p.N, ForkHash: p.Hash, ForkSeq: p.Seq}
	for _, v := range h.VolumesOn(p.Volume.Branch) {
		if v.JoinedN <= p.N {
			b.Volumes = append(b.Volumes, format.BranchVolume{Index: v.Index, Name: fmt.Sprintf("v%d-%d", v.Index, len(h.Branches())+1)})
		}
	}
	w.beginBranch(b)
	writes, ended := w.ended[p.Volume.Branch]
	if !ended {
		writes = w.journal.writes
	}
	w.ended[w.branch] = w.journal.writes
	w.journal.writes, w.journal.durable = slices.Clone(writes[:p.Seq]), p.Seq
	w.branch = b.ID
	w.index.mu.Lock()
	defer w.index.mu.Unlock()
	w.index.m = map[crypt.ChunkID]segmenter.Location{} // what only another branch refers to is not ours
}

// stop waits until everything is on the stores and ends the writer. One that is
// not in office yet has nothing on its way.
func (x *writer) stop() {
	x.world.t.Helper()
	ctx, cancel := context.WithTimeout(x.world.ctx, time.Minute)
	defer cancel()
	idle := make(chan error, 1)
	go func() { idle <- x.up.AwaitIdle(ctx) }()
	select {
	case err := <-idle:
		x.world.must(err)
	case err := <-x.done:
		x.world.t.Fatalf("the uploader ended: %v", err)
	}
	x.world.must(x.everywhere(ctx))
	x.kill()
}

// everywhere waits until the newest entry is not only on enough stores, but on
// all.
func (x *writer) everywhere(ctx context.Context) error {
	if err := x.up.AwaitIdle(ctx); err != nil {
		return err
	}
	next, _, _ := x.log.Next()
	if next < 2 {
		return nil // not in office, or the history has no entry
	}
	return x.log.AwaitSafe(ctx, len(x.world.stores)-1, next-2)
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
		p := make([]byte, n)
		w.write(v.Index, off, fill(w.rng, p))
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

// given are some of the stores.
func (w *world) given(numbers ...int) []object.Store {
	var out []object.Store
	for _, i := range numbers {
		out = append(out, w.faults[i])
	}
	return out
}

func (w *world) history(stores ...object.Store) *restorer.History {
	w.t.Helper()
	h, err := restorer.OpenHistory(w.ctx, w.config(stores...), w.groupID)
	w.must(err)
	return h
}

// check compares every checkpoint of every volume with the model.
func (w *world) check(h *restorer.History) {
	w.t.Helper()
	for _, v := range h.Volumes() {
		points := checkpoints(w.t, h, v)
		if len(points) == 0 {
			w.t.Fatalf("volume %s has no checkpoints", v.Name)
		}
		writes, ended := w.ended[v.Branch]
		if !ended {
			writes = w.journal.writes
		}
		model := make([]byte, v.SizeBytes)
		at := block.Seq(0)
		for _, c := range points {
			for ; at < c.Seq; at++ {
				applyWrite(model, v.Index, writes[at])
			}
			w.checkPoint(h, v.Name, "seq:"+c.Seq.String(), model)
		}
	}
}

func (w *world) checkPoint(h *restorer.History, volume, point string, want []byte) *restorer.Image {
	w.t.Helper()
	im, err := restorer.OpenImage(w.ctx, h, volume, point)
	w.must(err)
	got := w.buffer(int64(len(want)))
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

// names lists the objects of a store.
func names(t testing.TB, s object.Store, prefix string) []string {
	t.Helper()
	var out []string
	for info, err := range s.List(t.Context(), prefix, "") {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, info.Name)
	}
	return out
}

// checkpoints lists the checkpoints of a volume.
func checkpoints(t testing.TB, h *restorer.History, v restorer.Volume) []restorer.Checkpoint {
	t.Helper()
	all, err := h.AllCheckpoints(context.Background(), v)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// entryOf is an entry of a history.
func entryOf(t testing.TB, h *restorer.History, n uint64) *restorer.Entry {
	t.Helper()
	e, err := h.Entry(context.Background(), n)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
