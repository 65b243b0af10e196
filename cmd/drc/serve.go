package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"drc/internal/nbd"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/restorer"
	"drc/restorer/serve"
)

// serveFlags are the flags of drc serve.
type serveFlags struct {
	at     string
	listen []string
	asJSON bool
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

It serves until it is stopped by SIGTERM or Ctrl-C.`,
		Example: `  drc serve data --at -15m
  drc serve data data@before-upgrade logs --listen tcp:127.0.0.1:10809
  qemu-img convert -p "nbd+unix:///data?socket=/var/lib/drc/serve.sock" data.qcow2`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("VOLUME is missing: see %s --help", cmd.CommandPath())
			}
			if slices.Contains(args, "") {
				return usage("VOLUME is empty: see %s --help", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return g.serve(cmd.Context(), args, f) },
	}
	fl := c.Flags()
	fl.StringVar(&f.at, "at", "latest", "`POINT` of the volumes that are given without one")
	fl.StringArrayVar(&f.listen, "listen", nil, "listen on this `URI`, unix:/path or tcp:127.0.0.1:port; repeat for more (default unix:serve.sock in the state folder)")
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
	k, err := g.loadKeys()
	if err != nil {
		return err
	}
	if !k.ring.CanReadContent() {
		return usage("an agent key cannot read content: serve needs the identity (--identity FILE)")
	}
	r, closeRepo, err := g.openRepo(ctx, k)
	if err != nil {
		return err
	}
	defer closeRepo()
	boundMemory()
	signal.Ignore(syscall.SIGPIPE)
	c, err := restorer.OpenCatalog(ctx, g.restorerConfig(r, k))
	if err != nil {
		return err
	}
	defer c.Close()
	logger := slog.New(slog.NewTextHandler(g.err, nil))
	exports := serve.New(c, logger)
	out := servedJSON{Exports: []servedExportJSON{}, Warnings: c.Warnings()}
	for _, name := range names {
		h, p, err := findServed(ctx, c, name, f.at)
		if err != nil {
			return err
		}
		im, err := restorer.OpenImageAt(ctx, h, p)
		if err != nil {
			return err
		}
		if err := exports.Add(name, describePoint(p), im); err != nil {
			return usageError{err}
		}
		x := servedExportJSON{Name: name, Volume: p.Volume.Name, SizeBytes: p.Volume.SizeBytes, Point: toJSON(p.Checkpoint), Note: p.Note, ReadOnly: true, URIs: []string{}}
		for _, uri := range f.listen {
			x.URIs = append(x.URIs, pipeline.ExportURI(uri, name))
		}
		out.Exports = append(out.Exports, x)
	}
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
	if err := g.printServed(out, f.asJSON); err != nil {
		return err
	}
	server := nbd.NewServer(nbd.Options{Exports: exports, Logger: logger})
	e, ectx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		e.Go(func() error { return server.Serve(ectx, l) })
	}
	return e.Wait()
}

// findServed finds what an argument of drc serve means: a volume at the point that
// holds for all, or a volume with a point of its own.
func findServed(ctx context.Context, c *restorer.Catalog, name, at string) (*restorer.History, restorer.Point, error) {
	h, v, err := c.Find(name)
	if err != nil {
		return c.FindAt(ctx, name)
	}
	p, err := h.Resolve(ctx, v.Name, at)
	return h, p, err
}

func describePoint(p restorer.Point) string {
	return fmt.Sprintf("volume %s at seq:%d of %s, read-only", p.Volume.Name, p.Seq, p.Time.Local().Format("2006-01-02 15:04:05.000"))
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
		fmt.Fprintf(g.out, "volume %s at seq:%d of %s: %s\n", x.Volume, x.Point.Seq, local(x.Point.Time), x.URIs[0])
	}
	fmt.Fprintln(g.out, "ready")
	return nil
}
