package pipeline

import (
	"context"
	"sync"

	"drc/internal/block"
	"drc/internal/nbd"
)

// exports are the volumes of one listen URI; more may come while it is served.
type exports struct {
	mu      sync.Mutex
	volumes []*volume
}

func (x *exports) add(v *volume) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.volumes = append(x.volumes, v)
}

// List implements nbd.Exports.
func (x *exports) List() (out []nbd.Export) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, v := range x.volumes {
		out = append(out, nbd.Export{Name: v.cfg.Name, Description: "volume protected by DRC"})
	}
	return out
}

// Open implements nbd.Exports.
func (x *exports) Open(_ context.Context, name string) (block.Device, func(), error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, v := range x.volumes {
		if v.cfg.Name == name {
			return v.dev, nil, nil
		}
	}
	return nil, nil, nbd.ErrUnknownExport
}

// Device returns a volume for use within this process; ok is false if there is no
// volume of that name. It may be used from Ready on until Run is told to stop.
func (a *Agent) Device(name string) (d block.Device, ok bool) {
	for _, g := range a.all() {
		for _, v := range g.volumes {
			if v.cfg.Name == name {
				return v.dev, true
			}
		}
	}
	return nil, false
}

// AwaitWrite waits until a client has written to any of the volumes, and was answered.
func (a *Agent) AwaitWrite(ctx context.Context) error {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	groups := a.all()
	first := make(chan error, len(groups))
	for _, g := range groups {
		go func() { first <- g.capture.WaitCaptured(waiting, g.inherited) }()
	}
	if len(groups) == 0 {
		return errNotServing
	}
	return <-first
}
