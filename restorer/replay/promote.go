package replay

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"drc/internal/block"
	"drc/restorer"
)

// end is the last entry to which the copies may go.
func (g *group) end(h *restorer.History) uint64 {
	if g.bound > 0 {
		return min(g.bound, h.N())
	}
	return h.N()
}

// Bring brings the copies of the volumes of a fork to that fork, and returns their
// files. A copy that is past it already is compared with what it was there. From then on
// the copies of the group go no farther. Step must not be called meanwhile.
func (s *Standby) Bring(ctx context.Context, id block.GroupID, f *restorer.Fork) (map[block.VolumeID]string, error) {
	g := s.group(id)
	if g == nil {
		return nil, fmt.Errorf("%w: the standby in %s does not follow its group", restorer.ErrNoSuchVolume, s.o.Dir)
	}
	g.bound = f.N
	for {
		if g.history().N() >= f.N {
			back, err := g.backTo(f)
			if err != nil {
				return nil, err
			}
			if back {
				continue
			}
			at, err := g.isAt(ctx, f.N)
			if err != nil {
				return nil, err
			}
			if at && !g.broken {
				return g.filesOf(f)
			}
		}
		if _, err := g.step(ctx); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// copiesOf are the copies of a fork's volumes.
func (g *group) copiesOf(f *restorer.Fork) (out []*replica) {
	for _, c := range g.list() {
		if c.followed() && slices.ContainsFunc(f.Volumes, func(v restorer.Volume) bool { return v.ID == c.st.Volume && v.Branch == c.st.Branch }) {
			out = append(out, c)
		}
	}
	return out
}

// backTo has the copies that are past a fork compared with it, and reports whether
// there were any.
func (g *group) backTo(f *restorer.Fork) (back bool, err error) {
	for _, c := range g.copiesOf(f) {
		if c.st.Position.Entry <= f.N || c.st.Position.Seq == f.Seq && c.st.Whole {
			continue
		}
		back = true
		c.image = nil
		c.set(func(st *copyState) {
			st.Whole, st.Compare, st.Filled = false, true, 0
			st.Position = position{f.N, f.Hash, f.Seq, f.Time}
		})
	}
	if !back {
		return false, nil
	}
	return true, g.save()
}

func (g *group) filesOf(f *restorer.Fork) (map[block.VolumeID]string, error) {
	files := map[block.VolumeID]string{}
	for _, c := range g.copiesOf(f) {
		if !c.st.Whole || c.st.Position.Seq != f.Seq {
			return nil, fmt.Errorf("the copy %s is at seq %s, and not at %s: this is a bug in drc", c.path, c.st.Position.Seq, f.Seq)
		}
		files[c.st.Volume] = c.path
	}
	for _, v := range f.Volumes {
		if files[v.ID] == "" {
			return nil, fmt.Errorf("the standby has no copy of volume %q, which is in the same group: follow it as well", v.Name)
		}
	}
	return files, nil
}

// Release forgets the copies of a fork's volumes, durably, and closes their files: they
// are somebody else's from then on. Views of them are at an end.
func (s *Standby) Release(id block.GroupID, f *restorer.Fork) error {
	g := s.group(id)
	var err error
	for _, c := range g.copiesOf(f) {
		g.mu.Lock()
		g.copies = slices.DeleteFunc(slices.Clone(g.copies), func(x *replica) bool { return x == c })
		g.mu.Unlock()
		g.st.Copies = slices.DeleteFunc(g.st.Copies, func(st *copyState) bool { return st == c.st })
		err = errors.Join(err, c.close())
	}
	return errors.Join(err, g.save())
}
