package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drc/internal/control"
	"drc/internal/state"
	"drc/restorer/replay"
)

// client talks to the agent of the state folder.
func (g *global) client() (*control.Client, error) {
	path, err := filepath.Abs(g.statePath())
	if err != nil {
		return nil, fmt.Errorf("state folder %s: %w", g.statePath(), err)
	}
	return control.NewClient(state.SocketPath(path)), nil
}

func statusCommand(g *global) *cobra.Command {
	var asJSON, watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the agent, and of the standby: volumes, lag, buffer, stores, copies",
		Example: `  drc status
  drc status --json | jq '.groups[].lag_seconds'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			for {
				s, err := g.askStatus(cmd.Context(), client)
				if err != nil {
					return err
				}
				if asJSON {
					err = g.printJSON(s)
				} else {
					if watch {
						fmt.Fprint(g.out, "\x1b[H\x1b[2J")
					}
					err = g.printStatus(s)
				}
				if err != nil || !watch {
					return err
				}
				if wait(cmd.Context(), time.Second) != nil {
					return nil
				}
			}
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable output")
	c.Flags().BoolVar(&watch, "watch", false, "show it again every second")
	return c
}

// askStatus asks the agent of the state folder, and the standby, if there is one.
func (g *global) askStatus(ctx context.Context, agent *control.Client) (control.Status, error) {
	s, err := agent.Status(ctx)
	path, perr := filepath.Abs(g.statePath())
	if perr != nil {
		return s, perr
	}
	standby, serr := control.NewClient(state.StandbySocketPath(path)).Status(ctx)
	switch {
	case serr != nil:
		return s, err
	case errors.Is(err, control.ErrNoAgent):
		return standby, nil
	}
	s.Copies = standby.Copies
	return s, err
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (g *global) printStatus(s control.Status) error {
	w := tabwriter.NewWriter(g.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "state: %s\n\n", s.State)
	if len(s.Groups) > 0 || len(s.Copies) == 0 {
		printAgent(w, s)
	}
	if len(s.Copies) > 0 {
		if len(s.Groups) > 0 {
			fmt.Fprintln(w)
		}
		printStandby(w, s.Copies)
	}
	return w.Flush()
}

// printStandby shows the copies of a standby.
func printStandby(w io.Writer, copies []control.Copy) {
	fmt.Fprintln(w, "COPY OF\tSTATE\tSIZE\tAT SEQ\tOF\tLAG\tBEHIND\tCLIENTS\tFILE")
	for _, x := range copies {
		doing, at, of := x.State, "-", "-"
		if x.State == string(replay.Filling) || x.State == string(replay.Comparing) {
			doing = fmt.Sprintf("%s %d%%", x.State, 100*x.DoneBytes/max(1, x.SizeBytes))
		}
		if x.Entry > 0 {
			at, of = fmt.Sprint(x.Seq), local(x.Time)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%.1fs\t%s\t%d\t%s\n", x.Volume, doing, humanize.IBytes(uint64(x.SizeBytes)), at, of,
			x.LagSeconds, humanize.IBytes(uint64(x.BehindBytes)), x.Views, x.File)
	}
	for _, x := range copies {
		if x.Message != "" {
			fmt.Fprintf(w, "\n%s: %s\nThe stores last answered at %s; the copy stays as it is until it can go on.\n", x.Volume, x.Message, local(x.Heard))
		}
	}
}

func printAgent(w io.Writer, s control.Status) {
	fmt.Fprintln(w, "GROUP\tSTATE\tCAPTURED\tDURABLE\tSEALED\tLOGGED\tCOMMITTED\tLAG\tBACKLOG")
	for _, x := range s.Groups {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%.1fs\t%s\n", x.Name, x.State, x.Captured, x.Durable, x.Sealed, x.Logged, x.Committed,
			x.LagSeconds, humanize.IBytes(uint64(x.BacklogBytes)))
	}
	fmt.Fprintln(w, "\nVOLUME\tGROUP\tSIZE\tCOMMITTED\tTO READ\tCLIENTS\tEXPORT")
	for _, x := range s.Groups {
		for _, v := range x.Volumes {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%d\t%s\n", v.Name, x.Name, humanize.IBytes(uint64(v.SizeBytes)), v.Committed,
				humanize.IBytes(uint64(v.ResyncRemainingBytes)), v.Connections, strings.Join(v.Exports, " "))
		}
	}
	fmt.Fprintln(w, "\nBUFFER\tSTATE\tUSED\tCAPACITY")
	for _, d := range s.Buffer.Disks {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", d.Path, d.State, humanize.IBytes(uint64(d.UsedBytes)), humanize.IBytes(uint64(d.CapacityBytes)))
	}
	if s.Buffer.Rotten > 0 {
		fmt.Fprintf(w, "%d files of sealed writes had rotted there since the start, %d were made again, %d shards are lost: replace the disk that the log names\n", s.Buffer.Rotten, s.Buffer.Mended, s.Buffer.LostShards)
	}
	if s.Buffer.LastsSeconds != nil {
		fmt.Fprintf(w, "at the rate of the last minute it is full in %s\n", time.Duration(*s.Buffer.LastsSeconds*float64(time.Second)).Round(time.Second))
	}
	fmt.Fprintln(w, "\nSTORE\tSTATE\tSINCE\tWAITING\tLAST ERROR")
	for _, st := range s.Stores {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", st.URL, st.State, dash(st.Since), waiting(st.Waiting), dash(st.LastError))
	}
	for _, x := range s.Groups {
		if x.Message != "" {
			fmt.Fprintf(w, "\n%s: %s\n", x.Name, x.Message)
		}
		if x.Exposed {
			fmt.Fprintf(w, "\n%s: the newest history is on no more stores than may be lost: it is exposed until the missing store is back\n", x.Name)
		}
	}
}

func waiting(w control.Waiting) string {
	if w.Objects == 0 {
		return "-"
	}
	return fmt.Sprintf("%d objects, %s", w.Objects, humanize.IBytes(uint64(w.Bytes)))
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func checkpointCommand(g *global) *cobra.Command {
	var r control.CheckpointRequest
	var asJSON bool
	c := &cobra.Command{
		Use:   "checkpoint NAME",
		Short: "Name the present state, so that it can be restored by name",
		Example: `  drc checkpoint before-upgrade --wait
  drc restore data old.img --at before-upgrade`,
		Args: exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			r.Name = args[0]
			a, err := client.Checkpoint(cmd.Context(), r)
			if err != nil {
				return err
			}
			if asJSON {
				return g.printJSON(a)
			}
			word := "asked for"
			if a.Committed {
				word = "committed"
			}
			fmt.Fprintf(g.out, "checkpoint %s of group %s at seq %d: %s\n", a.Name, a.Group, a.Seq, word)
			return nil
		},
	}
	c.Flags().StringVar(&r.Group, "group", "", "`GROUP` of volumes (may be left out where there is one)")
	c.Flags().BoolVar(&r.Wait, "wait", false, "return when it is committed to the stores")
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable output")
	return c
}
