package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drc/internal/config"
	"drc/internal/diskcache"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/internal/vfs"
)

const (
	// cacheSizeDefault is the limit of the cache if none is given, but no more than
	// one part in cacheFreeParts of what is free: on that disk there may be the
	// buffer or a volume of an agent.
	cacheSizeDefault = "10GiB"
	cacheFreeParts   = 4
)

// cacheFlags are the flags of the cache of what images fetch.
type cacheFlags struct {
	dir   string // empty: in the state folder
	size  string
	bytes int64
	given bool // a size was given
}

func (f *cacheFlags) add(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVar(&f.dir, "cache", "", "keep what was fetched in `DIR`, sealed as it is, for later reads and starts (default: in the state folder)")
	fl.StringVar(&f.size, "cache-size", cacheSizeDefault, "let that take up to `SIZE`, by default no more than a quarter of what is free; 0 is no cache")
}

// check settles what the flags mean.
func (f *cacheFlags) check(c *cobra.Command) (err error) {
	f.given = c.Flags().Changed("cache-size")
	if f.bytes, err = config.ParseSize(f.size); err != nil {
		return usage("--cache-size: %w", err)
	}
	if f.bytes > 0 && f.bytes < diskcache.MinLimitBytes {
		return usage("--cache-size %s is too small: give it 1MiB or more, or 0 for no cache", f.size)
	}
	return nil
}

// openCache opens the cache of what images fetch. If there is none to be had that is a
// warning: a point is served all the same. It is an error where it was asked for.
func (g *global) openCache(r *repo.Repository, f cacheFlags, logger *slog.Logger) (c *diskcache.Cache, warning string, err error) {
	if f.bytes == 0 {
		return nil, "", nil
	}
	o := diskcache.Options{Dir: f.dir, LimitBytes: f.bytes, Logger: logger}
	if o.Dir == "" {
		o.Dir = filepath.Join(state.CachePath(g.statePath()), r.ID.String(), "content")
	}
	if !f.given {
		o.LimitBytes, err = cacheRoom(o.Dir, o.LimitBytes)
	}
	if err == nil {
		c, err = diskcache.Open(o)
	}
	switch {
	case err == nil:
		return c, "", nil
	case f.dir != "":
		return nil, "", fmt.Errorf("--cache %s cannot be used (choose another folder, or --cache-size 0 for no cache): %w", f.dir, err)
	}
	return nil, "serving without a cache, what is read again is fetched again: " + plain(err), nil
}

// cacheRoom is how much of limitBytes a cache in dir may take where nobody has said
// how much it shall. What it has already counts as free.
func cacheRoom(dir string, limitBytes int64) (int64, error) {
	if err := vfs.OS().MkdirAll(dir); err != nil {
		return 0, fmt.Errorf("make the cache folder: %w", err)
	}
	space, err := vfs.OS().StatFS(dir)
	if err != nil {
		return 0, fmt.Errorf("look how much is free in the cache folder: %w", err)
	}
	free := space.FreeBytes
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("list the cache folder: %w", err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			free += info.Size()
		}
	}
	room := min(limitBytes, free/cacheFreeParts)
	if room < diskcache.MinLimitBytes {
		return 0, fmt.Errorf("the disk of the cache folder %s is full: it has only %s free", dir, humanize.IBytes(uint64(space.FreeBytes)))
	}
	return room, nil
}
