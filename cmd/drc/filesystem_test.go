package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drc/internal/realpart"
)

// needRoot fails a test that cannot do its work without root: loop devices and
// mounts. DRC_TEST_WITHOUT_ROOT=1 leaves these tests out, and says so.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("DRC_TEST_WITHOUT_ROOT") != "" {
		t.Skip("NOT TESTED: this test needs root, and DRC_TEST_WITHOUT_ROOT is set")
	}
	t.Fatal("this test needs root (loop devices, mounts): run make test as root, or set DRC_TEST_WITHOUT_ROOT=1 to leave such tests out")
}

// shell runs a program that must succeed.
func shell(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(realpart.Path(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// attached is a volume of a running agent as a mounted file system: nbdfuse,
// a loop device on its file, and a mount.
type attached struct {
	t           *testing.T
	fuse        *exec.Cmd
	fuseDir     string
	loop, mount string
}

func attach(t *testing.T, socket, volume string, losetup ...string) *attached {
	t.Helper()
	a := &attached{t: t, fuseDir: t.TempDir(), mount: t.TempDir()}
	file := filepath.Join(a.fuseDir, "nbd")
	a.fuse = exec.Command(realpart.Path(t, "nbdfuse"), a.fuseDir, fmt.Sprintf("nbd+unix:///%s?socket=%s", volume, socket))
	var said bytes.Buffer
	a.fuse.Stderr = &said
	if err := a.fuse.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if st, err := os.Stat(file); err == nil && st.Size() > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("nbdfuse shows no file: %s", said.String())
		}
	}
	a.loop = strings.TrimSpace(shell(t, "losetup", append(losetup, "--find", "--show", "--direct-io=on", file)...))
	t.Cleanup(a.detach)
	return a
}

func (a *attached) mountIt(options ...string) {
	a.t.Helper()
	shell(a.t, "mount", append(options, a.loop, a.mount)...)
}

// detach takes everything down, whatever state it is in.
func (a *attached) detach() {
	if a.fuse == nil {
		return
	}
	_ = unix.Unmount(a.mount, unix.MNT_DETACH)
	_ = exec.Command("losetup", "-d", a.loop).Run()
	_ = exec.Command("fusermount3", "-u", "-z", a.fuseDir).Run()
	_ = a.fuse.Process.Signal(syscall.SIGTERM)
	_ = a.fuse.Wait()
	a.fuse = nil
}

// savedFile is a file that was fsynced, with its folder, at a time.
type savedFile struct {
	name string
	sum  [32]byte
	at   time.Time
}

// saveFiles writes files and syncs each, until one fails or stop is closed.
func saveFiles(dir, prefix string, seed uint64, stop <-chan struct{}) (saved []savedFile) {
	rng := rand.New(rand.NewPCG(seed, 7))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return saved
		default:
		}
		p := make([]byte, 1+rng.IntN(64<<10))
		for j := range p {
			p[j] = byte(rng.Uint32())
		}
		name := fmt.Sprintf("%s-%d", prefix, i)
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return saved
		}
		_, werr := f.Write(p)
		serr := f.Sync()
		f.Close()
		if werr != nil || serr != nil {
			return saved
		}
		d, err := os.Open(dir)
		if err != nil {
			return saved
		}
		err = d.Sync()
		d.Close()
		if err != nil {
			return saved
		}
		saved = append(saved, savedFile{name, sha256.Sum256(p), time.Now()})
	}
}

// TestFileSystems makes and uses real file systems on a protected volume,
// kills the agent in the middle, and restores every tenth checkpoint: its
// journal replays, its check is clean, and every file that was synced before
// the checkpoint is whole.
func TestFileSystems(t *testing.T) {
	needRoot(t)
	for _, fs := range []struct {
		name  string
		mkfs  []string
		check func(t *testing.T, device string)
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}, func(t *testing.T, device string) {
			shell(t, "fsck.ext4", "-f", "-n", device)
		}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}, func(t *testing.T, device string) {
			shell(t, "xfs_repair", "-n", device)
		}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			h := onFolders(t, 2)
			dir := t.TempDir()
			// xfs refuses less than 300 MiB.
			args := []string{"--rpo", "100ms", "--log-level", "warn", "--volume", "name=v,path=" + filepath.Join(dir, "v.img") + ",size=320MiB"}
			ag := h.start(args...)
			at := attach(t, h.socket(), "v")
			shell(t, fs.mkfs[0], append(fs.mkfs[1:], at.loop)...)
			at.mountIt()
			stop := make(chan struct{})
			done := make(chan []savedFile)
			go func() { done <- saveFiles(at.mount, "a", 1, stop) }()
			time.Sleep(4 * time.Second)
			ag.kill()
			close(stop)
			saved := <-done
			at.detach()

			ag = h.start(append(args, "--drain", "stores")...)
			at = attach(t, h.socket(), "v")
			at.mountIt()
			stop = make(chan struct{})
			go func() { done <- saveFiles(at.mount, "b", 2, stop) }()
			time.Sleep(3 * time.Second)
			close(stop)
			saved = append(saved, <-done...)
			shell(t, "umount", at.mount)
			at.detach()
			ag.stop()
			checkRestored(t, h, saved, fs.check)
		})
	}
}

func checkRestored(t *testing.T, h *host, saved []savedFile, check func(t *testing.T, device string)) {
	t.Helper()
	var hist historyJSON
	if err := json.Unmarshal([]byte(h.drc("history", "v", "--all", "--json")), &hist); err != nil {
		t.Fatal(err)
	}
	b := h.other()
	checked, files := 0, 0
	for i := len(hist.Checkpoints) - 1; i >= 0; i -= 10 {
		p := hist.Checkpoints[i]
		when, err := time.Parse(time.RFC3339Nano, p.Time)
		if err != nil {
			t.Fatal(err)
		}
		var before []savedFile
		for _, f := range saved {
			if f.at.Before(when) {
				before = append(before, f)
			}
		}
		if len(before) == 0 {
			continue // perhaps before there was a file system
		}
		image := filepath.Join(t.TempDir(), "restored.img")
		b.drc("restore", "v", image, "--at", fmt.Sprintf("seq:%d", p.Seq))
		loop := strings.TrimSpace(shell(t, "losetup", "--find", "--show", image))
		mount := t.TempDir()
		func() {
			defer func() { shell(t, "losetup", "-d", loop) }()
			shell(t, "mount", loop, mount) // replays the file system's journal
			func() {
				defer func() { shell(t, "umount", mount) }()
				for _, f := range before {
					raw, err := os.ReadFile(filepath.Join(mount, f.name))
					if err != nil || sha256.Sum256(raw) != f.sum {
						t.Errorf("checkpoint seq %d of %s: file %s, synced at %s, is not whole (%v)", p.Seq, p.Time, f.name, f.at.UTC().Format(time.RFC3339Nano), err)
					}
					files++
				}
			}()
			check(t, loop)
		}()
		if err := os.Remove(image); err != nil {
			t.Fatal(err)
		}
		checked++
	}
	t.Logf("%d of %d checkpoints restored and checked, %d synced files found whole", checked, len(hist.Checkpoints), files)
	if checked < 3 {
		t.Errorf("only %d checkpoints were checked: the run shows nothing", checked)
	}
}
