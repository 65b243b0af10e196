package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drc/internal/block"
	"drc/internal/config"
	"drc/internal/control"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/restorer"
	"drc/restorer/replay"
)

// promoteFlags are the flags of drc promote.
type promoteFlags struct {
	agent  agentFlags
	at     string
	into   string
	copies []string
	adopt  bool
	as     []string
	listen string

	files map[string]string
	names map[string]string
}

func promoteCommand(g *global) *cobra.Command {
	var f promoteFlags
	c := &cobra.Command{
		Use:   "promote VOLUME --into DIR",
		Short: "Make this host the writer of a volume, with the copy that a standby has kept",
		Long: `Make this host the writer of a volume: fence the host that has written it, on a
majority of the stores, bring the copy in DIR to what was committed, open it for
writing, and go on protecting it, until stopped. All volumes of its group come with it.
A standby that runs with DIR lets go of it first; without one the copy is made now.

After drc demote on the other host nothing is missing, and the volume goes on under its
name. Otherwise what that host acknowledged and had not committed is not here: the
volume goes on as a new branch under a new name (data-2), so that a client that still
knows the old export never finds itself in another history. With --at it goes on from
an older point, on a new branch as well. Everything that was committed before stays
restorable under the old name; drc history shows both.

The volume is remembered in the state folder: later starts need only drc agent.`,
		Example: `  drc promote data --into /srv/standby
  drc promote data --into /srv/standby --at -15m --as data=data-before-the-accident
  drc demote data          # on the living primary, for a planned switchover`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := exactly("VOLUME")(cmd, args); err != nil {
				return err
			}
			if f.into == "" {
				return usage("--into DIR is missing: it is where the standby keeps its copies, or where one is made now")
			}
			var err error
			if f.files, err = pairs("--copy", "VOLUME=FILE", f.copies, filepath.Abs); err != nil {
				return err
			}
			f.names, err = pairs("--as", "VOLUME=NAME", f.as, func(name string) (string, error) { return name, nil })
			return err
		},
		RunE: func(cmd *cobra.Command, args []string) error { return g.promote(cmd.Context(), args[0], f) },
	}
	fl := c.Flags()
	fl.StringVar(&f.at, "at", "", "go on from this `POINT` instead of the newest one; see drc restore --help")
	fl.StringVar(&f.into, "into", "", "the standby's `DIR`")
	fl.StringArrayVar(&f.copies, "copy", nil, "the copy of a volume is another file: `VOLUME=FILE`; repeat for more")
	fl.BoolVar(&f.adopt, "adopt", false, "make files that are there already copies: compare them, and overwrite what differs")
	fl.StringArrayVar(&f.as, "as", nil, "what a volume is called on the new branch: `VOLUME=NAME`; repeat for more (default: the next free number)")
	fl.StringVar(&f.listen, "listen", "", "export the volumes on this `URI`, unix:/path or tcp:127.0.0.1:port (default unix:nbd.sock in the state folder)")
	fl.StringArrayVar(&f.agent.buffers, "buffer", nil, "a buffer directory, as `SPEC` path=…[,size=…]; repeat for several disks (default: buffer in the state folder)")
	fl.DurationVar(&f.agent.rpo, "rpo", 0, "wanted lag, as a `DURATION` like 500ms, between a write and its checkpoint on the stores (default 1s)")
	fl.StringVar(&f.agent.bandwidth, "bandwidth", "", "limit towards the stores, `BYTES` a second, like 10MiB")
	fl.StringVar(&f.agent.http, "http", "", "serve /metrics and /v1/status, read-only, on this loopback `ADDR`")
	fl.StringVar(&f.agent.drain, "drain", "buffer", "`WHAT` a stop waits for: buffer or stores")
	fl.StringVar(&f.agent.logLevel, "log-level", "info", "least `LEVEL` of what is logged: debug, info, warn or error")
	return c
}

// pairs reads flags of the form A=B.
func pairs(flag, form string, texts []string, value func(string) (string, error)) (map[string]string, error) {
	out := map[string]string{}
	for _, text := range texts {
		a, b, ok := strings.Cut(text, "=")
		if !ok || a == "" || b == "" {
			return nil, usage("%s %q is not %s", flag, text, form)
		}
		var err error
		if out[a], err = value(b); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// standbyEnds is how long a standby has to let go of its folder.
const standbyEnds = 2 * time.Minute

func (g *global) promote(ctx context.Context, volume string, f promoteFlags) (err error) {
	began := time.Now()
	cfg, err := g.agentConfig(f.agent, &config.File{})
	if err != nil {
		return err
	}
	if f.listen != "" {
		if err := checkListen(f.listen); err != nil {
			return usageError{err}
		}
	}
	into, err := filepath.Abs(f.into)
	if err != nil {
		return err
	}
	k, err := g.loadKeys()
	if err != nil {
		return err
	}
	if !k.ring.CanReadContent() {
		return usage("an agent key cannot read content: promote needs the identity (--identity FILE)")
	}
	dir, err := state.Open(g.statePath())
	if err != nil {
		return err
	}
	if err := dir.Lock(); err != nil {
		return err
	}
	defer dir.Close()
	if cfg.Agent, err = k.agentFor(dir); err != nil {
		return err
	}
	r, closeRepo, err := g.openRepoCached(ctx, k, dir)
	if err != nil {
		return err
	}
	defer closeRepo()
	cfg.Repo, cfg.Ring, cfg.State = r, k.ring, dir

	order, volumes, err := g.promotion(ctx, cfg, volume, f)
	if err != nil {
		return err
	}
	if err := endStandby(ctx, dir); err != nil {
		return err
	}
	rc := g.restorerConfig(r, k)
	rc.Logger = cfg.Logger
	// What an earlier try had let go of is the volume's, and is compared.
	noted, err := pipeline.NotedPromotion(cfg, order.Group)
	if err != nil {
		return err
	}
	o := replay.Options{Restorer: rc, Dir: into, Files: f.files, Adopt: f.adopt || noted != nil, Logger: cfg.Logger}
	for _, v := range volumes {
		o.Volumes = append(o.Volumes, v.Name)
		if file := noted[v.ID.String()]; file != "" {
			o.Files[v.Name] = file
		}
	}
	s, err := openStandby(ctx, o)
	if err != nil {
		return err
	}
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, s.Close())
		}
	}()
	if order.At == nil { // most of it before the other one is fenced
		if err := s.CatchUp(ctx); err != nil {
			return err
		}
	}
	var fork *restorer.Fork
	order.Bring = func(ctx context.Context, _ *restorer.History, at *restorer.Fork) (map[block.VolumeID]string, error) {
		fork = at
		return s.Bring(ctx, order.Group, at)
	}
	order.Release = func() error { return s.Release(order.Group, fork) }
	done, err := pipeline.Promote(ctx, cfg, order)
	if err != nil {
		return err
	}
	closed = true
	if err := s.Close(); err != nil {
		return err
	}
	for _, v := range done.Volumes {
		at := fmt.Sprintf("seq:%d of %s", done.Fork.Seq, done.Fork.Time.Local().Format("2006-01-02 15:04:05.000"))
		if done.Same {
			fmt.Fprintf(g.out, "volume %s: it was handed over, and goes on from %s in %s\n", v.Name, at, v.Path)
		} else {
			fmt.Fprintf(g.out, "volume %s: it goes on from %s, %s, on branch %s in %s\n", v.Name, done.Was[v.Name], at, done.Branch.String()[:8], v.Path)
		}
	}
	added, err := addedVolumes(dir, r.ID)
	if err != nil {
		return err
	}
	if cfg.Volumes, err = joinAdded(nil, added); err != nil {
		return err
	}
	return g.runAgent(ctx, cfg, f.agent.http, func(a *pipeline.Agent) {
		fmt.Fprintf(g.out, "taking writes %.2fs after the command\n", time.Since(began).Seconds())
		if a.AwaitWrite(ctx) == nil {
			fmt.Fprintf(g.out, "first write accepted %.2fs after the command\n", time.Since(began).Seconds())
		}
	})
}

// promotion finds out what is to be promoted: the volume's group, and the volumes that
// come with it.
func (g *global) promotion(ctx context.Context, cfg pipeline.Config, volume string, f promoteFlags) (pipeline.Promotion, []restorer.Volume, error) {
	var order pipeline.Promotion
	rc := restorer.Config{Repo: cfg.Repo, Ring: cfg.Ring, Logger: cfg.Logger}
	h, v, err := restorer.Find(ctx, rc, volume)
	if err != nil {
		return order, nil, err
	}
	defer h.Close()
	order = pipeline.Promotion{Group: h.GroupID, Branch: v.Branch, Known: len(h.Branches()), Names: f.names, Listen: f.listen}
	if f.at != "" && f.at != "latest" {
		p, err := h.Resolve(ctx, volume, f.at)
		if err != nil {
			return order, nil, err
		}
		if p.Note != "" {
			g.talk("note: %s", p.Note)
		}
		order.At = &p
	}
	volumes := h.VolumesOn(v.Branch)
	var names []string
	for _, x := range volumes {
		names = append(names, x.Name)
	}
	for name := range f.files {
		if !slices.Contains(names, name) {
			return order, nil, usage("--copy is given for volume %s, which is not in group %s of volume %s", name, h.Group.Name, volume)
		}
	}
	if v.Branch != h.Current() && f.at == "" {
		return order, nil, fmt.Errorf("volume %s is not written any more: its group goes on on branch %s as %s. Promote that one, or say from which point of %s to go on: --at latest or another POINT",
			volume, h.Current().String()[:8], strings.Join(namesOf(h.CurrentVolumes()), ", "), volume)
	}
	return order, volumes, nil
}

func namesOf(vols []restorer.Volume) (names []string) {
	for _, v := range vols {
		names = append(names, v.Name)
	}
	return names
}

// endStandby has the standby of a state folder end, if there is one.
func endStandby(ctx context.Context, dir *state.Dir) error {
	err := control.NewClient(state.StandbySocketPath(dir.Path())).End(ctx)
	if errors.Is(err, control.ErrNoAgent) {
		return nil
	}
	return err
}

// openStandby opens a standby's folder, of which another process may be letting go.
func openStandby(ctx context.Context, o replay.Options) (*replay.Standby, error) {
	deadline := time.Now().Add(standbyEnds)
	for {
		s, err := replay.Open(ctx, o)
		var used *replay.InUseError
		if err == nil || !errors.As(err, &used) || time.Now().After(deadline) {
			return s, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func demoteCommand(g *global) *cobra.Command {
	c := &cobra.Command{
		Use:   "demote VOLUME",
		Short: "Hand a volume over: stop, commit everything, and let another host go on",
		Long: `Have the running agent hand over a volume, with all volumes of its group: its
clients may write no more, everything that was acknowledged goes to the stores, and an
entry in the log says so. drc promote on another host then goes on under the same name,
and nothing is missing. The export stays readable here.

If the stores cannot be reached, nothing is handed over: Ctrl-C, and the volume takes
writes again.`,
		Example: "  drc demote data",
		Args:    exactly("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			done, err := client.Demote(cmd.Context(), control.DemoteRequest{Volume: args[0]})
			if err != nil {
				return err
			}
			for _, name := range done.Volumes {
				fmt.Fprintf(g.out, "volume %s: handed over at seq:%d; on the host that goes on: drc promote %s\n", name, done.Seq, name)
			}
			return nil
		},
	}
	return c
}
