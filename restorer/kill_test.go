package restorer_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/crypt"
	"drc/internal/object"
	"drc/internal/object/dir"
	"drc/internal/object/fault"
	"drc/internal/repo"
	"drc/restorer"
)

// childFolder is set in the process that TestRestore_KilledAtAnyMoment kills.
const childFolder = "DRC_RESTORE_CHILD"

// restoreChild restores the volume in a folder, and prints a line for each
// request.
func restoreChild(folder string) error {
	ctx := context.Background()
	text, err := os.ReadFile(filepath.Join(folder, "id"))
	if err != nil {
		return err
	}
	id, err := crypt.ParseIdentity("id", text)
	if err != nil {
		return err
	}
	d, err := dir.Open(filepath.Join(folder, "store"), dir.Options{})
	if err != nil {
		return err
	}
	f := fault.New(d)
	f.Add(fault.Rule{Op: fault.GetRange, Hook: func(context.Context, fault.Call) error {
		fmt.Println("request")
		return nil
	}})
	r, err := repo.Open(ctx, []object.Store{f}, id.RootPublic)
	if err != nil {
		return err
	}
	h, _, err := restorer.Find(ctx, restorer.Config{Repo: r, Ring: crypt.NewRing(id)}, "v0")
	if err != nil {
		return err
	}
	im, err := restorer.OpenImage(ctx, h, "v0", "latest")
	if err != nil {
		return err
	}
	defer restorer.SaveEvery(1 << 20)()
	_, err = restorer.Restore(ctx, im, filepath.Join(folder, "volume"), restorer.Options{Concurrency: 3})
	return err
}

// A restore that is killed at any moment has no target yet, and the next run
// ends with the volume, having fetched less than all of it.
func TestRestore_KilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	w, want := inSegments(t, 12)
	folder := t.TempDir()
	w.onDiskAt(filepath.Join(folder, "store"), w.stores[0])
	w.must(os.WriteFile(filepath.Join(folder, "id"), w.id.Encode(w.clock.now()), 0o600))
	name := filepath.Join(folder, "volume")
	program, err := os.Executable()
	w.must(err)
	// run runs the child until it has made some requests; 0: to its end.
	run := func(requests int) (made int) {
		cmd := exec.Command(program)
		cmd.Env = append(os.Environ(), childFolder+"="+folder)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		w.must(err)
		w.must(cmd.Start())
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if strings.TrimSpace(lines.Text()) == "request" {
				made++
			}
			if made == requests {
				w.must(cmd.Process.Kill())
			}
		}
		err = cmd.Wait()
		if requests == 0 || made < requests {
			w.must(err)
		}
		return made
	}
	all := run(0)
	w.sameFile(name, want)
	for range scaled(3, 60) {
		w.must(os.Remove(name))
		for range 1 + w.rng.IntN(3) {
			if n := 1 + w.rng.IntN(all); run(n) < n {
				break // it has ended
			}
			if _, err := os.Stat(name); err == nil {
				break // it was quicker than the signal
			}
		}
		if _, err := os.Stat(name); err != nil {
			run(0)
		}
		w.sameFile(name, want)
	}
	// Late in the restore there is something to go on from.
	w.must(os.Remove(name))
	run(all - 4)
	if _, err := os.Stat(name); err != nil {
		if n := run(0); n > all*3/4 {
			t.Errorf("%d requests after a restore that was killed near its end, %d in all", n, all)
		}
	}
	w.sameFile(name, want)
}
