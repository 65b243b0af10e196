package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"drc/internal/state"
)

// streams are where a command reads and writes: results go to out, talk to err.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// global are the flags that every command takes.
type global struct {
	streams
	stores   []string
	identity string
	agentKey string
	state    string
}

const exitHelp = `
EXIT STATUS
  0  done
  1  failed
  2  wrong usage
  3  not found: no such volume or point
  4  damaged or unverifiable data
  5  fenced, or locked by another agent`

func execute(ctx context.Context, args []string, s streams) int {
	g := &global{streams: s}
	root := &cobra.Command{
		Use:   "drc",
		Short: "Continuous protection of block volumes",
		Long: `drc takes every write to a block volume at the moment it is made, keeps it in a
local buffer, and brings it to S3-compatible stores or directories as
deduplicated, encrypted, erasure-coded segments. Whoever has the stores and the
identity can rebuild a volume at any checkpoint, on any host.

To see it work, with nothing set up:  drc demo`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetArgs(args)
	root.SetOut(s.out)
	root.SetErr(s.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())}
	})
	f := root.PersistentFlags()
	f.StringArrayVar(&g.stores, "store", nil, "`URL` of a store; repeat for each (default $DRC_STORE, separated by spaces)")
	f.StringVar(&g.identity, "identity", os.Getenv("DRC_IDENTITY"), "identity `FILE` (default $DRC_IDENTITY)")
	f.StringVar(&g.agentKey, "agent-key", os.Getenv("DRC_AGENT_KEY"), "agent key `FILE`, for a host that shall write and not read (default $DRC_AGENT_KEY)")
	f.StringVar(&g.state, "state", "", "`DIR` for local state (default "+defaultStateText()+")")
	root.AddCommand(
		initCommand(g), agentCommand(g), statusCommand(g), checkpointCommand(g), historyCommand(g), restoreCommand(g),
		inspectCommand(g), demoCommand(g), volumeCommand(g), keyCommand(g), versionCommand(g),
	)
	root.InitDefaultCompletionCmd(args...)
	dressHelp(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if isUsage(err) {
		err = fmt.Errorf("%w", err)
	}
	fmt.Fprintf(s.err, "drc: %v\n", err)
	_ = cmd
	return exitCode(err)
}

// dressHelp ends each command's help with the exit codes.
func dressHelp(cmd *cobra.Command) {
	cmd.SetHelpTemplate(cmd.HelpTemplate() + exitHelp + "\n")
	for _, c := range cmd.Commands() {
		if c.Args != nil {
			args := c.Args
			c.Args = func(cmd *cobra.Command, a []string) error {
				if err := args(cmd, a); err != nil {
					return usageError{fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())}
				}
				return nil
			}
		}
	}
}

func defaultStateText() string {
	if os.Geteuid() == 0 {
		return "/var/lib/drc"
	}
	return "the XDG state folder"
}

// storeURLs are the stores given by flag or environment.
func (g *global) storeURLs() []string {
	if len(g.stores) > 0 {
		return g.stores
	}
	return strings.Fields(os.Getenv("DRC_STORE"))
}

// statePath is the state folder's path.
func (g *global) statePath() string {
	if g.state != "" {
		return g.state
	}
	return state.DefaultPath()
}

// usageError is wrong usage: exit code 2.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func isUsage(err error) bool {
	var u usageError
	return errors.As(err, &u) || strings.HasPrefix(err.Error(), "unknown command")
}
