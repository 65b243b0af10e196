package restorer

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"drc/internal/block"
	"drc/internal/format"
)

// The log of a group is one chain of entries, and its history may be a tree: an entry
// that begins a branch goes on from an earlier one, its fork, and what stands between
// the two is history of the parent only. What is history of a branch is therefore a
// line: a few stretches of the log, one behind the other. Whatever is looked for in
// the history of a volume (checkpoints, gaps, names, manifests) is looked for on the
// line of the branch that the volume is on; on it, and not along the log, seqs rise.

// Branch is one line of a group's history.
type Branch struct {
	ID      block.BranchID
	Parent  block.BranchID // zero: it is the first one
	Fork    Position       // the newest entry of the parent that is history of it
	ForkSeq block.Seq      // the end of that entry
	BeginN  uint64         // its first entry
	EndN    uint64         // its newest one
	Begin   time.Time      // of its first entry, by its author's clock
	Current bool           // it is the one that is written now
}

// stretch of the log that is history of a branch.
type lineSpan struct {
	branch   block.BranchID // whose entries they are
	from, to uint64
	after    block.Seq // at which the history before it ends
}

// line is what is history of a branch, in order.
type line []lineSpan

// volumeOn is a volume on a branch.
type volumeOn struct {
	branch block.BranchID
	volume block.VolumeIndex
}

// Branches are the lines of the group's history in the order in which they began.
func (h *History) Branches() []Branch {
	out := slices.Clone(h.branches)
	last := &out[len(out)-1]
	last.EndN, last.Current = h.N(), true
	return out
}

// Current is the id of the branch that is written now.
func (h *History) Current() block.BranchID { return h.branches[len(h.branches)-1].ID }

// CurrentVolumes are the volumes of the branch that is written now, in the order in
// which they joined.
func (h *History) CurrentVolumes() []Volume { return h.VolumesOn(h.Current()) }

// VolumesOn are the volumes of a branch, in the order in which they joined.
func (h *History) VolumesOn(b block.BranchID) []Volume {
	return slices.DeleteFunc(slices.Clone(h.volumes), func(v Volume) bool { return v.Branch != b })
}

// HandedOver reports whether the newest entry is the last word of its author: all that
// was acknowledged is history, and whoever goes on with the branch misses nothing.
func (h *History) HandedOver() bool { return h.newest.Handover != nil }

// spans are the stretches of the log that are history of a volume.
func (h *History) spans(v Volume) line { return h.lines[v.Branch] }

// floor is the newest entry up to n that is history of a volume; 0 if there is none.
func (h *History) floor(v Volume, n uint64) uint64 {
	n = min(n, h.N())
	for _, s := range slices.Backward(h.spans(v)) {
		if n >= s.from {
			return min(n, s.to)
		}
	}
	return 0
}

// ceil is the oldest entry from n on that is history of a volume; behind the end of the
// log if there is none.
func (h *History) ceil(v Volume, n uint64) uint64 {
	for _, s := range h.spans(v) {
		if n <= s.to {
			return max(n, s.from)
		}
	}
	return h.N() + 1
}

// holds reports whether an entry is history of a volume.
func (h *History) holds(v Volume, n uint64) bool { return n > 0 && h.floor(v, n) == n }

// eachOf visits the entries from entry from on that are history of a volume, in order,
// until visit returns false.
func (h *History) eachOf(ctx context.Context, v Volume, from uint64, visit func(*Entry) bool) error {
	for n := h.ceil(v, max(from, 1)); n <= h.N(); n = h.ceil(v, n+1) {
		e, err := h.Entry(ctx, n)
		if err != nil {
			return err
		}
		if !visit(e) {
			return nil
		}
	}
	return nil
}

// gapsOf visits a volume's gaps in the order of its history, until visit returns false.
func (h *History) gapsOf(v Volume, visit func(*Gap) bool) {
	for _, s := range h.spans(v) {
		gaps := h.gaps[volumeOn{s.branch, v.Index}]
		for i := range gaps {
			if g := &gaps[i]; g.BeginN <= s.to && !visit(g) {
				return
			}
		}
	}
}

// beginBranch takes in that entry e begins a branch.
func (h *History) beginBranch(ctx context.Context, e said) error {
	b := e.items.Branch
	wrong := func(format_ string, args ...any) error {
		return format.Corrupt(fmt.Sprintf("log entry %d", e.N), "it begins branch %s, and %s", b.ID, fmt.Sprintf(format_, args...))
	}
	parent, ok := h.lines[b.Parent]
	if _, again := h.lines[b.ID]; again || !ok {
		return wrong("there is no branch %s, or that one has begun already", b.Parent)
	}
	// A place that is history of the parent only as a volume of it can tell.
	on := Volume{Branch: b.Parent}
	if b.ForkN >= e.N || !h.holds(on, b.ForkN) {
		return wrong("entry %d is no history of branch %s before it", b.ForkN, b.Parent)
	}
	fork, err := h.Entry(ctx, b.ForkN)
	if err != nil {
		return err
	}
	if fork.Hash != b.ForkHash || fork.Range == nil || fork.Range.To != b.ForkSeq {
		return wrong("entry %d is another one than it forks from", b.ForkN)
	}
	var joined []Volume
	for _, v := range h.VolumesOn(b.Parent) {
		if v.JoinedN <= b.ForkN {
			joined = append(joined, v)
		}
	}
	slices.SortFunc(joined, func(x, y Volume) int { return cmp.Compare(x.Index, y.Index) })
	if len(joined) != len(b.Volumes) {
		return wrong("it names %d volumes of %d", len(b.Volumes), len(joined))
	}
	for i, v := range joined {
		if !h.isPoint(v, fork) {
			return wrong("entry %d is no checkpoint of volume %q", b.ForkN, v.Name)
		}
		named := b.Volumes[i]
		if _, taken := h.Volume(named.Name); taken || named.Index != v.Index {
			return wrong("volume %q cannot be %q on it", v.Name, named.Name)
		}
		v.Name, v.Branch = named.Name, b.ID
		joined[i] = v
	}
	var l line
	for _, s := range parent {
		if s.from <= b.ForkN {
			s.to = min(s.to, b.ForkN)
			l = append(l, s)
		}
	}
	h.endBranch(e.N - 1)
	h.lines[b.ID] = append(l, lineSpan{branch: b.ID, from: e.N, to: math.MaxUint64, after: b.ForkSeq})
	h.branches = append(h.branches, Branch{
		ID: b.ID, Parent: b.Parent, Fork: Position{b.ForkN, b.ForkHash}, ForkSeq: b.ForkSeq, BeginN: e.N, Begin: e.Time(),
	})
	h.volumes = append(slices.Clip(h.volumes), joined...)
	h.lastSeq = b.ForkSeq
	return nil
}

// firstBranch has the history begin.
func (h *History) firstBranch(g *format.Group) {
	h.branches = []Branch{{ID: g.Branch, BeginN: 1}}
	h.lines = map[block.BranchID]line{g.Branch: {{branch: g.Branch, from: 1, to: math.MaxUint64}}}
}

// endBranch ends the branch that was written, with entry n.
func (h *History) endBranch(n uint64) {
	last := h.branches[len(h.branches)-1]
	last.EndN = n
	h.branches = append(slices.Clone(h.branches[:len(h.branches)-1]), last) // others may share it
	l := slices.Clone(h.lines[last.ID])
	l[len(l)-1].to = n
	h.lines[last.ID] = l
}

// findBranch finds, of the branches that a volume's history is on, the one of which the
// id begins so.
func (h *History) findBranch(v Volume, prefix string) (lineSpan, error) {
	var known []string
	for _, s := range h.spans(v) {
		id := s.branch.String()
		if id == prefix || (len(prefix) >= 4 && len(id) >= len(prefix) && id[:len(prefix)] == prefix) {
			return s, nil
		}
		known = append(known, id[:8])
	}
	for _, b := range h.branches {
		if len(prefix) >= 4 && len(b.ID.String()) >= len(prefix) && b.ID.String()[:len(prefix)] == prefix {
			for _, other := range h.VolumesOn(b.ID) {
				if other.ID == v.ID {
					return lineSpan{}, fmt.Errorf("%w: on branch %s the volume is called %q: ask for that one", ErrNoSuchPoint, prefix, other.Name)
				}
			}
		}
	}
	return lineSpan{}, fmt.Errorf("%w: the history of volume %q has no branch %q: it is on branch %s", ErrNoSuchPoint, v.Name, prefix, strings.Join(known, ", "))
}
