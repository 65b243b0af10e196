package pipeline

import (
	"context"
	"errors"
	"fmt"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/format"
	"drc/internal/vfs"
)

// A handover lets another host go on with a group's branch, under the names that its
// volumes have, and nothing is missing there.
//
// Order, and what a crash leaves:
//
//  1. Writers are refused, and what was acknowledged before is flushed. The refusal is
//     lifted again if the next step does not come to its end: nothing has changed then.
//  2. All that was captured is brought to the log, on as many stores as a commit needs.
//  3. An entry says that the author hands over. A crash before it is decided leaves a
//     group that goes on here at the next start (a batch that would say so is made to
//     say nothing, see recovered); after that the next start finds the entry.
//  4. The handover is noted, durably, before the entry is: a start finds one of the two,
//     and takes no writes. Only a promotion, here or elsewhere, makes a writer again.

// handoverNote says that the group was handed over.
type handoverNote struct {
	N    uint64    `json:"entry"`
	Time time.Time `json:"time"`
}

const handoverFile = "handover.json"

// HandedOverError says that a group was handed over, and not taken back.
type HandedOverError struct {
	Group string
	Time  time.Time
	Names []string
}

func (e *HandedOverError) Error() string {
	return fmt.Sprintf("group %s was handed over at %s: it takes no writes here. On the host that goes on with it, or here to take it back: drc promote %s; to follow it: drc replay",
		e.Group, e.Time.Local().Format("2006-01-02 15:04:05"), e.Names[0])
}

// handedOver returns a HandedOverError if the group was handed over.
func (f groupFiles) handedOver(st *groupState) error {
	var n handoverNote
	found, err := f.dir.LoadJSON(&n, f.path(handoverFile)...)
	if err != nil || !found {
		return err
	}
	e := &HandedOverError{Group: st.Group.Name, Time: n.Time}
	for _, v := range st.Volumes {
		e.Names = append(e.Names, v.Name)
	}
	return e
}

// noteHandover keeps what the newest entry says of a handover.
func (g *group) noteHandover(n uint64, it *format.Items) error {
	switch {
	case it.Handover != nil:
		return g.a.cfg.State.SaveJSON(handoverNote{N: n, Time: time.Unix(0, it.Handover.Time)}, g.files.path(handoverFile)...)
	case g.handed.Load() != 0:
		g.handed.Store(0)
		return vfs.RemoveAll(g.a.cfg.State.Files(), g.a.cfg.State.Path(g.files.path(handoverFile)...))
	}
	return nil
}

// isHandedOver has the group take no writes any more.
func (g *group) isHandedOver(n uint64, it *format.Items) {
	if it.Handover == nil {
		return
	}
	g.handed.Store(n)
	g.capture.Refuse(fmt.Errorf("%w: it was handed over", block.ErrReadOnly))
}

// Demote implements control.Agent: it ends this host's work for the group of a volume,
// so that another host may go on with it where this one has stopped.
func (a *Agent) Demote(ctx context.Context, r control.DemoteRequest) (control.DemoteAnswer, error) {
	var none control.DemoteAnswer
	if !a.IsServing() {
		return none, errNotServing
	}
	for _, g := range a.all() {
		for _, v := range g.volumes {
			if v.cfg.Name == r.Volume {
				return g.demote(ctx)
			}
		}
	}
	return none, &control.CodedError{Code: 2, Err: fmt.Errorf("this agent protects no volume %s: see drc status", r.Volume)}
}

func (g *group) demote(ctx context.Context) (answer control.DemoteAnswer, err error) {
	g.demoting.Lock()
	defer g.demoting.Unlock()
	answer.Group = g.name
	for _, v := range g.volumes {
		answer.Volumes = append(answer.Volumes, v.cfg.Name)
	}
	if g.handed.Load() != 0 {
		answer.Seq = g.up.Logged()
		return answer, nil
	}
	if err := g.mayHandOver(); err != nil {
		return answer, err
	}
	// Most of what waits goes to the stores while writers go on.
	if err := g.awaitLogged(ctx); err != nil {
		return answer, fmt.Errorf("bring what waits to the stores: %w: nothing was changed", err)
	}
	g.capture.Refuse(fmt.Errorf("%w: it is being handed over", block.ErrReadOnly))
	err = g.journal.Flush(ctx)
	if err == nil {
		err = g.awaitLogged(ctx)
	}
	if err == nil {
		err = g.mayHandOver()
	}
	if err != nil {
		g.mu.Lock()
		failed := g.failed
		g.mu.Unlock()
		if failed == nil { // who is fenced takes no writes
			g.capture.Refuse(nil)
		}
		return answer, fmt.Errorf("bring the last writes to the stores: %w: the volumes take writes again", err)
	}
	now := g.a.cfg.Now()
	g.seg.Announce(func(it *format.Items) { it.Handover = &format.Handover{Time: now.UnixNano()} })
	// From here on there is no way back: the entry may be decided at any time.
	for g.handed.Load() == 0 {
		g.mu.Lock()
		failed, changed := g.failed, g.changed
		g.mu.Unlock()
		if failed != nil {
			return answer, failed
		}
		select {
		case <-ctx.Done():
			return answer, fmt.Errorf("%w: the handover goes on by itself, and the volumes take no writes meanwhile: drc status shows when it is done", ctx.Err())
		case <-changed:
		case <-time.After(100 * time.Millisecond):
		}
	}
	if err := g.log.AwaitSafe(ctx, g.a.cfg.Repo.Tolerates(), g.handed.Load()-1); err != nil {
		return answer, fmt.Errorf("%w: it was handed over, and is not on all the stores yet that a commit shall be on", err)
	}
	answer.Seq = g.up.Logged()
	g.logger.Info("handed over: this host takes no writes of the group any more", "seq", answer.Seq.String())
	return answer, nil
}

// mayHandOver says why the history on the stores cannot have all that was acknowledged.
func (g *group) mayHandOver() error {
	g.mu.Lock()
	failed := g.failed
	g.mu.Unlock()
	if failed != nil {
		return failed
	}
	if g.capture.Diverted() {
		return errors.New("the buffer was full, and a gap has not ended yet: wait until drc status shows the group protected")
	}
	for _, v := range g.volumes {
		if left := g.seg.ResyncRemaining(v.desc.Index); left > 0 {
			return fmt.Errorf("the sync of volume %s has not ended, %d bytes are left: wait until drc status shows it protected", v.cfg.Name, left)
		}
		if err := v.dev.Failed(); err != nil {
			return fmt.Errorf("volume %s: %w", v.cfg.Name, err)
		}
		if err := v.dev.Changed(); err != nil {
			return fmt.Errorf("volume %s: %w", v.cfg.Name, err)
		}
	}
	return nil
}

// awaitLogged waits until all that is captured now is in the log.
func (g *group) awaitLogged(ctx context.Context) error {
	want := g.capture.Captured()
	for {
		g.mu.Lock()
		failed := g.failed
		g.mu.Unlock()
		if failed != nil {
			return failed
		}
		if g.up.Logged() >= want && g.seg.Sealed() >= want {
			return nil
		}
		wait, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		_ = g.up.AwaitLogged(wait, want)
		cancel()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}
