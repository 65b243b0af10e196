package sim

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// put writes noise to the first volume.
func (w *world) put(l *life, seed byte, off, n int64) {
	r := &request{extent: block.Extent{Off: off, Len: n}, data: make([]byte, n)}
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(r.data)
	w.model.ask(r)
	err := l.device(0).WriteAt(l.ctx, r.data, off, block.WriteOptions{FUA: true})
	if l.isDead() {
		return
	}
	seq := w.model.answer(r, err, true)
	if err != nil {
		w.failf("a write fails: %v", err)
	}
	if seq > 0 {
		w.acked.raise(seq)
		w.flushed.raise(seq)
	}
}

// spooled are the files of the buffer's sealed batches that end in suffix.
func (w *world) spooled(suffix string) []string { return w.spooledIn(bufferPath(0), suffix) }

func (w *world) spooledIn(dir, suffix string) (all []string) {
	m := w.host.mem.Clone()
	spools := dir + "/spool"
	groups, err := m.ReadDir(spools)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	must(w.t, err)
	for _, g := range groups {
		files, err := m.ReadDir(path.Join(spools, g.Name))
		must(w.t, err)
		for _, f := range files {
			if strings.HasSuffix(f.Name, suffix) {
				all = append(all, path.Join(spools, g.Name, f.Name))
			}
		}
	}
	return all
}

// rot flips a bit in the middle of a file.
func (w *world) rot(name string) {
	raw, err := vfs.ReadFile(w.host.mem, name, 64<<20)
	must(w.t, err)
	f, err := w.host.mem.Open(name)
	must(w.t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte{raw[len(raw)/2] ^ 4}, int64(len(raw)/2))
	must(w.t, err)
}

// loseSealed begins in an outage of the stores, with some sealed batches in the buffer
// of which the journal has given back the writes, and has what says rot. The outage
// is over then.
func (w *world) loseSealed(what string) *life {
	l, err := w.start()
	if err != nil {
		w.failf("start: %v", err)
	}
	w.put(l, 1, 0, 64<<10)
	w.converge(l)
	w.stores[0].is("down")
	for k := range byte(5) {
		w.put(l, 2+k, int64(k)*(40<<10), 60<<10)
		time.Sleep(5 * time.Minute)
	}
	if n := len(w.spooled(".batch")); n < 4 {
		w.failf("there are only %d batches in the buffer", n)
	}
	switch what {
	case "records":
		for _, name := range w.spooled(".batch") {
			w.rot(name)
		}
	case "all":
		for _, name := range w.spooled(".shard") {
			w.rot(name)
		}
	default: // two segments: of one the bytes may have been read already
		var segments []string
		for _, name := range w.spooled(".shard") {
			if s := path.Base(name)[:32]; !slices.Contains(segments, s) {
				segments = append(segments, s)
			}
			if len(segments) <= 2 {
				w.rot(name)
			}
		}
	}
	return l
}

// Sealed batches rot in the buffer while the stores are away. The agent gives them up
// when the stores are back and all before them is history, and needs nobody for it.
// Everything before and behind them can be restored.
func TestStory_SealedWritesAreLostAtWork(t *testing.T) {
	for _, what := range []string{"two segments", "all", "records"} {
		t.Run(what, func(t *testing.T) {
			tell(t, func(p *plan) { p.quota = 8 << 20 }, func(w *world) {
				l := w.loseSealed(what)
				w.stores[0].clear()
				w.converge(l)
				if w.model.end() < 6 {
					w.failf("the journal begins anew")
				}
				w.put(l, 9, 100<<10, 8<<10)
				w.lookAtVolumes(l)
				w.converge(l)
				w.lookAtHistory("in the end", 0)
				w.stop(l)
				w.ifProblem()
			})
		})
	}
}

// The agent goes down while it gives up what is lost, at any step.
func TestStory_DownWhileSealedWritesAreGivenUp(t *testing.T) {
	for at, through := 1, false; !through; at += 1 + at/16 {
		tell(t, func(p *plan) { p.quota = 8 << 20 }, func(w *world) {
			l := w.loseSealed("all")
			w.fatal = at
			w.arm(l)
			w.stores[0].clear()
			for k := 0; !l.isDead() && !through; k++ {
				time.Sleep(time.Second)
				g := l.agent.Status().Groups[0]
				through = g.State == "continuous" && g.Captured == g.Committed && !l.isDead()
				if k == 3600 {
					w.failf("an hour after the outage: %+v", g)
				}
			}
			if through {
				w.arm(l)
			} else {
				cut := at%2 == 0
				l.die()
				if cut {
					w.host, w.cut = w.host.crash(w.dice.of("crash", at), fmt.Sprint("boot ", at)), true
				} else {
					w.host = w.host.kill()
				}
				l.bury()
				var err error
				if l, err = w.start(); err != nil {
					w.failf("a start after it went down at operation %d: %v", at, err)
				}
			}
			w.put(l, 9, 100<<10, 8<<10)
			w.lookAtVolumes(l)
			w.converge(l)
			w.lookAtHistory("in the end", 0)
			w.stop(l)
			w.ifProblem()
		})
		if t.Failed() || at > 20000 {
			t.Fatalf("it goes down at operation %d", at)
		}
	}
}

// All of the buffer is lost while the stores are away, with sealed batches; one that was
// in memory then is kept in the new buffer. The process dies before it can give up any.
// What is in the new buffer must not become history behind a hole.
func TestStory_ABatchBehindAHole(t *testing.T) {
	tell(t, func(p *plan) { p.quota, p.loses = 8<<20, true }, func(w *world) {
		start := func() *life {
			l, err := w.start()
			if err != nil {
				w.failf("start: %v", err)
			}
			return l
		}
		l := start()
		w.put(l, 1, 0, 64<<10)
		w.converge(l)
		w.stop(l)
		w.stores[0].is("down")
		l = start() // not in office
		for k := range byte(3) {
			w.put(l, 2+k, int64(k)*(40<<10), 60<<10)
			time.Sleep(5 * time.Minute)
		}
		if n := len(w.spooled(".batch")); n < 3 {
			w.failf("there are only %d batches in the buffer", n)
		}
		w.put(l, 7, 130<<10, 60<<10)
		time.Sleep(5 * time.Second) // it is sealed, and in memory
		w.host.mem.Vanish(bufferPath(0))
		for k := 0; !w.model.inGap(); k++ {
			if time.Sleep(time.Second); k > 600 {
				w.failf("it is not noticed that the buffer is gone")
			}
			w.put(l, byte(20+k), 200<<10, 8<<10)
		}
		w.giveBuffer(l)
		for k := 0; len(w.spooledIn(w.noted()[0], ".batch")) == 0; k++ {
			if time.Sleep(time.Minute); k == 60 {
				w.failf("nothing is in the new buffer")
			}
		}
		l.die()
		w.host = w.host.kill()
		l.bury()
		w.loss.now, w.loss.given = false, w.noted()
		w.stores[0].clear()
		l = start()
		w.lookAtVolumes(l)
		w.converge(l)
		w.lookAtHistory("in the end", 0)
		w.stop(l)
		w.ifProblem()
	})
}
