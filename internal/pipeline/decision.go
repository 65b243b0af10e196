package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/crypt"
	"drc/restorer"
	"drc/vbuf"
)

// Order is what a human has decided about a volume whose acknowledged writes may
// be lost with the buffer.
type Order int

const (
	// OrderNone means: nothing. The group waits for a decision.
	OrderNone Order = iota
	// OrderResync keeps the volume as it is. It may not be crash-consistent.
	OrderResync
	// OrderRewind brings the volume back to its newest checkpoint.
	OrderRewind
)

// DecisionError says that acknowledged writes of a volume may be lost, and that
// nobody but a human can decide what to go on with. Nothing was changed.
type DecisionError struct {
	Volume string
	Reason string
	Cut    bool // a rewind was cut short: the right buffer alone is no way out any more
}

func (e *DecisionError) Error() string {
	if e.Cut {
		return fmt.Sprintf("volume %s: %s. Nothing was changed by this start. Start again with --rewind %s (it goes on to the newest checkpoint; drc history %s shows it) or with --resync %s (keep the volume as it is, a mixture of two states). If the buffer that was used last is at hand, restore the volume instead: drc restore %s TARGET --with-buffer DIR",
			e.Volume, e.Reason, e.Volume, e.Volume, e.Volume, e.Volume)
	}
	return fmt.Sprintf("volume %s: %s. Acknowledged writes may be missing on the volume; nothing was changed. If the right buffer is at hand, start again with it in place of this one (--buffer). If it is lost for good, decide, and start again with --rewind %s (back to the newest checkpoint; drc history %s shows it) or with --resync %s (keep the volume as it is; it may not be crash-consistent)",
		e.Volume, e.Reason, e.Volume, e.Volume, e.Volume)
}

// undecided is a group that waits for a decision.
type undecided struct {
	name    string
	volumes []VolumeConfig
	err     *DecisionError
}

func (u undecided) status() control.Group {
	s := control.Group{Name: u.name, State: "needs-decision", Message: u.err.Error(), Volumes: []control.Volume{}}
	for _, v := range u.volumes {
		s.Volumes = append(s.Volumes, control.Volume{Name: v.Name, Path: v.Path, SizeBytes: v.SizeBytes, Exports: []string{}})
	}
	return s
}

// decide takes what was ordered for a volume, or says that a decision is needed.
func (g *group) decide(v *volume, reason string) error {
	order := g.a.cfg.Orders[v.cfg.Name]
	if order == OrderNone {
		return &DecisionError{Volume: v.cfg.Name, Reason: reason}
	}
	v.plan.order = order
	return nil
}

// decided reports whether somebody has decided what to go on with: then what this
// host had in the buffer is not known any more.
func (g *group) decided() bool {
	return slices.ContainsFunc(g.volumes, func(v *volume) bool { return v.plan.order != OrderNone })
}

// checkOrders warns of decisions that nobody needs.
func (g *group) checkOrders() {
	for _, v := range g.volumes {
		if g.a.cfg.Orders[v.cfg.Name] != OrderNone && v.plan.order == OrderNone {
			g.logger.Warn("nothing had to be decided about this volume: --rewind and --resync change nothing", "volume", v.cfg.Name)
		}
	}
}

// openJournal opens the group's journal, also if durable records of it are lost.
func (g *group) openJournal(ctx context.Context) (err error) {
	g.journal, err = g.a.buffer.Journal(ctx, g.st.ID)
	var damage *vbuf.DamageError
	if !errors.As(err, &damage) {
		return err
	}
	g.logger.Error("the buffer has lost writes that were durable", "error", damage)
	if g.journal, err = g.a.buffer.JournalDamaged(ctx, g.st.ID); err != nil {
		return err
	}
	for _, r := range g.journal.Damaged() {
		g.damagedTo = max(g.damagedTo, r.To)
	}
	return nil
}

// judgeRewinds has a human decide about volumes of which a rewind was begun and not
// ended: also with the right buffer, as its journal does not hold all that was taken
// off them. anew reports that there are some; the journal has to begin anew then.
func (g *group) judgeRewinds() (anew bool, err error) {
	for _, v := range g.volumes {
		r := v.plan.record
		if r == nil || !r.Rewound || r.Group != g.st.ID.String() {
			continue
		}
		if err := g.decide(v, "a rewind of it was begun and has not ended, so that parts of it are older than others"); err != nil {
			var undecided *DecisionError
			if errors.As(err, &undecided) {
				undecided.Cut = true
			}
			return false, err
		}
		anew = true
	}
	return anew, nil
}

// judgeDamage decides what the loss of journal records up to damagedTo means. If
// every volume has them, only their history is lost: a gap, and a resync. It
// returns the last seq that is lost so. If a volume lacks some of them, a human
// decides, and the journal has to begin anew.
func (g *group) judgeDamage() (dropped block.Seq, anew bool, err error) {
	if g.damagedTo == 0 || g.damagedTo <= g.safe {
		return 0, false, nil // it is history already
	}
	for _, v := range g.volumes {
		r := v.plan.record
		ours := v.plan.finding == capture.FindingClean || v.plan.finding == capture.FindingReplay
		if v.plan.fresh || (ours && r.Applied >= g.damagedTo) {
			continue
		}
		if err := g.decide(v, fmt.Sprintf("the buffer has lost durable writes up to seq %s that the volume does not have", g.damagedTo)); err != nil {
			return 0, false, err
		}
		anew = true
	}
	return g.damagedTo, anew, nil
}

// replayIntact brings what can still be read of a damaged journal onto the
// volumes, before it begins anew: all but those that are rewound.
func (g *group) replayIntact() error {
	end := g.journal.Next() - 1
	for _, v := range g.volumes {
		p := &v.plan
		ours := p.finding == capture.FindingClean || p.finding == capture.FindingReplay
		if p.fresh || !ours || p.order == OrderRewind || p.record.Applied >= end {
			continue
		}
		if err := p.backing.Claim(g.a.cfg.State.Backings(), p.record); err != nil {
			return err
		}
		from := max(p.record.Applied+1, g.journal.First())
		for _, r := range append(g.journal.Damaged(), vbuf.Range{From: end + 1, To: end + 1}) {
			if from < r.From {
				if _, err := capture.Replay(p.backing, v.desc.Index, g.journal, from-1, min(r.From-1, end)); err != nil {
					return err
				}
			}
			from = max(from, r.To+1)
		}
	}
	return nil
}

// rewindBytes is how much of a volume is compared at a time.
const rewindBytes = 4 << 20

// rewind brings a volume back to its newest checkpoint, writing only what
// differs. A crash in between leaves it between the two, which its record says: a
// decision is needed again, whatever buffer is given (judgeRewinds).
func (g *group) rewind(ctx context.Context, v *volume) error {
	cfg := g.a.restorerConfig()
	h, err := restorer.OpenHistory(ctx, cfg, g.st.ID)
	if err != nil {
		return fmt.Errorf("rewind volume %s: %w", v.cfg.Name, err)
	}
	defer h.Close()
	im, err := restorer.OpenImage(ctx, h, v.cfg.Name, "latest")
	if err != nil {
		return fmt.Errorf("rewind volume %s: %w", v.cfg.Name, err)
	}
	b := v.plan.backing
	if size := im.Geometry().SizeBytes; size != b.Size() {
		return fmt.Errorf("rewind volume %s: its newest checkpoint has %d bytes, and %s has %d", v.cfg.Name, size, v.plan.path, b.Size())
	}
	record := capture.Record{
		Repo: g.a.cfg.Repo.ID.String(), Group: g.st.ID.String(), Volume: v.desc.ID.String(), Branch: g.st.branch().String(), SectorSz: int(v.desc.SectorSize),
	}
	if r := v.plan.record; r != nil && r.Group == record.Group {
		record = *r
	}
	if err := b.ClaimRewind(g.a.cfg.State.Backings(), record); err != nil {
		return err
	}
	p := im.Point()
	g.logger.Warn("rewinding the volume to its newest checkpoint", "volume", v.cfg.Name, "seq", p.Seq.String(), "time", p.Time.UTC().String())
	hasher := crypt.NewChunkHasher(g.st.Group.ChunkIDKey)
	have, want := make([]byte, rewindBytes), make([]byte, rewindBytes)
	written := int64(0)
	for off := int64(0); off < b.Size(); off += rewindBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := block.Extent{Off: off, Len: min(rewindBytes, b.Size()-off)}
		if err := b.ReadAt(have[:e.Len], e.Off); err != nil {
			return err
		}
		extents, err := im.Extents(ctx, e)
		if err != nil {
			return fmt.Errorf("rewind volume %s: %w", v.cfg.Name, err)
		}
		at := e.Off
		differs := false
		for _, x := range extents {
			gap := have[at-e.Off : x.Off-e.Off]
			part := have[x.Off-e.Off : x.End()-e.Off]
			at = x.End()
			same := x.Offset == 0 && x.Len == int64(x.ChunkLen) && hasher.ID(part) == crypt.ChunkID(x.ChunkID)
			if x.Zero {
				same = isZero(part)
			}
			if !same || !isZero(gap) {
				differs = true
				break
			}
		}
		if !differs && isZero(have[at-e.Off:e.Len]) {
			continue
		}
		if err := im.ReadAt(ctx, want[:e.Len], e.Off); err != nil {
			return fmt.Errorf("rewind volume %s: %w", v.cfg.Name, err)
		}
		n, err := writeDifferences(b, e, have[:e.Len], want[:e.Len])
		if err != nil {
			return err
		}
		written += n
	}
	if err := b.Sync(); err != nil {
		return err
	}
	g.logger.Info("the volume is at its newest checkpoint", "volume", v.cfg.Name, "seq", p.Seq.String(), "bytes_written", written)
	return nil
}

// writeDifferences writes the blocks of want that differ from have.
func writeDifferences(b *capture.Backing, e block.Extent, have, want []byte) (written int64, err error) {
	const unit = 64 << 10
	for at := 0; at < len(want); at += unit {
		end := min(at+unit, len(want))
		switch {
		case bytes.Equal(have[at:end], want[at:end]):
			continue
		case isZero(want[at:end]):
			err = b.Zero(block.Extent{Off: e.Off + int64(at), Len: int64(end - at)}, false)
		default:
			err = b.WriteAt(want[at:end], e.Off+int64(at))
		}
		if err != nil {
			return written, err
		}
		written += int64(end - at)
	}
	return written, nil
}

func isZero(p []byte) bool {
	return len(p) == 0 || (p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]))
}

// CheckOrders refuses decisions about volumes that are not there.
func CheckOrders(orders map[string]Order, vols []VolumeConfig) error {
	for name := range orders {
		if !slices.ContainsFunc(vols, func(v VolumeConfig) bool { return v.Name == name }) {
			var names []string
			for _, v := range vols {
				names = append(names, v.Name)
			}
			return fmt.Errorf("there is no volume %s to rewind or resync; there are: %s", name, strings.Join(names, ", "))
		}
	}
	return nil
}
