package restorer

import (
	"fmt"
	"slices"
	"sort"
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
}

// Point is a checkpoint of a volume that was chosen by Resolve.
type Point struct {
	Checkpoint
	Volume Volume
	Branch block.BranchID
	Hash   format.Hash // of the log entry: it stands for the whole history up to there
	Note   string      // what the user should know of the choice
}

// Checkpoints lists what can be restored of a volume, in log order.
func (h *History) Checkpoints(v Volume) []Checkpoint { return slices.Clone(h.points[v.Index]) }

// Gaps lists the volume's gaps, in log order.
func (h *History) Gaps(v Volume) []Gap { return slices.Clone(h.gaps[v.Index]) }

// Names lists the named checkpoints in log order.
func (h *History) Names() []Named {
	var out []Named
	for i := range h.Entries {
		for _, c := range h.Entries[i].Names {
			out = append(out, Named{c.Name, c.Seq, time.Unix(0, c.Time)})
		}
	}
	return out
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
func (h *History) Resolve(volume, point string) (Point, error) {
	v, ok := h.Volume(volume)
	if !ok {
		return Point{}, fmt.Errorf("%w as %q in group %q", ErrNoSuchVolume, volume, h.Group.Name)
	}
	points := h.points[v.Index]
	if len(points) == 0 {
		return Point{}, fmt.Errorf("%w: volume %q has no checkpoint yet: its first sync has not ended", ErrNoSuchPoint, volume)
	}
	newest := points[len(points)-1]
	if point == "" || point == "latest" {
		p := h.point(v, newest)
		if g := h.openGap(v); g != nil {
			p.note("the newest checkpoint is older than the newest data: a gap began after seq %s (%s), and its resync has not ended", g.After, g.Reason)
		}
		return p, nil
	}
	if text, ok := strings.CutPrefix(point, "seq:"); ok {
		return h.resolveSeq(v, text)
	}
	if p, ok, err := h.resolveName(v, point); ok {
		return p, err
	}
	if strings.HasPrefix(point, "-") {
		d, err := time.ParseDuration(point)
		if err != nil {
			return Point{}, fmt.Errorf("%w: %q is no duration: write -15m or -2h30m", ErrNoSuchPoint, point)
		}
		return h.resolveTime(v, newest.Time.Add(d))
	}
	if t, ok := parseTime(point); ok {
		return h.resolveTime(v, t)
	}
	return Point{}, fmt.Errorf("%w: %q is no checkpoint's name, and no time (%s), duration (-15m), seq:N or latest; %s",
		ErrNoSuchPoint, point, "2006-01-02 15:04:05 or RFC 3339", h.extent(v))
}

func (p *Point) note(format string, args ...any) {
	if p.Note != "" {
		p.Note += "; "
	}
	p.Note += fmt.Sprintf(format, args...)
}

func (h *History) point(v Volume, c Checkpoint) Point {
	e := &h.Entries[c.N-1]
	p := Point{Checkpoint: c, Volume: v, Branch: e.Range.Branch, Hash: e.Hash}
	if c.Unconfirmed {
		p.note("unconfirmed: too few stores answered to be sure that this entry was decided")
	}
	return p
}

// extent says what range of a volume's history exists.
func (h *History) extent(v Volume) string {
	points := h.points[v.Index]
	a, b := points[0], points[len(points)-1]
	return fmt.Sprintf("volume %q has %d checkpoints from seq %s (%s) to seq %s (%s)", v.Name, len(points), a.Seq, stamp(a.Time), b.Seq, stamp(b.Time))
}

func stamp(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05.000 -0700") }

func (h *History) openGap(v Volume) *Gap {
	for i := range h.gaps[v.Index] {
		if g := &h.gaps[v.Index][i]; g.Open {
			return g
		}
	}
	return nil
}

// gapAfter is the gap that lies between checkpoint i of a volume and the next
// one, or nil.
func (h *History) gapAfter(v Volume, i int) *Gap {
	points := h.points[v.Index]
	next := uint64(len(h.Entries) + 1)
	if i+1 < len(points) {
		next = points[i+1].N
	}
	for j := range h.gaps[v.Index] {
		if g := &h.gaps[v.Index][j]; g.BeginN > points[i].N && g.BeginN <= next {
			return g
		}
	}
	return nil
}

func (h *History) resolveSeq(v Volume, text string) (Point, error) {
	digits, branch, hasBranch := strings.Cut(text, "@")
	seq, err := block.ParseSeq(digits)
	if err != nil {
		return Point{}, fmt.Errorf("%w: %q: %w", ErrNoSuchPoint, "seq:"+text, err)
	}
	if hasBranch && branch != h.Group.Branch.String() && (len(branch) < 4 || !strings.HasPrefix(h.Group.Branch.String(), branch)) {
		return Point{}, fmt.Errorf("%w: there is no branch %q: the group has branch %s", ErrNoSuchPoint, branch, h.Group.Branch)
	}
	points := h.points[v.Index]
	i := sort.Search(len(points), func(i int) bool { return points[i].Seq >= seq })
	if i < len(points) && points[i].Seq == seq {
		return h.point(v, points[i]), nil
	}
	return Point{}, fmt.Errorf("%w: seq %s is no checkpoint of volume %q: %s", ErrNoSuchPoint, seq, v.Name, h.neighbours(v, i))
}

// neighbours names the checkpoints around place i, where one is missing.
func (h *History) neighbours(v Volume, i int) string {
	points := h.points[v.Index]
	var parts []string
	if i > 0 {
		parts = append(parts, fmt.Sprintf("the one before is seq:%s (%s)", points[i-1].Seq, stamp(points[i-1].Time)))
	}
	if i < len(points) {
		parts = append(parts, fmt.Sprintf("the one after is seq:%s (%s)", points[i].Seq, stamp(points[i].Time)))
	}
	if i > 0 {
		if g := h.gapAfter(v, i-1); g != nil {
			parts = append(parts, fmt.Sprintf("between them is a gap (%s)", g.Reason))
		}
	}
	return strings.Join(parts, ", ")
}

// resolveName reports whether point is the name of a checkpoint.
func (h *History) resolveName(v Volume, point string) (Point, bool, error) {
	var found *format.NamedCheckpoint
	count := 0
	for i := range h.Entries {
		for j := range h.Entries[i].Names {
			if c := &h.Entries[i].Names[j]; c.Name == point {
				found = c
				count++
			}
		}
	}
	if found == nil {
		return Point{}, false, nil
	}
	points := h.points[v.Index]
	i := sort.Search(len(points), func(i int) bool { return points[i].Seq > found.Seq }) - 1
	if i < 0 {
		return Point{}, true, fmt.Errorf("%w: checkpoint %q (seq %s) is older than the history of volume %q; %s", ErrNoSuchPoint, point, found.Seq, v.Name, h.extent(v))
	}
	exact := points[i].Seq == found.Seq
	gap := h.gapAfter(v, i)
	if !exact && (gap == nil || gap.After > found.Seq) {
		return Point{}, true, fmt.Errorf("%w: checkpoint %q is at seq %s, which is no checkpoint of volume %q: %s", ErrNoSuchPoint, point, found.Seq, v.Name, h.neighbours(v, i+1))
	}
	p := h.point(v, points[i])
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

func (h *History) resolveTime(v Volume, t time.Time) (Point, error) {
	points := h.points[v.Index]
	at := -1
	for i := len(points) - 1; i >= 0; i-- {
		if !points[i].Time.After(t) {
			at = i
			break
		}
	}
	if at < 0 {
		return Point{}, fmt.Errorf("%w: nothing is as old as %s; %s", ErrNoSuchPoint, stamp(t), h.extent(v))
	}
	p := h.point(v, points[at])
	for i := range at {
		if points[i].Time.After(t) {
			p.note("the clock was set back: seq %s (%s) is later by the clock and earlier in the history; this is the last checkpoint in the order of the history that is not later than %s",
				points[i].Seq, stamp(points[i].Time), stamp(t))
			break
		}
	}
	if g := h.gapAfter(v, at); g != nil && points[at].Time.Before(t) {
		end := "which has not ended"
		if !g.Open {
			end = "which ended at seq " + g.Until.String()
		}
		p.note("%s lies in a gap after seq %s (%s), %s: this is the checkpoint before the gap", stamp(t), g.After, g.Reason, end)
	}
	return p, nil
}
