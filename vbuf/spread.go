package vbuf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"drc/internal/block"
)

// spreadBitmaps gives the bitmaps that count to the disks that lack them: to those
// that have joined, and to those that stay before others leave. One that does not
// count is made anew when it is needed.
func (b *Buffer) spreadBitmaps(ctx context.Context, leaving []*disk) (did bool, err error) {
	b.mu.Lock()
	open := slices.Clone(b.bitmaps)
	b.mu.Unlock()
	known := map[block.GroupID]bool{}
	for _, m := range open {
		known[m.group] = true
		if did, err := m.catchUp(); did || err != nil {
			return did, err
		}
	}
	// Of groups that nobody works with there may be one, too.
	for _, d := range leaving {
		entries, err := d.fs.ReadDir(b.path(d, bitmapFolder))
		if errors.Is(err, fs.ErrNotExist) || err != nil && b.isSuspect(d) {
			continue
		}
		if err != nil {
			return false, err
		}
		for _, e := range entries {
			name, ok := strings.CutSuffix(e.Name, bitmapSuffix)
			id, err := block.ParseID(name)
			if g := block.GroupID(id); !ok || err != nil || known[g] {
				continue
			} else if err := b.spreadBitmap(ctx, g); err != nil {
				return false, err
			}
		}
	}
	return false, nil
}

func (b *Buffer) spreadBitmap(ctx context.Context, g block.GroupID) error {
	m, err := b.Bitmap(ctx, g)
	if err != nil {
		return err
	}
	defer m.Close()
	_, err = m.catchUp()
	return err
}

// catchUp gives the bitmap, if it counts, to each disk in use that lacks it.
func (m *Bitmap) catchUp() (did bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.header.Active || m.writing || m.err != nil {
		return false, nil
	}
	before := len(m.files)
	if err := m.spread(m.header); err != nil {
		return false, fmt.Errorf("move the bitmap of group %s: %w", m.group, err)
	}
	return len(m.files) > before, nil
}
