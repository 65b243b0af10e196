package replay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"drc/internal/block"
	"drc/restorer"
)

// planned is a move of a copy.
type planned struct {
	c       *replica
	changes *restorer.Changes
	bytes   int64 // to be fetched, or a little more than what a step may have
}

// advance takes the copies of a group to a later point, and reports whether it did.
func (g *group) advance(ctx context.Context, copies []*replica) (bool, error) {
	if err := g.look(ctx, copies); err != nil { // Status shows it while the step goes on
		return false, err
	}
	plan, err := g.plan(ctx, copies)
	if err != nil || len(plan) == 0 {
		return false, err
	}
	if err := g.do(ctx, plan); err != nil {
		return false, err
	}
	return true, g.look(ctx, copies)
}

// look finds out at which checkpoints the copies should be next.
func (g *group) look(ctx context.Context, copies []*replica) error {
	for _, c := range copies {
		if err := c.look(ctx); err != nil {
			return err
		}
	}
	return nil
}

// plan chooses where the copies go: to the newest checkpoint that they may be at or, if
// that is more than one step may do, to an earlier one.
func (g *group) plan(ctx context.Context, copies []*replica) ([]planned, error) {
	h := g.history()
	limit := g.notAfter()
	upTo, least := g.end(h), false
	for first := true; ; first = false {
		var plan []planned
		lowest, highest := h.N(), uint64(0)
		sum := int64(0)
		for _, c := range copies {
			at := c.st.Position
			p, ok, err := h.Last(ctx, c.volume(), upTo, limit)
			if err != nil {
				return nil, err
			}
			if !ok || p.N <= at.Entry {
				continue
			}
			lowest, highest = min(lowest, at.Entry), max(highest, p.N)
			changes, err := restorer.OpenChanges(ctx, h, c.point(), p)
			if err != nil {
				return nil, fmt.Errorf("go on with the copy %s, which is at log entry %d: %w", c.path, at.Entry, err)
			}
			plan = append(plan, planned{c: c, changes: changes})
		}
		count := first && time.Since(g.counted) >= behindEvery
		for i := range plan {
			most := g.s.o.StepBytes
			if count || least {
				most = 0
			}
			var err error
			if plan[i].bytes, _, err = plan[i].changes.Bytes(ctx, most); err != nil {
				return nil, err
			}
			sum += plan[i].bytes
			if first {
				plan[i].c.isBehind(plan[i].bytes, count)
			}
		}
		if count {
			g.counted = time.Now()
		}
		switch {
		case len(plan) == 0 && first:
			return nil, nil
		case len(plan) == 0: // there is none as early as that: the first there is
			upTo, least = g.end(h), true
			for _, c := range copies {
				p, ok, err := h.Next(ctx, c.volume(), c.st.Position.Entry)
				if err != nil {
					return nil, err
				}
				if ok {
					upTo = min(upTo, p.N)
				}
			}
		case least || sum <= g.s.o.StepBytes || highest-lowest <= 1:
			return plan, nil
		default:
			upTo = lowest + (min(upTo, highest)-lowest)/2
		}
	}
}

// do does a step; see the package comment for the order.
func (g *group) do(ctx context.Context, plan []planned) error {
	head := redoHeader{group: g.id, step: block.NewID()}
	for _, m := range plan {
		p := m.changes.To()
		head.moves = append(head.moves, move{m.c.st.ID, m.c.st.Position, position{p.N, p.Hash, p.Seq, p.Time}})
		m.c.pending = newMarks(m.c.st.SizeBytes)
	}
	name := g.s.path(groupFile(g.id, ".redo"))
	w, err := beginRedo(g.s.fs, g.s.o.Dir, name, head, func(i int, e block.Extent) { plan[i].c.pending.add(e) })
	if err != nil {
		return err
	}
	for i, m := range plan {
		if err = m.changes.Fetch(ctx, func(changes []restorer.Change) error {
			return noRoomIf(name, w.add(i, changes))
		}); err != nil {
			break
		}
	}
	if err == nil {
		err = noRoomIf(name, w.finish())
	}
	if err != nil {
		_ = w.file.Truncate(0) // what it takes is given back; it is of no use
		_ = w.file.Close()
		return err
	}
	return g.apply(&redo{redoHeader: head, file: w.file, end: w.end})
}

func noRoomIf(name string, err error) error { return noRoom("the redo file "+name, err) }

// recover brings a step that is whole in the redo file to its end.
func (g *group) recover() error {
	name := g.s.path(groupFile(g.id, ".redo"))
	r, err := openRedo(g.s.fs, name)
	if errors.Is(err, errNoRedo) {
		if g.broken {
			return g.compareAll(name)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the redo file %s: %w", name, err)
	}
	if !g.isDue(r) {
		return r.close()
	}
	for _, m := range r.moves {
		c := g.copyOf(m.copy)
		if err := c.reopen(); err != nil {
			return errors.Join(err, r.close())
		}
		if !c.st.Whole { // it was gone, and begins anew
			return errors.Join(g.forget(m.copy), r.close())
		}
	}
	return g.apply(r)
}

// isDue reports whether a redo file leads from where the copies are.
func (g *group) isDue(r *redo) bool {
	if r.group != g.id {
		return false
	}
	for _, m := range r.moves {
		c := g.copyOf(m.copy)
		if c == nil || !c.st.Whole || c.st.Position.Entry != m.from.Entry || c.st.Position.Hash != m.from.Hash {
			return false
		}
	}
	return true
}

func (g *group) copyOf(id block.ID) *replica {
	for _, c := range g.list() {
		if c.st.ID == id {
			return c
		}
	}
	return nil
}

// forget: a copy that a step was about is gone. The others may have a part of that
// step, and are compared.
func (g *group) forget(gone block.ID) error {
	r, err := openRedo(g.s.fs, g.s.path(groupFile(g.id, ".redo")))
	if err != nil {
		return err
	}
	defer r.close()
	for _, m := range r.moves {
		if c := g.copyOf(m.copy); m.copy != gone && c != nil {
			c.st.Whole, c.st.Compare, c.st.Filled = false, true, 0
		}
	}
	g.broken = false
	return g.save()
}

// compareAll: a redo file that was written to the copies in part cannot be read any
// more. What the copies hold has to be found out.
func (g *group) compareAll(name string) error {
	g.s.logger.Warn("the redo file of a step that was under way is damaged; the copies are compared with the history in full", "file", name)
	for _, c := range g.list() {
		if c.st.Whole && c.followed() {
			c.st.Whole, c.st.Compare, c.st.Filled = false, true, 0
		}
	}
	g.broken = false
	return g.save()
}

// apply writes what is in a redo file to the copies, and notes where they are then.
func (g *group) apply(r *redo) (err error) {
	g.broken = true
	defer func() { err = errors.Join(err, r.close()) }()
	copies := make([]*replica, len(r.moves))
	for i, m := range r.moves {
		copies[i] = g.copyOf(m.copy)
		copies[i].mark()
	}
	err = r.each(func(i int, c restorer.Change) error { return copies[i].write(c) })
	if err != nil {
		return err
	}
	for _, c := range copies {
		if err := c.sync(); err != nil {
			return err
		}
	}
	stamps := make([]Stamp, len(copies))
	for i, c := range copies {
		if stamps[i], err = g.s.o.Stamp(c.path); err != nil {
			return fmt.Errorf("look at the copy %s: %w", c.path, err)
		}
	}
	before := make([]copyState, len(copies))
	for i, c := range copies {
		before[i] = *c.st
		c.set(func(st *copyState) { st.Position, st.Stamp = r.moves[i].to, stamps[i] })
	}
	if err := g.save(); err != nil {
		for i, c := range copies {
			c.set(func(st *copyState) { *st = before[i] })
		}
		return err
	}
	g.broken = false
	for _, c := range copies {
		c.moved()
	}
	_ = r.file.Truncate(0) // else the next step does
	return nil
}
