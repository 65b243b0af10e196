package pipeline

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"drc/capture"
	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/restorer"
	"drc/uploader"
)

// A host that goes on with a group must hold what the group's history says: its
// volumes are the state at the history's end, plus what its journal has behind
// that. This file finds out when that is not so, because another host, or a copy
// of this host's state, has written history meanwhile, and makes it so again when
// a takeover is ordered.
//
// Order of an ordered takeover, and what a crash leaves:
//
//  1. An epoch is promised on a majority: nobody else's entry is decided from
//     here on. A crash leaves the others fenced, and this host as it was.
//  2. The history is read as it is now, to its end. What stands behind that on some
//     store is no history (uploader.Office).
//  3. The journal's tail is replayed onto the volumes, durably: what clients of
//     this host were told to be written is on them.
//  4. Batches that wait in the buffer are given up. Their writes are on the
//     volumes, and their seqs are somebody else's by now.
//  5. The journal begins anew, two seqs behind all that there is, durably: no
//     volume's record fits it, so that this start, or the next one, compares the
//     volumes with the history in full.
//  6. The history is adopted: resyncs that were noted for the old one are
//     forgotten, and the progress is saved, durably, with the office of step 1: a
//     power cut that took it would leave a host that meets the entries of others as
//     if they were new. A crash before that leaves a host that finds, once more, that
//     it does not hold the history.
//  7. Office is taken again, as at each start, and nothing has been written under the
//     first one: an entry that the other host has left on a store which could not be
//     read in step 1 may be met only now, and is told from history by its epoch.

// ours reports, by an error, that this host does not hold what entry e says. What
// the log holds when office is taken, an earlier process of this host has cut out
// of its journal: under an epoch of this host, and no farther than the journal
// went when the first process began that has not been in office since.
func (g *group) ours(e *grouplog.Entry) error {
	g.mu.Lock()
	known, bound := g.prog.N, g.bound
	g.mu.Unlock()
	if e.N <= known {
		return nil
	}
	to := block.Seq(0)
	if e.Items.Range != nil {
		to = e.Items.Range.To
	}
	if to <= bound && slices.Contains(g.files.Epochs(), e.Epoch) {
		return nil
	}
	return &uploader.DivergedError{N: e.N, To: to, Known: bound, Epoch: e.Epoch}
}

// life is noted durably at each start, before a write is taken.
type life struct {
	// Unconfirmed says that a process has begun and was not in office yet. From
	// is how far the journal went before the first such one.
	Unconfirmed bool      `json:"unconfirmed"`
	From        block.Seq `json:"from"`
}

const lifeFile = "life.json"

// beginLife notes that a process begins whose journal goes up to last, and
// returns how far the history can be this host's at most.
func (f groupFiles) beginLife(last block.Seq) (bound block.Seq, err error) {
	var l life
	if _, err := f.dir.LoadJSON(&l, f.path(lifeFile)...); err != nil {
		return 0, err
	}
	if l.Unconfirmed {
		return min(l.From, last), nil
	}
	return last, f.dir.SaveJSON(life{Unconfirmed: true, From: last}, f.path(lifeFile)...)
}

// confirmLife notes that the process is in office: it holds the history. What it
// has decided from here on is its own.
func (f groupFiles) confirmLife() error {
	return f.dir.SaveJSON(life{}, f.path(lifeFile)...)
}

// fence takes office for a moment, so that nobody else's entries are decided any
// more, and returns where the history ends with that.
func (a *Agent) fence(ctx context.Context, id block.GroupID, takeover bool) (end restorer.Position, _ uploader.Office, err error) {
	office, err := a.inOffice(ctx, id, takeover, func(_ context.Context, l *uploader.Log) error {
		end = decidedBy(l)
		return nil
	})
	return end, office, err
}

// inOffice takes office, so that nobody else's entries are decided any more, and does
// something then. An entry behind the history's end, which the one who was fenced may
// have left on a minority of the stores, is no history: the next start, which takes
// office again and may then read such a store, tells it by this office. The epoch is
// this host's: its next office needs no order.
func (a *Agent) inOffice(ctx context.Context, id block.GroupID, takeover bool, do func(context.Context, *uploader.Log) error) (uploader.Office, error) {
	wait, cancel := context.WithTimeout(ctx, a.cfg.OfficeWait)
	defer cancel()
	f := groupFiles{a.cfg.State, id}
	l := uploader.NewLog(uploader.LogConfig{
		Repo: a.gated, Group: id, Agent: a.cfg.Agent, Ring: a.cfg.Ring, State: fenceState{f}, Takeover: takeover,
		Now: a.cfg.Now, Logger: a.cfg.Logger, OnEntry: func(*grouplog.Entry) error { return nil },
	})
	run, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.Run(run)
	}()
	defer func() { stop(); <-done }()
	err := l.TakeOffice(wait)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		err = fmt.Errorf("no majority of the stores answers within %s, and without one nobody can be fenced: bring the stores back, and try again", a.cfg.OfficeWait)
	}
	if err == nil {
		err = do(ctx, l)
	}
	if err != nil {
		return uploader.Office{}, err
	}
	n, _, epoch := l.Next()
	return uploader.Office{Epoch: epoch, N: n - 1}, nil
}

// decidedBy is the newest entry that is decided, as a log in office knows it.
func decidedBy(l *uploader.Log) restorer.Position {
	n, parent, _ := l.Next()
	return restorer.Position{N: n - 1, Hash: parent}
}

// fenceState is a host's state for an office that writes nothing: it reads the
// logs from their beginning, and remembers nothing but the epoch.
type fenceState struct{ groupFiles }

func (fenceState) Tails() *uploader.Tails          { return nil }
func (fenceState) SaveTails(*uploader.Tails) error { return nil }

// takeFromStores fences whoever writes a group, and makes its state from the
// history. If nothing is decided in it, the error is restorer.ErrNoEntries, and the
// progress says no more than by which office that is known. Unless it is a takeover
// the writer must have been this host.
func (a *Agent) takeFromStores(ctx context.Context, id block.GroupID, takeover bool) (*groupState, *progress, error) {
	end, office, err := a.fence(ctx, id, takeover)
	if err != nil {
		return nil, nil, err
	}
	cfg := a.restorerConfig()
	cfg.UpTo = &end
	h, err := restorer.OpenHistory(ctx, cfg, id)
	if errors.Is(err, restorer.ErrNoEntries) {
		p := newProgress()
		p.Office = office
		return nil, p, err
	}
	if err != nil {
		return nil, nil, err
	}
	defer h.Close()
	st, p, err := adopt(ctx, a.cfg.Repo.ID, h)
	if err != nil {
		return nil, nil, err
	}
	p.Office = office
	return st, p, nil
}

// takeBack makes this host hold the history again, where others have gone on with
// it and a takeover was ordered, or where this host has logged what it does not know
// any more, because the buffer is lost, and somebody has decided what to go on with.
// It reports whether there was anything to do. last is the end of the journal, and
// batches are what waits in the buffer.
func (g *group) takeBack(ctx context.Context, last block.Seq, batches []*batch.Batch) (bool, error) {
	a := g.a
	diverged, err := g.diverged(ctx, last)
	if err != nil || !diverged {
		return false, err
	}
	st, p, err := a.takeFromStores(ctx, g.st.ID, a.cfg.Takeover)
	if errors.Is(err, restorer.ErrNoEntries) {
		// What was there was not decided, and never will be.
		g.prog.Office = p.Office
		return false, g.files.adopted(g.prog)
	}
	if err != nil {
		return false, fmt.Errorf("take group %s over: %w", g.name, err)
	}
	who := "another agent has gone on with this group's history"
	if !a.cfg.Takeover {
		who = "this host has logged what it does not know any more"
	}
	g.logger.Warn(who+": its end becomes history as it is, then a gap begins, and the volumes of this host are compared with it in full",
		"entry", p.N, "seq", p.To.String(), "this_host", last.String())
	if err := g.sameVolumes(st); err != nil {
		return false, err
	}
	if err := g.replayAll(last); err != nil {
		return false, err
	}
	for _, b := range batches {
		if err := g.spool.giveUp(b); err != nil {
			return false, fmt.Errorf("give up what group %s had waiting in the buffer: %w", g.name, err)
		}
	}
	if g.journal, err = a.buffer.ResetJournal(ctx, g.st.ID, max(last, p.To)+2); err != nil {
		return false, err
	}
	if err := g.lacking.note(); err != nil {
		return false, err
	}
	g.st.Volumes, g.st.Line = st.Volumes, st.Line
	if err := g.files.saveGroup(g.st); err != nil {
		return false, err
	}
	if err := g.files.saveResyncs(resyncNotes{}); err != nil {
		return false, err
	}
	g.resyncs, g.prog = resyncNotes{}, p
	if err := g.files.adopted(p); err != nil {
		return false, err
	}
	g.savedN = p.N
	return true, nil
}

// diverged reports whether the stores' history holds what this host does not.
// Where it cannot be read now, the answer is no: then it is found out when office
// is taken.
func (g *group) diverged(ctx context.Context, last block.Seq) (bool, error) {
	h, err := restorer.OpenHistory(ctx, g.a.restorerConfig(), g.st.ID)
	if err != nil {
		if errors.Is(err, restorer.ErrNoEntries) || ctx.Err() != nil {
			return false, ctx.Err()
		}
		g.logger.Warn("the history cannot be read now: whether others have gone on with it is seen when the stores are back", "error", err)
		return false, nil
	}
	defer h.Close()
	if h.Current() != g.st.branch() && g.a.cfg.Takeover {
		for _, v := range h.VolumesOn(g.st.branch()) {
			return false, leftBehind(h, v)
		}
	}
	var l life
	if _, err := g.files.dir.LoadJSON(&l, g.files.path(lifeFile)...); err != nil {
		return false, err
	}
	if l.Unconfirmed {
		last = min(last, l.From)
	}
	own := g.files.Epochs()
	others, beyond := false, false
	err = h.Each(ctx, g.prog.N+1, func(e *restorer.Entry) bool {
		others = others || !slices.Contains(own, e.Epoch)
		beyond = beyond || (e.Range != nil && e.Range.To > last)
		return !others
	})
	if err != nil {
		return false, err
	}
	if !g.a.cfg.Takeover && others {
		return false, nil // who was not told to take over is refused
	}
	return others || beyond, nil
}

// LeftBehindError says that a volume's branch is not written any more: another host was
// promoted.
type LeftBehindError struct {
	Volume, Group string
	Branch        restorer.Branch // that is written
	Name          string          // of the volume on it; empty: it is not there
}

func (e *LeftBehindError) Error() string {
	as := ""
	if e.Name != "" {
		as = " as " + e.Name
	}
	return fmt.Sprintf("volume %s of group %s is not written any more: at %s another host was promoted, and goes on on branch %s%s: nothing was changed. To follow that one: drc replay; to go on here with what it has written, or with an older point: drc promote, with a --state DIR of its own",
		e.Volume, e.Group, e.Branch.Begin.Local().Format("2006-01-02 15:04:05"), e.Branch.ID.String()[:8], as)
}

func leftBehind(h *restorer.History, v restorer.Volume) error {
	all := h.Branches()
	e := &LeftBehindError{Volume: v.Name, Group: h.Group.Name, Branch: all[len(all)-1]}
	for _, x := range h.CurrentVolumes() {
		if x.ID == v.ID {
			e.Name = x.Name
		}
	}
	return e
}

// sameVolumes checks that the volumes here are those of the history.
func (g *group) sameVolumes(st *groupState) error {
	for _, v := range g.volumes {
		known := slices.ContainsFunc(st.Volumes, func(d format.Volume) bool { return d.ID == v.desc.ID && d.Index == v.desc.Index })
		if !known {
			return fmt.Errorf("volume %s of group %s is not in the history that another agent has gone on with: start without it, with --takeover, and add it again when this agent is in office", v.cfg.Name, g.name)
		}
	}
	return nil
}

// replayAll brings what the journal holds, up to last, onto the volumes, durably.
// Writes that went past the journal, in bitmap mode, are on them already, and came
// after all that it holds was applied.
func (g *group) replayAll(last block.Seq) error {
	if next := g.journal.Next(); next > 0 {
		last = min(last, next-1)
	}
	for _, v := range g.volumes {
		p := &v.plan
		r := p.record
		fits := p.finding == capture.FindingClean || p.finding == capture.FindingReplay
		switch {
		case fits && r.Applied >= last, g.journal.First() == 0, p.fresh, p.created, p.order == OrderRewind:
			continue
		case !fits || !g.reaches(r.Applied, last):
			return fmt.Errorf("volume %s: the buffer holds writes up to seq %s of it, and %s is not as this host has left it, so that they cannot be written to it: give the path of the volume that they belong to, or start with another --state and --buffer to go on from the volume as it is",
				v.cfg.Name, last, p.path)
		}
		if err := p.backing.Claim(g.a.cfg.State.Backings(), p.record); err != nil {
			return err
		}
		if _, err := capture.Replay(p.backing, v.desc.Index, g.journal, r.Applied, last); err != nil {
			return err
		}
	}
	return nil
}
