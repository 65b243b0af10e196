package main

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"drc/internal/block"
	"drc/restorer"
)

// historyJSON is what drc history --json prints; see docs/CLI_JSON.md.
type historyJSON struct {
	Volume      string           `json:"volume"`
	ID          string           `json:"id"`
	Group       string           `json:"group"`
	SizeBytes   int64            `json:"size_bytes"`
	Branches    []branchJSON     `json:"branches"`
	Named       []checkpointJSON `json:"named"`
	Gaps        []gapJSON        `json:"gaps"`
	Checkpoints []checkpointJSON `json:"checkpoints,omitempty"` // with --all
	Warnings    []string         `json:"warnings"`
}

type branchJSON struct {
	ID          string          `json:"id"`
	Volume      string          `json:"volume"`             // what it is called there
	Current     bool            `json:"current"`            // it is the one that is written
	Parent      string          `json:"parent,omitempty"`   // from which it forks
	ForkSeq     block.Seq       `json:"fork_seq,omitempty"` // at this seq
	Begin       string          `json:"begin,omitempty"`    // when that was
	Checkpoints int             `json:"checkpoints"`        // on the branch itself
	First       *checkpointJSON `json:"first"`              // null if nothing can be restored yet
	Last        *checkpointJSON `json:"last"`
}

type checkpointJSON struct {
	Seq         block.Seq `json:"seq"`
	Time        string    `json:"time"`
	Names       []string  `json:"names"`
	Unconfirmed bool      `json:"unconfirmed"`
}

type gapJSON struct {
	After  block.Seq `json:"after_seq"`
	Until  block.Seq `json:"until_seq"` // 0 while it is open
	Open   bool      `json:"open"`
	Reason string    `json:"reason"`
	Begin  string    `json:"begin"`
	End    string    `json:"end,omitempty"`
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func toJSON(c restorer.Checkpoint) checkpointJSON {
	names := c.Names
	if names == nil {
		names = []string{}
	}
	return checkpointJSON{Seq: c.Seq, Time: stamp(c.Time), Names: names, Unconfirmed: c.Unconfirmed}
}

func historyCommand(g *global) *cobra.Command {
	var asJSON, all bool
	c := &cobra.Command{
		Use:   "history VOLUME",
		Short: "Show what can be restored: range, named checkpoints, gaps",
		Example: `  drc history data
  drc history data --all --json | jq -r '.checkpoints[].seq'`,
		Args: exactly("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := g.loadKeys()
			if err != nil {
				return err
			}
			r, closeRepo, err := g.openRepo(cmd.Context(), k)
			if err != nil {
				return err
			}
			defer closeRepo()
			h, v, err := restorer.Find(cmd.Context(), g.restorerConfig(r, k), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			out, err := describeHistory(cmd.Context(), h, v, all)
			if err != nil {
				return err
			}
			if asJSON {
				return g.printJSON(out)
			}
			return g.printHistory(out)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable output")
	c.Flags().BoolVar(&all, "all", false, "list every checkpoint")
	return c
}

func describeHistory(ctx context.Context, h *restorer.History, v restorer.Volume, all bool) (historyJSON, error) {
	out := historyJSON{
		Volume: v.Name, ID: v.ID.String(), Group: h.Group.Name, SizeBytes: v.SizeBytes,
		Named: []checkpointJSON{}, Gaps: []gapJSON{}, Warnings: append([]string{}, h.Warnings...),
	}
	points, err := h.AllCheckpoints(ctx, v)
	if err != nil {
		return out, err
	}
	if out.Branches, err = describeBranches(ctx, h, v, points); err != nil {
		return out, err
	}
	for _, p := range points {
		if len(p.Names) > 0 {
			out.Named = append(out.Named, toJSON(p))
		}
		if all {
			out.Checkpoints = append(out.Checkpoints, toJSON(p))
		}
	}
	for _, x := range h.Gaps(v) {
		gap := gapJSON{After: x.After, Until: x.Until, Open: x.Open, Reason: x.Reason.String(), Begin: stamp(x.Begin)}
		if !x.Open {
			gap.End = stamp(x.End)
		}
		out.Gaps = append(out.Gaps, gap)
	}
	return out, nil
}

// describeBranches describes all branches that have the volume, each by what it has
// itself. points are those of v.
func describeBranches(ctx context.Context, h *restorer.History, v restorer.Volume, points []restorer.Checkpoint) ([]branchJSON, error) {
	out := []branchJSON{}
	for _, b := range h.Branches() {
		for _, on := range h.VolumesOn(b.ID) {
			if on.ID != v.ID {
				continue
			}
			x := branchJSON{ID: b.ID.String(), Volume: on.Name, Current: b.Current}
			if b.Parent != (block.BranchID{}) {
				x.Parent, x.ForkSeq, x.Begin = b.Parent.String(), b.ForkSeq, stamp(b.Begin)
			}
			all := points
			if on.Branch != v.Branch {
				var err error
				if all, err = h.AllCheckpoints(ctx, on); err != nil {
					return nil, err
				}
			}
			for _, p := range all {
				if p.N < b.BeginN {
					continue
				}
				last := toJSON(p)
				if x.Last = &last; x.First == nil {
					x.First = &last
				}
				x.Checkpoints++
			}
			out = append(out, x)
		}
	}
	return out, nil
}

func (g *global) printHistory(h historyJSON) error {
	w := tabwriter.NewWriter(g.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "volume %s, group %s, %d bytes\n", h.Volume, h.Group, h.SizeBytes)
	for _, b := range h.Branches {
		if b.First == nil {
			fmt.Fprintln(w, "nothing can be restored yet")
			continue
		}
		switch called := ""; {
		case len(h.Branches) == 1:
			fmt.Fprintf(w, "%d checkpoints on branch %s\n", b.Checkpoints, b.ID[:8])
		default:
			if b.Current {
				called = ", which is written now"
			}
			if b.Parent != "" {
				called += fmt.Sprintf("; it forks from branch %s at seq:%d, since %s", b.Parent[:8], b.ForkSeq, local(b.Begin))
			}
			fmt.Fprintf(w, "as %s: %d checkpoints on branch %s%s\n", b.Volume, b.Checkpoints, b.ID[:8], called)
		}
		fmt.Fprintf(w, "  first\tseq:%d\t%s\n", b.First.Seq, local(b.First.Time))
		fmt.Fprintf(w, "  last\tseq:%d\t%s\n", b.Last.Seq, local(b.Last.Time))
		if b.Last.Unconfirmed {
			fmt.Fprintln(w, "  the last one is unconfirmed: too few stores could be asked whether it is decided")
		}
	}
	for _, n := range h.Named {
		for _, name := range n.Names {
			fmt.Fprintf(w, "  %s\tseq:%d\t%s\n", name, n.Seq, local(n.Time))
		}
	}
	for _, x := range h.Gaps {
		if x.Open {
			fmt.Fprintf(w, "  gap, still open, after seq:%d: %s, since %s\n", x.After, x.Reason, local(x.Begin))
		} else {
			fmt.Fprintf(w, "  gap after seq:%d until seq:%d: %s, %s to %s\n", x.After, x.Until, x.Reason, local(x.Begin), local(x.End))
		}
	}
	for _, c := range h.Checkpoints {
		fmt.Fprintf(w, "  seq:%d\t%s\n", c.Seq, local(c.Time))
	}
	for _, x := range h.Warnings {
		g.talk("warning: %s", x)
	}
	return w.Flush()
}

// local shows a time of the JSON output in the local time zone.
func local(text string) string {
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return text
	}
	return t.Local().Format("2006-01-02 15:04:05.000 -0700")
}
