package restorer

import (
	"context"

	"drc/internal/block"
	"drc/internal/manifest"
)

// Layers are the entry ranges of the manifests that make up an image.
func (im *Image) Layers() [][2]uint64 {
	var out [][2]uint64
	for _, l := range im.layers {
		out = append(out, l.fromTo)
	}
	return out
}

// EntryExtents is what entry n changed of a volume.
func EntryExtents(ctx context.Context, h *History, v Volume, n uint64) ([]manifest.Extent, error) {
	if e, err := h.Entry(ctx, n); err != nil || !e.manifest {
		return nil, err
	}
	l, err := openOwn(ctx, h, n)
	if err != nil {
		return nil, err
	}
	p := Point{Volume: v, Checkpoint: Checkpoint{N: n}}
	im, err := OpenImageAt(ctx, h, p)
	if err != nil {
		return nil, err
	}
	im.layers = []layer{*l}
	return im.Extents(ctx, block.Extent{Len: v.SizeBytes})
}

// SaveEvery makes progress be saved after so many bytes, in tests.
func SaveEvery(n int64) (restore func()) {
	old := saveEveryBytes
	saveEveryBytes = n
	return func() { saveEveryBytes = old }
}

// SetSync replaces what makes a target's data durable.
func SetSync(f func(fd int) error) (restore func()) {
	old := fdatasync
	fdatasync = f
	return func() { fdatasync = old }
}

// Config is what a history was opened with.
func (h *History) Config() Config { return h.cfg }

// Requests is how many requests were made for what is followed.
func (f *Follower) Requests() int64 { return f.stores.requests.Load() }

// ListNow has the logs be listed with the next poll.
func (f *Follower) ListNow() { f.listed = f.listed.Add(-2 * followList) }

// SmallMemory is a Memory that keeps at most limit bytes of each kind.
func SmallMemory(limit int64) *Memory {
	m := NewMemory()
	m.pages.limit, m.windows.limit, m.frames.limit, m.indexes.limit, m.payloads.limit = limit, limit, limit, limit, limit
	return m
}

// Held is what is in a Memory, in bytes by kind.
func (m *Memory) Held() map[string]int64 {
	return map[string]int64{
		"pages": m.pages.held(), "windows": m.windows.held(), "frames": m.frames.held(),
		"indexes": m.indexes.held(), "payloads": m.payloads.held(),
	}
}

func (c *byteCache[K, V]) held() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}
