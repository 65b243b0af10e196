package sim

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/control"
)

// lookAtLoser checks what a fenced host must be: its volumes refuse what changes
// them and can be read, and hold all that was acknowledged; and what it has and the
// history lacks is kept, and listed, all of it and nothing else.
func (r *rivals) lookAtLoser(h *rival) {
	for range 60 { // who waits for room waits in vain, and is told so
		if h.busy.Load() == 0 {
			break
		}
		time.Sleep(time.Second)
	}
	if n := h.busy.Load(); n > 0 && !h.l.isDead() {
		h.failf("%s is fenced, and %d requests have no answer a minute later", h.name, n)
	}
	h.ifProblem()
	for i := range h.plan.volumes {
		d := h.l.device(i)
		e := block.Extent{Len: h.sector(i)}
		for what, err := range map[string]error{
			"a write": d.WriteAt(h.l.ctx, make([]byte, e.Len), 0, block.WriteOptions{}),
			"a trim":  d.Zero(h.l.ctx, e, block.ZeroOptions{}),
		} {
			if !errors.Is(err, block.ErrReadOnly) && !h.l.isDead() {
				h.failf("%s is fenced, and %s to volume %d gets %v", h.name, what, i, err)
			}
		}
	}
	h.lookAtVolumes(h.l)
	k, err := h.l.agent.Kept(h.l.ctx)
	if h.l.isDead() {
		return
	}
	if err != nil {
		h.failf("what %s keeps cannot be listed: %v", h.name, err)
	}
	g := k.Groups[0]
	if !g.Fenced {
		h.failf("what %s keeps is not said to be of a fenced agent", h.name)
	}
	r.holds(h, "logged", g.Logged, 0)
	// What the history lacks: of what is in it this host may know less.
	end, lacks := h.model.end(), r.own(h)+1
	anew, regions := h.model.from(g.From)
	lacks = max(lacks, anew) // what was written before its last takeover is on its volumes
	if g.Writes > 0 && (g.From <= g.Logged || g.To != end || block.Seq(g.Writes) != g.To-g.From+1) || lacks <= end && (g.Writes == 0 || g.From > lacks) {
		h.failf("%s keeps %d writes, %d to %d behind %d, and %d to %d are not in the history", h.name, g.Writes, g.From, g.To, g.Logged, lacks, end)
	}
	r.count.kept += int(g.Writes)
	if g.Writes == 0 {
		return
	}
	for _, v := range g.Volumes {
		var want []control.KeptRegion
		regions[v.Index].All(func(e block.Extent, _ struct{}) bool {
			if n := len(want); n > 0 && want[n-1].Off+want[n-1].Len == e.Off {
				want[n-1].Len += e.Len
			} else {
				want = append(want, control.KeptRegion{Off: e.Off, Len: e.Len})
			}
			return true
		})
		// A batch of a host that compares its volume holds what differs as well, and one
		// of which a part is in the history, that.
		more := slices.ContainsFunc(g.Batches, func(b control.KeptBatch) bool { return !b.Logged && !b.InJournal })
		if !slices.Equal(want, v.Regions) && (!more || !covers(v.Regions, want)) {
			h.failf("%s keeps %v of volume %d, and what was written is %v", h.name, fmt.Sprint(v.Regions), v.Index, want)
		}
	}
}

// own is the end of the part of the history that a host has taken part in.
func (r *rivals) own(h *rival) block.Seq {
	for n := len(r.chain.decided); n > 0; n-- {
		if d := r.chain.decided[n-1]; r.chain.author(d.author) == h.world || uint64(n) <= h.known || d.to <= h.shared {
			return d.to
		}
	}
	return 0
}

// covers reports whether all of want is in have.
func covers(have, want []control.KeptRegion) bool {
	return !slices.ContainsFunc(want, func(w control.KeptRegion) bool {
		return !slices.ContainsFunc(have, func(h control.KeptRegion) bool { return h.Off <= w.Off && h.Off+h.Len >= w.Off+w.Len })
	})
}
