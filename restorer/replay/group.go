package replay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/restorer"
)

const (
	// What is new is looked for every pollMin while something came lately, and up to
	// pollMax later when nothing did: about pollShare of the time that nothing came.
	pollMin   = 250 * time.Millisecond
	pollMax   = 5 * time.Second
	pollShare = 8
	// After an error it is tried again in retryMin, and later each time.
	retryMin = time.Second
	retryMax = 30 * time.Second
	// behindEvery is how often all that is behind is counted when it is much.
	behindEvery = 10 * time.Second
)

// group is a group of volumes with the copies of those that are followed.
//
// step and what it calls are one goroutine's at a time; mu guards what others read.
type group struct {
	s        *Standby
	id       block.GroupID
	follower *restorer.Follower
	st       groupState
	broken   bool      // a step is in its redo file, and not in the copies
	bound    uint64    // the copies go no farther than this entry; 0: to the end
	counted  time.Time // when all that is behind was counted

	mu     sync.Mutex
	hist   *restorer.History
	copies []*replica // of all volumes in st
	heard  time.Time  // when the stores last answered
	err    error      // what goes wrong now
}

func newGroup(s *Standby, id block.GroupID, f *restorer.Follower) *group {
	return &group{s: s, id: id, follower: f, hist: f.History(), st: groupState{Version: stateVersion, Group: id}, heard: s.o.Now()}
}

func (g *group) history() *restorer.History {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hist
}

// list are the copies.
func (g *group) list() []*replica {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]*replica(nil), g.copies...)
}

// load reads where the copies are.
func (g *group) load() error {
	name := groupFile(g.id, ".json")
	if _, err := g.s.load(name, &g.st); err != nil {
		return err
	}
	if g.st.Version != stateVersion || g.st.Group != g.id {
		return format.Corrupt(g.s.path(name), "it is of group %s, format %d", g.st.Group, g.st.Version)
	}
	for _, st := range g.st.Copies {
		if st.SizeBytes <= 0 || st.SizeBytes > format.MaxVolumeBytes || st.Filled < 0 || st.Filled > st.SizeBytes {
			return format.Corrupt(g.s.path(name), "it says that volume %q has %d bytes, of which %d are done", st.Name, st.SizeBytes, st.Filled)
		}
		if st.ID.IsZero() { // it was noted before there were branches
			st.ID, st.Branch = block.ID(st.Volume), g.history().Group.Branch
		}
		c := &replica{g: g, st: st, file: g.s.path(st.File), views: map[*view]struct{}{}}
		if err := g.s.claim(c.file, st.Name); err != nil {
			return err
		}
		g.copies = append(g.copies, c)
	}
	return nil
}

func (g *group) save() error { return g.s.save(groupFile(g.id, ".json"), &g.st) }

// join begins copies of volumes that have none, and opens those that are followed.
func (g *group) join(ctx context.Context) error {
	h := g.history()
	type line struct {
		volume block.VolumeID
		branch block.BranchID
	}
	have := map[line]*replica{}
	for _, c := range g.list() {
		have[line{c.st.Volume, c.st.Branch}] = c
	}
	for _, v := range h.Volumes() {
		c := have[line{v.ID, v.Branch}]
		if !g.s.wanted(v.Name) || (c != nil && c.followed()) {
			continue
		}
		if c == nil && len(g.s.o.Volumes) == 0 && v.Branch != h.Current() {
			continue // nobody writes that any more, and nobody has asked for it
		}
		if c == nil {
			var err error
			if c, err = g.begin(v); err != nil {
				return err
			}
		}
		if c.st.SizeBytes != v.SizeBytes {
			return fmt.Errorf("volume %q has %d bytes, and its copy %s is of %d: move the copy away to begin anew", v.Name, v.SizeBytes, c.file, c.st.SizeBytes)
		}
		if err := c.open(); err != nil {
			return err
		}
		c.follow(v)
	}
	return nil
}

// begin begins a copy of a volume.
func (g *group) begin(v restorer.Volume) (*replica, error) {
	st := &copyState{ID: block.NewID(), Volume: v.ID, Branch: v.Branch, Index: v.Index, Name: v.Name, File: fileOf(v.Name), SizeBytes: v.SizeBytes}
	if file := g.s.o.Files[v.Name]; file != "" {
		st.File = file
	}
	c := &replica{g: g, st: st, file: g.s.path(st.File), views: map[*view]struct{}{}}
	there, err := g.s.o.Stamp(c.file)
	if err != nil {
		return nil, fmt.Errorf("look for a copy of volume %q: %w", v.Name, err)
	}
	if st.Compare = there.Exists; there.Exists && !g.s.o.Adopt {
		return nil, fmt.Errorf("%s exists, and is no copy that this standby has made: pass --adopt to have it compared with volume %q and overwritten where it differs, or choose another file or folder", c.file, v.Name)
	}
	if err := g.s.claim(c.file, v.Name); err != nil {
		return nil, err
	}
	g.st.Copies = append(g.st.Copies, st)
	if err := g.save(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.copies = append(g.copies, c)
	g.mu.Unlock()
	return c, nil
}

// sorted are the followed copies: those that are at a checkpoint, and those that are on
// the way to their first.
func (g *group) sorted() (whole, filling []*replica) {
	for _, c := range g.list() {
		switch {
		case !c.followed():
		case c.st.Whole:
			whole = append(whole, c)
		default:
			filling = append(filling, c)
		}
	}
	return whole, filling
}

// notAfter is the time that no checkpoint may be later than; nil: any may.
func (g *group) notAfter() *time.Time {
	if g.s.o.Delay <= 0 {
		return nil
	}
	t := g.s.o.Now().Add(-g.s.o.Delay)
	return &t
}

// isAt reports whether the copies are at the newest checkpoint that they may be at in
// the entries up to n, or behind it.
func (g *group) isAt(ctx context.Context, n uint64) (bool, error) {
	h, limit := g.history(), g.notAfter()
	whole, filling := g.sorted()
	for _, c := range append(whole, filling...) {
		p, ok, err := h.Last(ctx, c.volume(), n, limit)
		if err != nil {
			return false, err
		}
		if ok && (!c.st.Whole || c.st.Position.Entry < p.N) {
			return false, nil
		}
	}
	return true, nil
}

// step does a bounded part of the work.
func (g *group) step(ctx context.Context) (worked bool, err error) {
	defer func() {
		if ctx.Err() == nil {
			g.mu.Lock()
			g.err = err
			g.mu.Unlock()
		}
	}()
	if g.broken {
		if err := g.recover(); err != nil {
			return false, err
		}
	}
	_, pollErr := g.follower.Poll(ctx)
	if pollErr == nil {
		g.mu.Lock()
		g.hist, g.heard = g.follower.History(), g.s.o.Now()
		g.mu.Unlock()
		if err := g.join(ctx); err != nil {
			return false, err
		}
	}
	// What is known can be worked on, also when what is newer cannot be asked for.
	whole, filling := g.sorted()
	worked, err = g.advance(ctx, whole)
	for _, c := range filling {
		did, ferr := c.fill(ctx)
		worked = worked || did
		err = errors.Join(err, ferr)
	}
	return worked, errors.Join(err, pollErr)
}

// run does the work until ctx ends.
func (g *group) run(ctx context.Context) {
	said := ""
	retry := time.Duration(0)
	for last := time.Now(); ctx.Err() == nil; {
		worked, err := g.step(ctx)
		if ctx.Err() != nil {
			return
		}
		if worked {
			last = time.Now()
		}
		wait := time.Duration(0)
		switch {
		case err != nil:
			retry = min(max(2*retry, retryMin), retryMax)
			wait = retry
			if text := err.Error(); text != said {
				said = text
				g.s.logger.Warn("the standby cannot go on for now; trying again", "group", g.id.String(), "error", err)
			}
		default:
			if said != "" {
				g.s.logger.Info("the standby goes on", "group", g.id.String())
			}
			said, retry = "", 0
			if !worked {
				wait = min(max(time.Since(last)/pollShare, pollMin), pollMax)
			}
		}
		_ = pause(ctx, wait)
	}
}

func (g *group) close() (err error) {
	for _, c := range g.list() {
		err = errors.Join(err, c.close())
	}
	return err
}
