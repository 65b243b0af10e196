package pipeline

import (
	"errors"
	"fmt"
	"os"

	"drc/capture"
	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
	"drc/segmenter"
)

// plan is what a start has to do for a volume.
type plan struct {
	path    string
	backing *capture.Backing // until the volume takes it over
	created bool
	fresh   bool // the volume has just joined its group
	finding capture.Finding
	record  *capture.Record

	replayFrom block.Seq        // replay the journal from here, if not 0
	resync     []block.Extent   // regions to read
	begin      *format.GapBegin // the gap that the resync opens
	after      block.Seq        // history up to here is right in spite of the resync
	noHistory  bool             // there is nothing to compare with
	order      Order            // what was decided about it, if that was needed
}

// openBackings opens and inspects the files of all volumes.
func (g *group) openBackings(vols []VolumeConfig) error {
	for i, cfg := range vols {
		v := g.volumes[i]
		o := capture.BackingOptions{Machine: g.a.cfg.Machine}
		if v.plan.fresh {
			o.CreateBytes = cfg.SizeBytes
			if cfg.SizeBytes%512 != 0 || cfg.SizeBytes < 0 {
				return fmt.Errorf("volume %s: size %d is not a multiple of 512 bytes", cfg.Name, cfg.SizeBytes)
			}
		}
		b, created, err := capture.OpenBacking(cfg.Path, o)
		if err != nil {
			if !v.plan.fresh && errors.Is(err, capture.ErrMissing) {
				return fmt.Errorf("volume %s: %s does not exist: correct the path; if it is lost, restore it first: drc restore %s %s", cfg.Name, cfg.Path, cfg.Name, cfg.Path)
			}
			if other := g.a.sameFile(cfg); other != "" && errors.Is(err, capture.ErrInUse) {
				return fmt.Errorf("volumes %s and %s have the same file, %s: correct one of the paths: %w", other, cfg.Name, cfg.Path, err)
			}
			if !v.plan.fresh {
				return fmt.Errorf("volume %s: %w (if it is lost, restore it first: drc restore %s %s)", cfg.Name, err, cfg.Name, cfg.Path)
			}
			return fmt.Errorf("volume %s: %w", cfg.Name, err)
		}
		v.plan.path, v.plan.backing, v.plan.created = b.Path(), b, created
		if err := g.describeVolume(v); err != nil {
			return err
		}
		if created {
			continue
		}
		if v.plan.finding, v.plan.record, err = capture.Inspect(g.a.cfg.State.Backings(), v.desc.ID.String(), b); err != nil {
			return err
		}
		if r := v.plan.record; r != nil && v.plan.finding != capture.FindingNew && r.Volume != v.desc.ID.String() {
			if !v.plan.fresh || r.Repo == g.a.cfg.Repo.ID.String() {
				return fmt.Errorf("%s is the backing of another volume of this host (id %s): correct the path of volume %s", b.Path(), r.Volume, cfg.Name)
			}
			v.plan.finding, v.plan.record = capture.FindingNew, nil
		}
		// Seqs of another branch say nothing of this one.
		if r := v.plan.record; r != nil && r.Group == g.st.ID.String() && r.Branch != g.st.branch().String() {
			v.plan.finding, v.plan.record = capture.FindingNew, nil
		}
	}
	return nil
}

// sameFile names another volume of this agent whose path leads to the same file.
func (a *Agent) sameFile(cfg VolumeConfig) string {
	st, err := os.Stat(cfg.Path)
	if err != nil {
		return ""
	}
	for _, other := range a.cfg.Volumes {
		if at, err := os.Stat(other.Path); other.Name != cfg.Name && err == nil && os.SameFile(st, at) {
			return other.Name
		}
	}
	return ""
}

// describeVolume checks a backing's size against what the history says, or
// notes the size of a volume that is new.
func (g *group) describeVolume(v *volume) error {
	b := v.plan.backing
	if b.Size() == 0 {
		return fmt.Errorf("volume %s: %s is empty: give size=… with a path that does not exist yet", v.cfg.Name, b.Path())
	}
	if v.plan.fresh {
		if b.Size()%int64(b.Sector()) != 0 {
			return fmt.Errorf("volume %s: the size of %s, %d bytes, is not a multiple of %d: extend the file, as by truncate -s %%%d %s", v.cfg.Name, b.Path(), b.Size(), b.Sector(), b.Sector(), b.Path())
		}
		v.desc.SizeBytes, v.desc.SectorSize = b.Size(), uint32(b.Sector())
		for i := range g.st.Volumes {
			if g.st.Volumes[i].Index == v.desc.Index {
				g.st.Volumes[i] = v.desc
			}
		}
		if v.cfg.SizeBytes > 0 && b.Size() != v.cfg.SizeBytes {
			return fmt.Errorf("volume %s: %s has %d bytes, and size=%d was given: leave the size out to use the file as it is", v.cfg.Name, b.Path(), b.Size(), v.cfg.SizeBytes)
		}
		return nil
	}
	switch {
	case b.Size() < v.desc.SizeBytes:
		return fmt.Errorf("volume %s: %s has %d bytes, and the history says %d: it was cut short; restore it, or correct the path", v.cfg.Name, b.Path(), b.Size(), v.desc.SizeBytes)
	case b.Size() > v.desc.SizeBytes:
		return fmt.Errorf("volume %s: %s has %d bytes, and the history says %d: growing a volume is not there yet; cut the file back", v.cfg.Name, b.Path(), b.Size(), v.desc.SizeBytes)
	}
	if v.desc.SectorSize == 512 && b.Sector() == 4096 {
		return fmt.Errorf("volume %s: %s has sectors of 4096 bytes, and the history says 512: use a device with sectors of 512 bytes, or a file", v.cfg.Name, b.Path())
	}
	return nil
}

// planVolumes decides for each volume between nothing, replay and resync. last
// is the newest Seq that this host knows of. The history is complete up to known;
// with lost the writes behind that are gone.
func (g *group) planVolumes(last, known block.Seq, lost bool, batches []*batch.Batch) {
	for _, v := range g.volumes {
		p := &v.plan
		whole := []block.Extent{{Len: v.desc.SizeBytes}}
		open, resuming := openResync(v.desc.Index, g.resyncs, g.prog, batches)
		if !resuming {
			open.After = known
		} else if g.unsaid { // what was to say that it has begun, and how far it has come, is lost
			open.Begun, open.Remaining = false, whole
		}
		open.endsAt(known)
		reason := open.Reason
		switch {
		case p.created:
			continue
		case p.fresh || (p.finding == capture.FindingNew && g.prog.N == 0):
			p.noHistory, resuming = g.noHistory(), false
			empty, err := p.backing.Empty()
			if err == nil && empty && (p.fresh || p.noHistory) {
				p.noHistory = true
				continue
			}
			p.noHistory = p.noHistory || p.fresh
			p.resync, open.After, reason = whole, 0, format.GapInitialSync
		case p.order != OrderNone:
			p.resync, p.noHistory = whole, g.noHistory()
			reason = max(reason, format.GapBufferLost)
		case (p.finding == capture.FindingClean || p.finding == capture.FindingReplay) && !lost && g.reaches(p.record.Applied, last):
			if p.record.Applied < last {
				p.replayFrom = p.record.Applied + 1
			}
			if p.record.Foreign {
				g.logger.Warn("somebody else wrote to the volume's file while an agent used it: a gap begins, and the volume is compared in full", "volume", v.cfg.Name, "path", p.path)
				p.resync = whole
				if !resuming {
					reason = format.GapForeign
				}
				break
			}
			if !resuming {
				continue
			}
			p.resync = open.Remaining
			p.noHistory = g.noHistory()
		case lost && p.finding == capture.FindingClean:
			p.resync = whole
			reason = max(reason, format.GapBuffer)
		default:
			g.logger.Warn("the volume was changed without DRC, or is not known on this host: what the journal still holds becomes history, then a gap begins and the volume is compared in full",
				"volume", v.cfg.Name, "path", p.path)
			p.resync = whole
			if !resuming {
				reason = format.GapForeign
			}
		}
		if !resuming || !open.Begun {
			p.after = open.After
			p.begin = &format.GapBegin{Volume: v.desc.Index, After: open.After, Reason: reason}
		}
	}
}

// planMarked adds the regions that were written past the journal. Of the history
// all is right up to known.
func (g *group) planMarked(marked map[block.VolumeIndex][]block.Extent, known block.Seq) {
	for _, v := range g.volumes {
		p, regions := &v.plan, marked[v.desc.Index]
		if len(regions) == 0 {
			continue
		}
		if len(p.resync) == 0 {
			p.noHistory = g.noHistory()
			p.after = known
			p.begin = &format.GapBegin{Volume: v.desc.Index, After: known, Reason: format.GapBuffer}
		}
		p.resync = segmenter.Union(p.resync, regions)
	}
}

// noHistory reports whether there is no history to compare with, nor will be one
// before the volumes are compared: the log is certainly empty, and nothing was ever
// captured or sealed. Progress that a power cut took is no proof of an empty log:
// an epoch is noted before anything is logged. What waits in the buffer for its
// first entry is history as well: a region that holds zeroes now must be stored if
// it did not then, and the state that is compared needs a Seq of its own.
func (g *group) noHistory() bool {
	return g.prog.N == 0 && len(g.files.Epochs()) == 0 && g.inherited == 0 && !g.sealed
}

// reaches reports whether the journal has everything behind applied.
func (g *group) reaches(applied, last block.Seq) bool {
	return applied == last || (g.journal.First() > 0 && g.journal.First() <= applied+1)
}
