package restorer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Catalog is the histories of all groups of a repository, at the moment they
// were read. It is safe for concurrent use.
type Catalog struct {
	histories  []*History
	unreadable []error // of groups whose history could not be read
}

// OpenCatalog reads the histories of all groups. One that cannot be read, while
// others can, is told by Find when it may be the one that is looked for.
func OpenCatalog(ctx context.Context, cfg Config) (*Catalog, error) {
	cfg.defaults()
	s := newStores(&cfg)
	ids, err := groups(ctx, s)
	if err != nil {
		return nil, err
	}
	c := &Catalog{}
	for _, id := range ids {
		h, err := openHistory(ctx, cfg, s, id)
		switch {
		case err == nil:
			c.histories = append(c.histories, h)
		case ctx.Err() != nil:
			c.Close()
			return nil, ctx.Err()
		case !errors.Is(err, ErrNoEntries):
			c.unreadable = append(c.unreadable, err)
		}
	}
	return c, nil
}

// NewCatalog returns a catalog of histories that are open already. They are its own
// from then on only if it is closed.
func NewCatalog(histories ...*History) *Catalog { return &Catalog{histories: histories} }

// Close releases what the histories hold.
func (c *Catalog) Close() {
	for _, h := range c.histories {
		_ = h.Close()
	}
}

// Histories are the histories that could be read.
func (c *Catalog) Histories() []*History { return slices.Clone(c.histories) }

// Find looks for a volume by name in all groups.
func (c *Catalog) Find(volume string) (*History, Volume, error) {
	var found *History
	var names []string
	for _, h := range c.histories {
		for _, v := range h.volumes {
			names = append(names, v.Name)
		}
		if _, ok := h.Volume(volume); !ok {
			continue
		}
		if found != nil {
			return nil, Volume{}, fmt.Errorf("volume %q is in group %q and in group %q: name the group", volume, found.Group.Name, h.Group.Name)
		}
		found = h
	}
	switch {
	case found != nil:
		v, _ := found.Volume(volume)
		return found, v, nil
	case len(c.unreadable) > 0:
		return nil, Volume{}, fmt.Errorf("look for volume %q: %w", volume, errors.Join(c.unreadable...))
	case len(names) == 0:
		return nil, Volume{}, fmt.Errorf("%w as %q: the repository has no volumes yet", ErrNoSuchVolume, volume)
	}
	slices.Sort(names)
	return nil, Volume{}, fmt.Errorf("%w as %q: the repository has %s", ErrNoSuchVolume, volume, strings.Join(slices.Compact(names), ", "))
}

// FindAt looks for what VOLUME or VOLUME@POINT names; without a point it is the
// newest checkpoint. As both names may have an @ in them, the longest name of a
// volume that fits counts.
func (c *Catalog) FindAt(ctx context.Context, name string) (*History, Point, error) {
	volume, point := name, ""
	for {
		h, v, err := c.Find(volume)
		if err == nil {
			p, err := h.Resolve(ctx, v.Name, point)
			return h, p, err
		}
		if !errors.Is(err, ErrNoSuchVolume) {
			return nil, Point{}, err
		}
		at := strings.LastIndexByte(volume, '@')
		if at < 0 {
			volume, _, _ = strings.Cut(name, "@")
			_, _, err = c.Find(volume)
			return nil, Point{}, err
		}
		volume, point = name[:at], name[at+1:]
	}
}

// Find looks for a volume by name in all groups and returns it with the
// history of its group.
func Find(ctx context.Context, cfg Config, volume string) (*History, Volume, error) {
	c, err := OpenCatalog(ctx, cfg)
	if err != nil {
		return nil, Volume{}, err
	}
	found, v, err := c.Find(volume)
	for _, h := range c.histories {
		if h != found {
			_ = h.Close()
		}
	}
	if err != nil {
		return nil, Volume{}, err
	}
	for _, err := range c.unreadable {
		found.warn("%v", err)
	}
	return found, v, nil
}

// Warnings are what was wrong with stores, logs and groups, and was worked around.
func (c *Catalog) Warnings() []string {
	out := []string{}
	for _, h := range c.histories {
		out = append(out, h.Warnings...)
	}
	for _, err := range c.unreadable {
		out = append(out, err.Error())
	}
	return out
}
