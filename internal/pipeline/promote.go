package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/vfs"
	"drc/restorer"
	"drc/uploader"
)

// A promotion makes this host the writer of a group that another host has written, with
// files that hold what the group's volumes were at a fork: a checkpoint of all of them.
//
// Order, and what a crash leaves:
//
//  1. An epoch is promised on a majority: nobody else's entry is decided from here on,
//     and where the history ends is known. A crash leaves the others fenced.
//  2. The fork is chosen, and the files are brought to it (Promotion.Bring).
//  3. What is about to be done is noted, durably: the branch's id, and the files. A
//     crash before that leaves a standby.
//  4. The standby lets go of the files (Promotion.Release), durably: whatever it does
//     later, it does not write to them. Each gets an identity record, by which the
//     agent knows that it is the volume at the fork. A crash leaves files that are
//     nobody's; the next promotion finds the note, and has them compared.
//  5. The entry that begins the branch is decided, in the office of step 1. After a
//     handover there is none: the branch goes on. A crash leaves a branch without
//     a writer, which the next promotion here knows by the note, and goes on with.
//  6. The group's state is made from the history, as on any host that takes over, and
//     the volumes are noted for the agent's starts. The note of step 3 goes.

// Promotion is the order to go on with a group here.
type Promotion struct {
	Group  block.GroupID
	Branch block.BranchID // that is gone on with, or forked from
	// At is a checkpoint to fork from; nil: the newest there is then.
	At *restorer.Point
	// Known is how many branches the group had when the order was given: with more, it
	// has been promoted elsewhere meanwhile.
	Known int
	// Names are names of volumes on the new branch, by those that they have now; the
	// others get one that is free.
	Names map[string]string
	// Listen is where the volumes are to be exported; empty: at the agent's socket.
	Listen string
	// Bring makes the files of the fork's volumes hold what they were there, durably,
	// and returns their paths.
	Bring func(ctx context.Context, h *restorer.History, f *restorer.Fork) (map[block.VolumeID]string, error)
	// Release is called when the files are about to be the agent's.
	Release func() error
}

// Promoted is what came of a promotion.
type Promoted struct {
	Fork    restorer.Fork
	Branch  block.BranchID
	Same    bool // the branch and the names of before: it was handed over
	Volumes []VolumeConfig
	Was     map[string]string // names on the branch of before, by those of now
}

// promotionNote is what is about to be done; see above.
type promotionNote struct {
	Branch block.BranchID    `json:"branch"`
	ForkN  uint64            `json:"fork_entry"`
	Files  map[string]string `json:"files"` // by volume id
	Was    map[string]string `json:"was"`
	Fork   block.Seq         `json:"fork_seq"`
	Time   time.Time         `json:"fork_time"`
}

const promotionFile = "promotion.json"

// NotedPromotion returns the files of a promotion of a group that was cut short on this
// host, by volume id. They are to be compared before they are used.
func NotedPromotion(cfg Config, group block.GroupID) (map[string]string, error) {
	var n promotionNote
	_, err := cfg.State.LoadJSON(&n, groupFiles{cfg.State, group}.path(promotionFile)...)
	return n.Files, err
}

// PromotedElsewhereError says that another host was promoted meanwhile.
type PromotedElsewhereError struct {
	Branch restorer.Branch
	Names  []string // of the volumes on it
}

func (e *PromotedElsewhereError) Error() string {
	return fmt.Sprintf("another host was promoted at %s: the group goes on there on branch %s, as %s, and nothing was changed here. To follow that one: drc replay. If that host is gone too, promote what it wrote: drc promote %s",
		e.Branch.Begin.Local().Format("2006-01-02 15:04:05"), e.Branch.ID.String()[:8], strings.Join(e.Names, ", "), e.Names[0])
}

// Promote makes this host, of which the state folder is locked, the writer of a group.
// The agent is to be started with the volumes that it returns.
func Promote(ctx context.Context, cfg Config, p Promotion) (*Promoted, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.OfficeWait <= 0 {
		cfg.OfficeWait = defaultOfficeWait
	}
	a := &Agent{cfg: cfg, gated: uploader.Gated(cfg.Repo)}
	f := groupFiles{cfg.State, p.Group}
	if _, err := f.loadEpochs(); err != nil {
		return nil, err
	}
	if err := a.mayBePromoted(f); err != nil {
		return nil, err
	}
	// Who has just been promoted elsewhere is not to be disturbed.
	h, err := restorer.OpenHistory(ctx, a.restorerConfig(), p.Group)
	if err != nil {
		return nil, err
	}
	note, err := p.cutShort(f, h)
	if err == nil && note == nil {
		if err = p.elsewhere(h); err == nil {
			_, _, err = p.choose(ctx, h) // what cannot be disturbs nobody
		}
	}
	if err = errors.Join(err, h.Close()); err != nil {
		return nil, err
	}
	var out *Promoted
	var end restorer.Position
	office, err := a.inOffice(ctx, p.Group, true, func(ctx context.Context, l *uploader.Log) (err error) {
		end = decidedBy(l)
		if note == nil {
			if note, err = a.begin(ctx, l, f, p, end); err != nil {
				return err
			}
			end = decidedBy(l)
		}
		return nil
	})
	if errors.Is(err, uploader.ErrFenced) {
		return nil, fmt.Errorf("another host has taken this group over at the same time, and is its writer now: nothing was changed here: %w", err)
	}
	if err != nil {
		return nil, err
	}
	if out, err = a.adoptPromoted(ctx, f, p.Listen, note, end, office); err != nil {
		return nil, err
	}
	return out, vfs.RemoveAll(cfg.State.Files(), cfg.State.Path(f.path(promotionFile)...))
}

// mayBePromoted refuses a state folder that knows the group already: its buffer may
// hold what was never committed, and that is kept.
func (a *Agent) mayBePromoted(f groupFiles) error {
	st := &groupState{}
	found, err := a.cfg.State.LoadJSON(st, f.path("group.json")...)
	if err != nil || !found {
		return err
	}
	var done handoverNote
	if handed, err := a.cfg.State.LoadJSON(&done, f.path(handoverFile)...); err != nil || handed {
		if err == nil { // all that was acknowledged here is history
			err = vfs.RemoveAll(a.cfg.State.Files(), a.cfg.State.Path(f.path()...))
		}
		return err
	}
	return fmt.Errorf("the state folder %s has protected group %s before, and its buffer may hold writes that were never committed (drc inspect --state %s lists them): keep it as it is, and promote with a folder of its own: --state DIR",
		a.cfg.State.Path(), st.Group.Name, a.cfg.State.Path())
}

// cutShort returns the note of an earlier promotion of this host whose branch has begun
// already, or nil.
func (p *Promotion) cutShort(f groupFiles, h *restorer.History) (*promotionNote, error) {
	n := &promotionNote{}
	found, err := f.dir.LoadJSON(n, f.path(promotionFile)...)
	if err != nil || !found || n.Branch != h.Current() {
		return nil, err
	}
	newest := h.Branches()
	if b := newest[len(newest)-1]; b.BeginN != h.N() || len(newest) == 1 {
		return nil, nil // others have gone on with it, or nothing was begun
	}
	return n, nil
}

// elsewhere reports a branch that was begun since the order was given.
func (p *Promotion) elsewhere(h *restorer.History) error {
	all := h.Branches()
	if len(all) <= p.Known {
		return nil
	}
	e := &PromotedElsewhereError{Branch: all[len(all)-1]}
	for _, v := range h.CurrentVolumes() {
		e.Names = append(e.Names, v.Name)
	}
	return e
}

// begin does steps 2 to 5, in office. The history ends at end.
func (a *Agent) begin(ctx context.Context, l *uploader.Log, f groupFiles, p Promotion, end restorer.Position) (*promotionNote, error) {
	cfg := a.restorerConfig()
	cfg.UpTo = &end
	h, err := restorer.OpenHistory(ctx, cfg, p.Group)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	fork, b, err := p.choose(ctx, h)
	if err != nil {
		return nil, err
	}
	same := b.ID == b.Parent
	if fork.Note != "" {
		a.cfg.Logger.Warn("the point that is promoted is not the newest: " + fork.Note)
	}
	files, err := p.Bring(ctx, h, fork)
	if err != nil {
		return nil, err
	}
	note := &promotionNote{Branch: b.ID, ForkN: fork.N, Fork: fork.Seq, Time: fork.Time, Files: map[string]string{}, Was: map[string]string{}}
	for i, v := range sortedVolumes(fork.Volumes) {
		note.Files[v.ID.String()] = files[v.ID]
		note.Was[b.Volumes[i].Name] = v.Name
	}
	if err := a.cfg.State.SaveJSON(note, f.path(promotionFile)...); err != nil {
		return nil, err
	}
	if err := p.Release(); err != nil {
		return nil, err
	}
	for _, v := range fork.Volumes {
		if err := capture.RecordRestored(a.cfg.State.Backings(), capture.Record{
			Path: files[v.ID], Repo: a.cfg.Repo.ID.String(), Group: p.Group.String(), Volume: v.ID.String(),
			Branch: b.ID.String(), Applied: fork.Seq, SectorSz: int(v.SectorSize),
		}); err != nil {
			return nil, err
		}
	}
	if same {
		return note, nil
	}
	keys, err := crypt.NewKeySet(a.cfg.Agent, a.cfg.Repo.Record.Recipients, a.cfg.Now().UnixNano())
	if err != nil {
		return nil, err
	}
	if err := a.cfg.State.Save(keys.Raw, f.path("keysets", keys.ID.String())...); err != nil {
		return nil, err
	}
	a.cfg.Ring.AddOwn(keys)
	_, err = l.BeginBranch(ctx, b, keys)
	return note, err
}

// choose chooses the fork, and says what the branch that begins there is. After a
// handover it is its own parent: it goes on.
func (p *Promotion) choose(ctx context.Context, h *restorer.History) (fork *restorer.Fork, b format.Branch, err error) {
	if p.At != nil {
		fork, err = h.ForkAt(ctx, *p.At)
	} else {
		fork, err = h.NewestFork(ctx, p.Branch)
	}
	if err != nil {
		return nil, b, err
	}
	same := p.At == nil && h.HandedOver() && h.Current() == p.Branch
	b = format.Branch{ID: block.BranchID(block.NewID()), Parent: fork.Branch, ForkN: fork.N, ForkHash: fork.Hash, ForkSeq: fork.Seq}
	if same {
		if b.ID = fork.Branch; fork.N != h.N() {
			return nil, b, format.Corrupt(fmt.Sprintf("log entry %d", h.N()), "it hands over, and is no checkpoint of all volumes")
		}
	}
	b.Volumes, err = p.names(h, fork, same)
	return fork, b, err
}

func sortedVolumes(vols []restorer.Volume) []restorer.Volume {
	out := slices.Clone(vols)
	slices.SortFunc(out, func(x, y restorer.Volume) int { return int(x.Index) - int(y.Index) })
	return out
}

// names are the names that the volumes get.
func (p *Promotion) names(h *restorer.History, fork *restorer.Fork, same bool) (out []format.BranchVolume, err error) {
	taken := map[string]bool{}
	known := map[string]bool{}
	for _, v := range sortedVolumes(fork.Volumes) {
		known[v.Name] = true
		name := v.Name
		if !same {
			if name = p.Names[v.Name]; name == "" {
				name = h.FreeName(v.Name)
			}
			if other, ok := h.Volume(name); ok || taken[name] {
				return nil, fmt.Errorf("volume %s cannot be called %s: group %s has a volume of that name already, on branch %s; choose another with --as %s=NAME", v.Name, name, h.Group.Name, other.Branch.String()[:8], v.Name)
			}
			if len(name) > 200 || !printable(name) {
				return nil, fmt.Errorf("volume %s cannot be called %q: a name is text of at most 200 bytes, without control characters", v.Name, name)
			}
		}
		taken[name] = true
		out = append(out, format.BranchVolume{Index: v.Index, Name: name})
	}
	for was := range p.Names {
		if !known[was] {
			return nil, fmt.Errorf("a name was given for volume %s, which is not there at that point", was)
		}
		if same {
			return nil, fmt.Errorf("volume %s was handed over, and keeps its name: leave --as out", was)
		}
	}
	return out, nil
}

// adoptPromoted does step 6. The history goes on up to end.
func (a *Agent) adoptPromoted(ctx context.Context, f groupFiles, listen string, note *promotionNote, end restorer.Position, office uploader.Office) (*Promoted, error) {
	cfg := a.restorerConfig()
	cfg.UpTo = &end
	h, err := restorer.OpenHistory(ctx, cfg, f.id)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	st, p, err := adopt(ctx, a.cfg.Repo.ID, h)
	if err != nil {
		return nil, err
	}
	p.Office = office
	out := &Promoted{
		Branch: st.branch(), Was: note.Was,
		Fork: restorer.Fork{Position: restorer.Position{N: note.ForkN}, Seq: note.Fork, Time: note.Time},
	}
	for _, v := range st.Volumes {
		path := note.Files[v.ID.String()]
		if path == "" {
			return nil, fmt.Errorf("volume %s of group %s has no file on this host: this is a bug in drc", v.Name, st.Group.Name)
		}
		out.Same = out.Same || note.Was[v.Name] == v.Name
		out.Volumes = append(out.Volumes, VolumeConfig{Name: v.Name, Path: path, Group: st.Group.Name, Listen: listen})
	}
	if err := addVolumes(a.cfg.State, a.cfg.Repo.ID, out.Volumes); err != nil {
		return nil, err
	}
	if err := f.noteLacking(); err != nil {
		return nil, err
	}
	if err := f.adopted(p); err != nil {
		return nil, err
	}
	return out, f.saveGroup(st)
}
