// Package serve exports volumes at points: images of restorer, for an NBD server.
//
// A point is exported at once, however large the volume and however long its
// history: an image is fetched while it is read. What was given to Add is listed;
// besides, a client may open any VOLUME@POINT by that name. Who opens the same
// point shares its image, and so what has been fetched of it.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/nbd"
	"drc/restorer"
)

// idleImages is how many images that nobody uses are kept for the next client:
// many clients connect several times before they read.
const idleImages = 4

// Finder finds what VOLUME@POINT names. Where there is no such volume or point the
// error is restorer.ErrNoSuchVolume or ErrNoSuchPoint.
type Finder interface {
	FindAt(ctx context.Context, name string) (*restorer.History, restorer.Point, error)
}

var _ Finder = (*restorer.Catalog)(nil)

// Live has exports that come and go, and change between one client and the next.
type Live interface {
	// Names are the exports that there are now.
	Names() []string
	// View opens one, for one client; ok is false if there is none of that name.
	View(name string) (dev block.Device, release func(), ok bool, err error)
}

// Exports are the exports of one server. It is safe for concurrent use.
type Exports struct {
	finder Finder
	live   Live // nil: none
	logger *slog.Logger

	mu     sync.Mutex
	listed []listed
	images []*image // the one used last at the end
}

type listed struct {
	nbd.Export
	dev block.Device
}

// image is an image that clients share.
type image struct {
	point  pointKey
	users  int
	opened chan struct{} // closed when im or err is there
	im     *restorer.Image
	err    error
}

// pointKey is what makes two points the same.
type pointKey struct {
	volume block.VolumeID
	hash   format.Hash // of the log entry
}

// New returns exports of what there is to be found, of which none is listed yet.
// Without a finder (nil) there is nothing but what is listed.
func New(f Finder, logger *slog.Logger) *Exports {
	return &Exports{finder: f, logger: logger}
}

// Follow lists what is live besides. It is called before clients come.
func (x *Exports) Follow(l Live) { x.live = l }

// Add lists an export.
func (x *Exports) Add(name, description string, dev block.Device) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if slices.ContainsFunc(x.listed, func(l listed) bool { return l.Name == name }) {
		return fmt.Errorf("two exports would be named %q", name)
	}
	x.listed = append(x.listed, listed{nbd.Export{Name: name, Description: description}, dev})
	return nil
}

// List implements nbd.Exports.
func (x *Exports) List() (out []nbd.Export) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, l := range x.listed {
		out = append(out, l.Export)
	}
	if x.live != nil {
		for _, name := range x.live.Names() {
			out = append(out, nbd.Export{Name: name, Description: "volume " + name + ", as it is at the moment, read-only"})
		}
	}
	return out
}

// Open implements nbd.Exports.
func (x *Exports) Open(ctx context.Context, name string) (block.Device, func(), error) {
	x.mu.Lock()
	for _, l := range x.listed {
		if l.Name == name {
			x.mu.Unlock()
			return l.dev, nil, nil
		}
	}
	x.mu.Unlock()
	if x.live != nil {
		if dev, release, ok, err := x.live.View(name); ok {
			return dev, release, err
		}
	}
	if x.finder == nil {
		return nil, nil, nbd.ErrUnknownExport
	}
	h, p, err := x.finder.FindAt(ctx, name)
	if err != nil {
		if errors.Is(err, restorer.ErrNoSuchVolume) || errors.Is(err, restorer.ErrNoSuchPoint) {
			err = fmt.Errorf("%w: %w", nbd.ErrUnknownExport, err)
		}
		return nil, nil, err
	}
	return x.image(ctx, h, p)
}

// image returns the image of a point, which all who want it share.
func (x *Exports) image(ctx context.Context, h *restorer.History, p restorer.Point) (block.Device, func(), error) {
	key := pointKey{p.Volume.ID, p.Hash}
	x.mu.Lock()
	var v *image
	if i := slices.IndexFunc(x.images, func(v *image) bool { return v.point == key }); i >= 0 {
		v = x.images[i]
		x.images = append(slices.Delete(x.images, i, i+1), v)
	} else {
		v = &image{point: key, opened: make(chan struct{})}
		x.images = append(x.images, v)
		// Not bound to the client who happens to be the first.
		go func(ctx context.Context) {
			defer close(v.opened)
			v.im, v.err = restorer.OpenImageAt(ctx, h, p)
		}(context.WithoutCancel(ctx))
	}
	v.users++
	x.mu.Unlock()
	release := sync.OnceFunc(func() { x.release(v) })
	select {
	case <-v.opened:
	case <-ctx.Done():
		release()
		return nil, nil, ctx.Err()
	}
	if v.err != nil {
		release()
		return nil, nil, v.err
	}
	return v.im, release, nil
}

// release lets go of an image. Those that nobody uses are forgotten when there are
// too many, the ones used longest ago first; one that could not be opened at once.
func (x *Exports) release(v *image) {
	x.mu.Lock()
	defer x.mu.Unlock()
	v.users--
	idle := 0
	for i := len(x.images) - 1; i >= 0; i-- {
		o := x.images[i]
		if o.users > 0 {
			continue
		}
		select {
		case <-o.opened:
			if o.err != nil {
				x.images = slices.Delete(x.images, i, i+1)
				continue
			}
		default:
		}
		if idle++; idle > idleImages {
			x.images = slices.Delete(x.images, i, i+1)
		}
	}
}
