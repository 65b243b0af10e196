package sim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/vfs"
	"drc/restorer"
)

// problem notes what somebody else than the driver has found.
func (w *world) problem(text string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wrong == nil {
		w.wrong = fmt.Errorf(text, args...)
	}
}

func (w *world) ifProblem() {
	w.mu.Lock()
	err := w.wrong
	w.mu.Unlock()
	if w.gaveUp.Load() && !w.faulted && !w.story { // which the agent makes up for with a gap
		w.failf("sealed writes are lost, and no disk of the buffer has failed")
	}
	if err != nil {
		w.failf("%v", err)
	}
}

// recovered is told with each start where the journal ends.
func (w *world) recovered(s block.Seq) {
	if w.loss.anew {
		w.renewed(s)
		return
	}
	end, least := w.model.end(), w.acked.load()
	flushed := max(w.flushed.load(), w.last.durable, w.logged)
	why := "was acknowledged before the process died"
	if w.cut {
		least, why = w.flushed.load(), "was flushed before the power went"
		if d := w.last.durable; d > least {
			least, why = d, "was said to be durable before the power went"
		}
	}
	w.trace("recovered up to %d: at least %d, at most %d", s, least, end)
	if w.logged > least {
		least, why = w.logged, "was logged"
	}
	switch {
	case s < least && w.model.inGap(): // the volumes show whether it is there
	case s < least:
		w.problem("the journal ends at seq %d, and %d %s", s, least, why)
	case s > end:
		w.problem("the journal ends at seq %d, and no write behind %d was ever made", s, end)
	}
	w.model.recover(s, least, flushed, w.cut)
	w.acked.set(s)
	w.flushed.set(s)
	w.last = control5{} // what a start knows of the stores it may have to find out again
	w.cut = false
}

// arm has the machine go down at some operation of life l, perhaps.
func (w *world) arm(l *life) {
	rng := w.dice.of("arm", l.number)
	at := 1 + rng.IntN(pick(rng, 30, 300, 1500))
	if !w.faulty.Load() || !w.plan.sudden || !oneIn(rng, 2) {
		at = 0
	}
	if w.fatal > 0 {
		at, w.fatal = w.fatal, 0
	}
	n := 0
	step := func() error { // under the lock of the file system or of a disk; they take turns
		w.mu.Lock()
		defer w.mu.Unlock()
		if n++; at > 0 && n >= at {
			l.die()
			return errPower
		}
		return nil
	}
	w.host.mem.SetHook(func(vfs.Op, string) error { return step() })
	for _, d := range w.host.disks {
		d.mu.Lock()
		d.fault = func(string) error { return step() }
		d.mu.Unlock()
	}
}

// run is the whole life of a world. It returns what is wrong.
func (w *world) run() (err error) {
	var l *life
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(failure)
			if !ok {
				panic(r)
			}
			err = errors.New(f.text)
			if l != nil {
				w.host = w.host.kill()
				l.bury()
			}
		}
	}()
	w.count.seeds++
	w.faulty.Store(true)
	for i := range w.plan.lives {
		var err error
		l, err = w.start()
		w.ifProblem()
		switch {
		case err == nil:
			w.lookAtVolumes(l)
			for step := range w.plan.steps {
				if l.isDead() {
					break
				}
				w.step(l, step)
				w.ifProblem()
			}
		case !l.isDead() && !w.excused(err):
			w.failf("start %d failed: %v", i+1, err)
		default:
			w.trace("start %d failed", i+1)
		}
		w.end(l, i, err == nil)
		l = nil
		w.ifProblem()
		if oneIn(w.dice.of("look", i), 2) {
			w.lookAtHistory("after life", i)
		}
	}
	w.faulty.Store(false)
	for _, s := range w.stores {
		s.clear()
	}
	for _, d := range w.host.disks {
		d.free = -1
	}
	if l, err = w.start(); err != nil {
		w.failf("the last start failed: %v", err)
	}
	w.ifProblem()
	w.lookAtVolumes(l)
	w.converge(l)
	w.lookAtHistory("in the end", 0)
	if n := w.base.Tolerates(); n > 0 {
		if at := w.plan.forgetful; at >= 0 && at < len(w.stores) {
			w.forget(w.stores[at], w.dice.of("forget"))
			w.lookAtHistory("with objects missing", 0)
		}
		lost := w.dice.of("lost").Perm(len(w.base.Members))
		if at := slices.Index(lost, w.plan.forgetful); at >= 0 { // it has lost enough already
			lost[0], lost[at] = lost[at], lost[0]
		}
		lost = lost[:n]
		w.lookAtHistory("in the end", 1, lost...)
	}
	w.stop(l)
	l = nil
	w.ifProblem()
	return nil
}

// start is begin, with somebody at hand who does what an error asks for.
func (w *world) start() (*life, error) {
	for {
		l, err := w.begin()
		if !w.asked(l, err) {
			return l, err
		}
	}
}

// excused reports whether a start may fail so: the group is new, and nobody waits
// for the stores then.
func (w *world) excused(error) bool { return w.model.end() == 0 }

// step is one thing that happens.
func (w *world) step(l *life, step int) {
	rng := w.dice.of("step", l.number, step)
	switch roll := rng.IntN(100); {
	case roll < 60:
		for k := range 1 + rng.IntN(w.plan.clients) {
			w.client(l, step*8+k)
			synctest.Wait()
		}
	case roll < 64 && w.busy.Load() == 0:
		w.lookAtVolumes(l)
	case roll < 68:
		w.checkpoint(l, fmt.Sprintf("life %d step %d", l.number, step))
	case roll < 72 && w.plan.storms:
		w.stores[rng.IntN(len(w.stores))].storm(rng)
	case roll < 74 && w.plan.storms:
		for _, s := range w.stores {
			s.clear()
		}
	case roll < 77 && w.plan.diskFaults && w.plan.disks > 1 && !w.faulted:
		w.faulted = true
		w.breakDisk(rng)
	case roll < 79 && w.plan.loses && !w.loss.now && w.model.end() > 0:
		w.loseBuffer(rng)
	case roll < 85 && w.loss.now:
		w.giveBuffer(l)
	case roll < 82 && w.plan.flood:
		w.flood(l, rng, step)
	case roll < 79 && w.plan.tightDisk:
		w.fillDisk(rng)
	case roll < 83 && w.plan.badBackings:
		w.breakBacking(rng)
	default:
		w.pass(l, between(rng, time.Microsecond, pick(rng, time.Millisecond, 100*time.Millisecond, time.Second, 10*time.Second, 5*time.Minute)))
	}
	synctest.Wait()
	if !l.isDead() {
		w.watermarks(l)
	}
}

// flood has all stores away, and clients write more than the buffer holds.
func (w *world) flood(l *life, rng *rand.Rand, step int) {
	for _, s := range w.stores {
		s.storm(rng)
	}
	for k := range 10 + rng.IntN(40) {
		w.client(l, 1<<20+step<<8+k)
		if synctest.Wait(); l.isDead() {
			return
		}
		if w.busy.Load() > 4 { // so many wait
			w.pass(l, between(rng, time.Millisecond, time.Second))
		}
	}
}

// breakDisk has one disk of the buffer fail, for this life: the others go on.
func (w *world) breakDisk(rng *rand.Rand) {
	i := rng.IntN(w.plan.disks)
	dir := w.dirs()[i%len(w.dirs())]
	f := &vfs.Fault{Skip: rng.IntN(20), Err: syscall.EIO}
	switch rng.IntN(5) {
	case 3:
		var names []string
		for _, folder := range []string{"journal", "spool"} {
			names = append(names, w.host.mem.Rot(path.Join(dir, folder), 1+rng.IntN(8), rng)...)
		}
		w.trace("bytes rot on buffer disk %d: %v", i, names)
		return
	case 0:
		f.Err = syscall.ENOSPC
		f.Ops = []vfs.Op{vfs.OpWrite, vfs.OpCreate, vfs.OpPreallocate}
	case 1:
		f.Ops = []vfs.Op{vfs.OpWrite, vfs.OpSync, vfs.OpCreate, vfs.OpPreallocate, vfs.OpSyncDir}
	case 2:
		f.Ops = []vfs.Op{vfs.OpSync}
	}
	w.trace("buffer disk %d fails: %v of %v", i, f.Err, f.Ops)
	w.host.mem.SetFault(dir, f)
}

// fillDisk has the file system of the volumes run full, or gives it room again.
func (w *world) fillDisk(rng *rand.Rand) {
	units := pick(rng, int64(-1), 0, 5, 50)
	w.trace("the file system of the volumes has %d units left", units)
	for _, path := range slices.Sorted(maps.Keys(w.host.disks)) {
		d := w.host.disks[path]
		d.mu.Lock()
		d.free = units
		d.mu.Unlock()
	}
}

// breakBacking has the disk of a volume fail for some time, in one of the ways that
// disks do.
func (w *world) breakBacking(rng *rand.Rand) {
	i := rng.IntN(len(w.plan.volumes))
	d := w.host.disks[volumePath(i)]
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken = pick(rng, []string{"write"}, []string{"sync"}, []string{"write", "sync"}, []string{"read"}, []string{"read", "write", "sync", "seek"})
	d.brokenUntil = time.Now().Add(between(rng, 100*time.Millisecond, pick(rng, 20*time.Second, 20*time.Minute)))
	d.drops = oneIn(rng, 2)
	w.trace("the disk of volume %d fails at %v until %s", i, d.broken, d.brokenUntil.UTC().Format(time.TimeOnly))
}

// forget has a store lose some segments, and manifests with them.
func (w *world) forget(s *store, rng *rand.Rand) {
	ctx := context.Background()
	var lost []string
	for o, err := range s.mem.List(ctx, "groups/", "") {
		must(w.t, err)
		if (strings.Contains(o.Name, "/segments/") || strings.Contains(o.Name, "/manifests/")) && oneIn(rng, 3) {
			lost = append(lost, o.Name)
		}
	}
	for _, name := range lost {
		must(w.t, s.mem.Delete(ctx, name))
	}
	w.trace("store %d loses %d objects", s.index, len(lost))
}

// pass lets time go by, or the life end.
func (w *world) pass(l *life, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.died:
	}
}

func (w *world) checkpoint(l *life, name string) {
	_, err := l.agent.Checkpoint(l.ctx, control.CheckpointRequest{Name: name})
	w.trace("checkpoint %s: %v", name, err != nil)
}

// watermarks looks at what the agent says of itself.
func (w *world) watermarks(l *life) {
	w.ifProblem()
	st := l.agent.Status()
	g := st.Groups[0]
	now := control5{g.Captured, g.Durable, g.Sealed, g.Logged, g.Committed}
	if now.captured < now.durable || now.durable < now.sealed || now.sealed < now.logged || now.logged < now.committed {
		w.failf("the watermarks are not in order: %+v", now)
	}
	was := w.last
	if now.captured < was.captured || now.durable < was.durable || now.sealed < was.sealed || now.logged < was.logged || now.committed < was.committed {
		w.failf("a watermark went back: %+v, and before %+v", now, was)
	}
	if now.captured > w.model.end() {
		w.failf("captured is %d, and there are %d writes", now.captured, w.model.end())
	}
	if g.State == "fenced" || g.State == "contested" {
		w.failf("the group is %s: %s", g.State, g.Message)
	}
	w.last = now
	w.logged, w.committed = max(w.logged, now.logged), max(w.committed, now.committed)
}

// end ends a life in one of the ways that there are.
func (w *world) end(l *life, i int, works bool) {
	rng := w.dice.of("end", i)
	how := pick(rng, "kill", "kill", "cut", "cut", "stop")
	if (l.isDead() || !works) && how == "stop" {
		how = "kill"
	}
	if rng := w.dice.of("rush", i); how == "cut" && works && !l.isDead() && oneIn(rng, 2) {
		w.rush(l, rng)
	}
	w.trace("life %d ends by a %s", l.number, how)
	switch how {
	case "stop":
		w.stop(l)
		if oneIn(rng, 2) {
			w.boots++
			w.host, w.cut = w.host.crash(rng, fmt.Sprint("boot ", w.boots)), true
		}
		w.reboot(w.dice.of("reboot", i))
		return
	case "kill":
		w.count.kills++
		l.die()
		w.host = w.host.kill()
		w.cut = w.cut || false
	case "cut":
		w.count.cuts++
		l.die()
		w.boots++
		w.host, w.cut = w.host.crash(rng, fmt.Sprint("boot ", w.boots)), true
	}
	l.bury()
	w.reboot(w.dice.of("reboot", i))
	for dir, x := range w.indexes {
		w.indexes[dir] = x.lose(w.dice.of("index", i, dir))
	}
	// Not of rng: how much a power cut draws of that hangs on what is not synced.
	if rng := w.dice.of("pause", i); oneIn(rng, 3) {
		time.Sleep(between(rng, time.Second, time.Hour))
	}
}

// rush has clients write something just before the power is cut, which is in the
// journal and not synced, for long enough that the backing might have it.
func (w *world) rush(l *life, rng *rand.Rand) {
	for k := range 1 + rng.IntN(4) {
		w.client(l, 1<<30+k)
	}
	if synctest.Wait(); !l.isDead() {
		w.pass(l, between(rng, 0, time.Second))
	}
	synctest.Wait()
}

// stop stops an agent in order. Its backings are the model then.
func (w *world) stop(l *life) {
	w.count.stops++
	for _, d := range w.host.disks {
		d.mend()
	}
	w.answered(l)
	l.cancel()
	err := <-l.ended
	l.ended <- nil
	dead := l.isDead()
	l.bury()
	if dead { // it went down meanwhile
		w.host = w.host.kill()
		return
	}
	w.host = w.host.kill()
	if err != nil && w.loss.now && errors.Is(err, syscall.EIO) {
		return // what it could not write it says
	}
	if err != nil {
		w.failf("the agent did not stop well: %v", err)
	}
	end := w.model.end()
	w.acked.raise(end)
	w.flushed.raise(end)
	for i := range w.plan.volumes {
		if at := w.model.check(block.VolumeIndex(i), w.host.disks[volumePath(i)].content()); at >= 0 {
			w.failf("after a stop in order the backing of volume %d is not the volume at seq %d: it differs at byte %d", i, end, at)
		}
	}
}

// answered waits until all clients are answered. Where they wait for room in the
// buffer the stores are back after some minutes, and then it must not take long.
func (w *world) answered(l *life) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.ops.Wait()
	}()
	for _, wait := range []time.Duration{5 * time.Minute, 2 * time.Hour} {
		select {
		case <-done:
			return
		case <-l.died:
			l.cancel()
			<-done
			return
		case <-time.After(wait):
		}
		for _, s := range w.stores {
			s.clear()
		}
	}
	n := w.busy.Load()
	if w.log != nil {
		buf := make([]byte, 1<<20)
		fmt.Fprintf(w.log, "%s\n", buf[:runtime.Stack(buf, true)])
	}
	l.cancel()
	<-done
	w.failf("two hours after the stores are back %d requests have no answer: %+v", n, l.agent.Status().Groups[0])
}

// same compares what is with what shall be.
func (w *world) same(have, want []byte, text string, args ...any) {
	if at := differs(have, want); at >= 0 {
		w.failf(text+": it differs at byte %d", append(args, at)...)
	}
}

// lookAtVolumes compares the volumes, as clients see them, with the model.
func (w *world) lookAtVolumes(l *life) {
	var image [][]byte
	for i := range w.plan.volumes {
		p := make([]byte, w.plan.volumes[i])
		if err := l.device(i).ReadAt(l.ctx, p, 0); err != nil {
			d := w.host.disks[volumePath(i)]
			if l.isDead() || (d.isBroken() && errors.Is(err, syscall.EIO)) {
				return
			}
			w.failf("read volume %d: %v", i, err)
		}
		if at := w.model.check(block.VolumeIndex(i), p); at >= 0 {
			w.failf("volume %d is not what was written up to seq %d: it differs at byte %d", i, w.model.end(), at)
		}
		image = append(image, p)
	}
	w.model.settle(image)
	w.loss.anew, w.loss.half, w.loss.orders = false, false, nil
}

// converge waits until all is on the stores.
func (w *world) converge(l *life) {
	var g control.Group
	for range 1800 {
		time.Sleep(time.Second)
		w.watermarks(l)
		w.ifProblem()
		g = l.agent.Status().Groups[0]
		done := g.State == "continuous" && g.Captured == g.Committed && !g.Exposed
		if done {
			w.trace("converged at %d", g.Committed)
			time.Sleep(3 * time.Minute) // what is late arrives
			return
		}
	}
	w.failf("half an hour after the last fault not all is on the stores: %+v", g)
}

// lookAtHistory restores some checkpoints, always the newest, and compares them
// with the model. lost are stores that are not there.
func (w *world) lookAtHistory(when string, n int, lost ...int) {
	ctx := context.Background()
	h, _, err := restorer.Find(ctx, restorer.Config{Repo: w.repository(nil, lost...), Ring: crypt.NewRing(identity), Patience: -1}, "v0")
	if errors.Is(err, restorer.ErrNoSuchVolume) {
		if w.logged > 0 {
			w.failf("%s there is no history, and %d was logged", when, w.logged)
		}
		return
	}
	var damaged *format.CorruptError
	if w.logged == 0 && errors.As(err, &damaged) && strings.Contains(err.Error(), "no store has an entry in it") {
		return // shards came before the first promise did
	}
	if err != nil {
		w.failf("%s the history cannot be read without stores %v: %v", when, lost, err)
	}
	defer h.Close()
	newest := block.Seq(0)
	must(w.t, h.Each(ctx, 1, func(e *restorer.Entry) bool {
		if e.Range != nil {
			newest = max(newest, e.Range.To)
		}
		return true
	}))
	if newest < w.logged {
		w.failf("%s the history ends at seq %d, and %d was logged", when, newest, w.logged)
	}
	rng := w.dice.of("history", when, n)
	for _, v := range h.Volumes() {
		points := checkpoints(w.t, h, v)
		if len(points) == 0 {
			continue
		}
		chosen := []restorer.Checkpoint{points[len(points)-1]}
		for range 2 {
			chosen = append(chosen, points[rng.IntN(len(points))])
		}
		if w.story || len(points) <= len(chosen) {
			chosen = points
		}
		for _, c := range chosen {
			if c.Seq > w.model.end() {
				w.failf("%s there is a checkpoint at seq %d, and there are %d writes", when, c.Seq, w.model.end())
			}
			p, err := h.Resolve(ctx, v.Name, "seq:"+c.Seq.String())
			if err != nil {
				w.failf("%s seq %d of %s cannot be found: %v", when, c.Seq, v.Name, err)
			}
			im, err := restorer.OpenImageAt(ctx, h, p)
			if err != nil {
				w.failf("%s seq %d of %s cannot be opened without stores %v: %v", when, c.Seq, v.Name, lost, err)
			}
			have := make([]byte, v.SizeBytes)
			if err := im.ReadAt(ctx, have, 0); err != nil {
				w.failf("%s seq %d of %s cannot be read without stores %v: %v", when, c.Seq, v.Name, lost, err)
			}
			want := w.model.at(v.Index, c.Seq)
			w.same(have, want, "%s the checkpoint at seq %d of %s is not the volume after its first %d writes%s",
				when, c.Seq, v.Name, c.Seq, w.model.origins(v.Index, have, want))
			w.count.checkpoints++
		}
	}
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
