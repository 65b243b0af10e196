package restorer

import (
	"context"
	"fmt"
	"strings"
	"time"

	"drc/internal/block"
	"drc/internal/format"
)

// Checkpoint is a seq of a volume that can be restored.
type Checkpoint struct {
	N           uint64 // the log entry that ends there
	Seq         block.Seq
	Time        time.Time // of the entry
	Names       []string
	Unconfirmed bool
}

// Named is a named checkpoint.
type Named struct {
	Name string
	Seq  block.Seq
	Time time.Time // when it was asked for
	n    uint64    // the entry that says so
}

// Point is a checkpoint of a volume that was chosen by Resolve.
type Point struct {
	Checkpoint
	Volume Volume
	Branch block.BranchID
	Hash   format.Hash // of the log entry: it stands for the whole history up to there
	Note   string      // what the user should know of the choice
}

// Gaps lists the volume's gaps, in log order.
func (h *History) Gaps(v Volume) (all []Gap) {
	h.gapsOf(v, func(g *Gap) bool {
		all = append(all, *g)
		return true
	})
	return all
}

// Names lists the named checkpoints that the history of a volume has, in log order.
func (h *History) Names(v Volume) (all []Named) {
	for _, n := range h.named {
		if h.holds(v, n.n) {
			all = append(all, n)
		}
	}
	return all
}

// timeLayouts are read in local time unless they say otherwise.
var timeLayouts = []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02 15:04:05.999999999", "2006-01-02 15:04", "2006-01-02"}

func parseTime(text string) (time.Time, bool) {
	for _, layout := range timeLayouts {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// Resolve finds the checkpoint of a volume that point means: "latest" (or
// nothing), a checkpoint's name, "seq:N" or "seq:N@BRANCH", a duration counted
// back from the newest checkpoint ("-15m"), or a time. A time means the last
// checkpoint in log order that is not later. Where there is no such point the
// error is ErrNoSuchPoint and says what there is.
func (h *History) Resolve(ctx context.Context, volume, point string) (Point, error) {
	v, ok := h.Volume(volume)
	if !ok {
		return Point{}, fmt.Errorf("%w as %q in group %q", ErrNoSuchVolume, volume, h.Group.Name)
	}
	newest, err := h.before(ctx, v, h.N(), nil)
	if err != nil {
		return Point{}, err
	}
	if newest == nil {
		return Point{}, fmt.Errorf("%w: volume %q has no checkpoint yet: its first sync has not ended", ErrNoSuchPoint, volume)
	}
	if point == "" || point == "latest" {
		p, err := h.point(ctx, v, *newest)
		if g := h.openGap(v); err == nil && g != nil {
			p.note("the newest checkpoint is older than the newest data: a gap began after seq %s (%s), and its resync has not ended", g.After, g.Reason)
		}
		return p, err
	}
	if text, ok := strings.CutPrefix(point, "seq:"); ok {
		return h.resolveSeq(ctx, v, text)
	}
	if p, ok, err := h.resolveName(ctx, v, point); ok {
		return p, err
	}
	if strings.HasPrefix(point, "-") {
		d, err := time.ParseDuration(point)
		if err != nil {
			return Point{}, fmt.Errorf("%w: %q is no duration: write -15m or -2h30m", ErrNoSuchPoint, point)
		}
		return h.resolveTime(ctx, v, newest.Time.Add(d))
	}
	if t, ok := parseTime(point); ok {
		return h.resolveTime(ctx, v, t)
	}
	return Point{}, fmt.Errorf("%w: %q is no checkpoint's name, and no time (%s), duration (-15m), seq:N or latest; %s",
		ErrNoSuchPoint, point, "2006-01-02 15:04:05 or RFC 3339", h.extent(ctx, v))
}

// At is the checkpoint of a volume at the end of entry n, of which the value has
// this hash. If the history has another entry there, or it is no checkpoint, the
// error is ErrNoSuchPoint.
func (h *History) At(ctx context.Context, v Volume, n uint64, hash format.Hash) (Point, error) {
	if n == 0 || n > h.N() {
		return Point{}, fmt.Errorf("%w: log entry %d of volume %q: the history that can be read has %d", ErrNoSuchPoint, n, v.Name, h.N())
	}
	e, err := h.Entry(ctx, n)
	if err != nil {
		return Point{}, err
	}
	if e.Hash != hash || !h.isPoint(v, e) {
		return Point{}, fmt.Errorf("%w: log entry %d of volume %q is not the one that was meant, or no checkpoint of it", ErrNoSuchPoint, n, v.Name)
	}
	return h.point(ctx, v, h.checkpoint(v, e))
}

func (p *Point) note(format string, args ...any) {
	if p.Note != "" {
		p.Note += "; "
	}
	p.Note += fmt.Sprintf(format, args...)
}

func (h *History) point(ctx context.Context, v Volume, c Checkpoint) (Point, error) {
	e, err := h.Entry(ctx, c.N)
	if err != nil {
		return Point{}, err
	}
	p := Point{Checkpoint: c, Volume: v, Branch: e.Range.Branch, Hash: e.Hash}
	if c.Unconfirmed {
		p.note("unconfirmed: too few stores answered to be sure that this entry was decided")
	}
	return p, nil
}

func stamp(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05.000 -0700") }

func (h *History) openGap(v Volume) (open *Gap) {
	h.gapsOf(v, func(g *Gap) bool {
		if g.Open {
			open = g
		}
		return open == nil
	})
	return open
}

// gapBetween is the gap of a volume that began behind entry n and not behind entry
// next, or nil. Where there is no next checkpoint, next is 0.
func (h *History) gapBetween(v Volume, n, next uint64) (between *Gap) {
	if next == 0 {
		next = h.N() + 1
	}
	h.gapsOf(v, func(g *Gap) bool {
		if g.BeginN > n && g.BeginN <= next {
			between = g
		}
		return between == nil
	})
	return between
}

// gapAfter is the gap that lies between a checkpoint and the next one, or nil.
func (h *History) gapAfter(ctx context.Context, v Volume, c *Checkpoint) (*Gap, error) {
	next, err := h.after(ctx, v, c.N)
	if err != nil || next == nil {
		return h.gapBetween(v, c.N, 0), err
	}
	return h.gapBetween(v, c.N, next.N), nil
}

// around are the checkpoint at or before seq, and the one behind it; either may be
// nil. With on they are looked for on that branch only.
func (h *History) around(ctx context.Context, v Volume, seq block.Seq, on *lineSpan) (at, next *Checkpoint, err error) {
	n, err := h.upTo(ctx, v, seq, on)
	if err != nil {
		return nil, nil, err
	}
	end := h.N()
	if on != nil {
		end = on.to
	}
	if at, err = h.beforeIn(ctx, v, n, end, nil); err != nil {
		return nil, nil, err
	}
	if next, err = h.after(ctx, v, n); on != nil {
		if at != nil && at.N < on.from {
			at = nil
		}
		if next != nil && next.N > on.to {
			next = nil
		}
	}
	return at, next, err
}

func (h *History) resolveSeq(ctx context.Context, v Volume, text string) (Point, error) {
	digits, branch, hasBranch := strings.Cut(text, "@")
	seq, err := block.ParseSeq(digits)
	if err != nil {
		return Point{}, fmt.Errorf("%w: %q: %w", ErrNoSuchPoint, "seq:"+text, err)
	}
	var on *lineSpan
	if hasBranch {
		s, err := h.findBranch(v, branch)
		if err != nil {
			return Point{}, err
		}
		on = &s
	}
	at, next, err := h.around(ctx, v, seq, on)
	if err != nil {
		return Point{}, err
	}
	if at != nil && at.Seq == seq {
		return h.point(ctx, v, *at)
	}
	return Point{}, fmt.Errorf("%w: seq %s is no checkpoint of volume %q: %s", ErrNoSuchPoint, seq, v.Name, h.neighbours(v, at, next))
}

// neighbours names the checkpoints between which one is missing.
func (h *History) neighbours(v Volume, at, next *Checkpoint) string {
	var parts []string
	if at != nil {
		parts = append(parts, fmt.Sprintf("the one before is seq:%s (%s)", at.Seq, stamp(at.Time)))
	}
	end := uint64(0)
	if next != nil {
		parts = append(parts, fmt.Sprintf("the one after is seq:%s (%s)", next.Seq, stamp(next.Time)))
		end = next.N
	}
	if at != nil {
		if g := h.gapBetween(v, at.N, end); g != nil {
			parts = append(parts, fmt.Sprintf("between them is a gap (%s)", g.Reason))
		}
	}
	return strings.Join(parts, ", ")
}

// resolveName reports whether point is the name of a checkpoint.
func (h *History) resolveName(ctx context.Context, v Volume, point string) (Point, bool, error) {
	var found *Named
	count := 0
	for i := range h.named {
		if h.named[i].Name == point && h.holds(v, h.named[i].n) {
			found = &h.named[i]
			count++
		}
	}
	if found == nil {
		return Point{}, false, nil
	}
	at, next, err := h.around(ctx, v, found.Seq, nil)
	switch {
	case err != nil:
		return Point{}, true, err
	case at == nil:
		return Point{}, true, fmt.Errorf("%w: checkpoint %q (seq %s) is older than the history of volume %q; %s", ErrNoSuchPoint, point, found.Seq, v.Name, h.extent(ctx, v))
	}
	exact := at.Seq == found.Seq
	end := uint64(0)
	if next != nil {
		end = next.N
	}
	gap := h.gapBetween(v, at.N, end)
	if !exact && (gap == nil || gap.After > found.Seq) {
		return Point{}, true, fmt.Errorf("%w: checkpoint %q is at seq %s, which is no checkpoint of volume %q: %s", ErrNoSuchPoint, point, found.Seq, v.Name, h.neighbours(v, at, next))
	}
	p, err := h.point(ctx, v, *at)
	if err != nil {
		return Point{}, true, err
	}
	if !exact {
		p.note("checkpoint %q (seq %s) lies in a gap (%s): this is the checkpoint before the gap", point, found.Seq, gap.Reason)
	}
	if count > 1 {
		p.note("%d checkpoints are named %q: this is the newest", count, point)
	}
	if _, ok := parseTime(point); ok {
		p.note("%q is a checkpoint's name, and was not read as a time", point)
	}
	return p, true, nil
}

func (h *History) resolveTime(ctx context.Context, v Volume, t time.Time) (Point, error) {
	at, err := h.before(ctx, v, h.N(), &t)
	if err != nil {
		return Point{}, err
	}
	if at == nil {
		return Point{}, fmt.Errorf("%w: nothing is as old as %s; %s", ErrNoSuchPoint, stamp(t), h.extent(ctx, v))
	}
	p, err := h.point(ctx, v, *at)
	if err != nil {
		return Point{}, err
	}
	earlier, err := h.laterBefore(ctx, v, at.N, t)
	if err != nil {
		return Point{}, err
	}
	if earlier != nil {
		p.note("the clock was set back: seq %s (%s) is later by the clock and earlier in the history; this is the last checkpoint in the order of the history that is not later than %s",
			earlier.Seq, stamp(earlier.Time), stamp(t))
	}
	g, err := h.gapAfter(ctx, v, at)
	if err != nil {
		return Point{}, err
	}
	if g != nil && at.Time.Before(t) {
		end := "which has not ended"
		if !g.Open {
			end = "which ended at seq " + g.Until.String()
		}
		p.note("%s lies in a gap after seq %s (%s), %s: this is the checkpoint before the gap", stamp(t), g.After, g.Reason, end)
	}
	return p, nil
}
