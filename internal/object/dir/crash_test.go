package dir

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"drc/internal/object/objecttest"
)

// writerVariable makes this test program a writer into the directory it names.
const writerVariable = "DRC_TEST_DIR_WRITER"

const crashObjectSize = 100_000

// crashBody returns what a writer puts under a name: each writer's is different.
func crashBody(writer, i int) []byte { return objecttest.Bytes(uint64(writer<<16|i), crashObjectSize) }

// write puts objects for ever and prints the name of each that was confirmed.
func write(root string, writer int) error {
	store, err := Open(root, Options{})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("d%d/%06d", i/10, i)
		if _, err := store.Put(context.Background(), name, crashBody(writer, i)); err == nil {
			fmt.Println(i)
		}
	}
}

// TestPut_WritersKilled: processes race for the same names and are killed at
// any moment. Each name has all bytes of one writer, and what a writer was
// told that it won is its own.
func TestPut_WritersKilled(t *testing.T) {
	const writers = 4
	root := t.TempDir()
	confirmed := make([][]int, writers)
	commands := make([]*exec.Cmd, writers)
	enough := make(chan struct{}, writers*1000)
	var readers sync.WaitGroup
	for writer := range writers {
		command := exec.CommandContext(t.Context(), os.Args[0])
		command.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%s", writerVariable, writer, root))
		command.Stderr = os.Stderr
		stdout, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		commands[writer] = command
		readers.Go(func() {
			for lines := bufio.NewScanner(stdout); lines.Scan(); {
				var i int
				fmt.Sscan(lines.Text(), &i)
				confirmed[writer] = append(confirmed[writer], i)
				select {
				case enough <- struct{}{}:
				default:
				}
			}
		})
	}
	// One after the other dies while the rest goes on.
	for _, command := range commands {
		for range 25 {
			<-enough
		}
		command.Process.Kill()
	}
	readers.Wait()
	for _, command := range commands {
		command.Wait()
	}

	store, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	owner := map[string]int{}
	for info, err := range store.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		var i int
		fmt.Sscanf(info.Name[strings.IndexByte(info.Name, '/')+1:], "%d", &i)
		body, _, err := store.Get(t.Context(), info.Name, crashObjectSize, nil)
		if err != nil {
			t.Fatal(err)
		}
		found := -1
		for writer := range writers {
			if string(crashBody(writer, i)) == string(body) {
				found = writer
			}
		}
		if found < 0 {
			t.Errorf("%s has the bytes of no writer", info.Name)
		}
		owner[info.Name] = found
	}
	for writer, list := range confirmed {
		for _, i := range list {
			name := fmt.Sprintf("d%d/%06d", i/10, i)
			if got, ok := owner[name]; !ok || got != writer {
				t.Errorf("writer %d was told that it put %s, which is writer %d's (there: %v)", writer, name, got, ok)
			}
		}
	}
}
