package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/object"
	"drc/internal/object/mem"
	"drc/internal/pipeline"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/vbuf"
)

// plan is what a seed is about.
type plan struct {
	disks       int
	quota       int64
	stores      int
	volumes     []int64 // sizes
	device      []bool
	ack         capture.Ack
	whenFull    pipeline.WhenFull
	rpo         time.Duration
	clients     int
	maxWrite    int64
	lives       int
	steps       int
	storeErrors int // of a thousand requests
	storms      bool
	diskFaults  bool
	tightDisk   bool // the backing's file system may run full
	badBackings bool // the disks behind the volumes may fail for some time
	loses       bool // all of the buffer may be lost
	forgetful   int  // a store that loses segments; -1: none
	flood       bool // more is written than the buffer holds, while no store takes anything
	sudden      bool // the machine may go down at any operation
}

func newPlan(d dice) plan {
	rng := d.of("plan")
	p := plan{
		disks: pick(rng, 1, 1, 2, 2, 3), quota: pick(rng, int64(1<<20), 1<<20, 2<<20, 4<<20), stores: pick(rng, 1, 1, 2, 3, 3, 5),
		ack: pick(rng, capture.AckJournal, capture.AckJournal, capture.AckDurable), whenFull: pick(rng, pipeline.WhenFullHold, pipeline.WhenFullBitmap),
		rpo: pick(rng, 20*time.Millisecond, 200*time.Millisecond, time.Second, 20*time.Second), clients: 1 + rng.IntN(3),
		maxWrite: pick(rng, int64(4<<10), 16<<10, 64<<10), lives: 2 + rng.IntN(4), steps: 10 + rng.IntN(40),
		storeErrors: pick(rng, 0, 5, 30, 80), storms: oneIn(rng, 2), diskFaults: oneIn(rng, 3), tightDisk: oneIn(rng, 6), sudden: true,
	}
	if p.flood = oneIn(rng, 4); p.flood {
		p.quota, p.maxWrite, p.storms = 1<<20, 64<<10, true
	}
	for range 1 + rng.IntN(2) {
		device := oneIn(rng, 4)
		p.volumes = append(p.volumes, pick(rng, int64(64<<10), 128<<10, 512<<10, 1<<20))
		p.device = append(p.device, device)
	}
	// While writes go past the journal a backing that fails is its clients' error.
	p.badBackings = oneIn(rng, 4) && p.whenFull == pipeline.WhenFullHold && !p.flood
	p.forgetful = -1
	if k := rng.IntN(2 * p.stores); p.stores > 1 && k < p.stores {
		p.forgetful = k
	}
	p.loses = oneIn(rng, 6) && !p.badBackings && !p.tightDisk
	return p
}

func (p plan) String() string {
	return fmt.Sprintf("%d buffer disks of %d KiB, %d stores, volumes of %d bytes (device %v), ack %d, when full %d, rpo %s, %d clients, writes up to %d, %d lives of %d steps, %d of 1000 requests fail each way, storms %v, disk faults %v, tight disk %v, flood %v, bad backings %v, store %d forgets, loses the buffer %v",
		p.disks, p.quota>>10, p.stores, p.volumes, p.device, p.ack, p.whenFull, p.rpo, p.clients, p.maxWrite, p.lives, p.steps, p.storeErrors, p.storms, p.diskFaults, p.tightDisk, p.flood, p.badBackings, p.forgetful, p.loses)
}

// world is one seed.
type world struct {
	t       *testing.T
	dice    dice
	plan    plan
	plant   *plant
	log     io.Writer
	stores  []*store
	base    *repo.Repository
	host    *machine
	indexes map[string]*index
	faulted bool        // a buffer disk has failed: no other one may
	gaveUp  atomic.Bool // an agent has said that sealed writes are lost
	loss    loss
	model   *model
	faulty  atomic.Bool
	story   bool // look at all checkpoints
	fatal   int  // at which operation the next life goes down, in a story; 0: by chance
	boots   int
	lives   int

	acked             mark // answered: survives the process
	flushed           mark // must survive the power
	cut               bool // the power was cut since it was last looked
	last              control5
	logged, committed block.Seq // the most that was ever said
	wrong             error     // the first thing that was found out elsewhere
	ops               sync.WaitGroup

	mu     sync.Mutex
	digest uint64
	lines  []string // kept of the trace, for who looks for a cause
	full   bool     // keep all of it

	count   counts
	swapped map[string][]byte // see swapShard
	busy    atomic.Int64      // requests of clients under way

	// Where the host is one of two (see rivals): what is different in an agent that
	// starts, and which errors of requests are in order. Nil: nothing, none.
	configure func(*life, *pipeline.Config)
	inOrder   func(*life, error) bool
}

// control5 are the watermarks that were seen last.
type control5 struct{ captured, durable, sealed, logged, committed block.Seq }

// counts is what a run has done.
type counts struct {
	seeds, lives, kills, cuts, stops, writes, checkpoints, gaps, losses, decisions int
}

func (c *counts) add(o counts) {
	c.seeds += o.seeds
	c.lives += o.lives
	c.kills += o.kills
	c.cuts += o.cuts
	c.stops += o.stops
	c.writes += o.writes
	c.checkpoints += o.checkpoints
	c.gaps += o.gaps
	c.losses += o.losses
	c.decisions += o.decisions
}

func (c counts) String() string {
	return fmt.Sprintf("%d seeds: %d lives, ended by %d kills, %d power cuts and %d stops in order; %d writes; %d gaps; %d buffers lost whole, %d decisions; %d checkpoints restored and compared",
		c.seeds, c.lives, c.kills, c.cuts, c.stops, c.writes, c.gaps, c.losses, c.decisions, c.checkpoints)
}

// trace notes something that must be the same when the seed is run again. What
// happens at one moment has no order.
func (w *world) trace(text string, args ...any) {
	line := fmt.Sprintf(text, args...)
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.digest += mixText(mix(0, uint64(now.UnixNano())), line)
	if w.full || w.log != nil {
		line = now.Format("15:04:05.000000000 ") + line
	}
	if w.full {
		w.lines = append(w.lines, line)
	}
	if w.log != nil {
		fmt.Fprintln(w.log, line)
	}
}

// failure is what a check throws.
type failure struct{ text string }

func (w *world) failf(text string, args ...any) {
	panic(failure{fmt.Sprintf(text, args...)})
}

var (
	identityOnce sync.Once
	identity     *crypt.Identity
	agentKey     *crypt.Agent
)

func newWorld(t *testing.T, seed uint64, p *plant, log io.Writer) *world {
	identityOnce.Do(func() { identity, agentKey = crypttest.Identity(t), crypttest.Agent(t) })
	w := &world{t: t, dice: dice(seed), plan: newPlan(dice(seed)), plant: p, log: log, indexes: map[string]*index{}}
	if p.adjust != nil {
		p.adjust(&w.plan)
	}
	w.model = &model{sizes: w.plan.volumes, alone: w.plan.whenFull == pipeline.WhenFullBitmap || w.plan.loses}
	var list []object.Store
	for i := range w.plan.stores {
		s := &store{w: w, index: i, mem: mem.New(mem.Options{Name: fmt.Sprint(i)}), asked: map[asked]int{}}
		w.stores = append(w.stores, s)
		list = append(list, s.mem)
	}
	var err error
	if w.base, err = repo.Create(context.Background(), list, identity.Root, repo.DefaultProfile(len(list)), identity.Recipients(), time.Now().UnixNano()); err != nil {
		t.Fatal(err)
	}
	for i, m := range w.base.Members { // in the record's order
		for _, s := range w.stores {
			if m.Store == object.Store(s.mem) && s.index != i {
				s.index = i
			}
		}
	}
	w.host = newMachine("boot 0", p)
	for i, device := range w.plan.device {
		if device {
			w.host.disks[volumePath(i)] = newRawDisk(w.plan.volumes[i], true, uint64(100+i))
		}
	}
	for i := range w.plan.disks {
		must(t, w.host.mem.MkdirAll(bufferPath(i)))
		w.host.mem.SetDevice(bufferPath(i), fmt.Sprint("disk", i))
	}
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func volumePath(i int) string { return fmt.Sprintf("/volumes/v%d", i) }
func bufferPath(i int) string { return fmt.Sprintf("/buffer/%d", i) }

// repository is the repository as the process l sees it, or as it is with l nil;
// without leaves stores out.
func (w *world) repository(l *life, without ...int) *repo.Repository {
	r := *w.base
	r.Members = append([]repo.Member(nil), r.Members...)
	for i, m := range r.Members {
		for _, s := range w.stores {
			if l != nil && m.Store == object.Store(s.mem) {
				r.Members[i].Store = &client{s, l}
			}
		}
		for _, x := range without {
			if x == i {
				r.Members[i].Store, r.Members[i].Err = nil, errStore
			}
		}
	}
	return &r
}

// life is one process.
type life struct {
	w      *world
	number int
	agent  *pipeline.Agent
	dir    *state.Dir
	ctx    context.Context
	cancel context.CancelFunc
	died   chan struct{} // closed when the machine is down for it
	once   sync.Once
	ended  chan error // how Run ended
	opened bool
}

// die has the process be no more: it does nothing to the stores from here on.
func (l *life) die() { l.once.Do(func() { close(l.died) }) }

func (l *life) isDead() bool {
	select {
	case <-l.died:
		return true
	default:
		return false
	}
}

var errStart = errors.New("the agent did not start")

// begin starts an agent on the host as it is, and waits until its volumes can be
// used. It returns an error if it does not start, or dies before.
func (w *world) begin() (*life, error) {
	w.lives++
	w.count.lives++
	l := &life{w: w, number: w.lives, died: make(chan struct{}), ended: make(chan error, 1)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	w.arm(l)
	var err error
	if l.dir, err = state.OpenOn(w.host.files, "/state"); err == nil {
		err = l.dir.Lock()
	}
	if err != nil {
		l.cancel()
		return l, err
	}
	cfg := pipeline.Config{
		Repo: w.repository(l), Ring: crypt.NewRing(identity), Agent: agentKey, State: l.dir, RPO: w.plan.rpo,
		Embedded: true, Machine: w.host, OpenIndex: w.plant.index(opener(w.indexes)),
		Journal: func(j pipeline.Journal) pipeline.Journal {
			w.recovered(j.Durable())
			return &watch{w.plant.journal(j), w, l}
		},
	}
	heard := &listener{w: w}
	if w.log != nil {
		heard.to = slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelInfo})
	}
	cfg.Logger = slog.New(heard)
	for _, path := range w.dirs() {
		cfg.Buffer = append(cfg.Buffer, vbuf.DirOptions{Path: path, SizeBytes: w.plan.quota})
	}
	if cfg.Buffer, err = pipeline.BufferDirs(l.dir, cfg.Buffer); err != nil {
		l.cancel()
		return l, err
	}
	cfg.Orders = w.loss.orders
	for i, size := range w.plan.volumes {
		v := pipeline.VolumeConfig{Name: fmt.Sprint("v", i), Path: volumePath(i), Group: "g", Ack: w.plan.ack, WhenFull: w.plan.whenFull}
		if !w.plan.device[i] {
			v.SizeBytes = size
		}
		cfg.Volumes = append(cfg.Volumes, v)
	}
	if w.configure != nil {
		w.configure(l, &cfg)
	}
	opened := make(chan error, 1)
	go func() {
		var err error
		l.agent, err = pipeline.Open(l.ctx, cfg)
		opened <- err
	}()
	select {
	case err = <-opened:
	case <-l.died:
		l.cancel()
		err = <-opened
	}
	if err != nil {
		l.cancel()
		return l, err
	}
	l.opened = true
	go func() { l.ended <- l.agent.Run(l.ctx) }()
	for _, wait := range []time.Duration{7 * time.Hour, 2 * time.Hour} {
		select {
		case <-l.agent.Ready():
			return l, nil
		case err := <-l.ended:
			l.ended <- err
			return l, fmt.Errorf("%w: %w", errStart, err)
		case <-l.died:
			return l, errPower
		case <-time.After(wait):
		}
		// A group that holds its writers may find no room for a first write of its own
		// until the stores are back.
		for _, s := range w.stores {
			s.clear()
		}
	}
	return l, fmt.Errorf("%w two hours after the stores are back", errStart)
}

// bury waits until nothing of a process is left.
func (l *life) bury() {
	l.die()
	l.cancel()
	if l.opened {
		l.ended <- <-l.ended // for who buries it again
	}
	l.w.ops.Wait()
	if l.dir != nil {
		_ = l.dir.Close()
	}
}

// device is a volume of the running agent.
func (l *life) device(i int) block.Device {
	d, ok := l.agent.Device(fmt.Sprint("v", i))
	if !ok {
		l.w.failf("volume v%d is not there", i)
	}
	return d
}

// sector is the unit of requests to a volume.
func (w *world) sector(i int) int64 {
	if w.plan.device[i] {
		return 4096
	}
	return 512
}

// client makes one request of a client, in a goroutine of its own.
func (w *world) client(l *life, step int) {
	rng := w.dice.of("request", l.number, step)
	i := rng.IntN(len(w.plan.volumes))
	d, sector := l.device(i), w.sector(i)
	size := w.plan.volumes[i]
	n := min(sector*(1+rng.Int64N(max(1, w.plan.maxWrite/sector))), size)
	if oneIn(rng, 3) { // content that is known already must be as long as it was
		n = min(max(sector, w.plan.maxWrite/4), size)
	}
	hot := size
	if oneIn(rng, 2) {
		hot = min(size, max(n, size/8)) // where writes meet
	}
	off := rng.Int64N((hot-n)/sector+1) * sector
	r := &request{volume: block.VolumeIndex(i), extent: block.Extent{Off: off, Len: n}}
	kind := rng.IntN(20)
	if kind < 14 {
		r.data = content(rng, n)
	}
	if kind < 17 && !w.model.ask(r) {
		return
	}
	w.count.writes++
	w.busy.Add(1)
	w.ops.Go(func() {
		defer w.busy.Add(-1)
		var err error
		fua := false
		switch {
		case kind < 14:
			fua = kind < 2
			err = d.WriteAt(l.ctx, r.data, off, block.WriteOptions{FUA: fua})
		case kind < 17:
			fua = kind == 14
			err = d.Zero(l.ctx, r.extent, block.ZeroOptions{FUA: fua, NoHole: kind == 15})
		default:
			err = w.flush(l.ctx, d)
			w.trace("flush: %v", err != nil)
			return
		}
		seq := block.Seq(0)
		if !l.isDead() {
			if seq = w.model.answer(r, err, fua || w.plan.ack == capture.AckDurable); seq == 0 && kind < 17 {
				w.trace("written past the journal: volume %d %s, %v", i, r.extent, err)
			}
		}
		if err != nil {
			w.trace("request %d of life %d: failed", step, l.number)
			if !l.isDead() && !w.plan.tightDisk && (!w.plan.badBackings || !errors.Is(err, syscall.EIO)) && (w.inOrder == nil || !w.inOrder(l, err)) {
				w.problem("a request failed, and nothing but the buffer and the stores can have been in trouble: %v", err)
			}
			return
		}
		if seq > 0 {
			w.acked.raise(seq)
			if fua || w.plan.ack == capture.AckDurable {
				w.flushed.raise(seq)
			}
		}
	})
}

// content draws data that is sometimes known already, sometimes zero, and
// sometimes easy to compress.
func content(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	switch rng.IntN(6) {
	case 0:
		return p
	case 1:
		seed := rng.Uint64N(4)
		rng = rand.New(rand.NewPCG(seed, 0))
		fallthrough
	case 2, 3:
		for i := 0; i+8 <= len(p); i += 8 {
			x := rng.Uint64()
			for k := range 8 {
				p[i+k] = byte(x >> (8 * k))
			}
		}
	default:
		text := strings.Repeat(fmt.Sprintf("%x ", rng.Uint64()), int(n)/8+1)
		copy(p, text)
	}
	return p
}

// listener hears what an agent says, and passes it on.
type listener struct {
	w  *world
	to slog.Handler // nil: nobody
}

func (x *listener) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelError || (x.to != nil && level >= slog.LevelInfo)
}

func (x *listener) Handle(ctx context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "sealed writes") {
		x.w.gaveUp.Store(true)
	}
	if x.to == nil {
		return nil
	}
	return x.to.Handle(ctx, r)
}

func (x *listener) WithAttrs(attrs []slog.Attr) slog.Handler {
	if x.to == nil {
		return x
	}
	return &listener{x.w, x.to.WithAttrs(attrs)}
}

func (x *listener) WithGroup(name string) slog.Handler {
	if x.to == nil {
		return x
	}
	return &listener{x.w, x.to.WithGroup(name)}
}
