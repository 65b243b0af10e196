package pipeline

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/dedup"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/manifest"
	"drc/internal/vfs"
	"drc/segmenter"
	"drc/uploader"
	"drc/vbuf"
)

// group is one group at work: its stages, wired.
type group struct {
	a      *Agent
	name   string
	st     *groupState
	files  groupFiles
	logger *slog.Logger

	journal *vbuf.Journal
	stream  Journal // the journal, as the stages see it
	capture *capture.Group
	volumes []*volume
	undo    func() error // takes back what a start that fails has noted; nil if nothing
	index   Index
	seg     *segmenter.Segmenter
	log     *uploader.Log
	up      *uploader.Uploader
	spool   *spool

	whenFull   WhenFull
	bitmap     *vbuf.Bitmap
	held       chan struct{} // told when a writer waits for room
	lost       chan struct{} // told when the buffer is lost
	lostBatch  chan struct{} // told when a sealed batch is lost
	holed      atomic.Bool   // the next batch begins behind a hole
	lacking    lacking       // shards that this host's buffer does not have
	forced     atomic.Bool   // bitmap mode must begin although there may be room
	diverting  sync.Mutex    // one at a time takes the writes past the journal
	renewed    atomic.Bool   // the buffer has begun anew, and the group has not returned to it
	marks      *groupMarks
	background func(func(context.Context))
	handed     atomic.Uint64 // the entry that hands the group over, the newest one; 0: none
	demoting   sync.Mutex
	dropped    block.Seq // the last seq that the journal lacked at the start, if it is behind safe
	unsaid     bool      // batches were lost that earlier starts relied on
	damagedTo  block.Seq // the last seq that was durable in the journal and is lost; 0 if none

	mu        sync.Mutex
	prog      *progress
	savedN    uint64 // entries in the progress that is saved
	resyncs   resyncNotes
	ended     []block.VolumeIndex       // resyncs whose note is to be removed
	keys      block.ID                  // of this process
	safe      block.Seq                 // logged or persisted up to here
	inherited block.Seq                 // the newest Seq when the group was opened
	sealed    bool                      // the buffer held batches then
	wasSealed block.Seq                 // up to here batches were sealed that were given up: no watermark goes back
	bound     block.Seq                 // what the log holds beyond this when office is taken, this host has not written
	failed    error                     // what stopped a stage
	unsaved   error                     // why the progress of the newest entry is not saved; nil if it is
	settledAt int64                     // bytes captured when the backings were last settled
	named     map[namedKey]uint64       // entries that named checkpoints travelled in
	unnamed   map[namedKey]bool         // checkpoints that can never be
	gapSince  time.Time                 // when the oldest write was captured that history lacks; zero if it lacks none
	baselines map[block.VolumeIndex]int // counts the baselines that were asked for
	changed   chan struct{}             // closed and replaced when named changes
	touched   chan struct{}             // closed when touch has been done
}

// namedKey tells one request for a named checkpoint from another.
type namedKey struct {
	name string
	at   int64
}

// volume is one volume of a group.
type volume struct {
	cfg    VolumeConfig
	desc   format.Volume
	plan   plan
	dev    *capture.Volume
	listen string
}

func (a *Agent) openGroup(ctx context.Context, name string, vols []VolumeConfig) (_ *group, err error) {
	g := &group{a: a, name: name, logger: a.cfg.Logger.With("group", name), named: map[namedKey]uint64{}, unnamed: map[namedKey]bool{}, baselines: map[block.VolumeIndex]int{}, changed: make(chan struct{}), touched: make(chan struct{})}
	g.marks, g.lost, g.lostBatch = &groupMarks{g: g}, make(chan struct{}, 1), make(chan struct{}, 1)
	if g.whenFull, err = whenFull(vols); err != nil {
		return nil, err
	}
	var isNew bool
	if g.st, g.prog, isNew, err = a.findGroup(ctx, name, vols); err != nil {
		return nil, err
	}
	g.files = groupFiles{a.cfg.State, g.st.ID}
	if err := g.lacking.load(g.files); err != nil {
		return nil, err
	}
	g.savedN = g.prog.N
	if g.resyncs, err = g.files.loadResyncs(); err != nil {
		return nil, err
	}
	if _, err := g.files.loadEpochs(); err != nil {
		return nil, err
	}
	before := *g.st
	before.Volumes = slices.Clone(g.st.Volumes)
	joined := g.joinVolumes(vols)

	// The volumes' files are opened before anything is written anywhere.
	defer func() {
		if err != nil {
			g.abandon()
		}
	}()
	if err := g.openBackings(vols); err != nil {
		return nil, err
	}
	if isNew || len(joined) > 0 {
		// Should the start fail, the next one must find things as they were.
		g.undo = func() error { return errors.Join(g.files.saveGroup(&before), g.forgetJoined(joined)) }
		if isNew {
			g.undo = func() error { return vfs.RemoveAll(a.cfg.State.Files(), a.cfg.State.Path(g.files.path()...)) }
		}
		if err := g.files.saveGroup(g.st); err != nil {
			return nil, err
		}
	}
	g.held = a.addHeld(g.st.ID)
	if err := g.openJournal(ctx); err != nil {
		return nil, err
	}
	vs, err := a.buffer.Spool(ctx, g.st.ID)
	if err != nil {
		return nil, err
	}
	g.spool = newSpool(vs, g.logger, g.nowSafe)
	g.spool.fetch = g.fetchShard
	vs.SetElsewhere(g.spool.elsewhere)
	batches, placed, heal, err := g.spool.recovered()
	if err != nil {
		return nil, err
	}
	batches, placed, gone, dropped := g.withoutLost(batches, placed)
	g.unsaid = len(gone) > 0
	g.damagedTo = max(g.damagedTo, dropped)
	g.safe = g.prog.To
	for _, b := range batches {
		g.safe = max(g.safe, b.To)
	}
	for _, v := range g.volumes {
		if r := v.plan.record; r != nil && r.Restored && r.Group == g.st.ID.String() {
			g.safe = max(g.safe, r.Applied) // it came out of the history
		}
	}
	marked, dropped, err := g.openBitmap(ctx)
	if err != nil {
		return nil, err
	}
	known := g.safe
	cut, err := g.judgeRewinds()
	if err != nil {
		return nil, err
	}
	last, begin, err := g.findLast()
	if err != nil {
		return nil, err
	}
	damaged, anew, err := g.judgeDamage()
	if err != nil {
		return nil, err
	}
	if anew = anew || cut; anew {
		begin = true
		if err := g.replayIntact(); err != nil {
			return nil, err
		}
	}
	if damaged > 0 && !anew {
		dropped = max(dropped, damaged)
		for _, v := range g.volumes {
			if !v.plan.fresh {
				marked[v.desc.Index] = []block.Extent{{Len: v.desc.SizeBytes}}
			}
		}
	}
	g.checkOrders()
	for _, v := range g.volumes {
		if v.plan.order == OrderRewind {
			if err := g.rewind(ctx, v); err != nil {
				return nil, err
			}
		}
	}
	if (a.cfg.Takeover || g.decided()) && !isNew {
		replaced, err := g.takeBack(ctx, last, batches)
		if err != nil {
			return nil, err
		}
		if replaced { // nothing of what was on its way is any more
			batches, placed, g.safe = nil, nil, g.prog.To
			marked, dropped = nil, 0 // the volumes are compared in full
			known = g.safe
			if last, begin, err = g.findLast(); err != nil {
				return nil, err
			}
		}
	}
	if g.bound, err = g.files.beginLife(last); err != nil {
		return nil, err
	}
	bypassed := begin && !anew && (g.bitmap.Active() || !slices.ContainsFunc(g.volumes, func(v *volume) bool { return !g.hasAll(v) && !v.plan.fresh }))
	if bypassed { // what the journal lacks is marked
		dropped = last
	}
	lost := begin && known < last && !bypassed
	if lost {
		g.logger.Warn("the buffer does not hold the writes behind those that are on the stores: the volumes are compared in full", "group", g.name, "stores", known.String(), "volumes", last.String())
	} else {
		known = last
	}
	if begin && dropped > g.safe { // what the journal had behind that it has no more
		dropped = last
	}
	if dropped > g.safe { // what is between them is on the volumes only
		g.dropped, known = max(dropped, g.journal.Released()), min(known, g.safe)
	}
	g.inherited, g.sealed = last, len(batches) > 0
	g.planVolumes(last, known, lost, batches)
	g.planMarked(marked, known)
	if err := g.noteResyncs(batches, begin); err != nil {
		return nil, err
	}
	for _, b := range gone {
		if err := g.spool.giveUp(b); err != nil {
			return nil, fmt.Errorf("give up the batch of seqs %s to %s, which is lost: %w", b.From, b.To, err)
		}
	}
	if err := g.clearBitmap(); err != nil {
		return nil, err
	}
	if bypassed {
		if err := g.replayRest(); err != nil {
			return nil, err
		}
	}
	// Only now: once the journal is where the volumes are, nothing but the notes
	// tells the next start that writes before that are lost.
	if begin {
		if !isNew {
			if err := g.lacking.note(); err != nil {
				return nil, err
			}
		}
		if err := g.beginJournal(ctx, last+1); err != nil {
			return nil, err
		}
		if err := g.journalBegun(); err != nil {
			return nil, err
		}
	}
	if g.dropped == 0 {
		// Progress that a power cut has taken knows less than the journal.
		g.safe = min(max(g.safe, g.journal.Released()), last)
	}
	if err := g.startVolumes(last); err != nil {
		return nil, err
	}
	if err := g.wire(ctx, last, joined, batches); err != nil {
		return nil, err
	}
	for i, b := range batches {
		g.up.Resume(b, placed[i])
	}
	g.up.Heal(heal)
	g.release()
	return g, nil
}

// joinVolumes gives the volumes that are not in the group yet their numbers,
// and returns these.
func (g *group) joinVolumes(vols []VolumeConfig) (joined []format.Volume) {
	for _, v := range vols {
		i := slices.IndexFunc(g.st.Volumes, func(d format.Volume) bool { return d.Name == v.Name })
		if i < 0 {
			d := format.Volume{Index: g.st.nextVolume(), ID: block.VolumeID(block.NewID()), Name: v.Name}
			g.st.Volumes = append(g.st.Volumes, d)
			joined = append(joined, d)
			i = len(g.st.Volumes) - 1
		}
		listen := v.Listen
		if listen == "" {
			listen = g.a.defaultListen()
		}
		g.volumes = append(g.volumes, &volume{cfg: v, desc: g.st.Volumes[i], listen: listen, plan: plan{fresh: len(joined) > 0 && joined[len(joined)-1].Name == v.Name}})
	}
	return joined
}

// newGroup makes a group that exists nowhere yet.
func (a *Agent) newGroup(name string) (*groupState, error) {
	poly, err := segmenter.NewPolynomial()
	if err != nil {
		return nil, fmt.Errorf("make group %s: %w", name, err)
	}
	st := &groupState{ID: block.GroupID(block.NewID()), Repo: a.cfg.Repo.ID, Group: format.Group{
		Name: name, Branch: block.BranchID(block.NewID()), Polynomial: poly,
		MinChunk: segmenter.DefaultMinChunk, AvgBits: segmenter.DefaultAvgBits, MaxChunk: segmenter.DefaultMaxChunk,
	}}
	_, _ = rand.Read(st.Group.ChunkIDKey[:])
	return st, nil
}

// findLast returns the newest Seq of the group's history that this host knows
// of. begin reports that the journal is not there: it holds nothing, or ends
// before, and has to begin behind last.
func (g *group) findLast() (last block.Seq, begin bool, err error) {
	last = g.prog.To
	for _, v := range g.volumes {
		if r := v.plan.record; r != nil && r.Group == g.st.ID.String() {
			last = max(last, r.Applied)
		}
	}
	next := g.journal.Next()
	if next > 0 && next-1 >= last {
		return next - 1, false, nil
	}
	for _, v := range g.volumes {
		if g.bitmap.Active() || g.hasAll(v) {
			continue // the journal was given up where it could not be written
		}
		// The last buffer may hold acknowledged writes that the volume lacks.
		r, reason := v.plan.record, ""
		switch {
		case v.plan.finding == capture.FindingReplay && next == 0 && r.Group == g.st.ID.String():
			reason = fmt.Sprintf("it was not stopped in order, and this buffer holds nothing of its group %s: it is not the one that was used last", g.name)
		case next > 0 && (v.plan.finding != capture.FindingClean || r.Applied < last):
			reason = fmt.Sprintf("the buffer's journal of group %s ends at seq %s, and what is known of its history at %s: it is not the one that was used last", g.name, next-1, last)
		}
		if reason != "" {
			if err := g.decide(v, reason); err != nil {
				return 0, false, err
			}
		}
	}
	return last, true, nil
}

// replayRest brings what a journal that was given up holds onto the volumes, for
// those that were not brought up to its end any more.
func (g *group) replayRest() error {
	end := max(g.journal.Next(), 1) - 1
	for _, v := range g.volumes {
		p := &v.plan
		if p.replayFrom > 0 && p.replayFrom <= end {
			if err := p.backing.Claim(g.a.cfg.State.Backings(), p.record); err != nil {
				return err
			}
			if _, err := capture.Replay(p.backing, v.desc.Index, g.journal, p.replayFrom-1, end); err != nil {
				return err
			}
		}
		p.replayFrom = 0
	}
	return nil
}

// beginJournal has the journal, which holds nothing that is needed, begin at
// next, durably.
func (g *group) beginJournal(ctx context.Context, next block.Seq) (err error) {
	if g.journal.Next() == 0 {
		return g.journal.SetNext(next)
	}
	g.journal, err = g.a.buffer.ResetJournal(ctx, g.st.ID, next)
	return err
}

// replay brings the volumes up to last. One may need the room on its file system that
// another one of the group gives back.
func (g *group) replay(last block.Seq) error {
	todo := slices.DeleteFunc(slices.Clone(g.volumes), func(v *volume) bool { return v.plan.replayFrom == 0 })
	for again := false; ; again = true {
		var full []*volume
		var why error
		for _, v := range todo {
			if err := v.plan.backing.Claim(g.a.cfg.State.Backings(), v.plan.record); err != nil {
				return err
			}
			g.logger.Info("replaying the journal onto the volume", "volume", v.cfg.Name, "from", v.plan.replayFrom.String(), "to", last.String())
			_, err := capture.Replay(v.plan.backing, v.desc.Index, g.journal, v.plan.replayFrom-1, last)
			switch {
			case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
				full, why = append(full, v), errors.Join(why, err)
			case err != nil:
				return err
			}
		}
		if len(full) == 0 || (again && len(full) == len(todo)) {
			return why
		}
		todo = full
	}
}

// startVolumes replays the journal where that is planned and makes the
// volumes.
func (g *group) startVolumes(last block.Seq) error {
	g.stream = g.journal
	if g.a.cfg.Journal != nil {
		g.stream = g.a.cfg.Journal(g.journal)
	}
	g.capture = capture.NewGroup(liveJournal{g.stream, g}, last, g.a.cfg.Now)
	if err := g.replay(last); err != nil {
		return err
	}
	for _, v := range g.volumes {
		applied := last
		if v.plan.replayFrom > 0 {
			applied = max(last, v.plan.replayFrom-1)
		}
		dev, err := capture.New(g.capture, capture.Options{
			Name: v.cfg.Name, Index: v.desc.Index, Backing: v.plan.backing, SectorSize: int(v.desc.SectorSize), Ack: v.cfg.Ack,
			RecordDir: g.a.cfg.State.Backings(), Logger: g.logger,
			Record: capture.Record{
				Repo: g.a.cfg.Repo.ID.String(), Group: g.st.ID.String(), Volume: v.desc.ID.String(), Branch: g.st.branch().String(),
			},
		}, applied)
		if err != nil {
			return err
		}
		v.dev, v.plan.backing = dev, nil
		if r := v.plan.record; r != nil && r.Path != v.plan.path {
			g.logger.Info("the volume's backing was moved", "volume", v.cfg.Name, "from", r.Path, "to", v.plan.path)
			if err := capture.ForgetMoved(g.a.cfg.State.Files(), g.a.cfg.State.Backings(), r.Volume, r.Path); err != nil {
				g.logger.Warn("forget where the volume's backing was", "volume", v.cfg.Name, "error", err)
			}
		}
	}
	return nil
}

// wire makes segmenter and uploader.
func (g *group) wire(ctx context.Context, last block.Seq, joined []format.Volume, batches []*batch.Batch) error {
	a := g.a
	keys, err := crypt.NewKeySet(a.cfg.Agent, a.cfg.Repo.Record.Recipients, a.cfg.Now().UnixNano())
	if err != nil {
		return err
	}
	if err := a.cfg.State.Save(keys.Raw, g.files.path("keysets", keys.ID.String())...); err != nil {
		return err
	}
	a.cfg.Ring.AddOwn(keys)
	g.keys = keys.ID
	for _, b := range batches {
		if err := g.loadKeySet(b.KeySet); err != nil {
			return err
		}
	}
	if g.index, err = a.cfg.OpenIndex(a.cfg.State.Path(g.files.path("dedup")...), g.st.ID, g.st.branch(), g.prog.N, g.logger); err != nil {
		return err
	}
	logged := map[block.ID]bool{}
	for _, id := range g.prog.KeySets {
		logged[id] = true
	}
	g.log = uploader.NewLog(uploader.LogConfig{
		Repo: a.gated, Group: g.st.ID, Agent: a.cfg.Agent, Ring: a.cfg.Ring, State: logState{g.files, g}, Takeover: a.cfg.Takeover,
		Now: a.cfg.Now, Logger: g.logger, OnEntry: g.onEntry, KeySet: g.loadKeySet, Ours: g.ours, OnOffice: g.files.confirmLife,
		Office: g.prog.Office,
	})
	committed := map[block.VolumeIndex]block.Seq{}
	for _, v := range g.st.Volumes {
		committed[v.Index] = g.prog.Committed[v.Index]
	}
	g.up = uploader.New(uploader.Config{
		Repo: a.gated, Group: g.st.ID, Branch: g.st.branch(), Begin: g.st.begin(), Agent: a.cfg.Agent, Ring: a.cfg.Ring, Keys: keys,
		Log: g.log, Spool: g.spool, Now: a.cfg.Now, Logger: g.logger, LoggedKeySets: logged, Committed: committed,
		Logged: g.prog.To, BytesPerSec: a.cfg.BytesPerSec, DegradeAfter: a.cfg.DegradeAfter, OnLogged: g.onLogged, HolesUpTo: g.holesUpTo(), OnHole: g.tellHole,
		Entries: g.files,
	})
	g.seg = segmenter.New(segmenter.Config{
		Group: g.st.Group, Branch: g.st.branch(), Profile: a.cfg.Repo.Profile(), Keys: keys, RPO: a.cfg.RPO, BatchBytes: batchBytes(a.buffer.Stats()),
		Next: g.safe + 1, Dropped: g.dropped, Now: a.cfg.Now, Coarse: g.coarse, Patience: g.patience,
	}, source{g.capture, g.stream}, g.up, lookup{g.index})
	if g.prog.N == 0 && len(batches) == 0 {
		g.announceGroup()
	} else if vols := g.unannounced(joined, batches); len(vols) > 0 {
		g.seg.Announce(func(it *format.Items) { it.Volumes = vols })
	}
	g.up.Learn(g.prog.N, g.prog.To, maps.Clone(g.prog.Checkpoint), g.announced())
	for _, v := range g.volumes {
		if len(v.plan.resync) > 0 {
			g.seg.AddResync(segmenter.Resync{
				Volume: v.desc.Index, Backing: v.dev, Remaining: v.plan.resync, Begin: v.plan.begin, After: v.plan.after,
			})
		}
	}
	return nil
}

// announceGroup has the next batch describe the group and all of its volumes.
func (g *group) announceGroup() {
	group := g.st.Group
	volumes := slices.Clone(g.st.Volumes)
	g.seg.Announce(func(it *format.Items) { it.Group, it.Volumes = &group, volumes })
}

// unannounced are the volumes that neither the log nor a batch on its way there
// describes: those that have just joined, and those whose agent died before it
// could say so.
func (g *group) unannounced(joined []format.Volume, batches []*batch.Batch) (vols []format.Volume) {
	for _, d := range g.st.Volumes {
		is := func(o format.Volume) bool { return o.Index == d.Index }
		known := slices.Contains(g.prog.Announced, d.Index)
		if g.prog.Announced == nil {
			known = !slices.ContainsFunc(joined, is)
		}
		for _, b := range batches {
			known = known || slices.ContainsFunc(b.Items.Volumes, is)
		}
		if !known {
			vols = append(vols, d)
		}
	}
	return vols
}

// announced are the volumes that the log is known to describe.
func (g *group) announced() (vols []format.Volume) {
	for _, i := range g.prog.Announced {
		vols = append(vols, g.describe(i))
	}
	return vols
}

func (g *group) describe(i block.VolumeIndex) format.Volume {
	for _, v := range g.st.Volumes {
		if v.Index == i {
			return v
		}
	}
	panic("pipeline: a volume that is not in its group")
}

func (g *group) loadKeySet(id block.ID) error {
	if _, ok := g.a.cfg.Ring.Set(id); ok {
		return nil
	}
	raw, err := g.a.cfg.State.Load(g.files.path("keysets", id.String())...)
	if err != nil {
		return fmt.Errorf("read key set %s, which this group's history needs: %w", id, err)
	}
	_, err = g.a.cfg.Ring.Add(raw)
	return err
}

// onEntry takes note of an entry of the log that this host's state did not
// know yet.
func (g *group) onEntry(e *grouplog.Entry) error {
	// What another host has handed over is this one's to go on with.
	if !g.a.cfg.Takeover && slices.Contains(g.files.Epochs(), e.Epoch) {
		if err := g.noteHandover(e.N, e.Items); err != nil {
			return err
		}
		g.isHandedOver(e.N, e.Items)
	}
	g.note(e.N, e.Items, false)
	if err := g.files.Note(e.N, e.Hash, len(e.Items.Checkpoints) > 0); err != nil {
		g.logger.Warn("note a decided entry; it will not be merged", "entry", e.N, "error", err)
	}
	var ids []block.ID
	for _, raw := range e.KeySets {
		ks, _, _, err := format.DecodeKeySet(raw)
		if err != nil {
			return err
		}
		// Kept, because the next start does not read this entry again.
		if err := g.a.cfg.State.Save(raw, g.files.path("keysets", ks.ID.String())...); err != nil {
			return err
		}
		ids = append(ids, ks.ID)
	}
	to := block.Seq(0)
	if e.Items.Range != nil {
		to = e.Items.Range.To
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.up.Learn(e.N, to, maps.Clone(g.prog.Checkpoint), e.Items.Volumes)
	for _, id := range ids {
		if !slices.Contains(g.prog.KeySets, id) {
			g.prog.KeySets = append(g.prog.KeySets, id)
		}
	}
	if err := g.saveProgress(); err != nil {
		return err
	}
	g.forgetResyncs()
	return nil
}

// saveProgress saves the progress; g.mu is held.
func (g *group) saveProgress() error {
	g.prog.Committed = map[block.VolumeIndex]block.Seq{}
	for _, v := range g.st.Volumes {
		g.prog.Committed[v.Index] = g.up.Committed(v.Index)
	}
	if err := g.files.saveProgress(g.prog); err != nil {
		return err
	}
	g.savedN = g.prog.N
	return nil
}

// onLogged is told of each batch that has become an entry of the log.
func (g *group) onLogged(b *batch.Batch, n uint64) error {
	if err := g.noteHandover(n, &b.Items); err != nil {
		return err
	}
	g.isHandedOver(n, &b.Items)
	g.note(n, &b.Items, b.KeySet == g.keys)
	g.mu.Lock()
	for id := range g.up.LoggedKeySets() {
		if !slices.Contains(g.prog.KeySets, id) {
			g.prog.KeySets = append(g.prog.KeySets, id)
		}
	}
	err := g.saveProgress()
	if err == nil {
		g.forgetResyncs()
	}
	before := g.unsaved
	g.unsaved = err
	g.mu.Unlock()
	switch {
	case err != nil && before == nil:
		g.logger.Warn("save progress; until that works again a restart will do some work again", "error", err)
	case err == nil && before != nil:
		g.logger.Info("progress is saved again")
	}
	if err := g.index.Add(b, g.st.ID, g.st.branch(), n); err != nil && !errors.Is(err, dedup.ErrGivenUp) {
		g.logger.Warn("chunks will be stored again", "error", err)
	}
	g.nowSafe(b.To)
	return nil
}

// note takes an entry into progress; mine says that this process has cut it.
func (g *group) note(n uint64, it *format.Items, mine bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.prog.N = max(g.prog.N, n)
	for _, v := range it.Volumes {
		if !slices.Contains(g.prog.Announced, v.Index) {
			g.prog.Announced = append(g.prog.Announced, v.Index)
		}
	}
	if it.Range == nil {
		return
	}
	g.prog.To = max(g.prog.To, it.Range.To)
	for _, c := range it.Checkpoints {
		g.named[namedKey{c.Name, c.Time}] = n
	}
	close(g.changed)
	g.changed = make(chan struct{})
	g.noteResync(it, mine)
	partial := map[block.VolumeIndex]bool{}
	for _, p := range it.Partials {
		partial[p.Volume] = true
	}
	for _, v := range g.st.Volumes {
		if !partial[v.Index] {
			g.prog.Checkpoint[v.Index] = max(g.prog.Checkpoint[v.Index], it.Range.To)
		}
	}
}

// awaitNamed waits until the entry with a named checkpoint is committed.
func (g *group) awaitNamed(ctx context.Context, key namedKey) error {
	for {
		g.mu.Lock()
		n, ok := g.named[key]
		changed, failed := g.changed, g.failed
		lost := g.unnamed[key]
		delete(g.unnamed, key)
		g.mu.Unlock()
		switch {
		case failed != nil:
			return failed
		case lost:
			return errGap
		case ok:
			err := g.log.AwaitSafe(ctx, g.a.cfg.Repo.Tolerates(), n-1)
			g.mu.Lock()
			delete(g.named, key)
			g.mu.Unlock()
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// nowSafe is told up to where the history is logged or persisted.
func (g *group) nowSafe(to block.Seq) {
	g.mu.Lock()
	g.safe = max(g.safe, to)
	g.mu.Unlock()
	g.release()
}

// release gives back the journal that nobody needs any more.
func (g *group) release() { g.stream.Release(g.releasable()) }

// releasable is up to where the journal is not needed any more.
func (g *group) releasable() block.Seq {
	g.mu.Lock()
	upTo := g.safe
	g.mu.Unlock()
	for _, v := range g.volumes {
		upTo = min(upTo, v.dev.Applied())
	}
	return upTo
}

// abandon releases what openGroup had opened, and takes back what it had noted
// of a group or volume that is new: no client has written to it yet.
func (g *group) abandon() {
	for _, v := range g.volumes {
		switch {
		case v.dev != nil && v.plan.created:
			_ = v.dev.Discard()
		case v.dev != nil:
			_ = v.dev.Abandon()
		case v.plan.backing != nil && v.plan.created:
			_ = v.plan.backing.Discard()
		case v.plan.backing != nil:
			_ = v.plan.backing.Close()
		}
		if v.dev != nil && v.plan.fresh {
			_ = capture.ForgetRecord(g.a.cfg.State.Files(), g.a.cfg.State.Backings(), v.plan.path)
		}
	}
	if g.index != nil {
		_ = g.index.Close()
	}
	if g.bitmap != nil {
		g.bitmap.Close()
	}
	if g.undo == nil {
		return
	}
	if err := g.undo(); err != nil {
		g.logger.Warn("take back what was noted of a new group", "error", err)
	}
}

// touch gives the state of each volume that is about to be compared with its
// history a Seq of its own: the one before is a checkpoint of what was there
// before. It comes before the clients.
func (g *group) touch(ctx context.Context) error {
	for _, v := range g.volumes {
		if len(v.plan.resync) > 0 && !v.plan.noHistory {
			if err := v.dev.Touch(ctx); err != nil {
				return fmt.Errorf("begin the resync of volume %s: %w", v.cfg.Name, err)
			}
		}
	}
	close(g.touched)
	return nil
}

// startResyncs gives each planned resync its baseline: at once where there is
// no history to compare with, else as soon as the stores can be read and hold
// all that was captured before. A region that equals the baseline is not stored,
// so a baseline must not be older than what is to be logged in front of the
// resync: history would end with that, and not with what the region holds.
func (g *group) startResyncs(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-g.touched:
	}
	for _, v := range g.volumes {
		switch {
		case len(v.plan.resync) == 0:
		case v.plan.noHistory:
			g.seg.StartResync(v.desc.Index, emptyBaseline{})
		default:
			g.giveBaseline(ctx, v)
		}
	}
}

// giveBaseline gives the resync of a volume the newest history to compare with,
// as soon as the stores can be read and hold all that was cut before; unless
// another baseline is asked for meanwhile.
func (g *group) giveBaseline(ctx context.Context, v *volume) {
	i := v.desc.Index
	g.mu.Lock()
	wanted, inherited := g.baselines[i], g.inherited
	g.mu.Unlock()
	// Who is not in office does not know what is history: see baseline.
	if g.up.AwaitLogged(ctx, inherited) != nil || g.log.AwaitOffice(ctx) != nil {
		return
	}
	for pause := time.Second; ; pause = min(2*pause, 30*time.Second) {
		b, err := g.a.baseline(ctx, g.st.ID, v.desc, decidedBy(g.log))
		if err == nil {
			g.mu.Lock()
			if g.baselines[i] == wanted {
				g.seg.StartResync(i, b)
			}
			g.mu.Unlock()
			return
		}
		if ctx.Err() != nil {
			return
		}
		g.logger.Warn("the resync waits until the history can be read", "volume", v.cfg.Name, "error", err)
		if sleep(ctx, pause) != nil {
			return
		}
	}
}

// emptyBaseline is the history of a volume that has none.
type emptyBaseline struct{}

func (emptyBaseline) Extents(context.Context, block.VolumeIndex, block.Extent) ([]manifest.Extent, error) {
	return nil, nil
}

// source joins capture and journal for segmenter.
type source struct {
	*capture.Group
	j Journal
}

func (s source) Flush(ctx context.Context) error { return s.j.Flush(ctx) }
func (s source) Durable() block.Seq              { return s.j.Durable() }

// errPast ends a read of the journal behind the wanted Seq.
var errPast = errors.New("past the wanted seq")

func (s source) Read(from, upTo block.Seq, limit int64, visit func(block.Write) error) (block.Seq, error) {
	next := from
	_, err := s.j.Read(from, limit, func(w block.Write) error {
		if w.Seq > upTo {
			return errPast
		}
		if err := visit(w); err != nil {
			return err
		}
		next = w.Seq + 1
		return nil
	})
	if errors.Is(err, errPast) {
		err = nil
	}
	return next, err
}

// lookup lets segmenter use the dedup index.
type lookup struct{ x Index }

func (l lookup) Lookup(id crypt.ChunkID) (segmenter.Location, bool) {
	loc, ok := l.x.Lookup(id)
	return segmenter.Location(loc), ok
}
