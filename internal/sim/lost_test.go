package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/crypt"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/internal/vfs"
	"drc/restorer"
	"drc/vbuf"
)

// loss is that all disks of the buffer have failed at once, until somebody has given
// the agent another one, or they are back after a reboot.
type loss struct {
	now    bool     // they have failed, and the agent, if it lives, has no other one yet
	given  []string // what the configuration names; nil: the disks of the plan
	next   string   // an empty directory that the agent was given, and perhaps has begun to use
	tried  string   // what an agent was given last
	dirs   int      // that were made
	anew   bool     // the next start may find an empty buffer
	half   bool     // the last process may have gone down when some volumes had all that the buffer lacks, and others had not
	orders map[string]pipeline.Order
	tries  int
	images [][]byte // what the volumes are after the decision to rewind them; nil: as they are
}

// dirs are the buffer's directories, as the configuration names them.
func (w *world) dirs() []string {
	if w.loss.given != nil {
		return w.loss.given
	}
	var all []string
	for i := range w.plan.disks {
		all = append(all, bufferPath(i))
	}
	return all
}

// loseBuffer has all disks of the buffer fail.
func (w *world) loseBuffer(rng *rand.Rand) {
	w.loss.now, w.faulted = true, true
	w.count.losses++
	ops := pick(rng, nil, []vfs.Op{vfs.OpWrite, vfs.OpSync, vfs.OpCreate, vfs.OpPreallocate, vfs.OpSyncDir}, []vfs.Op{vfs.OpSync})
	w.trace("all disks of the buffer fail: %v", ops)
	for _, dir := range append(w.dirs(), w.noted()...) {
		w.host.mem.SetFault(dir, &vfs.Fault{Skip: rng.IntN(8), Err: syscall.EIO, Ops: ops})
	}
}

// emptyDir makes a directory on a disk that works.
func (w *world) emptyDir() string {
	w.loss.dirs++
	dir := bufferPath(100 + w.loss.dirs)
	must(w.t, w.host.mem.MkdirAll(dir))
	w.host.mem.SetDevice(dir, fmt.Sprint("new disk ", w.loss.dirs))
	return dir
}

// giveBuffer gives an agent that has lost its buffer an empty directory.
func (w *world) giveBuffer(l *life) {
	if w.loss.next == "" {
		w.loss.next = w.emptyDir()
	}
	ctx, cancel := context.WithTimeout(l.ctx, 10*time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := l.agent.Buffer(ctx, control.BufferRequest{Action: "add", Path: w.loss.next, SizeBytes: w.plan.quota})
		done <- err
	}()
	tried := w.loss.tried
	w.loss.tried = w.loss.next
	var err error
	select {
	case err = <-done:
	case <-l.died:
		cancel()
		<-done
		return
	}
	w.trace("the agent is given the empty directory %s: %v", w.loss.next, err)
	var setup *vbuf.SetupError
	switch {
	case l.isDead():
	case errors.As(err, &setup) && strings.Contains(setup.Reason, "stale") && tried == setup.Path: // an agent went down while that began to be its buffer
		w.trace("%s is emptied", setup.Path)
		w.host.mem.Vanish(setup.Path)
		must(w.t, w.host.mem.MkdirAll(setup.Path))
		w.giveBuffer(l)
	case err == nil:
		w.loss.next, w.loss.now = "", false
	default:
		w.failf("an agent that has lost its buffer does not take another one: %v", err)
	}
}

// reboot decides, when a process has ended, what becomes of a buffer that was lost:
// it is back as it was, or is gone for good and an empty one takes its place.
func (w *world) reboot(rng *rand.Rand) {
	if !w.loss.now {
		return
	}
	w.loss.now = false
	if oneIn(rng, 2) {
		w.trace("the disks of the buffer are back")
		w.loss.half = true
		return
	}
	for _, dir := range append(w.dirs(), w.noted()...) {
		w.host.mem.Vanish(dir)
	}
	if w.loss.next == "" {
		w.loss.next = w.emptyDir()
	}
	w.trace("the buffer is gone, and %s takes its place", w.loss.next)
	w.loss.given, w.loss.next, w.loss.anew = []string{w.loss.next}, "", true
}

// noted are the directories that were added at work, as the agent has noted them.
func (w *world) noted() (all []string) {
	dir, err := state.OpenOn(w.host.mem.Clone(), "/state") // where nothing fails
	must(w.t, err)
	defer dir.Close()
	dirs, err := pipeline.BufferDirs(dir, nil)
	must(w.t, err)
	for _, d := range dirs {
		if d.Path != dir.Path("buffer") {
			all = append(all, d.Path)
		}
	}
	return all
}

// asked does what a start that does not come to serve the volumes asks for. It
// reports whether there was something to do.
func (w *world) asked(l *life, err error) bool {
	var setup *vbuf.SetupError
	var coded *control.CodedError
	switch {
	case l.isDead():
		return false
	case errors.As(err, &setup) && strings.Contains(setup.Reason, "was dropped from the buffer"):
		if !w.faulted {
			w.again(l)
			w.failf("a disk was dropped that has not failed: %v", err)
		}
		w.trace("%s is emptied", setup.Path)
		w.again(l)
		w.host.mem.Vanish(setup.Path)
		must(w.t, w.host.mem.MkdirAll(setup.Path))
		return true
	case errors.As(err, &coded) && strings.Contains(err.Error(), "was taken out"):
		w.again(l)
		w.loss.given = slices.DeleteFunc(slices.Clone(w.dirs()), func(d string) bool {
			return strings.Contains(err.Error(), "buffer directory "+d+" was taken out")
		})
		if len(w.loss.given) == 0 {
			w.loss.given = w.noted()
		}
		w.trace("the configuration names %v now", w.loss.given)
		return true
	case errors.As(err, &setup) && strings.Contains(setup.Reason, "is missing") && setup.Path == w.loss.next: // it went down while that joined
		w.again(l)
		w.loss.given, w.loss.next = append(w.dirs(), setup.Path), ""
		return true
	case errors.As(err, &setup) && strings.Contains(setup.Reason, "is missing") && w.loss.anew && !slices.Contains(w.dirs(), setup.Path):
		w.again(l) // what takes the place of all others had joined them before it went down
		w.takeOut(setup.Path)
		return true
	case errors.As(err, &setup) && strings.Contains(setup.Reason, "of two different buffers"):
		w.again(l)
		w.takeOut(setup.Path) // the other one is newer
		return true
	case w.loss.orders != nil && (errors.Is(err, errStore) || errors.Is(err, errAnswer)) && w.loss.tries < 50:
		w.loss.tries++
		w.again(l)
		return true
	case err != nil || !w.plan.loses || l.agent.Status().Groups[0].State != "needs-decision":
		return false
	case w.loss.next != "": // perhaps it is in there
		w.again(l)
		w.useNext()
		return true
	case !w.loss.anew && !w.loss.half:
		text := l.agent.Status().Groups[0].Message
		w.again(l)
		w.failf("a decision is asked for, and the buffer is as it was: %s", text)
	}
	w.again(l)
	w.loss.anew = true
	w.decide(w.dice.of("decide", l.number))
	return true
}

// takeOut takes a directory out of the buffer while no agent runs.
func (w *world) takeOut(path string) {
	w.trace("%s is taken out", path)
	dir, err := state.OpenOn(w.host.files, "/state")
	must(w.t, err)
	defer dir.Close()
	if err := pipeline.RemoveBufferOffline(dir, control.BufferRequest{Path: path}); err != nil {
		w.failf("a directory of another buffer is not taken out: %v", err)
	}
}

// again ends a process that is of no use.
func (w *world) again(l *life) {
	l.bury()
	w.host = w.host.kill()
}

func (w *world) useNext() {
	w.trace("it is started with %s", w.loss.next)
	w.loss.given, w.loss.next, w.loss.anew = []string{w.loss.next}, "", true
}

// decide is what somebody does whose buffer is lost for good.
func (w *world) decide(rng *rand.Rand) {
	order := pick(rng, pipeline.OrderResync, pipeline.OrderRewind)
	if w.logged == 0 {
		order = pipeline.OrderResync // there is no checkpoint
	}
	w.count.decisions++
	w.loss.orders, w.loss.images = map[string]pipeline.Order{}, nil
	for _, s := range w.stores {
		s.clear() // a rewind reads from them
	}
	for i := range w.plan.volumes {
		name := fmt.Sprint("v", i)
		w.loss.orders[name] = order
		if order == pipeline.OrderResync {
			continue
		}
		w.loss.images = append(w.loss.images, w.newest(name))
	}
	w.trace("decided: %v", order)
}

// newest is what the newest checkpoint of a volume holds.
func (w *world) newest(name string) []byte {
	ctx := context.Background()
	h, _, err := restorer.Find(ctx, restorer.Config{Repo: w.repository(nil), Ring: crypt.NewRing(identity), Patience: -1}, name)
	if err != nil {
		w.failf("look for the newest checkpoint: %v", err)
	}
	defer h.Close()
	im, err := restorer.OpenImage(ctx, h, name, "latest")
	if err != nil {
		w.failf("look for the newest checkpoint: %v", err)
	}
	p := make([]byte, im.Geometry().SizeBytes)
	if err := im.ReadAt(ctx, p, 0); err != nil {
		w.failf("read the newest checkpoint: %v", err)
	}
	return p
}

// renewed is recovered, for a start with a buffer that was empty: the journal begins
// anew behind s.
func (w *world) renewed(s block.Seq) {
	least := w.acked.load()
	if w.cut {
		least = max(w.flushed.load(), w.last.durable)
	}
	w.trace("the journal begins anew behind %d", s)
	if s < w.logged {
		w.problem("the journal goes on behind seq %d, and %d was logged", s, w.logged)
	}
	w.model.mu.Lock()
	w.model.diverted = true // what is on the volumes is not known to the last write
	w.model.mu.Unlock()
	w.model.recover(s, least, max(w.flushed.load(), w.last.durable), w.cut)
	if w.loss.orders != nil {
		w.model.decided(w.backings(), w.loss.images)
	}
	w.model.begin(s)
	w.acked.set(s)
	w.flushed.set(s)
	w.last, w.cut = control5{}, false
}

// decided has the volumes be what somebody has decided that they shall be: as they are
// or, if rewound is not nil, as they were. Of those about which nothing had to be
// decided, as they have all, they are as they are in either case.
func (m *model) decided(kept, rewound [][]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.loose = nil
	for v, p := range kept {
		var all [][]sectorBytes
		for off := 0; off < len(p); off += diskSector {
			may := []sectorBytes{slices.Clone(p[off:][:diskSector])}
			if rewound != nil {
				may = append(may, rewound[v][off:][:diskSector])
			}
			all = append(all, may)
		}
		m.loose = append(m.loose, all)
	}
	m.looser = m.loose
}

// begin has the numbers go on behind s.
func (m *model) begin(s block.Seq) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.base = s
}
