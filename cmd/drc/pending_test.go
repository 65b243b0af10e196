package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInit_KilledAndRepeated leaves what a kill leaves at each step of an init,
// and repeats it.
func TestInit_KilledAndRepeated(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"identity half written", "identity written", "first store written", "all stores written"} {
		t.Run(strings.ReplaceAll(step, " ", "_"), func(t *testing.T) {
			h := onFolders(t, 3)
			id := strings.TrimPrefix(h.env[len(h.env)-1], "DRC_IDENTITY=")
			must(t, os.Rename(id, id+".init"))
			record := func(i int) string {
				return filepath.Join(strings.TrimPrefix(h.urls[i], "file://"), "repo", strings.Repeat("0", 15)+"1")
			}
			switch step {
			case "identity half written":
				must(t, os.Truncate(id+".init", 10))
				for i := range 3 {
					must(t, os.Remove(record(i)))
				}
				out, err := h.command("init", "--identity-is-safe").CombinedOutput()
				if err == nil || !bytes.Contains(out, []byte("remove "+id+".init and try again")) {
					t.Fatalf("%v: %s", err, out)
				}
				must(t, os.Remove(id+".init"))
			case "identity written":
				for i := range 3 {
					must(t, os.Remove(record(i)))
				}
			case "first store written":
				must(t, os.Remove(record(1)))
				must(t, os.Remove(record(2)))
			}
			h.drc("init", "--identity-is-safe")
			if _, err := os.Stat(id + ".init"); !os.IsNotExist(err) {
				t.Errorf("%s.init: %v", id, err)
			}
			a := h.start("--volume", "name=v,size=1MiB,path="+filepath.Join(t.TempDir(), "v"))
			a.stop()
		})
	}
}
