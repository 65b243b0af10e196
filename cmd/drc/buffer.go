package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drc/internal/config"
	"drc/internal/control"
	"drc/internal/pipeline"
	"drc/internal/state"
)

func bufferCommand(g *global) *cobra.Command {
	c := &cobra.Command{
		Use:   "buffer",
		Short: "Show, add, drain and remove the directories of the local buffer",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(bufferListCommand(g), bufferAddCommand(g), bufferDrainCommand(g), bufferRemoveCommand(g))
	return c
}

// offline opens the state folder of an agent that does not run, locked.
func (g *global) offline() (*state.Dir, error) {
	if !exists(g.statePath()) { // a look must not make one
		return nil, fmt.Errorf("there is no state folder %s: pass the --state DIR of the agent", g.statePath())
	}
	dir, err := state.Open(g.statePath())
	if err != nil {
		return nil, err
	}
	return dir, dir.Lock()
}

func bufferListCommand(g *global) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list",
		Short: "Show the buffer's directories, their state and what they hold",
		Long: `Show the buffer's directories. The running agent is asked; without one the labels
in the directories tell which belong together and which are missing, and JOURNAL
counts files that are free as well.

States: ok; full (its file system has no room); slow (it has not answered for
some time); draining; suspect (it fails, and is read until what it alone holds is
elsewhere); failed (out of the set); missing.`,
		Example: `  drc buffer list
  drc buffer list --json | jq -r '.disks[] | select(.state != "ok") | .path'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			s, err := client.Status(cmd.Context())
			b := s.Buffer
			if errors.Is(err, control.ErrNoAgent) {
				dir, lerr := g.offline()
				if lerr != nil {
					return lerr
				}
				defer dir.Close()
				b, err = pipeline.ListBufferOffline(dir)
			}
			if err != nil {
				return err
			}
			if asJSON {
				return g.printJSON(b)
			}
			return g.printBuffer(b)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable output")
	return c
}

func (g *global) printBuffer(b control.Buffer) error {
	w := tabwriter.NewWriter(g.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BUFFER\tDEVICE\tSTATE\tCAPACITY\tJOURNAL\tSEGMENTS\tLAST ERROR")
	for _, d := range b.Disks {
		capacity := "-" // not known without the agent
		if d.CapacityBytes > 0 {
			capacity = humanize.IBytes(uint64(d.CapacityBytes))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", d.Path, dash(d.Device), d.State, capacity,
			humanize.IBytes(uint64(d.JournalBytes)), humanize.IBytes(uint64(d.SegmentBytes)), dash(d.LastError))
	}
	return w.Flush()
}

// bufferRequest makes a request for the directory that is named.
func bufferRequest(action, path string) (control.BufferRequest, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return control.BufferRequest{}, fmt.Errorf("path %s: %w", path, err)
	}
	return control.BufferRequest{Action: action, Path: abs}, nil
}

func bufferAddCommand(g *global) *cobra.Command {
	var size string
	c := &cobra.Command{
		Use:   "add DIR",
		Short: "Take one more directory into the buffer of the running agent",
		Long: `Take an empty directory, best on a disk of its own, into the buffer of the running
agent. What is there only once is brought there, too. The agent remembers the
directory for its next starts.`,
		Example: "  drc buffer add /mnt/ssd2/drc-buffer --size 20GiB",
		Args:    exactly("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := bufferRequest("add", args[0])
			if err != nil {
				return err
			}
			if size != "" {
				if r.SizeBytes, err = config.ParseSize(size); err != nil {
					return usage("--size: %w", err)
				}
				if r.SizeBytes <= 0 {
					return usage("--size %s is no room: give at least 1MiB, or no size", size)
				}
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			if _, err := client.Buffer(cmd.Context(), r); err != nil {
				return err
			}
			fmt.Fprintf(g.out, "%s has joined the buffer\n", r.Path)
			return nil
		},
	}
	c.Flags().StringVar(&size, "size", "", "how much of the disk it may use, as `SIZE` (default: as for drc agent --buffer)")
	return c
}

func bufferDrainCommand(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "drain DIR",
		Short: "Move what a directory holds to the others, then take it out",
		Long: `Move what a directory of the buffer holds to the others, while the agent works,
then take it out and remove its files. The command waits; if it is stopped the
agent goes on, but not over its own restart. Take the directory out of the
configuration, too: a start that still names it is refused.`,
		Example: "  drc buffer drain /mnt/old-ssd/drc-buffer",
		Args:    exactly("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := bufferRequest("drain", args[0])
			if err != nil {
				return err
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			b, err := client.Buffer(cmd.Context(), r)
			for err == nil {
				i := slices.IndexFunc(b.Disks, func(d control.Disk) bool { return d.Path == r.Path })
				if i < 0 {
					fmt.Fprintf(g.out, "%s is empty and out of the buffer\n", r.Path)
					return nil
				}
				switch d := b.Disks[i]; d.State {
				case "draining", "suspect":
				case "failed":
					return fmt.Errorf("buffer directory %s failed while it was drained (%s): what it held is brought back from the others; take it off the list with drc buffer remove %s", d.Path, d.LastError, d.Path)
				default:
					return fmt.Errorf("buffer directory %s is not drained any more: another one failed, and it is needed: add one with drc buffer add first", d.Path)
				}
				if wait(cmd.Context(), 200*time.Millisecond) != nil {
					return fmt.Errorf("%s is still being drained: the agent goes on; drc buffer list shows how far it is", r.Path)
				}
				var s control.Status
				s, err = client.Status(cmd.Context())
				b = s.Buffer
			}
			return err
		},
	}
}

func bufferRemoveCommand(g *global) *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "remove DIR",
		Short: "Take a directory out of the buffer that has failed or is missing",
		Long: `Take a directory out of the buffer. The running agent first brings what it holds
to the others; if that cannot be, the directory stays, unless --force is given:
then what it alone holds is lost, and the volumes are compared with their history
where that matters.

Without an agent a missing directory is taken out, so that the agent can start
again; one that is there only with --force.`,
		Example: `  drc buffer remove /mnt/dead/drc-buffer
  drc buffer remove /mnt/dying/drc-buffer --force`,
		Args: exactly("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := bufferRequest("remove", args[0])
			if err != nil {
				return err
			}
			r.Force = force
			client, err := g.client()
			if err != nil {
				return err
			}
			_, err = client.Buffer(cmd.Context(), r)
			if errors.Is(err, control.ErrNoAgent) {
				dir, lerr := g.offline()
				if lerr != nil {
					return lerr
				}
				defer dir.Close()
				err = pipeline.RemoveBufferOffline(dir, r)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(g.out, "%s is out of the buffer\n", r.Path)
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "take it out at once, and lose what only it holds")
	return c
}
