package restorer

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"drc/internal/block"
)

// Fork is a place from which a group can go on: a checkpoint of all volumes that had
// joined.
type Fork struct {
	Position
	Branch  block.BranchID // of whose history it is the end
	Seq     block.Seq
	Time    time.Time
	Volumes []Volume // that had joined, by the names that they have on Branch
	Note    string   // what the user should know of the choice
}

// Point is the checkpoint of a volume at the fork.
func (f *Fork) Point(v Volume) Point {
	return Point{Checkpoint: Checkpoint{N: f.N, Seq: f.Seq, Time: f.Time}, Volume: v, Branch: f.Branch, Hash: f.Hash}
}

// ForkAt is the fork at a checkpoint of a volume. If it is no checkpoint of all volumes
// of the group that had joined, the error is ErrNoSuchPoint and names one that is not.
func (h *History) ForkAt(ctx context.Context, p Point) (*Fork, error) {
	e, err := h.Entry(ctx, p.N)
	if err != nil {
		return nil, err
	}
	for _, v := range h.joined(p.Volume.Branch, p.N) {
		if e.Hash != p.Hash || !h.isPoint(v, e) {
			return nil, fmt.Errorf("%w: seq %s of volume %q is no checkpoint of volume %q of the same group, whose sync had not ended: choose another point (drc history %s)",
				ErrNoSuchPoint, p.Seq, p.Volume.Name, v.Name, v.Name)
		}
	}
	return h.fork(p.Volume.Branch, e), nil
}

// NewestFork is the newest fork of a branch.
func (h *History) NewestFork(ctx context.Context, b block.BranchID) (*Fork, error) {
	on := Volume{Branch: b}
	waits := map[string]bool{}
	for n := h.floor(on, h.N()); n > 0; n = h.floor(on, n) {
		e, err := h.Entry(ctx, n)
		if err != nil {
			return nil, err
		}
		joined := h.joined(b, n)
		before := n - 1
		whole := e.Range != nil && len(joined) > 0
		for _, v := range joined {
			if h.isPoint(v, e) {
				continue
			}
			whole = false
			waits[v.Name] = true
			if g := h.gapAt(v, n); g != nil {
				before = min(before, g.BeginN-1)
			}
		}
		if !whole {
			n = before
			continue
		}
		f := h.fork(b, e)
		if len(waits) > 0 {
			names := []string{}
			for name := range waits {
				names = append(names, fmt.Sprintf("%q", name))
			}
			slices.Sort(names)
			f.Note = fmt.Sprintf("what was written later is left behind: a sync of volume %s had not ended", strings.Join(names, ", "))
		}
		return f, nil
	}
	return nil, fmt.Errorf("%w: there is no checkpoint of all volumes of group %q yet: their first sync has not ended", ErrNoSuchPoint, h.Group.Name)
}

// joined are the volumes of a branch that had joined by entry n.
func (h *History) joined(b block.BranchID, n uint64) []Volume {
	return slices.DeleteFunc(h.VolumesOn(b), func(v Volume) bool { return v.JoinedN > n })
}

func (h *History) fork(b block.BranchID, e *Entry) *Fork {
	return &Fork{Position: Position{e.N, e.Hash}, Branch: b, Seq: e.Range.To, Time: e.Time(), Volumes: h.joined(b, e.N)}
}

// FreeName is a name for a volume on a new branch: one that no volume of the group
// has, made from the one that it has now.
func (h *History) FreeName(name string) string {
	base := name
	if i := strings.LastIndexByte(name, '-'); i > 0 && i < len(name)-1 && strings.Trim(name[i+1:], "0123456789") == "" {
		base = name[:i]
	}
	for n := 2; ; n++ {
		free := fmt.Sprintf("%s-%d", base, n)
		if _, taken := h.Volume(free); !taken {
			return free
		}
	}
}
