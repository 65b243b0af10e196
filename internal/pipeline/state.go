package pipeline

import (
	"encoding/json"
	"fmt"
	"os"

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
}

// progress is what changes with every entry. It is saved without a sync: an
// older one makes a start do a little work again, and never wrong.
type progress struct {
	N          uint64                                 `json:"n"`
	To         block.Seq                              `json:"to"`
	Resync     map[block.VolumeIndex][]block.Extent   `json:"resync"` // volumes whose resync is not finished
	Checkpoint map[block.VolumeIndex]block.Seq        `json:"checkpoint"`
	KeySets    []block.ID                             `json:"key_sets"` // that the log holds
	Reasons    map[block.VolumeIndex]format.GapReason `json:"reasons"`
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

func (f groupFiles) loadProgress() (*progress, error) {
	p := newProgress()
	_, err := f.dir.LoadJSON(p, f.path("progress.json")...)
	if err != nil {
		// A torn progress file is what an unsynced write may leave.
		return newProgress(), nil
	}
	return p, nil
}

func (f groupFiles) saveProgress(p *progress) error { return f.loose(p, "progress.json") }

// loose saves v without a sync: whole or not at all for this process's death,
// and perhaps damaged by a power cut.
func (f groupFiles) loose(v any, name string) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	path := f.dir.Path(f.path(name)...)
	if err := os.WriteFile(path+".new", raw, 0o600); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// Epochs implements uploader.State.
func (f groupFiles) Epochs() []format.Epoch {
	var epochs []format.Epoch
	_, _ = f.dir.LoadJSON(&epochs, f.path("epochs.json")...) // checked by openGroup
	return epochs
}

// AddEpoch implements uploader.State.
func (f groupFiles) AddEpoch(e format.Epoch) error {
	return f.dir.SaveJSON(append(f.Epochs(), e), f.path("epochs.json")...)
}

// Tails implements uploader.State.
func (f groupFiles) Tails() *uploader.Tails {
	t := &uploader.Tails{}
	if found, err := f.dir.LoadJSON(t, f.path("tails.json")...); err != nil || !found || t.N == 0 {
		return nil // without it the logs are read from their beginning
	}
	return t
}

// SaveTails implements uploader.State.
func (f groupFiles) SaveTails(t *uploader.Tails) error { return f.loose(t, "tails.json") }
