package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/restorer"
)

// restoreJSON is what drc restore --json prints; see docs/CLI_JSON.md.
type restoreJSON struct {
	Volume       string         `json:"volume"`
	Target       string         `json:"target"`
	Point        checkpointJSON `json:"point"`
	Note         string         `json:"note,omitempty"`
	VolumeBytes  int64          `json:"volume_bytes"`
	FetchedBytes int64          `json:"fetched_bytes"`
	WrittenBytes int64          `json:"written_bytes"`
	ZeroBytes    int64          `json:"zero_bytes"`
	ResumedBytes int64          `json:"resumed_bytes"`
	Requests     int64          `json:"requests"`
	Seconds      float64        `json:"seconds"`
	Damage       []damageJSON   `json:"damage"`
	Warnings     []string       `json:"warnings"`
	WithBuffer   *beyondJSON    `json:"with_buffer,omitempty"`
}

// beyondJSON is what came out of the buffer, with --with-buffer.
type beyondJSON struct {
	Seq     block.Seq `json:"seq"`     // the volume is as it was after this write
	Batches int       `json:"batches"` // that are not in the history yet
	From    block.Seq `json:"from"`    // of the journal behind these; 0 if there is nothing
	To      block.Seq `json:"to"`
}

type damageJSON struct {
	Object string `json:"object"`
	Store  string `json:"store"`
	Reason string `json:"reason"`
}

func restoreCommand(g *global) *cobra.Command {
	var point string
	var withBuffer []string
	var force, asJSON bool
	c := &cobra.Command{
		Use:   "restore VOLUME TARGET",
		Short: "Rebuild a volume into a file or device, on any host",
		Long: `Rebuild a volume as it was at a point. TARGET is a file that does not exist yet,
or an existing block device. Nothing but the stores and the identity is needed.

A file appears under its name only when it is whole. An interrupted restore goes
on where it was when the same command is given again.

With --with-buffer, on the host that has protected the volume and while no agent
runs there, the writes that are in the buffer and not on the stores yet are put on
top: nothing that was acknowledged is lost, also if the stores lag. The buffer is
only read. An agent that is started with it goes on from the restored file.

POINT is latest, the name of a checkpoint, seq:N, a time (2026-01-31T12:00:00Z,
"2026-01-31 12:00", local time), or a duration back from the newest checkpoint
(-15m).`,
		Example: `  drc restore data data.img
  drc restore data /dev/sdc --at before-upgrade
  drc restore data /srv/data.img --with-buffer /var/lib/drc/buffer
  drc restore data yesterday.img --at -24h --store 's3://backup/drc?endpoint=https://s3.example.net' --identity drc.id`,
		Args: exactly("VOLUME", "TARGET"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(withBuffer) > 0 && point != "latest" && point != "" {
				return usage("--with-buffer restores the volume after its last write: leave out --at, or leave out --with-buffer")
			}
			return g.restore(cmd.Context(), restoreOrder{args[0], args[1], point, withBuffer, force, asJSON})
		},
	}
	c.Flags().StringVar(&point, "at", "latest", "`POINT` to restore")
	c.Flags().BoolVar(&force, "force", false, "replace a file, overwrite a device that holds data")
	c.Flags().StringArrayVar(&withBuffer, "with-buffer", nil, "put on top what the buffer in `DIR` holds and the stores lack; repeat it for each directory")
	c.Flags().BoolVar(&asJSON, "json", false, "print a summary as JSON")
	return c
}

// restoreOrder is what drc restore was asked for.
type restoreOrder struct {
	volume, target, point string
	withBuffer            []string
	force, asJSON         bool
}

func (g *global) restore(ctx context.Context, o restoreOrder) error {
	target := o.target
	k, err := g.loadKeys()
	if err != nil {
		return err
	}
	if !k.ring.CanReadContent() {
		return usage("an agent key cannot read content: restore needs the identity (--identity FILE)")
	}
	r, closeRepo, err := g.openRepo(ctx, k)
	if err != nil {
		return err
	}
	defer closeRepo()
	var held *pipeline.Unlogged
	if len(o.withBuffer) > 0 {
		if held, err = g.openUnlogged(ctx, o.withBuffer); err != nil {
			return err
		}
		defer held.Close()
		if r, err = held.Repo(r); err != nil {
			return err
		}
	}
	h, v, err := restorer.Find(ctx, g.restorerConfig(r, k), o.volume)
	if err != nil {
		return err
	}
	defer h.Close()
	var p restorer.Point
	var beyond *pipeline.BeyondLog
	if held == nil {
		p, err = h.Resolve(ctx, v.Name, o.point)
	} else if beyond, err = held.Of(ctx, h, v, k.ring); err == nil {
		p = beyond.Point
	}
	if err != nil {
		return err
	}
	if dir := filepath.Dir(target); !exists(dir) {
		return fmt.Errorf("the folder %s does not exist: make it first, or choose another target", dir)
	}
	im, err := restorer.OpenImageAt(ctx, h, p)
	if err != nil {
		return err
	}
	seq := p.Seq
	if beyond != nil {
		im.Extend(&beyond.Beyond)
		seq = beyond.Seq
		g.talk("restoring %s as it was after its last write, seq:%d, to %s: the history on the stores ends at seq:%d", v.Name, seq, target, p.Seq)
	} else {
		g.talk("restoring %s at seq:%d of %s to %s", v.Name, p.Seq, p.Time.Local().Format("2006-01-02 15:04:05.000"), target)
	}
	if p.Note != "" {
		g.talk("note: %s", p.Note)
	}
	bar := g.newProgress(v.SizeBytes)
	sum, err := restorer.Restore(ctx, im, target, restorer.Options{Force: o.force, Progress: bar.update})
	bar.done(err)
	if err != nil {
		return err
	}
	// With this record an agent of this state folder goes on from here.
	dir, err := state.Open(g.statePath())
	if err == nil {
		record := capture.Record{
			Path: target, Repo: r.ID.String(), Group: h.GroupID.String(), Volume: v.ID.String(),
			Branch: p.Branch.String(), Applied: seq, SectorSz: int(v.SectorSize),
		}
		if beyond != nil {
			err = capture.RecordReplayed(dir.Backings(), record)
		} else {
			err = capture.RecordRestored(dir.Backings(), record)
		}
	}
	if err != nil {
		g.talk("warning: %s is whole, but no record of it could be kept in %s, so that an agent would compare it in full: %v", target, g.statePath(), err)
	}
	return g.printRestore(sum, h, beyond, o.asJSON)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// openUnlogged opens the buffer of this host's agent, which does not run.
func (g *global) openUnlogged(ctx context.Context, dirs []string) (*pipeline.Unlogged, error) {
	dir, err := state.Open(g.statePath())
	if err != nil {
		return nil, err
	}
	var abs []string
	for _, d := range dirs {
		if d == "" { // not the folder that the shell is in
			return nil, usage("--with-buffer was given and is empty: see drc restore --help")
		}
		a, err := filepath.Abs(d)
		if err != nil {
			return nil, fmt.Errorf("buffer directory %s: %w", d, err)
		}
		abs = append(abs, a)
	}
	return pipeline.OpenUnlogged(ctx, pipeline.UnloggedConfig{State: dir, Dirs: abs})
}

func (g *global) printRestore(s restorer.Summary, h *restorer.History, beyond *pipeline.BeyondLog, asJSON bool) error {
	out := restoreJSON{
		Volume: s.Point.Volume.Name, Target: s.Target, Point: toJSON(s.Point.Checkpoint), Note: s.Point.Note,
		VolumeBytes: s.VolumeBytes, FetchedBytes: s.FetchedBytes, WrittenBytes: s.WrittenBytes, ZeroBytes: s.ZeroBytes,
		ResumedBytes: s.ResumedBytes, Requests: s.Requests, Seconds: s.Duration.Seconds(),
		Damage: []damageJSON{}, Warnings: append([]string{}, h.Warnings...),
	}
	end := out.Point.Seq
	if beyond != nil {
		end = beyond.Seq
		out.WithBuffer = &beyondJSON{Seq: beyond.Seq, Batches: beyond.Batches}
		if beyond.Journal.From <= beyond.Journal.To {
			out.WithBuffer.From, out.WithBuffer.To = beyond.Journal.From, beyond.Journal.To
		}
	}
	for _, d := range s.Damage {
		out.Damage = append(out.Damage, damageJSON{d.Object, d.Store, d.Reason})
		g.talk("damaged, and worked around: %s in %s: %s", d.Object, d.Store, d.Reason)
	}
	for _, w := range h.Warnings {
		g.talk("warning: %s", w)
	}
	if asJSON {
		return g.printJSON(out)
	}
	fmt.Fprintf(g.out, "restored %s at seq:%d to %s: %s in %.1fs (%s fetched, %s written)\n", out.Volume, end, out.Target,
		humanize.IBytes(uint64(s.VolumeBytes)), out.Seconds, humanize.IBytes(uint64(s.FetchedBytes)), humanize.IBytes(uint64(s.WrittenBytes)))
	if out.Point.Unconfirmed {
		g.talk("this point is unconfirmed: too few stores could be asked whether it is decided")
	}
	return nil
}

// progressEvery is how often plain lines are printed where there is no
// terminal.
const progressEvery = 5 * time.Second

// progress shows how far a restore is: a bar on a terminal, lines elsewhere.
type progress struct {
	g       *global
	pool    *mpb.Progress
	bar     *mpb.Bar
	started time.Time
	last    time.Time
}

func (g *global) newProgress(total int64) *progress {
	p := &progress{g: g, started: time.Now(), last: time.Now()}
	f, ok := g.err.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return p
	}
	p.pool = mpb.New(mpb.WithOutput(f), mpb.WithWidth(60))
	p.bar = p.pool.AddBar(total,
		mpb.PrependDecorators(decor.CountersKibiByte("% .1f / % .1f")),
		mpb.AppendDecorators(decor.AverageSpeed(decor.SizeB1024(0), "% .1f"), decor.Name("  "), decor.AverageETA(decor.ET_STYLE_GO)))
	return p
}

func (p *progress) update(now restorer.Progress) {
	if p.bar != nil {
		p.bar.SetCurrent(now.DoneBytes)
		return
	}
	if time.Since(p.last) < progressEvery {
		return
	}
	p.last = time.Now()
	rate := float64(now.DoneBytes) / time.Since(p.started).Seconds()
	left := time.Duration(float64(now.VolumeBytes-now.DoneBytes) / max(rate, 1) * float64(time.Second))
	p.g.talk("%s of %s, %s/s, %s left", humanize.IBytes(uint64(now.DoneBytes)), humanize.IBytes(uint64(now.VolumeBytes)),
		humanize.IBytes(uint64(rate)), left.Round(time.Second))
}

func (p *progress) done(err error) {
	if p.bar == nil {
		return
	}
	if err != nil {
		p.bar.Abort(false)
	} else {
		p.bar.SetTotal(-1, true)
	}
	p.pool.Wait()
}
