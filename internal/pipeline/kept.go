package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/state"
	"drc/internal/vfs"
	"drc/uploader"
	"drc/vbuf"
)

// What a buffer keeps of writes that are not on the stores. It is only read: of an
// agent that does not run from its files, and of one that runs, as when it has been
// fenced, by itself.

// ErrNoState means: a folder is neither a state folder nor a buffer directory.
var ErrNoState = errors.New("it is neither the state folder of an agent nor a directory of a buffer")

// InspectKept tells what the state folder or buffer directory dir keeps. stateDir is
// where to look for names if dir is a buffer directory. It fails with
// state.ErrInUse if an agent works with the state folder: ask that one.
func InspectKept(ctx context.Context, dir, stateDir string, logger *slog.Logger) (*control.Kept, error) {
	files := vfs.OS()
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("folder %s: %w", dir, err)
	}
	has := func(name ...string) bool {
		_, err := files.Stat(filepath.Join(name...))
		return err == nil
	}
	out := &control.Kept{Kind: control.KeptWrites, Groups: []control.KeptGroup{}}
	var st *state.Dir
	dirs := []string{abs}
	switch {
	case vbuf.IsBufferDir(files, abs):
		if has(stateDir, hostFile) {
			if st, err = state.Open(stateDir); err != nil {
				return nil, err
			}
		}
	case has(abs, hostFile):
		if st, err = state.Open(abs); err != nil {
			return nil, err
		}
		known, err := knownDirs(st)
		if err != nil {
			return nil, err
		}
		slices.Sort(known)
		dirs = slices.DeleteFunc(slices.Compact(known), func(d string) bool { return !vbuf.IsBufferDir(files, d) })
		if len(dirs) == 0 {
			return nil, fmt.Errorf("the state folder %s knows of no buffer directory that is there: name one: drc inspect DIR --state %s", abs, abs)
		}
		if err := st.Lock(); err != nil {
			return nil, err
		}
		defer st.Close()
	default:
		return nil, fmt.Errorf("%s: %w: name one, or a file in it", dir, ErrNoState)
	}
	r, err := vbuf.OpenToRead(ctx, vbuf.ReadOptions{Dirs: dirs, Logger: logger})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out.Dirs = r.Dirs()
	if st != nil {
		host, err := st.Host()
		if err != nil {
			return nil, err
		}
		if host == r.Host() {
			out.State = st.Path()
		} else if st.Path() == abs {
			return nil, fmt.Errorf("buffer directory %s belongs to another agent (%s) than state folder %s (%s)", dirs[0], r.Host(), abs, host)
		} else {
			st = nil // of somebody else: names are not known
		}
	}
	groups, err := r.Groups()
	if err != nil {
		return nil, err
	}
	for _, id := range groups {
		k := keeper{id: id, prog: newProgress()}
		if st != nil {
			f := groupFiles{st, id}
			s := &groupState{}
			found, err := st.LoadJSON(s, f.path("group.json")...)
			if err != nil {
				return nil, err
			}
			if found {
				k.st = s
			}
			if k.prog, err = f.loadProgress(); err != nil {
				return nil, err
			}
		}
		if k.journal, err = r.Journal(ctx, id); err != nil {
			return nil, err
		}
		if k.spool, err = r.Spool(ctx, id); err != nil {
			return nil, err
		}
		if k.bitmap, err = r.Bitmap(ctx, id); err != nil {
			return nil, err
		}
		g, err := k.kept(ctx)
		if err != nil {
			return nil, err
		}
		g.Advice = adviceStopped(g, out.State)
		out.Groups = append(out.Groups, *g)
	}
	return out, nil
}

// hostFile is what makes a folder a state folder.
const hostFile = "host.json"

// Kept implements control.Agent.
func (a *Agent) Kept(ctx context.Context) (control.Kept, error) {
	out := control.Kept{Kind: control.KeptWrites, State: a.cfg.State.Path(), Running: true, Dirs: []string{}, Groups: []control.KeptGroup{}}
	for _, d := range a.buffer.Stats().Disks {
		out.Dirs = append(out.Dirs, d.Path)
	}
	for _, g := range a.all() {
		g.mu.Lock()
		k := keeper{id: g.st.ID, st: g.st, prog: &progress{To: g.prog.To}, journal: g.journal, spool: g.spool.s, bitmap: g.bitmap}
		failed := g.failed
		g.mu.Unlock()
		kept, err := k.kept(ctx)
		if err != nil {
			return out, err
		}
		var locked *uploader.LockedError
		kept.Fenced = errors.Is(failed, uploader.ErrFenced) || errors.As(failed, &locked)
		kept.Advice = adviceRunning(kept)
		out.Groups = append(out.Groups, *kept)
	}
	return out, nil
}

// keeper is what is known of one group and its part of the buffer.
type keeper struct {
	id      block.GroupID
	st      *groupState // nil: not known
	prog    *progress
	journal *vbuf.Journal
	spool   *vbuf.Spool
	bitmap  *vbuf.Bitmap
}

// keptVolume gathers what is kept of one volume.
type keptVolume struct {
	control.KeptVolume
	oldest, newest int64
	regions        *block.Map[struct{}]
}

func (k keeper) kept(ctx context.Context) (*control.KeptGroup, error) {
	g := &control.KeptGroup{
		ID: k.id.String(), Logged: k.prog.To, Volumes: []control.KeptVolume{}, Batches: []control.KeptBatch{}, Damaged: []control.KeptRange{},
	}
	volumes := map[block.VolumeIndex]*keptVolume{}
	volume := func(i block.VolumeIndex) *keptVolume {
		if volumes[i] == nil {
			volumes[i] = &keptVolume{
				KeptVolume: control.KeptVolume{Index: int(i), Regions: []control.KeptRegion{}},
				regions:    block.NewMap(func(v struct{}, _ int64) struct{} { return v }),
			}
		}
		return volumes[i]
	}
	if k.st != nil {
		g.Name, g.Branch = k.st.Group.Name, k.st.branch().String()
		for _, v := range k.st.Volumes {
			volume(v.Index).Name = v.Name
		}
	}
	next := max(k.journal.First(), k.prog.To+1)
	inJournal := next
	if k.journal.First() == 0 {
		inJournal = ^block.Seq(0)
	}
	if err := k.batches(g, volume, inJournal); err != nil {
		return nil, err
	}
	if err := k.writes(ctx, g, volume, next); err != nil {
		return nil, err
	}
	if k.bitmap.Active() {
		g.MarkedFrom = k.bitmap.Since().UTC().Format(time.RFC3339)
		for i, v := range volumes {
			v.MarkedBytes = k.bitmap.MarkedBytes(i)
		}
	}
	oldest, newest := int64(0), int64(0)
	for _, v := range volumes {
		v.Oldest, v.Newest = keptTime(v.oldest), keptTime(v.newest)
		if v.oldest != 0 && (oldest == 0 || v.oldest < oldest) {
			oldest = v.oldest
		}
		newest = max(newest, v.newest)
		v.regions.All(func(e block.Extent, _ struct{}) bool {
			if n := len(v.Regions); n > 0 && v.Regions[n-1].Off+v.Regions[n-1].Len == e.Off {
				v.Regions[n-1].Len += e.Len
			} else {
				v.Regions = append(v.Regions, control.KeptRegion{Off: e.Off, Len: e.Len})
			}
			return true
		})
		g.Volumes = append(g.Volumes, v.KeptVolume)
	}
	g.Oldest, g.Newest = keptTime(oldest), keptTime(newest)
	slices.SortFunc(g.Volumes, func(a, b control.KeptVolume) int { return a.Index - b.Index })
	return g, nil
}

func keptTime(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339Nano)
}

// batches adds the sealed batches. What is in no journal, which begins at
// inJournal, is known from them only.
func (k keeper) batches(g *control.KeptGroup, volume func(block.VolumeIndex) *keptVolume, inJournal block.Seq) error {
	for _, vb := range k.spool.Batches() {
		x := control.KeptBatch{From: vb.From, To: vb.To, Logged: vb.Logged || vb.To <= k.prog.To, InJournal: vb.From >= inJournal, SafeInBuffer: k.spool.Persisted(vb)}
		for _, s := range vb.Shards {
			if !k.spool.IsPlaced(s.Segment, s.Index) {
				x.Shards++
				x.ShardBytes += s.SizeBytes
			}
		}
		b, err := decode(k.spool, vb)
		if err != nil {
			x.LastError = err.Error()
		} else {
			x.Bytes, x.Oldest = b.Bytes, keptTime(b.Oldest)
		}
		if x.Logged && x.Shards == 0 {
			continue
		}
		g.Batches = append(g.Batches, x)
		from, to := max(vb.From, k.prog.To+1), min(vb.To, inJournal-1)
		if x.Logged || from > to {
			continue
		}
		addKept(g, from, to)
		if err != nil {
			continue
		}
		for _, ve := range b.Volumes {
			v := volume(ve.Volume)
			for _, e := range ve.Extents {
				v.regions.Set(e.Extent, struct{}{})
			}
			if b.Oldest != 0 && (v.oldest == 0 || b.Oldest < v.oldest) {
				v.oldest = b.Oldest
			}
		}
	}
	return nil
}

// writes adds what is in the journal from next on.
func (k keeper) writes(ctx context.Context, g *control.KeptGroup, volume func(block.VolumeIndex) *keptVolume, next block.Seq) error {
	visit := func(w block.Write) error {
		if w.Seq < next { // it was made durable meanwhile, and visited
			return nil
		}
		next = w.Seq + 1
		addKept(g, w.Seq, w.Seq)
		g.Bytes += w.Extent.Len
		v := volume(w.Volume)
		v.Writes++
		v.Bytes += w.Extent.Len
		if v.From == 0 {
			v.From = w.Seq
		}
		v.To = w.Seq
		if v.oldest == 0 || w.Time < v.oldest {
			v.oldest = w.Time
		}
		v.newest = max(v.newest, w.Time)
		v.regions.Set(w.Extent, struct{}{})
		return nil
	}
	if k.journal.First() == 0 {
		return nil
	}
	for next <= k.journal.Durable() {
		if err := ctx.Err(); err != nil {
			return err
		}
		before := next
		_, err := k.journal.Read(next, journalReadBytes, visit)
		if err == nil && next > before {
			continue
		}
		if skip := k.damagedAt(next); skip > 0 {
			next = skip
			continue
		}
		if err == nil {
			err = fmt.Errorf("it ends before seq %s", k.journal.Durable())
		}
		return fmt.Errorf("read the journal of group %s in the buffer: %w", k.id, err)
	}
	for _, r := range k.journal.Damaged() {
		if r.To > k.prog.To {
			g.Damaged = append(g.Damaged, control.KeptRange{From: r.From, To: r.To})
		}
	}
	return k.journal.Unsynced(visit)
}

// damagedAt returns what follows the damage at seq, 0 if there is none.
func (k keeper) damagedAt(seq block.Seq) block.Seq {
	for _, r := range k.journal.Damaged() {
		if r.From <= seq && seq <= r.To {
			return r.To + 1
		}
	}
	return 0
}

// addKept adds the seqs from to to, which lie before or behind what was added.
func addKept(g *control.KeptGroup, from, to block.Seq) {
	g.Writes += int64(to - from + 1)
	if g.From == 0 || from < g.From {
		g.From = from
	}
	g.To = max(g.To, to)
}

// adviceStopped says what can be done with what an agent that does not run has
// left.
func adviceStopped(g *control.KeptGroup, stateDir string) string {
	if stateDir == "" {
		stateDir = "DIR"
	}
	switch {
	case g.Writes == 0 && len(g.Batches) == 0 && g.MarkedFrom == "":
		return "all that was captured is in the history on the stores, as far as this host knows"
	case g.MarkedFrom != "":
		return fmt.Sprintf("the buffer was full, and what was written to the marked regions is on the volumes only: start the agent again with this buffer (drc agent --state %s): it brings all that is kept to the stores and compares the marked regions", stateDir)
	}
	return fmt.Sprintf("start the agent again with this buffer (drc agent --state %s): it brings all of it to the stores. If another agent has taken over meanwhile, that start is refused, and these writes are no part of the history: they are on this host's volume too, and drc agent --takeover makes that the newest state. If the volume is lost and nobody has taken over: drc restore VOLUME TARGET --with-buffer", stateDir)
}

// adviceRunning says the same of a group at work.
func adviceRunning(g *control.KeptGroup) string {
	switch {
	case g.Writes == 0 && len(g.Batches) == 0 && g.MarkedFrom == "":
		return "all that was captured is in the history on the stores"
	case g.Fenced:
		return "another agent has taken over the group: these writes are no part of the history, and stay here. They are on this host's volume, too, which can still be read. To make this host's state the newest one, with all of them: stop this agent and start it with --takeover. To give them up: stop it, restore the volume, and empty the buffer"
	}
	return "they are on their way to the stores: drc status says how far"
}
