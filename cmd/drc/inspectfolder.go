package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"text/tabwriter"

	"github.com/dustin/go-humanize"

	"drc/internal/control"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/vbuf"
)

// regionsShown is how many regions of a volume are listed without --json.
const regionsShown = 16

// inspectFolder shows what a state folder or a buffer directory keeps.
func (g *global) inspectFolder(ctx context.Context, dir string, asJSON bool) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("folder %s: %w", dir, err)
	}
	kept, err := pipeline.InspectKept(ctx, dir, g.statePath(), nil)
	var setup *vbuf.SetupError
	switch {
	case errors.Is(err, state.ErrInUse):
		var k control.Kept
		if k, err = control.NewClient(state.SocketPath(abs)).Kept(ctx); errors.Is(err, control.ErrNoAgent) {
			err = fmt.Errorf("%s: %w, and does not answer: try again, or stop it first", dir, state.ErrInUse)
		}
		kept = &k
	case errors.As(err, &setup): // perhaps because the agent is at work with it
		if k, asked := control.NewClient(state.SocketPath(g.statePath())).Kept(ctx); asked == nil && slices.Contains(k.Dirs, abs) {
			kept, err = &k, nil
		}
	}
	if err != nil {
		return err
	}
	if asJSON {
		return g.printJSON(kept)
	}
	return g.printKept(kept)
}

func (g *global) printKept(k *control.Kept) error {
	w := tabwriter.NewWriter(g.out, 0, 0, 2, ' ', 0)
	if len(k.Groups) == 0 {
		fmt.Fprintln(w, "nothing is kept")
	}
	for _, x := range k.Groups {
		name := x.Name
		if name == "" {
			name = x.ID
		}
		fmt.Fprintf(w, "group %s: history on the stores up to seq %s", name, x.Logged)
		if x.Fenced {
			fmt.Fprint(w, "; fenced")
		}
		fmt.Fprintln(w)
		if x.Writes == 0 {
			fmt.Fprintln(w, "  no write behind that is kept")
		} else {
			fmt.Fprintf(w, "  kept\tseqs %s to %s\t%d writes\t%s\t%s to %s\n", x.From, x.To, x.Writes, humanize.IBytes(uint64(x.Bytes)), keptLocal(x.Oldest), keptLocal(x.Newest))
		}
		for _, d := range x.Damaged {
			fmt.Fprintf(w, "  lost\tseqs %s to %s were durable, and no disk has them\n", d.From, d.To)
		}
		if x.MarkedFrom != "" {
			fmt.Fprintf(w, "  since %s writes went past the full buffer, to the volumes only\n", local(x.MarkedFrom))
		}
		for _, v := range x.Volumes {
			name := v.Name
			if name == "" {
				name = fmt.Sprint(v.Index)
			}
			fmt.Fprintf(w, "  volume %s\t%d writes\t%s\tin %d regions\n", name, v.Writes, humanize.IBytes(uint64(v.Bytes)), len(v.Regions))
			for i, r := range v.Regions {
				if i == regionsShown {
					fmt.Fprintf(w, "    %d more: --json lists all\n", len(v.Regions)-i)
					break
				}
				fmt.Fprintf(w, "    at %d\t%d bytes\n", r.Off, r.Len)
			}
		}
		for _, b := range x.Batches {
			fmt.Fprintf(w, "  batch\tseqs %s to %s\t%s\t%s\t%s\n", b.From, b.To, humanize.IBytes(uint64(b.Bytes)), waitsFor(b), dash(b.LastError))
		}
		fmt.Fprintf(w, "  %s\n", x.Advice)
	}
	return w.Flush()
}

func waitsFor(b control.KeptBatch) string {
	if b.Logged {
		return fmt.Sprintf("in the history; stores lack %d of its shards", b.Shards)
	}
	return "sealed, and not in the history"
}

func keptLocal(text string) string {
	if text == "" {
		return "-"
	}
	return local(text)
}
