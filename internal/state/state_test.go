package state_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/state"
	"drc/internal/vfs"
)

func open(t *testing.T, path string) *state.Dir {
	t.Helper()
	d, err := state.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestLock_OneAgent: the lock holds against every other, whichever way the folder
// is named, and ends with its holder.
func TestLock_OneAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	d := open(t, path)
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	link := path + "-link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link} {
		if err := open(t, p).Lock(); !errors.Is(err, state.ErrInUse) {
			t.Errorf("lock %s again: %v", p, err)
		}
	}
	for range 2 { // Close is idempotent
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	again := open(t, link)
	if err := again.Lock(); err != nil {
		t.Errorf("after its holder has ended: %v", err)
	}
	again.Close()
}

// TestOpen_KeepsStrangersOut: what is made is its owner's only.
func TestOpen_KeepsStrangersOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "state")
	d := open(t, path)
	if err := d.SaveJSON(1, "groups", "x", "secret.json"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: 0o700, d.Path("groups"): 0o700, d.Path("groups", "x"): 0o700, d.Path("groups", "x", "secret.json"): 0o600} {
		st, err := os.Stat(name)
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v (%v), want %v", name, st.Mode().Perm(), err, want)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := state.Open(file); err == nil || !strings.Contains(err.Error(), "--state") {
		t.Errorf("a file as state folder: %v", err)
	}
}

// TestSave_AWriterThatDied leaves what a crash between the steps of a write may
// leave. The file is the old one, and can be written again.
func TestSave_AWriterThatDied(t *testing.T) {
	d := open(t, t.TempDir())
	if err := d.SaveJSON("old", "x.json"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.Path("x.json.tmp"), []byte("\"ne"), 0o600); err != nil {
		t.Fatal(err)
	}
	var got string
	if found, err := d.LoadJSON(&got, "x.json"); err != nil || !found || got != "old" {
		t.Errorf("%q, %v, %v", got, found, err)
	}
	if err := d.SaveJSON("new", "x.json"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.LoadJSON(&got, "x.json"); err != nil || got != "new" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestLoadJSON_Damaged: a file that is not whole is an error that names it, and
// never taken for none.
func TestLoadJSON_Damaged(t *testing.T) {
	d := open(t, t.TempDir())
	for _, raw := range []string{"", "{", `{"host_id":"`, "\x00\x00\x00\x00", `{"host_id":1}`, `{"host_id":"aa"} {}`, "null", " null\n"} {
		if err := os.WriteFile(d.Path("host.json"), []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		var v struct {
			ID string `json:"host_id"`
		}
		if _, err := d.LoadJSON(&v, "host.json"); err == nil || !strings.Contains(err.Error(), d.Path("host.json")) {
			t.Errorf("%q: %v", raw, err)
		}
	}
	if found, err := d.LoadJSON(new(int), "none.json"); found || err != nil {
		t.Errorf("a file that is not there: %v, %v", found, err)
	}
}

// TestHost_StaysTheSame: the id owns buffers, so a damaged one must not be
// replaced by a new one.
func TestHost_StaysTheSame(t *testing.T) {
	path := t.TempDir()
	first, err := open(t, path).Host()
	if err != nil || first == (block.ID{}) {
		t.Fatalf("%v, %v", first, err)
	}
	if again, err := open(t, path).Host(); err != nil || again != first {
		t.Errorf("%v, then %v (%v)", first, again, err)
	}
	if other, err := open(t, t.TempDir()).Host(); err != nil || other == first {
		t.Errorf("another folder has the same id (%v)", err)
	}
	name := filepath.Join(path, "host.json")
	for _, raw := range []string{"{}", "null", `{"host_id":"short"}`, `{"host_id":"` + strings.Repeat("x", 32) + `"}`} {
		if err := os.WriteFile(name, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if id, err := open(t, path).Host(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: id %v, %v", raw, id, err)
		}
	}
}

// TestLock_MakesDurableWhatAKilledProcessLeft: the process dies between a rename
// and the sync of its folder. The next one rests on what it finds, so a power cut
// must not take that away.
func TestLock_MakesDurableWhatAKilledProcessLeft(t *testing.T) {
	files := vfs.NewMem()
	d, err := state.OpenOn(files, "/state")
	if err != nil {
		t.Fatal(err)
	}
	killed := errors.New("killed")
	files.SetHook(func(op vfs.Op, _ string) error {
		if op == vfs.OpSyncDir {
			return killed
		}
		return nil
	})
	if _, err := d.Host(); !errors.Is(err, killed) {
		t.Fatal(err)
	}
	files = files.Kill()
	if d, err = state.OpenOn(files, "/state"); err != nil {
		t.Fatal(err)
	}
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	id, err := d.Host()
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(20) {
		d, err := state.OpenOn(files.Clone().Crash(rand.New(rand.NewPCG(seed, 0))), "/state")
		if err != nil {
			t.Fatal(err)
		}
		if again, err := d.Host(); err != nil || again != id {
			t.Fatalf("after a power cut the host is %s, and was %s: %v", again, id, err)
		}
	}
}
