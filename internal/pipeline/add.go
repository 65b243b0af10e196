package pipeline

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/state"
)

// addedFile remembers the volumes that were added while an agent ran.
const addedFile = "volumes.json"

// AddedVolumes returns the volumes of a repository that were added to the
// agent of a state folder while it ran.
func AddedVolumes(dir *state.Dir, repository block.ID) ([]VolumeConfig, error) {
	all := map[string][]VolumeConfig{}
	if _, err := dir.LoadJSON(&all, addedFile); err != nil {
		return nil, err
	}
	return all[repository.String()], nil
}

// addVolumes remembers volumes for the next starts; each takes the place of what is
// remembered under its name.
func addVolumes(dir *state.Dir, repository block.ID, vols []VolumeConfig) error {
	all := map[string][]VolumeConfig{}
	if _, err := dir.LoadJSON(&all, addedFile); err != nil {
		return err
	}
	kept := slices.DeleteFunc(all[repository.String()], func(old VolumeConfig) bool {
		return slices.ContainsFunc(vols, func(v VolumeConfig) bool { return v.Name == old.Name || v.Path == old.Path })
	})
	all[repository.String()] = append(kept, vols...)
	return dir.SaveJSON(all, addedFile)
}

func rememberAdded(dir *state.Dir, repository block.ID, v VolumeConfig) error {
	all := map[string][]VolumeConfig{}
	if _, err := dir.LoadJSON(&all, addedFile); err != nil {
		return err
	}
	all[repository.String()] = append(all[repository.String()], v)
	return dir.SaveJSON(all, addedFile)
}

// errNotServing: the agent is starting or stopping.
var errNotServing = errors.New("the agent is starting or stopping: try again in a moment")

// AddVolume implements control.Agent: it protects one more volume, in a group
// of its own, and remembers it for the next starts.
func (a *Agent) AddVolume(ctx context.Context, r control.VolumeRequest) (control.Volume, error) {
	var none control.Volume
	cfg := VolumeConfig{Name: r.Name, Path: r.Path, SizeBytes: r.SizeBytes, Listen: r.Listen}
	a.adding.Lock()
	defer a.adding.Unlock()
	if !a.IsServing() {
		return none, errNotServing
	}
	groups := a.all()
	var vols []VolumeConfig
	for _, g := range groups {
		if g.name == cfg.GroupName() {
			return none, &control.CodedError{Code: 2, Err: fmt.Errorf("there is a group %s already: choose another name, or put the volume into it by the configuration and restart the agent", g.name)}
		}
		for _, v := range g.volumes {
			vols = append(vols, VolumeConfig{Name: v.cfg.Name, Path: v.plan.path})
		}
	}
	for _, u := range a.undecided {
		vols = append(vols, u.volumes...)
		if u.name == cfg.GroupName() {
			return none, &control.CodedError{Code: 2, Err: fmt.Errorf("there is a group %s already, and it waits for a decision: see drc status", u.name)}
		}
	}
	if err := CheckVolumes(append(vols, cfg)); err != nil {
		return none, &control.CodedError{Code: 2, Err: err}
	}
	g, err := a.openGroup(ctx, cfg.GroupName(), []VolumeConfig{cfg})
	if err != nil {
		return none, err
	}
	v := g.volumes[0]
	x, err := a.exportsOf(v)
	if err != nil {
		g.abandon()
		return none, err
	}
	a.mu.Lock()
	start := a.background
	if start != nil {
		a.groups = append(slices.Clone(a.groups), g)
	}
	a.mu.Unlock()
	if start == nil {
		g.abandon()
		return none, errNotServing
	}
	if err := rememberAdded(a.cfg.State, a.cfg.Repo.ID, cfg); err != nil {
		a.cfg.Logger.Error("the volume is protected, and would be forgotten at the next start: put it into the configuration", "volume", cfg.Name, "error", err)
	}
	g.start(start)
	// It is the agent's from here on, whether or not the client waits: the write
	// that begins a resync may have to wait for room.
	served := make(chan error, 1)
	start(func(ctx context.Context) {
		err := g.touch(ctx)
		if err == nil {
			x.add(v)
		} else if ctx.Err() == nil {
			a.cfg.Logger.Error("the volume that was added is not served; restart the agent once the cause is mended", "volume", cfg.Name, "error", err)
		}
		served <- err
	})
	select {
	case err := <-served:
		if err != nil {
			return none, err
		}
	case <-ctx.Done():
		return none, ctx.Err()
	}
	for _, vs := range a.groupStatus(g, false).Volumes {
		return vs, nil
	}
	return none, nil
}
