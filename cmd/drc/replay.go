package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"drc/internal/control"
	"drc/internal/nbd"
	"drc/internal/state"
	"drc/internal/vfs"
	"drc/restorer/replay"
	"drc/restorer/serve"
)

// replayFlags are the flags of drc replay.
type replayFlags struct {
	into   string
	copies []string
	adopt  bool
	delay  time.Duration
	once   bool
	listen []string
	http   string
	asJSON bool

	files map[string]string
}

func replayCommand(g *global) *cobra.Command {
	var f replayFlags
	c := &cobra.Command{
		Use:   "replay [VOLUME …] --into DIR",
		Short: "Keep raw copies of volumes up to date from the stores: a standby",
		Long: `Keep raw copies of volumes up to date by following what is committed to the
stores, until it is stopped. Without VOLUME it follows all volumes of the repository,
and those that join later. DIR holds the copies, VOLUME.raw, and what the standby
remembers; given again, it goes on where it was.

A copy moves from checkpoint to checkpoint, whole: after a crash it is at one, never
between two. With --delay it stays that far behind, so that what was done by mistake
can be had back from the copy as it was.

A copy begins from nothing, or from a raw file that is there: with --adopt what the
file holds is compared, and only what differs is fetched and overwritten. A copy that
another program has written to is noticed, and compared in the same way.

It exports the copies over NBD, read-only: VOLUME is the copy as it is when a client
connects, and stays so for that client; VOLUME@POINT is any checkpoint, fetched from
the stores while it is read. drc status shows how far the copies are.`,
		Example: `  drc replay --into /srv/standby
  drc replay data --into /srv/standby --delay 1h
  drc replay data --into /srv/standby --copy data=/srv/data.img --adopt
  drc replay --into /srv/standby --once`,
		Args: func(cmd *cobra.Command, args []string) error {
			if slices.Contains(args, "") {
				return usage("VOLUME is empty: see %s --help", cmd.CommandPath())
			}
			if f.into == "" {
				return usage("--into DIR is missing: it is where the copies are")
			}
			if f.delay < 0 {
				return usage("--delay %s is negative: give it how far the copies shall stay behind, like 1h", f.delay)
			}
			if f.once && (len(f.listen) > 0 || f.http != "") {
				return usage("--once ends when the copies are up to date, and serves nobody: leave out --listen and --http")
			}
			if f.asJSON && !f.once {
				return usage("--json is for --once; drc status --json shows a standby that runs")
			}
			f.files = map[string]string{}
			for _, text := range f.copies {
				volume, file, ok := strings.Cut(text, "=")
				if !ok || volume == "" || file == "" {
					return usage("--copy %q is not VOLUME=FILE", text)
				}
				file, err := filepath.Abs(file)
				if err != nil {
					return err
				}
				f.files[volume] = file
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return g.replay(cmd.Context(), args, f) },
	}
	fl := c.Flags()
	fl.StringVar(&f.into, "into", "", "keep the copies, and what the standby remembers, in `DIR`")
	fl.StringArrayVar(&f.copies, "copy", nil, "keep the copy of a volume in another file: `VOLUME=FILE`; repeat for more")
	fl.BoolVar(&f.adopt, "adopt", false, "make files that are there already copies: compare them, and overwrite what differs")
	fl.DurationVar(&f.delay, "delay", 0, "stay this `DURATION` behind, like 1h")
	fl.BoolVar(&f.once, "once", false, "end when the copies are up to date")
	fl.StringArrayVar(&f.listen, "listen", nil, "listen on this `URI`, unix:/path or tcp:127.0.0.1:port; repeat for more (default unix:replay.sock in the state folder)")
	fl.StringVar(&f.http, "http", "", "serve /metrics and /v1/status, read-only, on this loopback `ADDR`")
	fl.BoolVar(&f.asJSON, "json", false, "with --once: print how the copies are as JSON")
	return c
}

func (g *global) replay(ctx context.Context, volumes []string, f replayFlags) (err error) {
	dir, err := state.Open(g.statePath())
	if err != nil {
		return err
	}
	if len(f.listen) == 0 {
		f.listen = []string{"unix:" + dir.Path("replay.sock")}
	}
	for _, uri := range f.listen {
		if err := checkListen(uri); err != nil {
			return usageError{err}
		}
	}
	for volume, file := range f.files {
		if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
			return usage("--copy %s=%s: it is no regular file; copies are kept in files", volume, file)
		}
	}
	boundMemory()
	signal.Ignore(syscall.SIGPIPE)
	k, err := g.loadKeys()
	if err != nil {
		return err
	}
	if !k.ring.CanReadContent() {
		return usage("an agent key cannot read content: replay needs the identity (--identity FILE)")
	}
	r, closeRepo, err := g.openRepo(ctx, k)
	if err != nil {
		return err
	}
	defer closeRepo()
	logger := slog.New(slog.NewTextHandler(g.err, nil))
	cfg := g.restorerConfig(r, k)
	cfg.Logger = logger
	into, err := filepath.Abs(f.into)
	if err != nil {
		return err
	}
	s, err := replay.Open(ctx, replay.Options{
		Restorer: cfg, Dir: into, Volumes: volumes, Files: f.files, Adopt: f.adopt, Delay: f.delay, Logger: logger,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if f.once {
		if err := s.CatchUp(ctx); err != nil {
			return err
		}
		return g.printCopies(standbyStatus(s), f.asJSON)
	}
	return g.follow(ctx, s, dir, f, logger)
}

// follow runs a standby and serves its exports and its status.
func (g *global) follow(ctx context.Context, s *replay.Standby, dir *state.Dir, f replayFlags, logger *slog.Logger) error {
	lock, err := vfs.OS().Lock(dir.Path("standby.lock"))
	if errors.Is(err, vfs.ErrLocked) {
		return fmt.Errorf("%s: another standby uses this state folder: pass --state DIR for a second one: %w", g.statePath(), state.ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("lock the state folder: %w", err)
	}
	defer lock.Close()
	status := func() control.Status { return standbyStatus(s) }
	socket := state.StandbySocketPath(dir.Path())
	sock, err := control.Listen(socket)
	if err != nil {
		return err
	}
	running, end := context.WithCancel(ctx)
	defer end()
	e, ectx := errgroup.WithContext(running)
	var listeners []net.Listener
	closeAll := func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	}
	listeners = append(listeners, sock)
	var nbds []net.Listener
	for _, uri := range f.listen {
		l, err := nbd.Listen(uri)
		if err != nil {
			closeAll()
			return err
		}
		listeners, nbds = append(listeners, l), append(nbds, l)
	}
	if f.http != "" {
		web, err := listenHTTP(f.http)
		if err != nil {
			closeAll()
			return err
		}
		defer serveHTTP(web, status)()
	}
	exports := serve.New(s, logger)
	exports.Follow(s)
	server := nbd.NewServer(nbd.Options{Exports: exports, Logger: logger})
	for _, x := range status().Copies {
		fmt.Fprintf(g.out, "volume %s: %s, %s\n", x.Volume, x.File, f.listen[0])
	}
	fmt.Fprintln(g.out, "ready")
	e.Go(func() error { return control.ServeStandby(ectx, sock, status, end) })
	for _, l := range nbds {
		e.Go(func() error { return server.Serve(ectx, l) })
	}
	e.Go(func() error { return s.Run(ectx) })
	return e.Wait()
}

// standbyStatus is the status of a standby, as drc status shows it.
func standbyStatus(s *replay.Standby) control.Status {
	out := control.Status{
		State: string(replay.Following), PID: os.Getpid(), Repo: s.RepoID().String(),
		Groups: []control.Group{}, Buffer: control.Buffer{Disks: []control.Disk{}}, Stores: []control.Store{}, Copies: []control.Copy{},
	}
	for _, x := range s.Status() {
		c := control.Copy{
			Volume: x.Volume, Group: x.Group, File: x.File, State: string(x.State), Message: x.Message, SizeBytes: x.SizeBytes, DoneBytes: x.DoneBytes,
			Entry: x.Entry, Seq: x.Seq, LagSeconds: x.Lag.Seconds(), BehindBytes: x.BehindBytes, Views: x.Views, Heard: stamp(x.Heard),
		}
		if x.Entry > 0 {
			c.Time = stamp(x.Time)
		}
		if worse(c.State, out.State) {
			out.State = c.State
		}
		if x.Message != "" {
			c.Message = plain(errors.New(x.Message))
		}
		out.Copies = append(out.Copies, c)
	}
	return out
}

// worse compares states of copies.
func worse(a, b string) bool {
	order := []string{string(replay.Following), string(replay.Waiting), string(replay.Comparing), string(replay.Filling), string(replay.Failing)}
	return slices.Index(order, a) > slices.Index(order, b)
}

func (g *global) printCopies(s control.Status, asJSON bool) error {
	if asJSON {
		return g.printJSON(s.Copies)
	}
	for _, x := range s.Copies {
		at := "nothing of it can be had yet"
		if x.Entry > 0 {
			at = fmt.Sprintf("at seq:%d of %s", x.Seq, local(x.Time))
		}
		fmt.Fprintf(g.out, "volume %s: %s, %s\n", x.Volume, x.File, at)
	}
	return nil
}
