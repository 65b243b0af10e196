package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"drc/internal/block"
	"drc/internal/overlay"
	"drc/internal/vfs"
	"drc/restorer"
	"drc/restorer/serve"
)

// heldOverlay is an overlay that was begun by an earlier run.
type heldOverlay struct {
	of       overlay.Identity
	complete bool
}

// peekOverlay looks at an overlay that may exist; nil: it does not, or none is
// wanted.
func peekOverlay(file string) (*heldOverlay, error) {
	if file == "" {
		return nil, nil
	}
	if dir := filepath.Dir(file); !exists(dir) {
		return nil, fmt.Errorf("the folder %s does not exist: make it first, or choose another file", dir)
	}
	id, complete, err := overlay.Peek(vfs.OS(), file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &heldOverlay{id, complete}, nil
}

// addComplete exports an overlay that has the whole volume: without stores.
func (s *served) addComplete(ctx context.Context, name string, f serveFlags, held *heldOverlay) error {
	if name != held.of.VolumeName {
		return usage("%s holds volume %q at seq:%d, and %q was asked for: name what it holds, or choose another file", f.writable, held.of.VolumeName, held.of.Seq, name)
	}
	if f.at != "" && f.at != "seq:"+held.of.Seq.String() {
		return usage("%s holds volume %q at seq:%d, whole: leave out --at, or choose another file", f.writable, held.of.VolumeName, held.of.Seq)
	}
	s.exports = serve.New(nil, nil)
	return s.openOverlay(ctx, servedExportJSON{
		Name: name, Volume: held.of.VolumeName, SizeBytes: held.of.SizeBytes,
		Point: checkpointJSON{Seq: held.of.Seq, Names: []string{}},
	}, f, overlay.Config{File: f.writable})
}

// addWritable exports an image with an overlay over it.
func (s *served) addWritable(ctx context.Context, x servedExportJSON, f serveFlags, h *restorer.History, im *restorer.Image) error {
	p := im.Point()
	s.once = im.OnePass()
	return s.openOverlay(ctx, x, f, overlay.Config{File: f.writable, Base: im, Identity: overlay.Identity{
		Repo: h.RepoID(), Group: h.GroupID, Volume: p.Volume.ID, Branch: p.Branch, Entry: p.N, Hash: p.Hash, Seq: p.Seq,
		SizeBytes: p.Volume.SizeBytes, SectorSize: int(p.Volume.SectorSize), VolumeName: p.Volume.Name,
	}})
}

func (s *served) openOverlay(ctx context.Context, x servedExportJSON, f serveFlags, cfg overlay.Config) error {
	dev, err := overlay.Open(ctx, cfg)
	if err != nil {
		return err
	}
	s.overlay = dev
	s.closers = append(s.closers, dev.Close)
	complete := dev.Complete()
	x.ReadOnly, x.File, x.Complete = false, f.writable, &complete
	return s.add(x, f, describePoint(x), dev)
}

// hydrateEvery is how often it is said how far hydration is.
const hydrateEvery = 10 * time.Second

// hydrate brings the whole volume into the overlay's file, from base.
func (g *global) hydrate(ctx context.Context, d *overlay.Device, base block.Device) error {
	if d.Complete() {
		return nil
	}
	last := time.Now()
	err := d.Hydrate(ctx, overlay.HydrateOptions{
		Base: base,
		Progress: func(p overlay.Progress) {
			if time.Since(last) < hydrateEvery {
				return
			}
			last = time.Now()
			g.talk("hydrating: %s of %s", humanize.IBytes(uint64(p.DoneBytes)), humanize.IBytes(uint64(p.TotalBytes)))
		},
		Trouble: func(err error, pause time.Duration) {
			g.talk("hydrating stands still and is tried again in %s; what is there is served: %s", pause.Round(time.Second), plain(err))
		},
	})
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		// What is there can be read all the same.
		g.talk("hydrating has ended before all is there: %s", plain(err))
		return nil
	}
	g.talk("hydrated: all of the volume is in the file, and no store is needed for it any more")
	return nil
}
