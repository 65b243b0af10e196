package main

import (
	"bytes"
	"context"
	"regexp"
	"strings"
	"testing"
)

// helpOf is what a command prints with --help.
func helpOf(t *testing.T, path []string) string {
	t.Helper()
	var out, err bytes.Buffer
	if code := execute(context.Background(), append(path, "--help"), streams{in: strings.NewReader(""), out: &out, err: &err}); code != 0 || err.Len() > 0 {
		t.Fatalf("drc %s --help: exit code %d\n%s", strings.Join(path, " "), code, err.String())
	}
	return out.String()
}

var subcommand = regexp.MustCompile(`(?m)^  ([a-z]+) +\S`)

// Each command says what it is for, shows an example, and ends with the exit
// codes.
func TestHelp_OfEveryCommand(t *testing.T) {
	seen := 0
	var visit func(path []string)
	visit = func(path []string) {
		seen++
		help := helpOf(t, path)
		name := "drc " + strings.Join(path, " ")
		if !strings.HasSuffix(help, exitHelp+"\n") {
			t.Errorf("%s: the help does not end with the exit codes", name)
		}
		for line := range strings.SplitSeq(help, "\n") {
			// The example of a URL may be long, and so may a flag's line.
			if len([]rune(line)) > 220 {
				t.Errorf("%s: a line of %d characters: %s", name, len([]rune(line)), line)
			}
		}
		if strings.Contains(help, "not there yet") {
			t.Errorf("%s: the help offers what is not there", name)
		}
		_, commands, parent := strings.Cut(help, "Available Commands:\n")
		if parent {
			commands, _, _ = strings.Cut(commands, "\n\n")
			for _, m := range subcommand.FindAllStringSubmatch(commands, -1) {
				visit(append(path[:len(path):len(path)], m[1]))
			}
			return
		}
		if path[0] != "help" && path[0] != "completion" && !strings.Contains(help, "Examples:\n  drc ") {
			t.Errorf("%s: the help has no example", name)
		}
	}
	visit(nil)
	if seen < 18 {
		t.Errorf("only %d commands were found", seen)
	}
}

func TestHelp_LeavesOutFlagsWithoutMeaning(t *testing.T) {
	for command, flags := range map[string][]string{
		"version": {"--store", "--identity", "--state", "--agent-key"}, "status": {"--store", "--identity", "--agent-key"},
		"demo": {"--identity", "--state"}, "completion bash": {"--store", "--identity", "--state", "--agent-key"},
	} {
		help := helpOf(t, strings.Fields(command))
		for _, f := range flags {
			if strings.Contains(help, f+" ") {
				t.Errorf("drc %s --help shows %s, which means nothing there", command, f)
			}
		}
	}
}
