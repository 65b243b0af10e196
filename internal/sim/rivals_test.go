package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/pipeline"
	"drc/restorer"
	"drc/uploader"
)

// rivals is a seed with two hosts of one group: each is a world of its own, with its
// own machine, clients, model, and way to the stores; what is on the stores they
// share.
type rivals struct {
	dice  dice
	a, b  *rival // b is nil until it is there
	chain *chain
	plan  plan
	isNew bool // b is a new host, and not a copy of a
	count rivalCounts
}

// rival is one of the two hosts.
type rival struct {
	*world
	r         *rivals
	name      string
	l         *life        // its process; nil: none
	starting  chan started // nil if nobody waits for a start
	up        bool         // the volumes are served
	orders    bool         // the process was started with --takeover
	calm      bool         // it was started after the last fault
	anew      bool         // its journal may have begun anew, and it is not known yet what the volumes are
	ends      int          // of its processes
	fenced    bool         // this process
	contested bool         // it was
	looked    bool         // at what it is to be when it is fenced
	frozen    control5     // what it said when it was
	adopts    bool         // a start with --takeover was tried: it may have come so far
	known     uint64       // entries up to here it may have taken over from the other one
	shared    block.Seq    // a copy has what the original had up to here
}

type started struct {
	l   *life
	err error
}

// rivalCounts is what a run has done.
type rivalCounts struct {
	seeds, copies, starts, refused, takeovers, fenced, contested, tookBack, kept, writes, entries, checkpoints int
}

func (c *rivalCounts) add(o rivalCounts) {
	c.seeds += o.seeds
	c.copies += o.copies
	c.starts += o.starts
	c.refused += o.refused
	c.takeovers += o.takeovers
	c.fenced += o.fenced
	c.contested += o.contested
	c.kept += o.kept
	c.tookBack += o.tookBack
	c.writes += o.writes
	c.entries += o.entries
	c.checkpoints += o.checkpoints
}

func (c rivalCounts) String() string {
	return fmt.Sprintf("%d seeds with two hosts, %d of which a copy: %d starts, %d refused, %d takeovers that served; fenced at work %d times, contested %d times, %d times until a restart; %d writes, %d of them kept by a fenced host and listed; %d decided entries; %d checkpoints restored and compared",
		c.seeds, c.copies, c.starts, c.refused, c.takeovers, c.fenced, c.contested, c.tookBack, c.writes, c.kept, c.entries, c.checkpoints)
}

// newRivals makes the world of a seed, with its first host.
func newRivals(t *testing.T, seed uint64, p *plant) *rivals {
	r := &rivals{dice: dice(seed ^ 0x2a05), chain: &chain{values: map[format.Hash][]byte{}, votes: map[vote]map[int]bool{}, early: map[uint64]format.Hash{}, authors: map[format.Epoch]*world{}}}
	q := *p
	q.onPut = func(s *store, name string, body []byte) (bool, []byte) {
		r.chain.put(s.w, name, body)
		if p.onPut == nil {
			return true, body
		}
		return p.onPut(s, name, body)
	}
	q.adjust = func(x *plan) {
		rng := r.dice.of("plan")
		x.whenFull, x.diskFaults, x.tightDisk, x.storms, x.flood = pipeline.WhenFullHold, false, false, true, false
		x.stores = pick(rng, 1, 2, 2, 3, 3, 3, 5)
		x.rpo = pick(rng, 20*time.Millisecond, 200*time.Millisecond, time.Second)
		x.steps = 30 + rng.IntN(90)
		if p.adjust != nil {
			p.adjust(x)
		}
	}
	w := newWorld(t, seed, &q, nil)
	r.plan = w.plan
	r.a = r.host("a", w)
	var ids []block.ID
	for _, m := range w.base.Members {
		ids = append(ids, m.ID)
		for _, s := range w.stores {
			if m.Store == any(s.mem) {
				r.chain.mems = append(r.chain.mems, s.mem)
			}
		}
	}
	r.chain.repo, r.chain.root, r.chain.ring, r.chain.stores = w.base.ID, identity.RootPublic, crypt.NewRing(identity), grouplog.NewStoreSet(ids)
	r.chain.read, r.chain.promise, r.chain.newest = make([]uint64, len(ids)), make([]format.Epoch, len(ids)), make([]uint64, len(ids))
	r.isNew = oneIn(r.dice.of("second"), 2)
	return r
}

func (r *rivals) host(name string, w *world) *rival {
	h := &rival{world: w, r: r, name: name}
	w.configure = func(l *life, cfg *pipeline.Config) {
		h.l = l
		cfg.Takeover = h.orders
		if h.anew {
			cfg.Journal = func(j pipeline.Journal) pipeline.Journal {
				h.begun(j.Durable())
				return &watch{h.plant.journal(j), h.world, l}
			}
		}
	}
	// Nothing but a fence has requests fail here.
	w.inOrder = func(_ *life, err error) bool { return errors.Is(err, block.ErrReadOnly) && r.b != nil }
	return h
}

// begun is recovered, for a start after which the journal may have begun anew
// behind seq s, and the volumes hold what clients were told, and perhaps more.
func (h *rival) begun(s block.Seq) {
	least := h.acked.load()
	if h.cut {
		least = max(h.flushed.load(), h.last.durable)
	}
	h.trace("%s begins behind %d: at least %d", h.name, s, least)
	if s < max(least, h.logged) {
		h.problem("the journal goes on behind seq %d, and %d was promised", s, max(least, h.logged))
	}
	h.model.mu.Lock()
	h.model.diverted = true // what is on the volumes is not known to the last write
	h.model.mu.Unlock()
	h.model.recover(s, least, max(h.flushed.load(), h.last.durable), h.cut)
	h.acked.set(s)
	h.flushed.set(s)
	h.last, h.cut = control5{}, false
}

// second makes the other host.
func (r *rivals) second() {
	a := r.a.world
	w := &world{
		t: a.t, dice: a.dice ^ 0x5eed, plan: a.plan, plant: a.plant, log: a.log, base: a.base, indexes: map[string]*index{},
		lives: 1000, boots: 1000, full: a.full,
	}
	for _, s := range a.stores {
		w.stores = append(w.stores, &store{w: w, index: s.index, mem: s.mem, asked: map[asked]int{}})
	}
	w.faulty.Store(a.faulty.Load())
	r.b = r.host("b", w)
	rng := r.dice.of("copy")
	if r.isNew {
		r.a.trace("b is a new host")
		r.restoreTo(r.b, rng)
		return
	}
	r.count.copies++
	cut := oneIn(rng, 2)
	r.a.trace("b is a copy of a, as after a power cut: %v", cut)
	crash := rng
	if !cut {
		crash = nil
	}
	w.host, w.cut = a.host.clone(crash, "boot of the copy"), cut || a.cut
	w.model = a.model.clone()
	w.acked.set(a.acked.load())
	w.flushed.set(a.flushed.load())
	w.last, w.logged, w.committed = a.last, a.logged, a.committed
	for dir, x := range a.indexes {
		w.indexes[dir] = x.clone(r.dice.of("copy of index", dir))
	}
	r.b.anew, r.b.known, r.b.shared = r.a.anew, r.a.known, w.model.end()
}

// restoreTo gives a new host volumes: what is at some checkpoint, the newest most
// times.
func (r *rivals) restoreTo(b *rival, rng *rand.Rand) {
	ctx := context.Background()
	b.host = newMachine("boot of the new host", b.plant)
	b.model = &model{sizes: b.plan.volumes}
	h, _, err := restorer.Find(ctx, restorer.Config{Repo: b.repository(nil), Ring: crypt.NewRing(identity), Patience: -1}, "v0")
	if err != nil {
		b.failf("restore to another host: %v", err)
	}
	defer h.Close()
	for i := range b.plan.disks {
		must(b.t, b.host.mem.MkdirAll(bufferPath(i)))
		b.host.mem.SetDevice(bufferPath(i), fmt.Sprint("disk", i))
	}
	var loose [][][]sectorBytes
	for i, v := range h.Volumes() {
		points := checkpoints(b.t, h, v)
		c := points[len(points)-1]
		if oneIn(rng, 4) {
			c = points[rng.IntN(len(points))]
		}
		p, err := h.Resolve(context.Background(), v.Name, "seq:"+c.Seq.String())
		if err != nil {
			b.failf("restore to another host: %v", err)
		}
		im, err := restorer.OpenImageAt(ctx, h, p)
		if err != nil {
			b.failf("restore to another host: %v", err)
		}
		d := newRawDisk(v.SizeBytes, b.plan.device[i], uint64(200+i))
		if err := im.ReadAt(ctx, d.data, 0); err != nil {
			b.failf("restore to another host: %v", err)
		}
		copy(d.base, d.data)
		var sectors [][]sectorBytes
		for s := int64(0); s < v.SizeBytes; s += diskSector {
			sectors = append(sectors, []sectorBytes{slices.Clone(d.data[s : s+diskSector])})
		}
		for u := range d.alloc {
			d.alloc[u] = true
		}
		b.host.disks[volumePath(i)] = d
		loose = append(loose, sectors)
	}
	b.model.loose, b.model.looser, b.anew = loose, loose, true
}

func (r *rivals) hosts() []*rival {
	if r.b == nil {
		return []*rival{r.a}
	}
	return []*rival{r.a, r.b}
}

func (r *rivals) other(h *rival) *rival {
	if h == r.a {
		return r.b
	}
	return r.a
}

// run is the whole life of a seed. It returns what is wrong.
func (r *rivals) run() (err error) {
	defer func() {
		if x := recover(); x != nil {
			f, ok := x.(failure)
			if !ok {
				panic(x)
			}
			err = errors.New(f.text)
			for _, h := range r.hosts() {
				h.vanish()
			}
		}
		for _, h := range r.hosts() {
			r.count.starts += h.count.lives
			r.count.writes += h.count.writes
			r.count.checkpoints += h.count.checkpoints
		}
		r.count.entries = len(r.chain.decided)
	}()
	r.count.seeds++
	at := r.dice.of("second comes").IntN(r.plan.steps / 2)
	if r.isNew { // it finds the group on the stores
		r.start(r.a, false)
		r.awaitStart(r.a)
		r.settle(r.a)
	}
	r.a.faulty.Store(true)
	for step := range r.plan.steps {
		if step >= at && r.b == nil && r.chain.known() { // before that it would make another group
			r.second()
		}
		hosts := r.hosts()
		rng := r.dice.of("step", step)
		r.step(hosts[rng.IntN(len(hosts))], rng, step)
		synctest.Wait()
		r.look()
	}
	r.finish()
	return nil
}

// start begins to start a host's agent.
func (r *rivals) start(h *rival, takeover bool) {
	h.trace("%s starts, takeover %v", h.name, takeover)
	h.orders, h.up, h.fenced, h.looked, h.contested = takeover, false, false, false, false
	h.calm = !h.faulty.Load()
	h.anew, h.adopts = h.anew || takeover, takeover
	h.l, h.starting = nil, make(chan started, 1)
	c := h.starting
	go func() {
		l, err := h.begin()
		c <- started{l, err}
	}()
	synctest.Wait()
}

// poll looks whether a start is over.
func (r *rivals) poll(h *rival) {
	if h.starting == nil {
		return
	}
	var s started
	select {
	case s = <-h.starting:
	default:
		return
	}
	h.starting, h.l = nil, s.l
	h.ifProblem()
	r.adopted(h)
	var locked *uploader.LockedError
	switch {
	case s.err == nil:
		h.up = true
		if h.orders {
			r.count.takeovers++
		}
		h.lookAtVolumes(h.l)
		h.anew = h.anew && h.model.inGap()
		return
	case s.l.isDead():
	case errors.Is(s.err, uploader.ErrFenced), errors.As(s.err, &locked):
		r.count.refused++
		if r.b == nil || (h.orders && h.calm) || r.chain.isOf(h.world) {
			h.failf("%s is refused: %v", h.name, s.err)
		}
	case !h.calm && (h.orders || h == r.b && r.isNew): // it needs the stores
	case !h.calm && h.excused(s.err):
	default:
		h.failf("%s does not start: %v", h.name, s.err)
	}
	h.trace("%s does not start: %v", h.name, s.err)
	r.over(h, false)
}

// adopted notes up to where a host may have taken over the history of the other one.
func (r *rivals) adopted(h *rival) {
	r.lookAtChain()
	if h.adopts {
		h.adopts = false
		h.known = uint64(len(r.chain.decided))
	}
}

// over ends the process of a host, if it has not ended itself.
func (r *rivals) over(h *rival, works bool) {
	if h.starting != nil { // in the middle of its start
		if h.l != nil {
			h.l.die()
		}
		h.host = h.host.kill()
		s := <-h.starting
		h.starting, h.l, works = nil, s.l, false
		r.adopted(h)
	}
	l := h.l
	h.l, h.up = nil, false
	h.ends++
	h.end(l, h.ends, works)
	h.ifProblem()
	h.anew = h.anew || h.model.inGap()
}

// vanish ends what is left of a host when the seed has failed.
func (h *rival) vanish() {
	if h.l != nil {
		h.l.die()
	}
	if h.host != nil {
		h.host = h.host.kill()
	}
	if h.starting != nil {
		s := <-h.starting
		h.starting, h.l = nil, s.l
	}
	if h.l != nil {
		h.l.bury()
	}
}

// step is one thing that happens to one of the hosts.
func (r *rivals) step(h *rival, rng *rand.Rand, step int) {
	r.poll(h)
	switch roll := rng.IntN(100); {
	case h.starting != nil:
		switch {
		case roll < 10:
			r.over(h, false)
		case roll < 30:
			r.weather(h, rng)
		default:
			time.Sleep(between(rng, 0, pick(rng, 20*time.Millisecond, time.Second, 20*time.Second)))
		}
	case h.l == nil:
		// Who comes back unasked is refused if he must not.
		r.start(h, r.b != nil && (oneIn(rng, 4) || (h == r.b && r.isNew && !oneIn(rng, 6))))
	case h.l.isDead():
		r.over(h, true)
	case h.fenced && roll < 40:
		r.over(h, true)
	case roll < 60:
		for k := range 1 + rng.IntN(h.plan.clients) {
			h.client(h.l, step*8+k)
			synctest.Wait()
		}
	case roll < 64 && h.busy.Load() == 0:
		h.lookAtVolumes(h.l)
	case roll < 67:
		h.checkpoint(h.l, fmt.Sprintf("%s step %d", h.name, step))
	case roll < 77:
		r.weather(h, rng)
	case roll < 83:
		r.over(h, true)
	case roll < 85:
		r.lookAtHistory("after step", step)
	default:
		time.Sleep(between(rng, time.Microsecond, pick(rng, time.Millisecond, 100*time.Millisecond, time.Second, 10*time.Second, 3*time.Minute)))
	}
}

// weather changes which stores a host reaches, and how.
func (r *rivals) weather(h *rival, rng *rand.Rand) {
	switch rng.IntN(5) {
	case 0, 1: // any minority
		for _, s := range h.stores {
			s.clear()
		}
		for _, i := range rng.Perm(len(h.stores))[:rng.IntN((len(h.stores)+1)/2+1)] {
			h.stores[i].storm(rng)
		}
	case 2: // cut off
		for _, s := range h.stores {
			s.storm(rng)
		}
	default:
		for _, s := range h.stores {
			s.clear()
		}
	}
}

// look checks what must hold at any time.
func (r *rivals) look() {
	for _, h := range r.hosts() {
		r.poll(h)
		h.ifProblem()
		if h.up && !h.l.isDead() {
			r.lookAt(h)
		}
	}
	r.lookAtChain()
}

func (r *rivals) lookAtChain() {
	if err := r.chain.look(); err != nil {
		r.a.failf("%v", err)
	}
}

// lookAt looks at what a host says of itself.
func (r *rivals) lookAt(h *rival) control.Group {
	g := h.l.agent.Status().Groups[0]
	if h.l.isDead() { // it went down meanwhile, and what it says is of nothing
		return g
	}
	r.lookAtChain()
	now, was := control5{g.Captured, g.Durable, g.Sealed, g.Logged, g.Committed}, h.last
	if now.captured < now.durable || now.durable < now.sealed || now.sealed < now.logged || now.logged < now.committed {
		h.failf("the watermarks of %s are not in order: %+v", h.name, now)
	}
	if now.captured < was.captured || now.durable < was.durable || now.sealed < was.sealed || now.logged < was.logged || now.committed < was.committed {
		h.failf("a watermark of %s went back: %+v, and before %+v", h.name, now, was)
	}
	if now.captured > h.model.end() && !h.model.inGap() {
		h.failf("captured of %s is %d, and there are %d writes", h.name, now.captured, h.model.end())
	}
	r.holds(h, "logged", now.logged, 0)
	r.holds(h, "committed", now.committed, h.base.Tolerates())
	h.last = now
	h.logged, h.committed = max(h.logged, now.logged), max(h.committed, now.committed)
	switch {
	case g.State == "fenced" && !h.fenced:
		h.fenced, h.frozen = true, now
		r.count.fenced++
		h.trace("%s is fenced", h.name)
		if r.b == nil {
			h.failf("%s is fenced, and is alone: %s", h.name, g.Message)
		}
	case g.State == "fenced":
		if now.logged != h.frozen.logged || now.committed != h.frozen.committed {
			h.failf("%s is fenced, and commits: %+v, and before %+v", h.name, now, h.frozen)
		}
	case h.fenced:
		h.failf("%s was fenced, and is %s", h.name, g.State)
	case g.State == "contested":
		if !h.contested {
			r.count.contested++
		}
		h.contested = true
		if r.b == nil {
			h.failf("%s is contested, and is alone", h.name)
		}
	case g.State == "error":
		h.failf("%s is in error: %s", h.name, g.Message)
	}
	if h.fenced && !h.looked {
		h.looked = true
		r.lookAtLoser(h)
	}
	return g
}

// holds checks that what a host says of the history up to seq is so: the stores
// have decided it, it is the history of this host, and more than lost stores have
// it.
func (r *rivals) holds(h *rival, what string, seq block.Seq, lost int) {
	if seq == 0 {
		return
	}
	why := ""
	for _, n := range r.chain.ends(seq) {
		author := r.chain.author(r.chain.decided[n-1].author)
		if r.chain.on(n) > lost && (author == h.world || n <= h.known || seq <= h.shared) {
			return
		}
		why += fmt.Sprintf("; entry %d is on %d stores, its own: %v, the other's that it has taken over: up to entry %d, and seq %d", n, r.chain.on(n), author == h.world, h.known, h.shared)
	}
	h.failf("%s says that seq %d is %s, and the one history on the stores, which ends at seq %d, does not hold it so%s", h.name, seq, what, r.chain.end(), why)
}

func (c *chain) end() block.Seq {
	if len(c.decided) == 0 {
		return 0
	}
	return c.decided[len(c.decided)-1].to
}

// awaitStart waits until a host is up, or its start has failed.
func (r *rivals) awaitStart(h *rival) {
	for range 3600 {
		time.Sleep(time.Second)
		r.poll(h)
		if h.starting == nil {
			return
		}
	}
	h.failf("the start of %s does not end", h.name)
}

// settled reports whether all of a host's writes are on the stores.
func settled(g control.Group) bool {
	return (g.State == "continuous" || g.State == "contested") && g.Captured == g.Committed && !g.Exposed
}

// settle waits until all of a host's writes are on the stores.
func (r *rivals) settle(h *rival) {
	var g control.Group
	for k := range 1800 {
		time.Sleep(time.Second)
		h.ifProblem()
		if h.l == nil || h.l.isDead() {
			h.failf("%s does not run", h.name)
		}
		if g = r.lookAt(h); settled(g) {
			return
		}
		r.takeBack(h, g, k)
	}
	h.failf("half an hour after the last fault not all of %s is on the stores: %+v", h.name, g)
}

// takeBack does, once a minute, what the state contested asks for: the stores that
// follow the other host are taken back by a restart.
func (r *rivals) takeBack(h *rival, g control.Group, second int) {
	if g.State != "contested" || second%60 != 59 {
		return
	}
	r.count.tookBack++
	r.stop(h)
	r.start(h, false)
	r.awaitStart(h)
}

// write has a client write something.
func (r *rivals) write(h *rival, n int) {
	i := n % len(h.plan.volumes)
	r.writeData(h, i, bytes.Repeat([]byte{byte(n), byte(n >> 8), byte(len(h.name)), h.name[0]}, int(h.sector(i))/4))
}

// writeData has a client write data at the beginning of a volume.
func (r *rivals) writeData(h *rival, i int, data []byte) {
	d, x := h.l.device(i), &request{volume: block.VolumeIndex(i), extent: block.Extent{Len: int64(len(data))}, data: data}
	h.model.ask(x)
	h.count.writes++
	h.busy.Add(1)
	h.ops.Go(func() {
		defer h.busy.Add(-1)
		err := d.WriteAt(h.l.ctx, x.data, 0, block.WriteOptions{FUA: true})
		if seq := h.model.answer(x, err, true); err == nil {
			h.acked.raise(seq)
			h.flushed.raise(seq)
		} else if !h.inOrder(h.l, err) {
			h.problem("a write fails: %v", err)
		}
	})
	time.Sleep(time.Second)
	h.ifProblem()
}

// finish ends the faults. One host must be in office then, or come to it when it is
// told to, and the other one must be fenced.
func (r *rivals) finish() {
	for _, h := range r.hosts() {
		h.faulty.Store(false)
		h.disarm()
		for _, s := range h.stores {
			s.clear()
		}
	}
	for _, h := range r.hosts() {
		for again := true; again; again = h.up && h.l.isDead() {
			if h.l != nil && h.starting == nil && h.l.isDead() { // it went down with the last fault
				r.over(h, true)
			}
			if h.l == nil && h.starting == nil {
				r.start(h, false)
			}
			if h.starting != nil {
				r.awaitStart(h)
			}
		}
	}
	if r.b == nil {
		r.settle(r.a)
		r.second()
		r.b.up = false
		r.start(r.b, false)
		r.awaitStart(r.b)
	}
	rng := r.dice.of("finish")
	winner := r.compete()
	if winner != nil && oneIn(rng, 3) { // the other one shall go on
		winner = r.order(r.other(winner))
	}
	if winner == nil {
		winner = r.order(r.hosts()[rng.IntN(2)])
	}
	// Who has lost learns it when it is about to log something.
	loser := r.other(winner)
	if loser.up && !loser.fenced {
		r.write(loser, 1)
		for k := 0; !loser.fenced; k++ {
			if k == 1800 {
				loser.failf("half an hour after the last fault %s is not fenced: %+v", loser.name, r.lookAt(loser))
			}
			time.Sleep(time.Second)
			r.lookAt(loser)
		}
	}
	for k := range 3 {
		r.write(winner, 10+k)
	}
	r.settle(winner)
	time.Sleep(3 * time.Minute) // what is late arrives
	r.look()
	r.settle(winner)
	winner.lookAtVolumes(winner.l)
	r.lookAtHistory("in the end", 0)
	if n := winner.base.Tolerates(); n > 0 {
		r.lookAtHistory("in the end", 1, r.dice.of("lost").Perm(len(winner.base.Members))[:n]...)
	}
	if end := r.chain.end(); end != winner.model.end() || r.chain.author(r.chain.decided[len(r.chain.decided)-1].author) != winner.world {
		winner.failf("the history ends at seq %d, and not with what %s wrote last, which is %d", end, winner.name, winner.model.end())
	}
	if loser.up {
		r.lookAtLoser(loser)
		r.stop(loser)
	}
	r.stop(winner)
	// Unasked nobody comes back.
	r.start(loser, false)
	r.awaitStart(loser)
	if loser.up {
		loser.failf("%s comes back unasked, although %s has taken over", loser.name, winner.name)
	}
	r.start(winner, false)
	r.awaitStart(winner)
	if !winner.up {
		winner.failf("%s, which was in office last, is refused", winner.name)
	}
	r.write(winner, 20)
	r.settle(winner)
	winner.lookAtVolumes(winner.l)
	r.stop(winner)
}

// disarm has the machine not go down by itself any more. If it has, it stays down.
func (h *rival) disarm() {
	if h.l != nil && h.l.isDead() {
		return
	}
	h.host.mem.SetHook(nil)
	for _, d := range h.host.disks {
		d.mu.Lock()
		d.fault = nil
		d.mu.Unlock()
	}
}

// compete has both hosts, where they run, write until it is known which of them is
// in office. It returns that one, or nil.
func (r *rivals) compete() *rival {
	for k := range 1800 {
		var open, office []*rival
		for _, h := range r.hosts() {
			switch {
			case !h.up || h.fenced:
			default:
				if g := r.lookAt(h); settled(g) {
					office = append(office, h)
				} else {
					open = append(open, h)
					r.takeBack(h, g, k)
				}
			}
			if h.up && !h.fenced && k < 3 {
				r.write(h, 100+k)
				open = append(open, h)
			}
		}
		switch {
		case len(open) > 0:
		case len(office) == 0:
			return nil
		case len(office) == 1:
			return office[0]
		default:
			r.a.failf("both hosts say that all of their writes are on the stores")
		}
		time.Sleep(time.Second)
	}
	text := ""
	for _, h := range r.hosts() {
		if h.up {
			text += fmt.Sprintf("\n\t%s: %+v", h.name, r.lookAt(h))
		}
	}
	r.a.failf("half an hour after the last fault it is not known who is in office%s", text)
	return nil
}

// order stops a host and starts it again with --takeover.
func (r *rivals) order(h *rival) *rival {
	if h.up {
		r.stop(h)
	}
	r.start(h, true)
	r.awaitStart(h)
	if !h.up {
		h.failf("the takeover by %s fails", h.name)
	}
	r.write(h, 200)
	r.settle(h)
	return h
}

// stop stops a host in order.
func (r *rivals) stop(h *rival) {
	l := h.l
	h.l, h.up = nil, false
	h.stopHost(l)
	h.ifProblem()
}

func (h *rival) stopHost(l *life) { h.stop(l) }

// lookAtHistory restores some checkpoints, always the newest, and compares each
// with what its author's clients wrote. lost are stores that are not there.
func (r *rivals) lookAtHistory(when string, n int, lost ...int) {
	ctx := context.Background()
	r.lookAtChain()
	if len(r.chain.decided) == 0 {
		return
	}
	decided := slices.Clone(r.chain.decided)
	h, err := restorer.OpenHistory(ctx, restorer.Config{Repo: r.a.repository(nil, lost...), Ring: crypt.NewRing(identity), Patience: -1}, r.chain.group)
	if err != nil {
		r.a.failf("%s the history cannot be read without stores %v: %v", when, lost, err)
	}
	defer h.Close()
	if h.N() < uint64(len(decided)) {
		r.a.failf("%s a reader finds %d entries without stores %v, and %d were decided", when, h.N(), lost, len(decided))
	}
	for i, d := range decided {
		if entryOf(r.a.t, h, uint64(i)+1).Hash != d.hash {
			r.a.failf("%s a reader finds another entry %d without stores %v than was decided", when, i+1, lost)
		}
	}
	rng := r.dice.of("history", when, n)
	for _, v := range h.Volumes() {
		points := checkpoints(r.a.t, h, v)
		if len(points) == 0 {
			continue
		}
		chosen := []restorer.Checkpoint{points[len(points)-1]}
		for range 2 {
			chosen = append(chosen, points[rng.IntN(len(points))])
		}
		for _, c := range chosen {
			r.compare(h, v, c, fmt.Sprintf("%s, without stores %v,", when, lost))
		}
	}
}

// compare restores a checkpoint and compares it with what its author's clients
// wrote.
func (r *rivals) compare(h *restorer.History, v restorer.Volume, c restorer.Checkpoint, when string) {
	ctx := context.Background()
	author := r.chain.author(entryOf(r.a.t, h, c.N).Epoch)
	if author == nil {
		r.a.failf("%s entry %d is of an epoch that nobody has promised", when, c.N)
	}
	p, err := h.Resolve(context.Background(), v.Name, "seq:"+c.Seq.String())
	if err != nil {
		r.a.failf("%s seq %d of %s cannot be found: %v", when, c.Seq, v.Name, err)
	}
	if p.N != c.N {
		author = r.chain.author(entryOf(r.a.t, h, p.N).Epoch)
	}
	im, err := restorer.OpenImageAt(ctx, h, p)
	if err != nil {
		r.a.failf("%s seq %d of %s cannot be opened: %v", when, c.Seq, v.Name, err)
	}
	have := make([]byte, v.SizeBytes)
	if err := im.ReadAt(ctx, have, 0); err != nil {
		r.a.failf("%s seq %d of %s cannot be read: %v", when, c.Seq, v.Name, err)
	}
	want := author.model.at(v.Index, c.Seq)
	r.a.same(have, want, "%s the checkpoint at seq %d of %s (entry %d) is not the volume of its author after that write%s",
		when, c.Seq, v.Name, p.N, author.model.origins(v.Index, have, want))
	r.a.count.checkpoints++
}
