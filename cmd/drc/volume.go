package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/restorer"
)

func volumeCommand(g *global) *cobra.Command {
	c := &cobra.Command{
		Use:   "volume",
		Short: "List the volumes of a repository, add one to this host's agent",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(volumeListCommand(g), volumeAddCommand(g))
	return c
}

// volumeJSON is one row of drc volume list --json; see docs/CLI_JSON.md.
type volumeJSON struct {
	Name        string          `json:"name"`
	ID          string          `json:"id"`
	Group       string          `json:"group"`
	SizeBytes   int64           `json:"size_bytes"`
	SectorSize  int             `json:"sector_size"`
	Checkpoints int             `json:"checkpoints"`
	Last        *checkpointJSON `json:"last"`
}

func volumeListCommand(g *global) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "list",
		Short:   "List the volumes in the repository",
		Example: "  drc volume list --store file:///backup/drc --identity drc.id",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := g.loadKeys()
			if err != nil {
				return err
			}
			r, closeRepo, err := g.openRepo(cmd.Context(), k)
			if err != nil {
				return err
			}
			defer closeRepo()
			cfg := g.restorerConfig(r, k)
			groups, err := restorer.Groups(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			rows := []volumeJSON{}
			for _, id := range groups {
				h, err := restorer.OpenHistory(cmd.Context(), cfg, id)
				if errors.Is(err, restorer.ErrNoEntries) {
					continue
				}
				if err != nil {
					return err
				}
				some, err := volumeRows(cmd.Context(), h)
				_ = h.Close()
				if err != nil {
					return err
				}
				rows = append(rows, some...)
			}
			if asJSON {
				return g.printJSON(rows)
			}
			w := tabwriter.NewWriter(g.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "VOLUME\tGROUP\tSIZE\tCHECKPOINTS\tNEWEST")
			for _, v := range rows {
				newest := "-"
				if v.Last != nil {
					newest = fmt.Sprintf("seq:%d  %s", v.Last.Seq, local(v.Last.Time))
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", v.Name, v.Group, humanize.IBytes(uint64(v.SizeBytes)), v.Checkpoints, newest)
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable output")
	return c
}

func volumeRows(ctx context.Context, h *restorer.History) (rows []volumeJSON, err error) {
	for _, v := range h.Volumes() {
		points, err := h.AllCheckpoints(ctx, v)
		if err != nil {
			return nil, err
		}
		row := volumeJSON{
			Name: v.Name, ID: v.ID.String(), Group: h.Group.Name, SizeBytes: v.SizeBytes, SectorSize: int(v.SectorSize), Checkpoints: len(points),
		}
		if n := len(points); n > 0 {
			last := toJSON(points[n-1])
			row.Last = &last
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func volumeAddCommand(g *global) *cobra.Command {
	var r control.VolumeRequest
	var size string
	c := &cobra.Command{
		Use:   "add NAME --path PATH",
		Short: "Have the running agent protect one more volume, from now on",
		Long: `Have the running agent protect one more volume, in a group of its own. What is on
it already is read in while it is used. The agent remembers it for its next
starts.`,
		Example: "  drc volume add data --path /dev/sdb1",
		Args:    exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.Path == "" {
				return usage("say where the volume is: --path PATH")
			}
			text := "name=" + args[0] + ",path=" + r.Path
			if size != "" {
				text += ",size=" + size
			}
			v, err := parseVolume(text)
			if err != nil {
				return usageError{err}
			}
			if r.Path, err = filepath.Abs(v.Path); err != nil {
				return fmt.Errorf("path %s: %w", v.Path, err)
			}
			r.Name, r.SizeBytes = v.Name, v.SizeBytes
			if r.Listen != "" {
				if err := checkListen(r.Listen); err != nil {
					return usageError{err}
				}
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			added, err := client.AddVolume(cmd.Context(), r)
			if err != nil {
				return err
			}
			fmt.Fprintf(g.out, "volume %s: %s\n", added.Name, added.Exports[0])
			return nil
		},
	}
	c.Flags().StringVar(&r.Path, "path", "", "`PATH` of the raw file or device")
	c.Flags().StringVar(&size, "size", "", "`SIZE` of the file to create, if there is none")
	c.Flags().StringVar(&r.Listen, "listen", "", "listen `URI` (default: the agent's socket)")
	return c
}

// addedVolumes are the volumes that drc volume add gave to this state folder's
// agent.
func addedVolumes(dir *state.Dir, repository block.ID) ([]pipeline.VolumeConfig, error) {
	return pipeline.AddedVolumes(dir, repository)
}
