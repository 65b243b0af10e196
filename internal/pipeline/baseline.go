package pipeline

import (
	"context"
	"fmt"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/restorer"
	"drc/segmenter"
)

// baseline reads the history of a volume up to an entry that this host, in office,
// knows to be decided: be it a checkpoint of the volume or not, because regions that
// an interrupted resync has read count as history too. Where few stores answer, the
// logs may show an older state, or one that another writer has left behind and that
// is no history: a region that is what it was there, and is something else in the
// history, would be taken for unchanged.
func (a *Agent) baseline(ctx context.Context, g block.GroupID, v format.Volume, end restorer.Position) (segmenter.Baseline, error) {
	if end.N == 0 {
		return emptyBaseline{}, nil
	}
	cfg := a.restorerConfig()
	cfg.UpTo = &end
	cfg.CacheDir = "" // the history stays open for long, and would keep the cache's lock
	h, err := restorer.OpenHistory(ctx, cfg, g)
	if err != nil {
		return nil, err
	}
	vol, ok := h.Volume(v.Name)
	if !ok {
		return emptyBaseline{}, h.Close()
	}
	e := h.Newest()
	p := restorer.Point{Volume: vol, Branch: vol.Branch, Hash: e.Hash}
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
