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
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"drc/capture"
	"drc/internal/config"
	"drc/internal/nbd"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/vbuf"
)

// agentFlags are the flags of drc agent.
type agentFlags struct {
	config    string
	volumes   []string
	buffers   []string
	rpo       time.Duration
	bandwidth string
	http      string
	takeover  bool
	drain     string
	rewind    []string
	resync    []string
	logLevel  string
}

func agentCommand(g *global) *cobra.Command {
	var f agentFlags
	c := &cobra.Command{
		Use:   "agent --volume name=…,path=… [flags]",
		Short: "Protect volumes continuously, until stopped",
		Long: `Export each volume over NBD and bring every write to the stores, about a second
behind. The volume's path is a raw file or device, which may hold data already:
it is read in while clients use it. With size=… a file that does not exist is
created, sparse.

Stopped by SIGTERM or Ctrl-C it makes buffer and volumes safe and ends; with
--drain=stores it first waits until everything is committed. After kill -9 or a
power cut the next start goes on where this one was.

Configuration: a TOML file with the same words; flags win over it.`,
		Example: `  drc agent --store file:///backup/drc --identity drc.id --volume name=data,path=/var/lib/data.img,size=10GiB
  drc agent --config /etc/drc/agent.toml
  nbdinfo --list "nbd+unix:///?socket=/var/lib/drc/nbd.sock"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return g.agent(cmd.Context(), f) },
	}
	fl := c.Flags()
	fl.StringVar(&f.config, "config", "", "configuration `FILE` (TOML)")
	fl.StringArrayVar(&f.volumes, "volume", nil, "a volume, as `SPEC` name=…,path=…[,size=…][,listen=unix:/…|tcp:127.0.0.1:…][,group=…][,ack=journal|durable][,when-full=bitmap|hold]; repeat for more")
	fl.StringArrayVar(&f.buffers, "buffer", nil, "a buffer directory, as `SPEC` path=…[,size=…]; repeat for several disks (default: buffer in the state folder)")
	fl.DurationVar(&f.rpo, "rpo", 0, "wanted lag, as a `DURATION` like 500ms, between a write and its checkpoint on the stores (default 1s)")
	fl.StringVar(&f.bandwidth, "bandwidth", "", "limit towards the stores, `BYTES` a second, like 10MiB")
	fl.StringVar(&f.http, "http", "", "serve /metrics and /v1/status, read-only, on this loopback `ADDR`")
	fl.BoolVar(&f.takeover, "takeover", false, "fence the agent that wrote these volumes before, for good")
	fl.StringVar(&f.drain, "drain", "buffer", "`WHAT` a stop waits for: buffer or stores")
	fl.StringArrayVar(&f.rewind, "rewind", nil, "the buffer is lost: bring this `VOLUME` back to its newest checkpoint; repeat for more")
	fl.StringArrayVar(&f.resync, "resync", nil, "the buffer is lost: keep this `VOLUME` as it is, though it may lack acknowledged writes; repeat for more")
	fl.StringVar(&f.logLevel, "log-level", "info", "least `LEVEL` of what is logged: debug, info, warn or error")
	return c
}

func (g *global) agent(ctx context.Context, f agentFlags) (err error) {
	defer func() { err = g.stoppedEarly(ctx, err) }()
	file := &config.File{}
	if f.config != "" {
		if file, err = config.Load(f.config); err != nil {
			return usageError{err}
		}
	}
	cfg, err := g.agentConfig(f, file)
	if err != nil {
		return err
	}
	k, err := g.loadKeys()
	if err != nil {
		return err
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
	added, err := addedVolumes(dir, k.root.RepoID())
	if err != nil {
		return err
	}
	if cfg.Volumes, err = joinAdded(cfg.Volumes, added); err != nil {
		return err
	}
	if f.http == "" {
		f.http = file.HTTP
	}
	r, closeRepo, err := g.openRepoCached(ctx, k, dir)
	if err != nil {
		return err
	}
	defer closeRepo()
	cfg.Repo, cfg.Ring, cfg.State = r, k.ring, dir
	return g.runAgent(ctx, cfg, f.http, nil)
}

// runAgent runs an agent until it is stopped. ready, if not nil, is called when it takes
// writes, and may go on until ctx ends.
func (g *global) runAgent(ctx context.Context, cfg pipeline.Config, http string, ready func(*pipeline.Agent)) (err error) {
	var web net.Listener
	if http != "" {
		if web, err = listenHTTP(http); err != nil {
			return err
		}
		defer web.Close()
	}
	if cfg.Buffer, err = pipeline.BufferDirs(cfg.State, cfg.Buffer); err != nil {
		return err
	}
	boundMemory()
	// Who reads the agent's output may go away; that ends no protection.
	signal.Ignore(syscall.SIGPIPE)

	a, err := pipeline.Open(ctx, cfg)
	if err != nil {
		return g.stoppedEarly(ctx, err)
	}
	go func() {
		select {
		case <-a.Ready():
			for _, grp := range a.Status().Groups {
				for _, v := range grp.Volumes {
					if len(v.Exports) == 0 {
						fmt.Fprintf(g.out, "volume %s: not exported: %s\n", v.Name, grp.State)
						continue
					}
					fmt.Fprintf(g.out, "volume %s: %s\n", v.Name, v.Exports[0])
				}
			}
			fmt.Fprintln(g.out, "ready")
			if ready != nil {
				ready(a)
			}
		case <-ctx.Done():
		}
	}()
	if web != nil {
		defer serveHTTP(web, a.Status)()
	}
	err = a.Run(ctx)
	if !a.IsServing() && err == nil {
		err = context.Cause(ctx)
	}
	if a.IsServing() {
		return err
	}
	return g.stoppedEarly(ctx, err)
}

// stoppedEarly makes no failure of a stop before the volumes were served: however long
// a start has to wait, it may be stopped.
func (g *global) stoppedEarly(ctx context.Context, err error) error {
	if ctx.Err() == nil || !errors.Is(err, context.Canceled) {
		return err
	}
	g.talk("stopped before the volumes were served: nothing is lost, and the next start goes on")
	return nil
}

// joinAdded joins the volumes of flags and file with those that drc volume add
// gave this host's agent; a volume that is in both is as flags and file say.
func joinAdded(given, added []pipeline.VolumeConfig) ([]pipeline.VolumeConfig, error) {
	names := map[string]bool{}
	for i, v := range given {
		abs, err := filepath.Abs(v.Path)
		if err != nil {
			return nil, fmt.Errorf("path of volume %s: %w", v.Name, err)
		}
		given[i].Path = abs
		names[v.Name] = true
	}
	for _, v := range added {
		if !names[v.Name] {
			given = append(given, v)
		}
	}
	if err := pipeline.CheckVolumes(given); err != nil {
		return nil, usageError{err}
	}
	for _, v := range given {
		if v.Listen == "" {
			continue
		}
		if err := checkListen(v.Listen); err != nil {
			return nil, usage("volume %s: %w", v.Name, err)
		}
	}
	return given, nil
}

// checkListen refuses an address on which no export could be reached.
func checkListen(uri string) error {
	if err := nbd.CheckListen(uri); err != nil {
		return err
	}
	if strings.HasPrefix(uri, "tcp:") && strings.HasSuffix(uri, ":0") {
		return fmt.Errorf("NBD address %q: clients could not know port 0: choose one, like 10809", uri)
	}
	return nil
}

// memoryLimit is what the agent asks Go's runtime to stay under; its own
// queues and caches are bounded well below.
const memoryLimit = 200 << 20

func boundMemory() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}

// agentConfig joins flags and file; flags win.
func (g *global) agentConfig(f agentFlags, file *config.File) (pipeline.Config, error) {
	var cfg pipeline.Config
	if len(g.stores) == 0 && len(file.Stores) > 0 && os.Getenv("DRC_STORE") == "" {
		g.stores = file.Stores
	}
	if g.identity == "" && g.agentKey == "" {
		g.identity, g.agentKey = file.Identity, file.AgentKey
	}
	if g.state == "" {
		g.state = file.State
	}
	cfg.Orders = map[string]pipeline.Order{}
	for _, name := range f.resync {
		cfg.Orders[name] = pipeline.OrderResync
	}
	for _, name := range f.rewind {
		if cfg.Orders[name] == pipeline.OrderResync {
			return cfg, usage("volume %s cannot be kept (--resync) and rewound (--rewind)", name)
		}
		cfg.Orders[name] = pipeline.OrderRewind
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return cfg, usage("--log-level %q is not debug, info, warn or error", f.logLevel)
	}
	cfg.Logger = slog.New(slog.NewTextHandler(g.err, &slog.HandlerOptions{Level: level}))
	cfg.RPO = time.Duration(file.RPO)
	if f.rpo != 0 {
		cfg.RPO = f.rpo
	}
	if cfg.RPO < 0 || (cfg.RPO > 0 && cfg.RPO < 10*time.Millisecond) {
		return cfg, usage("an RPO of %s is too short: 10ms is the least", cfg.RPO)
	}
	cfg.BytesPerSec = int64(file.Bandwidth)
	if f.bandwidth != "" {
		n, err := config.ParseSize(f.bandwidth)
		if err != nil {
			return cfg, usage("--bandwidth: %w", err)
		}
		cfg.BytesPerSec = n
	}
	switch f.drain {
	case "buffer":
	case "stores":
		cfg.DrainStores = true
	default:
		return cfg, usage("--drain %q is neither buffer nor stores", f.drain)
	}
	cfg.Takeover = f.takeover
	for _, v := range file.Volumes {
		vc := pipeline.VolumeConfig{Name: v.Name, Path: v.Path, SizeBytes: int64(v.Size), Listen: v.Listen, Group: v.Group}
		var err error
		if vc.Ack, err = parseAck(v.Ack); err != nil {
			return cfg, usage("%s, volume %s: %w", f.config, v.Name, err)
		}
		if vc.WhenFull, err = parseWhenFull(v.WhenFull); err != nil {
			return cfg, usage("%s, volume %s: %w", f.config, v.Name, err)
		}
		cfg.Volumes = append(cfg.Volumes, vc)
	}
	for _, text := range f.volumes {
		vc, err := parseVolume(text)
		if err != nil {
			return cfg, usageError{err}
		}
		cfg.Volumes = append(cfg.Volumes, vc)
	}
	for i, b := range file.Buffer {
		if b.Path == "" {
			return cfg, usage("%s: [[buffer]] %d has no path: give the directory, as path = \"/mnt/ssd/drc-buffer\"", f.config, i+1)
		}
		cfg.Buffer = append(cfg.Buffer, vbuf.DirOptions{Path: b.Path, SizeBytes: int64(b.Size)})
	}
	if len(f.buffers) > 0 {
		cfg.Buffer = nil
	}
	for _, text := range f.buffers {
		m, err := config.ParsePairs("--buffer", text, "path", "size")
		if err != nil {
			return cfg, usageError{err}
		}
		b := vbuf.DirOptions{Path: m["path"]}
		if m["size"] != "" {
			if b.SizeBytes, err = config.ParseSize(m["size"]); err != nil {
				return cfg, usage("--buffer %s: %w", text, err)
			}
			if b.SizeBytes <= 0 {
				return cfg, usage("--buffer %s: a size of %d is no room: give at least 1MiB, or no size", text, b.SizeBytes)
			}
		}
		if b.Path == "" {
			return cfg, usage("--buffer %s: it needs path=…", text)
		}
		cfg.Buffer = append(cfg.Buffer, b)
	}
	for i := range cfg.Buffer {
		abs, err := filepath.Abs(cfg.Buffer[i].Path)
		if err != nil {
			return cfg, fmt.Errorf("buffer %s: %w", cfg.Buffer[i].Path, err)
		}
		cfg.Buffer[i].Path = abs
		if slices.ContainsFunc(cfg.Buffer[:i], func(b vbuf.DirOptions) bool { return b.Path == abs }) {
			return cfg, usage("the buffer directory %s is given twice", abs)
		}
	}
	return cfg, nil
}

func parseAck(text string) (capture.Ack, error) {
	switch text {
	case "", "journal":
		return capture.AckJournal, nil
	case "durable":
		return capture.AckDurable, nil
	}
	return 0, fmt.Errorf("ack %q is neither journal nor durable", text)
}

func parseWhenFull(text string) (pipeline.WhenFull, error) {
	switch text {
	case "":
		return pipeline.WhenFullDefault, nil
	case "bitmap":
		return pipeline.WhenFullBitmap, nil
	case "hold":
		return pipeline.WhenFullHold, nil
	}
	return 0, fmt.Errorf("when-full %q is neither bitmap nor hold", text)
}

func parseVolume(text string) (pipeline.VolumeConfig, error) {
	m, err := config.ParsePairs("--volume", text, "name", "path", "size", "listen", "group", "ack", "when-full")
	if err != nil {
		return pipeline.VolumeConfig{}, err
	}
	v := pipeline.VolumeConfig{Name: m["name"], Path: m["path"], Listen: m["listen"], Group: m["group"]}
	if v.Name == "" || v.Path == "" {
		return v, fmt.Errorf("--volume %s: it needs name=… and path=…", text)
	}
	if m["size"] != "" {
		if v.SizeBytes, err = config.ParseSize(m["size"]); err != nil {
			return v, fmt.Errorf("--volume %s: %w", text, err)
		}
		if v.SizeBytes == 0 || v.SizeBytes%512 != 0 {
			return v, fmt.Errorf("--volume %s: size %d is not a multiple of 512 bytes", text, v.SizeBytes)
		}
	}
	if v.Ack, err = parseAck(m["ack"]); err != nil {
		return v, fmt.Errorf("--volume %s: %w", text, err)
	}
	if v.WhenFull, err = parseWhenFull(m["when-full"]); err != nil {
		return v, fmt.Errorf("--volume %s: %w", text, err)
	}
	return v, nil
}
