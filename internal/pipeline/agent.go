package pipeline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/format"
	"drc/internal/nbd"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/internal/vfs"
	"drc/restorer"
	"drc/segmenter"
	"drc/uploader"
	"drc/vbuf"
)

// Agent protects volumes until it is stopped.
type Agent struct {
	cfg       Config
	repairing chan struct{}    // holds one while a segment is made whole again: it takes the memory of one
	gated     *repo.Repository // cfg.Repo for all that writes to it: a store that fails is probed once, not by each group
	buffer    *vbuf.Buffer
	fill      fillRate
	ready     chan struct{}
	names     []string // of the groups that Open opens

	stopControl func()     // ends the control API; nil before it is there
	controlErr  chan error // how it ended

	adding    sync.Mutex // one volume is added at a time
	buffering sync.Mutex // one change of the buffer at a time
	notes     sync.Mutex // guards buffer.json

	heldMu sync.Mutex
	held   map[block.GroupID]chan struct{} // told when a writer of a group waits for room

	mu        sync.Mutex
	groups    []*group // replaced, never changed in place
	undecided []undecided
	sockets   []*socket
	noRoom    error // why a start waits for room on a file system; nil if it does not

	// background starts a goroutine of the stages, serve one of the servers;
	// both are nil unless the agent is serving.
	background func(func(context.Context))
	serve      func(func(context.Context) error)
}

// socket is one listen URI and the volumes that it exports.
type socket struct {
	uri      string
	listener net.Listener
	server   *nbd.Server
	exports  *exports
}

func (a *Agent) all() []*group {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.groups
}

// Open prepares an agent: it opens buffer and volumes, replays what must be
// replayed, and opens the sockets. No client is served and nothing goes to the
// stores before Run; the control API answers from the start, for a start may have
// to wait for room. On an error nothing is left open.
func Open(ctx context.Context, cfg Config) (_ *Agent, err error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.RPO <= 0 {
		cfg.RPO = segmenter.DefaultRPO
	}
	if cfg.OfficeWait <= 0 {
		cfg.OfficeWait = defaultOfficeWait
	}
	if cfg.Machine == nil {
		cfg.Machine = capture.Kernel()
	}
	if cfg.OpenIndex == nil {
		cfg.OpenIndex = openIndex
	}
	if err := CheckVolumes(cfg.Volumes); err != nil {
		return nil, err
	}
	if err := CheckOrders(cfg.Orders, cfg.Volumes); err != nil {
		return nil, &control.CodedError{Code: 2, Err: err}
	}
	a := &Agent{cfg: cfg, gated: uploader.Gated(cfg.Repo), repairing: make(chan struct{}, 1), ready: make(chan struct{})}
	defer func() {
		if err != nil {
			a.abandon()
		}
	}()
	if cfg.Buffer, err = withQuotas(cfg.State.Files(), cfg.Buffer); err != nil {
		return nil, err
	}
	host, err := cfg.State.Host()
	if err != nil {
		return nil, err
	}
	if a.buffer, err = vbuf.Open(ctx, vbuf.Options{Repo: cfg.Repo.ID, Host: host, Dirs: cfg.Buffer, FS: cfg.State.Files(), Logger: cfg.Logger, Held: a.tellHeld, OnLoss: a.lossOf}); err != nil {
		return nil, errors.Join(err, noteBuffer(cfg.State, cfg.Buffer, false))
	}
	if err := noteBuffer(cfg.State, cfg.Buffer, true); err != nil {
		cfg.Logger.Warn("where the buffer is could not be noted; drc buffer finds it only while the agent runs", "error", err)
	}
	byGroup := map[string][]VolumeConfig{}
	var order []string
	for _, v := range cfg.Volumes {
		if _, ok := byGroup[v.GroupName()]; !ok {
			order = append(order, v.GroupName())
		}
		byGroup[v.GroupName()] = append(byGroup[v.GroupName()], v)
	}
	a.names = order
	if err := a.openControl(ctx); err != nil {
		return nil, err
	}
	for _, name := range order {
		if err := a.isHandedOver(name); err != nil {
			var handed *HandedOverError
			if !errors.As(err, &handed) || len(order) == 1 {
				return nil, err
			}
			cfg.Logger.Warn("a group is left out", "group", name, "error", err)
			continue
		}
		g, err := a.openGroupWithRoom(ctx, name, byGroup[name])
		var decision *DecisionError
		if errors.As(err, &decision) {
			// The other groups are protected meanwhile.
			cfg.Logger.Error("a decision is needed before this group can be protected again", "group", name, "error", decision)
			a.mu.Lock()
			a.undecided = append(slices.Clone(a.undecided), undecided{name, byGroup[name], decision})
			a.mu.Unlock()
			continue
		}
		if err != nil {
			return nil, err
		}
		a.mu.Lock()
		a.groups = append(slices.Clone(a.groups), g)
		a.mu.Unlock()
	}
	return a, a.listen()
}

// A start that finds no room is tried again with pauses that grow from
// roomPauseMin to roomPauseMax: it may have to replay much of a journal.
const (
	roomPauseMin = 500 * time.Millisecond
	roomPauseMax = 10 * time.Second
)

// openGroupWithRoom opens a group. Where the file system of the state folder or
// of a volume is full it waits for room, as an agent at work does: ending would
// leave the group unprotected for want of somebody to start it again. Each try
// begins anew, as a start after a crash does. A group that is new is not waited
// for: who has just asked for it sees why it cannot be.
func (a *Agent) openGroupWithRoom(ctx context.Context, name string, vols []VolumeConfig) (*group, error) {
	known, err := a.localGroup(name)
	if err != nil {
		return nil, err
	}
	for pause := roomPauseMin; ; pause = min(2*pause, roomPauseMax) {
		g, err := a.openGroup(ctx, name, vols)
		full := err != nil && known != nil && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT))
		a.mu.Lock()
		waited := a.noRoom != nil
		a.noRoom = nil
		if full {
			a.noRoom = err
		}
		a.mu.Unlock()
		switch {
		case full && !waited:
			a.cfg.Logger.Warn("a file system is full: nothing is lost, and the start goes on by itself when there is room; make room there", "group", name, "error", err)
		case err == nil && waited:
			a.cfg.Logger.Info("there is room again: the start goes on", "group", name)
		}
		if !full {
			return g, err
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		case <-t.C:
		}
	}
}

// openControl begins to answer on the control socket.
func (a *Agent) openControl(ctx context.Context) error {
	if a.cfg.Embedded {
		a.stopControl = func() {}
		return nil
	}
	l, err := control.Listen(a.cfg.State.Socket())
	if err != nil {
		return err
	}
	serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a.controlErr = make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.controlErr <- control.Serve(serving, l, a)
	}()
	a.stopControl = func() {
		cancel()
		<-done
	}
	return nil
}

// IsServing reports whether the exports are being served, or were.
func (a *Agent) IsServing() bool {
	select {
	case <-a.ready:
		return true
	default:
		return false
	}
}

// CheckVolumes refuses a choice of volumes that no agent could protect.
func CheckVolumes(vols []VolumeConfig) error {
	if len(vols) == 0 {
		return errors.New("no volume was given: pass --volume name=…,path=… or a [[volume]] in the configuration")
	}
	byGroup := map[string][]VolumeConfig{}
	for _, v := range vols {
		byGroup[v.GroupName()] = append(byGroup[v.GroupName()], v)
	}
	for _, v := range vols {
		if _, err := whenFull(byGroup[v.GroupName()]); err != nil {
			return err
		}
	}
	names, paths := map[string]bool{}, map[string]string{}
	for _, v := range vols {
		switch {
		case v.Name == "" || v.Path == "":
			return errors.New("a volume needs a name and a path: --volume name=…,path=…")
		case len(v.Name) > 200:
			return fmt.Errorf("the volume name %.20s… is longer than 200 bytes", v.Name)
		case !printable(v.Name) || !printable(v.Group):
			return fmt.Errorf("volume %q of group %q: names must be text without control characters", v.Name, v.Group)
		case len(v.Group) > 200:
			return fmt.Errorf("the group name %.20s… of volume %s is longer than 200 bytes", v.Group, v.Name)
		case v.SizeBytes > format.MaxVolumeBytes:
			return fmt.Errorf("volume %s: %d bytes are more than a volume can have, which is %d", v.Name, v.SizeBytes, int64(format.MaxVolumeBytes))
		case names[v.Name]:
			return fmt.Errorf("volume %s is given twice", v.Name)
		case paths[v.Path] != "":
			return fmt.Errorf("volumes %s and %s have the same path %s", paths[v.Path], v.Name, v.Path)
		}
		names[v.Name], paths[v.Path] = true, v.Name
	}
	return nil
}

// printable reports whether a name can be shown on a terminal and in a log.
func printable(name string) bool {
	return utf8.ValidString(name) && !strings.ContainsFunc(name, unicode.IsControl)
}

// DefaultListen is the URI on which volumes are exported if nothing else is
// said.
func (a *Agent) defaultListen() string { return "unix:" + a.cfg.State.Path("nbd.sock") }

// listen opens the exports' sockets.
func (a *Agent) listen() error {
	if a.cfg.Embedded {
		return nil
	}
	for _, g := range a.groups {
		for _, v := range g.volumes {
			x, err := a.exportsOf(v)
			if err != nil {
				return err
			}
			x.add(v)
		}
	}
	return nil
}

// exportsOf returns the exports of the URI on which v is to be served, opening
// its socket if need be.
func (a *Agent) exportsOf(v *volume) (*exports, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.sockets {
		if s.uri == v.listen {
			return s.exports, nil
		}
	}
	l, err := nbd.Listen(v.listen)
	if err != nil {
		return nil, fmt.Errorf("listen for volume %s: %w", v.cfg.Name, err)
	}
	s := &socket{uri: v.listen, listener: l, exports: &exports{}}
	s.server = nbd.NewServer(nbd.Options{Exports: s.exports, Logger: a.cfg.Logger})
	a.sockets = append(a.sockets, s)
	if a.serve != nil {
		a.serve(func(ctx context.Context) error { return s.server.Serve(ctx, l) })
	}
	return s.exports, nil
}

// abandon closes what Open had opened.
func (a *Agent) abandon() {
	if a.stopControl != nil {
		a.stopControl()
	}
	for _, g := range a.groups {
		g.abandon()
	}
	for _, s := range a.sockets {
		_ = s.listener.Close()
	}
	if a.buffer != nil {
		_ = a.buffer.Close()
	}
}

// Ready is closed when the exports are being served.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Run protects the volumes until ctx ends, then stops in order. It returns nil
// after an orderly stop, and an error if another agent holds a group, or if
// the stop could not make everything safe.
func (a *Agent) Run(ctx context.Context) error {
	// The stages outlive ctx: they must work while the exports drain.
	stages, stopStages := context.WithCancel(context.WithoutCancel(ctx))
	defer stopStages()
	var work sync.WaitGroup
	background := func(f func(context.Context)) {
		work.Go(func() { f(stages) })
	}
	background(func(ctx context.Context) { _ = a.buffer.Run(ctx) })
	for _, g := range a.groups {
		g.start(background)
	}
	err := a.awaitOffice(ctx)
	for _, g := range a.groups {
		if err == nil {
			err = g.touch(ctx)
		}
	}
	if ctx.Err() != nil {
		err = nil // stopped while it waited for the stores or for room
	} else if err == nil {
		err = a.serveClients(ctx, background)
	}
	stopErr := a.stop(stopStages, &work)
	return errors.Join(err, stopErr)
}

// start runs the stages of a group.
func (g *group) start(background func(func(context.Context))) {
	g.background = background
	background(g.watchFull)
	background(g.watchLost)
	background(g.watchLostBatches)
	background(func(ctx context.Context) {
		if err := g.seg.Run(ctx); err != nil {
			g.fail("cutting batches", err)
		}
	})
	background(func(ctx context.Context) {
		if err := g.up.Run(ctx); err != nil {
			g.fenced(err)
		}
	})
	background(g.startResyncs)
	background(g.restoreRedundancy)
	for _, v := range g.volumes {
		background(func(ctx context.Context) {
			if err := v.dev.Run(ctx); err != nil {
				g.fail("writing to the volume", fmt.Errorf("volume %s: %w", v.cfg.Name, err))
			}
		})
	}
	// The journal is released as the backings advance, also when nobody writes: others
	// may wait for the room, or nobody can write because it is not there.
	background(func(ctx context.Context) {
		t := time.NewTimer(0)
		defer t.Stop()
		<-t.C
		for {
			before := g.capture.Captured()
			if g.capture.WaitCaptured(ctx, before) != nil {
				return
			}
			for quiet := 0; quiet < 3; {
				t.Reset(time.Second)
				select {
				case <-ctx.Done():
					return
				case <-t.C:
				}
				g.a.fill.note(g.a.cfg.Now(), g.a.buffer.Stats().UsedBytes)
				g.settleIfLong(ctx)
				g.release()
				if now := g.capture.Captured(); now == before && (g.releasable() >= now || g.capture.Diverted()) {
					quiet++
				} else {
					before, quiet = now, 0
				}
			}
		}
	})
}

// settleAt is how many bytes of writes may go by before the backings are
// settled, so that the journal behind them can be released.
const settleAt = 192 << 20

// settleIfLong settles the backings when much has been written since the last
// time, or when the buffer is short of room.
func (g *group) settleIfLong(ctx context.Context) {
	st := g.a.buffer.Stats()
	g.mu.Lock()
	due := g.capture.CapturedBytes()-g.settledAt >= settleAt || st.Full || st.UsedBytes > st.CapacityBytes/2
	g.mu.Unlock()
	if !due || g.capture.Diverted() {
		return
	}
	at := g.capture.CapturedBytes()
	for _, v := range g.volumes {
		if v.dev.Full() != nil || v.dev.Failed() != nil {
			return // tried again by the volume itself
		}
		if err := v.dev.Settle(ctx); err != nil {
			if ctx.Err() == nil {
				g.logger.Warn("settle the backing", "volume", v.cfg.Name, "error", err)
			}
			return
		}
	}
	g.mu.Lock()
	g.settledAt = at
	g.mu.Unlock()
}

// fail takes note that a stage has stopped for good.
func (g *group) fail(doing string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failed == nil {
		g.failed = fmt.Errorf("%s: %w", doing, err)
		g.logger.Error("a part of the agent has stopped; writes are kept in the buffer", "while", doing, "error", err)
	}
}

// fenced takes note that the uploader has ended.
func (g *group) fenced(err error) {
	var locked *uploader.LockedError
	if errors.Is(err, uploader.ErrFenced) || errors.As(err, &locked) {
		refusal := fmt.Errorf("%w: %w", block.ErrReadOnly, err)
		g.capture.Refuse(refusal)
		g.journal.Divert(refusal) // who waits for room waits in vain
	}
	g.fail("bringing history to the stores", err)
}

// awaitOffice waits until every group has taken office on the stores, or until
// it is clear that the stores are not in reach. It fails if another agent
// holds a group.
func (a *Agent) awaitOffice(ctx context.Context) error {
	deadline := time.NewTimer(a.cfg.OfficeWait)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		waiting := false
		for _, g := range a.groups {
			g.mu.Lock()
			failed := g.failed
			g.mu.Unlock()
			var locked *uploader.LockedError
			if errors.As(failed, &locked) || errors.Is(failed, uploader.ErrFenced) {
				return fmt.Errorf("group %s: %w", g.name, failed)
			}
			waiting = waiting || (failed == nil && !g.log.InOffice() && !g.log.OutOfReach())
		}
		if !waiting {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-deadline.C:
			a.cfg.Logger.Warn("the stores do not answer: serving without them; history waits in the buffer")
			return nil
		case <-tick.C:
		}
	}
}

// serveClients answers clients until ctx ends.
func (a *Agent) serveClients(ctx context.Context, background func(func(context.Context))) error {
	g, gctx := errgroup.WithContext(ctx)
	serve := func(f func(context.Context) error) { g.Go(func() error { return f(gctx) }) }
	a.mu.Lock()
	for _, s := range a.sockets {
		serve(func(ctx context.Context) error { return s.server.Serve(ctx, s.listener) })
	}
	a.background, a.serve = background, serve
	a.mu.Unlock()
	serve(func(ctx context.Context) error {
		select {
		case err := <-a.controlErr:
			return err
		case <-ctx.Done():
			a.stopControl()
			return nil
		}
	})
	close(a.ready)
	<-gctx.Done()
	// No volume joins any more: what is being added ends first.
	a.adding.Lock()
	a.mu.Lock()
	a.background, a.serve = nil, nil
	a.mu.Unlock()
	a.adding.Unlock()
	err := g.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// stopTime bounds an orderly stop, drains apart.
const stopTime = 2 * time.Minute

// stop makes everything safe and ends the stages.
func (a *Agent) stop(stopStages context.CancelFunc, work *sync.WaitGroup) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), stopTime, errStopTime)
	defer cancel()
	for _, s := range a.sockets {
		_ = s.listener.Close()
	}
	a.stopControl()
	if !a.IsServing() {
		var unwatch func()
		ctx, unwatch = a.whileThereIsRoom(ctx)
		defer unwatch()
	}
	var errs []error
	for _, g := range a.groups {
		g.capture.Refuse(block.ErrStopping)
		if g.capture.Diverted() {
			continue // the volumes have everything, and are settled below
		}
		if err := g.journal.Flush(ctx); err != nil && !errors.Is(err, capture.ErrDiverted) {
			errs = append(errs, fmt.Errorf("flush the journal of group %s: %w", g.name, err))
		}
	}
	if a.cfg.DrainStores && !errors.Is(context.Cause(ctx), errNoRoom) {
		for _, g := range a.groups {
			g.drain()
		}
	}
	stopStages()
	work.Wait()
	for _, g := range a.groups {
		for _, v := range g.volumes {
			if err := v.dev.Close(ctx); err != nil {
				errs = append(errs, fmt.Errorf("settle volume %s: %w: the next start replays the journal", v.cfg.Name, err))
			}
		}
		g.release()
		g.bitmap.Close()
		errs = append(errs, g.index.Close())
	}
	errs = append(errs, a.buffer.Close())
	if errors.Is(context.Cause(ctx), errNoRoom) {
		a.cfg.Logger.Warn("stopped while it waited for room in the buffer: nothing is lost, and the next start goes on; make room on the buffer's file system", "error", errors.Join(errs...))
		return nil
	}
	return errors.Join(errs...)
}

var (
	errStopTime = fmt.Errorf("it was not done within %s", stopTime)
	errNoRoom   = errors.New("there is no room in the buffer")
)

// whileThereIsRoom returns a context that ends when the buffer holds somebody
// back for want of room. It is for the stop of an agent that has served nobody:
// what it could not write was never acknowledged, so that nobody need wait for
// it. unwatch ends the watching.
func (a *Agent) whileThereIsRoom(ctx context.Context) (_ context.Context, unwatch func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(20 * time.Millisecond)
		defer t.Stop()
		for {
			if a.buffer.Stats().Waiting > 0 {
				cancel(errNoRoom)
			}
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-done
	}
}

// drain waits until everything captured is committed, for as long as that
// takes, or until the group has failed.
func (g *group) drain() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		g.mu.Lock()
		failed := g.failed
		g.mu.Unlock()
		if failed != nil {
			return
		}
		if g.seg.Sealed() >= g.capture.Captured() {
			wait, stop := context.WithTimeout(ctx, time.Second)
			err := g.up.AwaitIdle(wait)
			stop()
			if err == nil {
				return
			}
			continue
		}
		time.Sleep(50 * time.Millisecond) // the segmenter paces itself by the RPO
	}
}

// restorerConfig is how an agent reads history.
func (a *Agent) restorerConfig() restorer.Config {
	c := restorer.Config{Repo: a.cfg.Repo, Ring: a.cfg.Ring, CacheDir: a.cfg.State.Path("cache"), Logger: a.cfg.Logger}
	if a.cfg.Embedded {
		c.CacheDir = "" // the cache is on the real file system only
	}
	return c
}

// findGroup looks for a group in the state folder, then on the stores. A group
// that is in neither is made; one that is only on the stores was written by
// another host.
func (a *Agent) findGroup(ctx context.Context, name string, vols []VolumeConfig) (st *groupState, p *progress, isNew bool, err error) {
	st, err = a.localGroup(name)
	if err != nil {
		return nil, nil, false, err
	}
	if st != nil {
		p, err = groupFiles{a.cfg.State, st.ID}.loadProgress()
		return st, p, false, err
	}
	for _, v := range vols {
		h, found, err := restorer.Find(ctx, a.restorerConfig(), v.Name)
		if errors.Is(err, restorer.ErrNoSuchVolume) {
			continue
		}
		if err != nil {
			return nil, nil, false, fmt.Errorf("look for volume %s on the stores: %w", v.Name, err)
		}
		defer h.Close()
		if found.Branch != h.Current() {
			return nil, nil, false, leftBehind(h, found)
		}
		if h.Group.Name != name {
			return nil, nil, false, fmt.Errorf("volume %s belongs to group %s on the stores: give group=%s, or choose another name", found.Name, h.Group.Name, h.Group.Name)
		}
		if !a.cfg.Takeover {
			return nil, nil, false, fmt.Errorf("volume %s: %w", v.Name, &uploader.LockedError{Epoch: h.Newest().Epoch, Store: "the stores"})
		}
		st, p, err = a.takeFromStores(ctx, h.GroupID, true)
		if err != nil {
			return nil, nil, false, fmt.Errorf("take over volume %s: %w", v.Name, err)
		}
		f := groupFiles{a.cfg.State, st.ID}
		if err := f.noteLacking(); err != nil {
			return nil, nil, false, err
		}
		if err := f.saveGroup(st); err != nil {
			return nil, nil, false, err
		}
		return st, p, false, f.adopted(p)
	}
	st, err = a.newGroup(name)
	return st, newProgress(), true, err
}

// isHandedOver returns a HandedOverError for a group that this host has handed over,
// unless it is told to take it back.
func (a *Agent) isHandedOver(name string) error {
	st, err := a.localGroup(name)
	if err != nil || st == nil {
		return err
	}
	f := groupFiles{a.cfg.State, st.ID}
	if a.cfg.Takeover {
		return vfs.RemoveAll(a.cfg.State.Files(), a.cfg.State.Path(f.path(handoverFile)...))
	}
	return f.handedOver(st)
}

// localGroup finds a group of this repository in the state folder.
func (a *Agent) localGroup(name string) (*groupState, error) {
	entries, err := a.cfg.State.Files().ReadDir(a.cfg.State.Path("groups"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	for _, e := range entries {
		st := &groupState{}
		found, err := a.cfg.State.LoadJSON(st, "groups", e.Name, "group.json")
		if err != nil {
			return nil, err
		}
		if found && st.ID.String() != e.Name {
			return nil, &state.DamagedError{Path: a.cfg.State.Path("groups", e.Name, "group.json"), Err: errors.New("it is of another group")}
		}
		if found && st.Repo == a.cfg.Repo.ID && st.Group.Name == name {
			return st, nil
		}
	}
	return nil, nil
}

// adopt makes the state of a group from its history on the stores.
func adopt(ctx context.Context, repo block.ID, h *restorer.History) (*groupState, *progress, error) {
	st := &groupState{ID: h.GroupID, Repo: repo, Group: h.Group}
	for _, v := range h.CurrentVolumes() {
		st.Volumes = append(st.Volumes, v.Volume)
	}
	branches := h.Branches()
	if b := branches[len(branches)-1]; len(branches) > 1 {
		st.Line = &branchState{Branch: b.ID, Begin: b.BeginN}
		for _, v := range h.Volumes() {
			st.Line.NextVolume = max(st.Line.NextVolume, v.Index+1)
		}
	}
	p := newProgress()
	for _, v := range st.Volumes {
		p.Announced = append(p.Announced, v.Index)
	}
	p.N = h.N()
	err := h.BackOn(ctx, st.branch(), p.N, func(e *restorer.Entry) bool {
		if e.Range == nil {
			return true
		}
		p.To = max(p.To, e.Range.To)
		for _, v := range st.Volumes {
			if _, known := p.Checkpoint[v.Index]; !known && !slices.Contains(e.Partial, v.Index) {
				p.Checkpoint[v.Index] = e.Range.To
			}
		}
		return len(p.Checkpoint) < len(st.Volumes)
	})
	if err != nil {
		return nil, nil, err
	}
	for _, x := range h.Resyncs {
		p.Resync[x.Volume] = slices.Clone(x.Remaining)
	}
	return st, p, nil
}
