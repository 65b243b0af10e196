package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

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

// resultWriter remembers that results could not be written, so that no command
// ends as if they had been.
type resultWriter struct {
	io.Writer
	mu  sync.Mutex
	err error
}

func (w *resultWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	return n, err
}

// failed is the first error of a write, or nil.
func (w *resultWriter) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		return nil
	}
	return fmt.Errorf("the result could not be written to standard output: %w", cause(w.err))
}

func execute(ctx context.Context, args []string, s streams) int {
	result := &resultWriter{Writer: s.out}
	s.out = result
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
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return g.checkFlags(cmd) }
	root.SetArgs(args)
	root.SetOut(s.out)
	root.SetErr(s.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		text := err.Error()
		if what, value, ok := strings.Cut(text, " for \""); ok && strings.HasPrefix(what, "invalid argument ") {
			flag, _, _ := strings.Cut(value, "\"")
			text = fmt.Sprintf("%s is not what %s takes", strings.TrimPrefix(what, "invalid argument "), flag)
		}
		return usage("%s: see %s --help", text, cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringArrayVar(&g.stores, "store", nil, "`URL` of a store; repeat for each (default $DRC_STORE, separated by spaces)")
	f.StringVar(&g.identity, "identity", os.Getenv("DRC_IDENTITY"), "identity `FILE` (default $DRC_IDENTITY)")
	f.StringVar(&g.agentKey, "agent-key", os.Getenv("DRC_AGENT_KEY"), "agent key `FILE`, for a host that shall write and not read (default $DRC_AGENT_KEY)")
	f.StringVar(&g.state, "state", "", "`DIR` for local state (default "+defaultStateText()+")")
	root.AddCommand(
		initCommand(g), agentCommand(g), statusCommand(g), checkpointCommand(g), historyCommand(g), restoreCommand(g), serveCommand(g), replayCommand(g), promoteCommand(g), demoteCommand(g),
		inspectCommand(g), demoCommand(g), volumeCommand(g), bufferCommand(g), keyCommand(g), versionCommand(g),
	)
	root.SetHelpCommand(helpCommand())
	root.InitDefaultCompletionCmd(args...)
	dressHelp(root)
	err := root.ExecuteContext(ctx)
	if unwritten := result.failed(); unwritten != nil && (err == nil || errors.Is(err, cause(result.err))) {
		err = unwritten
	}
	if err == nil {
		return 0
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = errInterrupted
	}
	fmt.Fprintf(s.err, "drc: %s\n", plain(err))
	return exitCode(err)
}

// checkFlags refuses flags that were given with nothing, as by a variable of a
// script that is not set, and settles which key counts: what is given by flag
// before what the environment has.
func (g *global) checkFlags(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() == "string" && f.Value.String() == "" && err == nil {
			err = usage("--%s was given and is empty: see %s --help", f.Name, cmd.CommandPath())
		}
	})
	switch identity, agentKey := cmd.Flags().Changed("identity"), cmd.Flags().Changed("agent-key"); {
	case err != nil:
		return err
	case identity && agentKey:
		return usage("--identity and --agent-key were both given: one key is enough")
	case agentKey:
		g.identity = ""
	case identity:
		g.agentKey = ""
	}
	return nil
}

var errInterrupted = errors.New("interrupted")

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show what a command does",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usage("unknown command %q for \"drc\": see drc --help", strings.Join(args, " "))
			}
			return c.Help()
		},
	}
}

// noGlobals says which of the flags for all commands have no meaning for a
// command: its help leaves them out. They are taken nevertheless, so that a
// script can give all its calls the same ones.
var noGlobals = map[string][]string{
	"drc init":       {"agent-key", "state"},
	"drc status":     {"store", "identity", "agent-key"},
	"drc checkpoint": {"store", "identity", "agent-key"},
	"drc inspect":    {"state"},
	"drc restore":    {"agent-key"},
	"drc serve":      {"agent-key"},
	"drc demo":       {"identity", "agent-key", "state"},
	"drc volume add": {"store", "identity", "agent-key"},
	"drc key":        {"store", "agent-key", "state"},
	"drc key agent":  {"store", "agent-key", "state"},
	"drc version":    {"store", "identity", "agent-key", "state"},
	"drc help":       {"store", "identity", "agent-key", "state"},
	"drc completion": {"store", "identity", "agent-key", "state"},
}

// dressHelp ends each command's help with the exit codes, leaves out the flags
// that have no meaning there, and makes usage errors of wrong arguments.
func dressHelp(root *cobra.Command) {
	root.SetHelpTemplate(root.HelpTemplate() + exitHelp + "\n")
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		path := cmd.CommandPath()
		for _, name := range noGlobals[strings.TrimSuffix(path, " "+cmd.Name())] {
			if cmd.Parent().Name() == "completion" {
				cmd.InheritedFlags().Lookup(name).Hidden = true
			}
		}
		for _, name := range noGlobals[path] {
			cmd.InheritedFlags().Lookup(name).Hidden = true
		}
		help(cmd, args)
	})
	wrapArgs(root)
}

func wrapArgs(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			err := check(cmd, args)
			var already usageError
			if err == nil || errors.As(err, &already) {
				return err
			}
			switch {
			case len(args) > 0 && cmd.HasSubCommands():
				return usage("unknown command %q for %q: see %s --help", args[0], cmd.CommandPath(), cmd.CommandPath())
			case len(args) > 0:
				return usage("%s takes no argument, and got %q: see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())
			}
			return usage("%w: see %s --help", err, cmd.CommandPath())
		}
	}
	if cmd.Name() == "completion" {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("unknown command %q for %q: it is bash, fish, powershell or zsh", args[0], cmd.CommandPath())
			}
			return usage("say for which shell: drc completion bash, fish, powershell or zsh")
		}
		cmd.RunE = func(*cobra.Command, []string) error { return nil }
	}
	for _, c := range cmd.Commands() {
		wrapArgs(c)
	}
}

// exactly checks that a command gets the arguments named.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usage("%s %s missing: see %s --help", strings.Join(names[len(args):], " and "), plural(len(names)-len(args), "is", "are"), cmd.CommandPath())
		case len(args) > len(names):
			return usage("%q is too much: see %s --help", args[len(names)], cmd.CommandPath())
		}
		for i, a := range args {
			if a == "" {
				return usage("%s is empty: see %s --help", names[i], cmd.CommandPath())
			}
		}
		return nil
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
