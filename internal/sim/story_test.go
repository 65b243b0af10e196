package sim

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/block"
	"drc/internal/pipeline"
	"drc/internal/vfs"
)

// tell runs a story in a world without chance, but what is written.
func tell(t *testing.T, adjust func(*plan), story func(w *world)) {
	t.Helper()
	defer guard(1, ", in "+t.Name())()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, &plant{adjust: func(p *plan) {
			*p = plan{disks: 1, quota: 1 << 20, stores: 1, volumes: []int64{256 << 10}, device: []bool{false}, whenFull: pipeline.WhenFullBitmap,
				rpo: time.Second, clients: 1, maxWrite: 64 << 10}
			adjust(p)
		}}, nil)
		defer func() {
			if f, ok := recover().(failure); ok {
				t.Fatal(f.text)
			}
		}()
		w.faulty.Store(true)
		w.story = true
		if *verbose {
			w.log = os.Stderr
		}
		story(w)
	})
}

// The stores have never been there, the buffer is full, a volume that had data is
// cleared past the journal, and the process dies. What was sealed before becomes
// the first history: that the volume holds nothing now must be in it as well.
func TestStory_PastTheJournalBeforeTheFirstEntry(t *testing.T) {
	tell(t, func(*plan) {}, func(w *world) {
		for _, s := range w.stores {
			s.is("lists")
		}
		l, err := w.start()
		if err != nil {
			w.failf("start: %v", err)
		}
		for step := 0; !w.model.inGap(); step++ {
			w.client(l, step)
			synctest.Wait()
			if step == 5 {
				time.Sleep(time.Minute) // what is sealed is kept in the buffer
			}
			if time.Sleep(20 * time.Millisecond); step > 10000 {
				w.failf("the buffer does not get full")
			}
		}
		w.ops.Wait()
		all := &request{extent: block.Extent{Len: w.plan.volumes[0]}}
		w.model.ask(all)
		w.model.answer(all, l.device(0).Zero(l.ctx, all.extent, block.ZeroOptions{}), false)
		l.die()
		w.host = w.host.kill()
		l.bury()
		w.stores[0].clear()
		if l, err = w.start(); err != nil {
			w.failf("start again: %v", err)
		}
		w.lookAtVolumes(l)
		w.converge(l)
		w.lookAtHistory("in the end", 0)
		w.stop(l)
		w.ifProblem()
	})
}

// A gap ends while the stores that have the newest history take what is put, but
// cannot be read: what changed in the gap must not be compared with the old
// history on the one that can. What was written before the gap, and zeroed in it,
// would be taken for what it was in the beginning.
func TestStory_AGapEndsWhileOnlyAnOldHistoryCanBeRead(t *testing.T) {
	tell(t, func(p *plan) { p.stores = 3 }, func(w *world) {
		l, err := w.start()
		if err != nil {
			w.failf("start: %v", err)
		}
		w.converge(l)
		for i, s := range w.stores {
			s.is([]string{"puts", "puts", "full"}[i])
		}
		write := func(off int64, data []byte) {
			r := &request{extent: block.Extent{Off: off, Len: int64(len(data))}, data: data}
			w.model.ask(r)
			w.model.answer(r, l.device(0).WriteAt(l.ctx, data, off, block.WriteOptions{}), false)
		}
		write(0, bytes.Repeat([]byte{1}, 64<<10))
		time.Sleep(time.Minute) // it is logged
		w.stores[0].is("down")
		w.stores[1].is("down")
		for step := 0; !w.model.inGap(); step++ {
			w.client(l, step)
			synctest.Wait()
			if time.Sleep(20 * time.Millisecond); step > 10000 {
				w.failf("the buffer does not get full")
			}
		}
		w.ops.Wait()
		all := &request{extent: block.Extent{Len: w.plan.volumes[0]}}
		w.model.ask(all)
		w.model.answer(all, l.device(0).Zero(l.ctx, all.extent, block.ZeroOptions{}), false)
		w.stores[0].is("puts")
		w.stores[1].is("puts")
		time.Sleep(time.Hour)
		if w.model.inGap() {
			w.failf("the gap has not ended: %+v", l.agent.Status().Groups[0])
		}
		for _, s := range w.stores {
			s.clear()
		}
		w.lookAtVolumes(l)
		w.converge(l)
		w.lookAtHistory("in the end", 0)
		w.stop(l)
		w.ifProblem()
	})
}

// The power goes when the journal is about to be given back, as a gap has begun. The
// next start finds all of it, and will have it as history in front of the gap. Before
// that has come about the buffer is full once more, and the journal is dropped: what
// it held is in the gap too, and no checkpoint says that it is history. Sealed batches
// find no room all that time.
func TestStory_AGapGrowsBackwards(t *testing.T) {
	tell(t, func(p *plan) { p.rpo = 24 * time.Hour }, func(w *world) {
		for _, s := range w.stores {
			s.is("lists")
		}
		fill := func(l *life) {
			for step := 0; !w.model.inGap() && !l.isDead(); step++ {
				w.client(l, l.number<<16+step)
				synctest.Wait()
				if time.Sleep(20 * time.Millisecond); step > 10000 {
					w.failf("the buffer does not get full")
				}
			}
			time.Sleep(time.Second)
		}
		start := func() *life {
			l, err := w.start()
			if err != nil {
				w.failf("start: %v", err)
			}
			return l
		}
		l := start()
		w.host.mem.SetHook(func(op vfs.Op, name string) error {
			if op == vfs.OpWrite && strings.Contains(name, ".mark") && w.model.inGap() {
				l.die()
			}
			if l.isDead() {
				return errPower
			}
			return nil
		})
		full := &vfs.Fault{Ops: []vfs.Op{vfs.OpCreate, vfs.OpWrite, vfs.OpPreallocate}, Err: syscall.ENOSPC}
		w.host.mem.SetFault(bufferPath(0)+"/spool", full)
		fill(l)
		if !l.isDead() {
			w.failf("no mark was written")
		}
		w.host = w.host.kill()
		l.bury()
		w.host.mem.SetFault(bufferPath(0)+"/spool", full)
		l = start()
		fill(l)
		time.Sleep(time.Minute)
		l.die()
		w.host = w.host.kill()
		l.bury()
		for _, s := range w.stores {
			s.clear()
		}
		l = start()
		w.lookAtVolumes(l)
		w.converge(l)
		w.lookAtHistory("in the end", 0)
		w.stop(l)
		w.ifProblem()
	})
}

// The disk of one volume fails for a while, and the buffer gets full meanwhile, as what
// that volume lacks is kept in the journal. Nobody writes any more: the writers of
// the other volume wait for room. It comes when the disk works again.
func TestStory_RoomComesWithTheBackingThatFailed(t *testing.T) {
	tell(t, func(p *plan) {
		p.whenFull, p.volumes, p.device = pipeline.WhenFullHold, []int64{256 << 10, 256 << 10}, []bool{false, false}
	}, func(w *world) {
		l, err := w.start()
		if err != nil {
			w.failf("start: %v", err)
		}
		w.converge(l)
		w.host.disks[volumePath(1)].fail(20*time.Minute, "write", "sync")
		write := func(volume, k int) {
			r := &request{volume: block.VolumeIndex(volume), extent: block.Extent{Off: int64(k%4) * 64 << 10, Len: 64 << 10}}
			r.data = bytes.Repeat([]byte{byte(k + 1)}, 64<<10)
			w.model.ask(r)
			w.ops.Go(func() {
				w.model.answer(r, l.device(volume).WriteAt(l.ctx, r.data, r.extent.Off, block.WriteOptions{}), false)
			})
			synctest.Wait()
		}
		write(1, 0)
		for k := range 40 {
			write(0, k)
			time.Sleep(20 * time.Millisecond)
		}
		if st := l.agent.Status(); !st.Groups[0].WritersWaiting {
			w.failf("nobody waits: %+v", st.Groups[0])
		}
		time.Sleep(20 * time.Minute)
		done := make(chan struct{})
		go func() { w.ops.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(10 * time.Minute):
			w.failf("ten minutes after the disk works again writers wait: %+v", l.agent.Status().Groups[0])
		}
		w.lookAtVolumes(l)
		w.converge(l)
		w.lookAtHistory("in the end", 0)
		w.stop(l)
		w.ifProblem()
	})
}

// All of the buffer was lost at work, and the agent had been given an empty one when
// its power was cut. The volumes have everything. The start that finds that goes down,
// too, at any step: the next one knows it still, and asks for no decision.
func TestStory_AStartWithAnEmptyBufferGoesDown(t *testing.T) {
	for at, through := 1, false; !through; at++ {
		tell(t, func(p *plan) { p.loses = true }, func(w *world) {
			l, err := w.start()
			if err != nil {
				w.failf("start: %v", err)
			}
			for step := range 5 {
				w.client(l, step)
			}
			w.ops.Wait()
			for _, s := range w.stores {
				s.is("down") // what is sealed waits, and the journal is not used again
			}
			w.loseBuffer(w.dice.of("lose"))
			for step := 5; !w.model.inGap(); step++ {
				w.client(l, step)
				if time.Sleep(time.Second); step > 100 {
					w.failf("it is not noticed that the buffer is lost")
				}
			}
			w.ops.Wait()
			w.giveBuffer(l)
			down := func(number int) {
				l.die()
				w.host, w.cut = w.host.crash(w.dice.of("crash", number), fmt.Sprint("boot ", number)), true
				l.bury()
				w.loss.now = false
			}
			down(1)
			w.loss.given = w.noted()
			w.fatal = at
			if l, err = w.begin(); err != nil && !l.isDead() {
				w.failf("operation %d: the start fails: %v", at, err)
			}
			if through = !l.isDead(); through {
				w.arm(l)
			} else {
				down(2)
				w.ifProblem()
				if l, err = w.begin(); err != nil {
					w.failf("after a start that went down at operation %d: %v", at, err)
				}
			}
			if g := l.agent.Status().Groups[0]; g.State == "needs-decision" {
				w.failf("after a start that went down at operation %d: %s", at, g.Message)
			}
			for _, s := range w.stores {
				s.clear()
			}
			w.lookAtVolumes(l)
			w.converge(l)
			w.lookAtHistory("in the end", 0)
			w.stop(l)
			w.ifProblem()
		})
		if t.Failed() || at > 5000 {
			t.Fatalf("the start goes down at operation %d", at)
		}
	}
}
