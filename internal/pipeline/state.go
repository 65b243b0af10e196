package pipeline

import (
	"encoding/json"
	"fmt"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/state"
	"drc/uploader"
)

// groupState is what a host remembers of a group, durably, from its making on.
type groupState struct {
	ID      block.GroupID   `json:"id"`
	Repo    block.ID        `json:"repository"`
	Group   format.Group    `json:"group"`
	Volumes []format.Volume `json:"volumes"`
	// Line is the branch that this host goes on with; nil: the group's first one.
	Line *branchState `json:"line,omitempty"`
}

// branchState is what a host knows of the branch that it writes.
type branchState struct {
	Branch block.BranchID `json:"branch"`
	Begin  uint64         `json:"begin"` // its first entry
	// NextVolume is an index that no volume of the group has on any branch, nor any
	// above it.
	NextVolume block.VolumeIndex `json:"next_volume"`
}

// branch is the branch that this host writes.
func (s *groupState) branch() block.BranchID {
	if s.Line != nil {
		return s.Line.Branch
	}
	return s.Group.Branch
}

// begin is the first entry of the branch.
func (s *groupState) begin() uint64 {
	if s.Line != nil {
		return s.Line.Begin
	}
	return 1
}

// nextVolume is the index of the next volume that joins.
func (s *groupState) nextVolume() block.VolumeIndex {
	next := block.VolumeIndex(0)
	if s.Line != nil {
		next = s.Line.NextVolume
	}
	for _, d := range s.Volumes {
		next = max(next, d.Index+1)
	}
	return next
}

// progress is what changes with every entry. It is saved without a sync: an
// older one makes a start do a little work again, and never wrong, as long as all
// that it lacks is this host's own. What was taken over from others is therefore
// saved durably, beside.
type progress struct {
	N          uint64                                 `json:"n"`
	To         block.Seq                              `json:"to"`
	Resync     map[block.VolumeIndex][]block.Extent   `json:"resync"`     // volumes whose resync is not finished
	Checkpoint map[block.VolumeIndex]block.Seq        `json:"checkpoint"` // each volume's newest in an entry
	Committed  map[block.VolumeIndex]block.Seq        `json:"committed"`  // and in an entry that is on enough stores
	KeySets    []block.ID                             `json:"key_sets"`   // that the log holds
	Reasons    map[block.VolumeIndex]format.GapReason `json:"reasons"`
	Announced  []block.VolumeIndex                    `json:"announced"` // volumes that the log has described; nil: not known
	// Office is the one in which the history of others was taken over; none if it
	// was not.
	Office uploader.Office `json:"office"`
}

func newProgress() *progress {
	return &progress{
		Resync: map[block.VolumeIndex][]block.Extent{}, Checkpoint: map[block.VolumeIndex]block.Seq{},
		Reasons: map[block.VolumeIndex]format.GapReason{},
	}
}

// groupFiles are the files of one group in the state folder.
type groupFiles struct {
	dir *state.Dir
	id  block.GroupID
}

func (f groupFiles) path(elements ...string) []string {
	return append([]string{"groups", f.id.String()}, elements...)
}

func (f groupFiles) saveGroup(s *groupState) error { return f.dir.SaveJSON(s, f.path("group.json")...) }

// adoptedFile holds the progress with which the history of others was taken over.
const adoptedFile = "adopted.json"

func (f groupFiles) loadProgress() (*progress, error) {
	p, adopted := newProgress(), newProgress()
	_, err := f.dir.LoadJSON(p, f.path("progress.json")...)
	if err != nil {
		// A torn progress file is what an unsynced write may leave.
		p = newProgress()
	}
	if _, err := f.dir.LoadJSON(adopted, f.path(adoptedFile)...); err != nil {
		return nil, err
	}
	if p.N < adopted.N {
		return adopted, nil
	}
	return p, nil
}

// adopted saves the progress with which history was taken over from others.
func (f groupFiles) adopted(p *progress) error {
	if err := f.dir.SaveJSON(p, f.path(adoptedFile)...); err != nil {
		return err
	}
	return f.saveProgress(p)
}

func (f groupFiles) saveProgress(p *progress) error { return f.loose(p, "progress.json") }

// loose saves v without a sync: whole or not at all for this process's death,
// and perhaps damaged by a power cut.
func (f groupFiles) loose(v any, name string) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	return f.dir.SaveLoose(raw, f.path(name)...)
}

// Epochs implements uploader.State.
func (f groupFiles) Epochs() []format.Epoch {
	epochs, _ := f.loadEpochs() // checked by openGroup
	return epochs
}

func (f groupFiles) loadEpochs() (epochs []format.Epoch, err error) {
	_, err = f.dir.LoadJSON(&epochs, f.path("epochs.json")...)
	return epochs, err
}

// AddEpoch implements uploader.State.
func (f groupFiles) AddEpoch(e format.Epoch) error {
	return f.dir.SaveJSON(append(f.Epochs(), e), f.path("epochs.json")...)
}

// logState is what the log keeps of a group at work.
type logState struct {
	groupFiles
	g *group
}

// Tails implements uploader.State. Tails ahead of the progress, as a power cut
// may leave them, would have the log read on behind entries that the progress
// does not know.
func (s logState) Tails() *uploader.Tails {
	t := &uploader.Tails{}
	found, err := s.dir.LoadJSON(t, s.path("tails.json")...)
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if err != nil || !found || t.N == 0 || len(t.Logs) == 0 || t.N > s.g.prog.N {
		return nil // without it the logs are read from their beginning
	}
	return t
}

// SaveTails implements uploader.State.
func (s logState) SaveTails(t *uploader.Tails) error {
	s.g.mu.Lock()
	saved := s.g.savedN
	s.g.mu.Unlock()
	if t.N > saved {
		return nil // the progress comes first; the next tails will do
	}
	return s.loose(t, "tails.json")
}
