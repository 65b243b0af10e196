package pipeline

import (
	"context"
	"errors"
	"fmt"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/restorer"
	"drc/segmenter"
)

// baseline reads the newest history of a volume: the newest entry, be it a
// checkpoint of the volume or not, because regions that an interrupted resync
// has read count as history too.
func (a *Agent) baseline(ctx context.Context, g block.GroupID, v format.Volume) (segmenter.Baseline, error) {
	cfg := a.restorerConfig()
	cfg.CacheDir = "" // the history stays open for long, and would keep the cache's lock
	h, err := restorer.OpenHistory(ctx, cfg, g)
	if errors.Is(err, restorer.ErrNoEntries) {
		return emptyBaseline{}, nil
	}
	if err != nil {
		return nil, err
	}
	vol, ok := h.Volume(v.Name)
	if !ok || len(h.Entries) == 0 {
		return emptyBaseline{}, h.Close()
	}
	e := h.Entries[len(h.Entries)-1]
	p := restorer.Point{Volume: vol, Branch: h.Group.Branch, Hash: e.Hash}
	p.N, p.Time = e.N, e.Time()
	if e.Range != nil {
		p.Seq = e.Range.To
	}
	im, err := restorer.OpenImageAt(ctx, h, p)
	if err != nil {
		return nil, fmt.Errorf("open the newest history of volume %s: %w", v.Name, err)
	}
	return imageBaseline{im}, nil
}

type imageBaseline struct{ im *restorer.Image }

func (b imageBaseline) Extents(ctx context.Context, _ block.VolumeIndex, e block.Extent) ([]manifest.Extent, error) {
	return b.im.Extents(ctx, e)
}
