package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/nbd"
	"drc/internal/overlay"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/restorer"
	"drc/restorer/serve"
)

// serveFlags are the flags of drc serve.
type serveFlags struct {
	at       string
	listen   []string
	writable string
	hydrate  bool
	cache    cacheFlags
	asJSON   bool
}

// servedJSON is what drc serve --json prints when it serves; see docs/CLI_JSON.md.
type servedJSON struct {
	Exports  []servedExportJSON `json:"exports"`
	Warnings []string           `json:"warnings"`
}

type servedExportJSON struct {
	Name      string         `json:"name"`
	Volume    string         `json:"volume"`
	SizeBytes int64          `json:"size_bytes"`
	Point     checkpointJSON `json:"point"`
	Note      string         `json:"note,omitempty"`
	ReadOnly  bool           `json:"read_only"`
	File      string         `json:"file,omitempty"`
	Complete  *bool          `json:"complete,omitempty"`
	URIs      []string       `json:"uris"`
}

func serveCommand(g *global) *cobra.Command {
	var f serveFlags
	c := &cobra.Command{
		Use:   "serve VOLUME[@POINT] …",
		Short: "Export volumes at a point over NBD, at once",
		Long: `Export volumes as they were at a point, read-only, over NBD. It takes about a
second, however large the volume is and however long its history: what a client
reads is fetched while it reads. Nothing but the stores and the identity is
needed, and nothing is written to the stores.

An export's name is what was given here: VOLUME, or VOLUME@POINT. Clients may open
any other point of the repository's volumes as VOLUME@POINT too, without it being
listed here.

POINT is latest, the name of a checkpoint, seq:N, a time (2026-01-31T12:00:00Z,
"2026-01-31 12:00", local time), or a duration back from the newest checkpoint
(-15m). What is newest is settled when drc serve starts.

With --writable FILE the one volume that is given can be written: what clients
write is kept in FILE, a sparse file of the volume's size, and in FILE.drc-overlay
beside it; all else still comes from the stores, where nothing changes. Given again
with the same FILE the command goes on with what was written, at the same point.
With --hydrate the rest of the volume is brought into FILE in the background, over
restarts; when all is there FILE is the whole volume, a raw image, and neither
stores nor identity are needed any more.

What was fetched is kept on the local disk, encrypted as it is in the stores, and
need not be fetched again, also by a later drc serve and for other points. Anything
in --cache DIR may be lost or damaged at any time: it is verified, and had from the
stores then. A cache has one user at a time; a second drc serve goes without one,
unless it is given another DIR.

It serves until it is stopped by SIGTERM or Ctrl-C.`,
		Example: `  drc serve data --at -15m
  drc serve data data@before-upgrade logs --listen tcp:127.0.0.1:10809
  drc serve data --at before-upgrade --writable /srv/try.img --hydrate
  qemu-img convert -p "nbd+unix:///data?socket=/var/lib/drc/serve.sock" data.qcow2`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("VOLUME is missing: see %s --help", cmd.CommandPath())
			}
			if slices.Contains(args, "") {
				return usage("VOLUME is empty: see %s --help", cmd.CommandPath())
			}
			if f.writable != "" && len(args) > 1 {
				return usage("--writable FILE is for one volume, and %d are given: serve each by a command of its own", len(args))
			}
			if f.hydrate && f.writable == "" {
				return usage("--hydrate needs --writable FILE, which is what it fills")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("at") {
				f.at = ""
			}
			if err := f.cache.check(cmd); err != nil {
				return err
			}
			return g.serve(cmd.Context(), args, f)
		},
	}
	fl := c.Flags()
	fl.StringVar(&f.at, "at", "latest", "`POINT` of the volumes that are given without one")
	fl.StringArrayVar(&f.listen, "listen", nil, "listen on this `URI`, unix:/path or tcp:127.0.0.1:port; repeat for more (default unix:serve.sock in the state folder)")
	fl.StringVar(&f.writable, "writable", "", "keep what clients write in `FILE`, which is made if it does not exist")
	fl.BoolVar(&f.hydrate, "hydrate", false, "bring the whole volume into FILE in the background")
	f.cache.add(c)
	fl.BoolVar(&f.asJSON, "json", false, "print what is served as JSON")
	return c
}

func (g *global) serve(ctx context.Context, names []string, f serveFlags) error {
	if len(f.listen) == 0 {
		dir, err := state.Open(g.statePath())
		if err != nil {
			return err
		}
		f.listen = []string{"unix:" + dir.Path("serve.sock")}
	}
	for _, uri := range f.listen {
		if err := checkListen(uri); err != nil {
			return usageError{err}
		}
	}
	boundMemory()
	signal.Ignore(syscall.SIGPIPE)
	logger := slog.New(slog.NewTextHandler(g.err, nil))
	what, err := g.openServed(ctx, names, f, logger)
	if err != nil {
		return err
	}
	defer what.close()
	var listeners []net.Listener
	for _, uri := range f.listen {
		l, err := nbd.Listen(uri)
		if err != nil {
			for _, l := range listeners {
				_ = l.Close()
			}
			return err
		}
		listeners = append(listeners, l)
	}
	if err := g.printServed(what.out, f.asJSON); err != nil {
		return err
	}
	server := nbd.NewServer(nbd.Options{Exports: what.exports, Logger: logger})
	e, ectx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		e.Go(func() error { return server.Serve(ectx, l) })
	}
	if f.hydrate {
		e.Go(func() error { return g.hydrate(ectx, what.overlay, what.once) })
	}
	return errors.Join(e.Wait(), what.close())
}

// served is what drc serve exports.
type served struct {
	exports *serve.Exports
	overlay *overlay.Device // nil: nothing can be written
	once    block.Device    // what is below that, for who reads it once; nil: nothing is missing
	out     servedJSON
	closers []func() error
}

// close lets go of everything, in the reverse order. It may be called again.
func (s *served) close() (err error) {
	for _, f := range slices.Backward(s.closers) {
		err = errors.Join(err, f())
	}
	s.closers = nil
	return err
}

// openServed opens what is to be exported.
func (g *global) openServed(ctx context.Context, names []string, f serveFlags, logger *slog.Logger) (_ *served, err error) {
	s := &served{out: servedJSON{Exports: []servedExportJSON{}, Warnings: []string{}}}
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	held, err := peekOverlay(f.writable)
	if err != nil {
		return nil, err
	}
	if held != nil && held.complete {
		return s, s.addComplete(ctx, names[0], f, held)
	}
	k, err := g.loadKeys()
	if err != nil {
		return nil, err
	}
	if !k.ring.CanReadContent() {
		return nil, usage("an agent key cannot read content: serve needs the identity (--identity FILE)")
	}
	r, closeRepo, err := g.openRepo(ctx, k)
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, func() error { closeRepo(); return nil })
	cfg := g.restorerConfig(r, k)
	cache, warning, err := g.openCache(r, f.cache, logger)
	if err != nil {
		return nil, err
	}
	if cache != nil {
		cfg.Cache = cache
		s.closers = append(s.closers, cache.Close)
	}
	c, err := restorer.OpenCatalog(ctx, cfg)
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, func() error { c.Close(); return nil })
	s.out.Warnings = c.Warnings()
	if warning != "" {
		s.out.Warnings = append(s.out.Warnings, warning)
	}
	s.exports = serve.New(c, logger)
	for _, name := range names {
		h, p, err := findServed(ctx, c, name, f.at, held)
		if err != nil {
			return nil, err
		}
		im, err := restorer.OpenImageAt(ctx, h, p)
		if err != nil {
			return nil, err
		}
		x := servedExportJSON{Name: name, Volume: p.Volume.Name, SizeBytes: p.Volume.SizeBytes, Point: toJSON(p.Checkpoint), Note: p.Note, ReadOnly: true}
		if f.writable != "" {
			err = s.addWritable(ctx, x, f, h, im)
		} else {
			err = s.add(x, f, describePoint(x), im)
		}
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// add exports a device.
func (s *served) add(x servedExportJSON, f serveFlags, description string, dev block.Device) error {
	if err := s.exports.Add(x.Name, description, dev); err != nil {
		return usageError{err}
	}
	x.URIs = []string{}
	for _, uri := range f.listen {
		x.URIs = append(x.URIs, pipeline.ExportURI(uri, x.Name))
	}
	s.out.Exports = append(s.out.Exports, x)
	return nil
}

// findServed finds what an argument of drc serve means: a volume at the point that
// holds for all, or a volume with a point of its own. Without a point an overlay that
// was begun before says which.
func findServed(ctx context.Context, c *restorer.Catalog, name, at string, held *heldOverlay) (*restorer.History, restorer.Point, error) {
	h, v, err := c.Find(name)
	if err != nil {
		return c.FindAt(ctx, name)
	}
	var p restorer.Point
	if held != nil && at == "" && held.of.Volume == v.ID {
		p, err = h.At(ctx, v, held.of.Entry, held.of.Hash)
	} else {
		p, err = h.Resolve(ctx, v.Name, at)
	}
	return h, p, err
}

func describePoint(x servedExportJSON) string {
	how := "read-only"
	if !x.ReadOnly {
		how = "written to a file of its own"
	}
	return fmt.Sprintf("volume %s at seq:%d of %s, %s", x.Volume, x.Point.Seq, local(x.Point.Time), how)
}

func (g *global) printServed(s servedJSON, asJSON bool) error {
	for _, w := range s.Warnings {
		g.talk("warning: %s", w)
	}
	if asJSON {
		return g.printJSON(s)
	}
	for _, x := range s.Exports {
		if x.Note != "" {
			g.talk("note: %s: %s", x.Name, x.Note)
		}
		if x.Complete != nil && *x.Complete {
			g.talk("note: all of %s is in %s: no store is needed for it any more", x.Volume, x.File)
		}
		fmt.Fprintf(g.out, "volume %s at seq:%d%s: %s\n", x.Volume, x.Point.Seq, ofTime(x.Point.Time), x.URIs[0])
	}
	fmt.Fprintln(g.out, "ready")
	return nil
}

// ofTime is how a line goes on with a time, if there is one.
func ofTime(text string) string {
	if text == "" {
		return ""
	}
	return " of " + local(text)
}
