package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"drc/internal/block"
)

// TestStateFolder_DamagedFiles damages each file of the state folder, one at a
// time and in several ways, after a stop in order and after a kill. The next
// start does without it, or ends with one plain line that names it and goes on
// when the file is back. In either case nothing is lost, neither from the volume
// nor from its history.
func TestStateFolder_DamagedFiles(t *testing.T) {
	t.Parallel()
	v := onSparse(t, 4<<20)
	v.put(1, 0, 1<<20, atOnce)
	v.await("all is committed", isContinuous)
	digits := regexp.MustCompile(`[0-9]+`)
	ways := []struct {
		name   string
		damage func(raw []byte) []byte
	}{
		{"empty", func([]byte) []byte { return nil }},
		{"cut in half", func(raw []byte) []byte { return raw[:len(raw)/2] }},
		{"null", func([]byte) []byte { return []byte("null") }},
		{"an empty object", func([]byte) []byte { return []byte("{}") }},
		{"an empty list", func([]byte) []byte { return []byte("[]") }},
		{"noise", func(raw []byte) []byte { return noise(7, len(raw)) }},
		{"large numbers", func(raw []byte) []byte { return digits.ReplaceAll(raw, []byte("18446744073709551615")) }},
	}
	seed := uint64(2)
	files := 0
	for f, name := range v.stateFiles() {
		found := false
		for i := range 2 {
			w := ways[(2*f+i)%len(ways)]
			must(t, v.dev.Close())
			if killed := i%2 == 1; killed {
				v.agent.kill()
			} else {
				v.agent.stop()
			}
			path := filepath.Join(v.state, name)
			raw, err := os.ReadFile(path)
			if os.IsNotExist(err) { // not there at each start
				v.again()
				continue
			}
			must(t, err)
			found = true
			must(t, os.WriteFile(path, w.damage(raw), 0o600))
			from := len(v.said())
			a, err := v.tryStart(v.args...)
			if err != nil {
				said := v.said()[from:]
				if err := plainLine(said); err != nil {
					t.Errorf("%s, %s: %v\n%s", name, w.name, err, said)
				}
				// Who does not know any more that it is in office is refused, and may be.
				if !strings.Contains(said, filepath.Base(name)) && !strings.Contains(said, "written by another agent") {
					t.Errorf("%s, %s: the error does not name it: %s", name, w.name, said)
				}
				must(t, os.WriteFile(path, raw, 0o600))
				a = v.start(v.args...)
			}
			v.agent, v.dev = a, v.device("v")
			seed++
			v.put(seed, int(seed%15)<<18, 64<<10, block.WriteOptions{FUA: seed%2 == 0})
			v.await("all is committed", isContinuous)
			got := make([]byte, len(v.want))
			must(t, v.dev.ReadAt(testContext(t), got, 0))
			if !bytes.Equal(got, v.want) {
				t.Fatalf("%s, %s: the volume is not what was written", name, w.name)
			}
		}
		if found {
			files++
			v.isWhole()
		}
	}
	if files < 5 {
		t.Errorf("only %d files were damaged", files)
	}
}

// stateFiles lists the files of the state folder, but for the buffer and the
// dedup index, which have tests of their own.
func (h *host) stateFiles() (names []string) {
	h.t.Helper()
	must(h.t, filepath.WalkDir(h.state, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(h.state, path)
		switch {
		case err != nil:
			return err
		case e.IsDir() && (name == "buffer" || e.Name() == "dedup"):
			return fs.SkipDir
		case e.Type().IsRegular() && filepath.Base(name) != "lock":
			names = append(names, name)
		}
		return nil
	}))
	slices.Sort(names)
	return names
}
