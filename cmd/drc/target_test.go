package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"drc/internal/block"
)

// fails runs a command that must fail with a code and one plain line that has
// the text in it.
func (h *host) fails(code int, text string, args ...string) {
	h.t.Helper()
	cmd := h.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	var ended *exec.ExitError
	if !errors.As(err, &ended) || ended.ExitCode() != code {
		h.t.Errorf("drc %s: %v, and not exit code %d\n%s", strings.Join(args, " "), err, code, stderr.String())
	}
	if !strings.Contains(stderr.String(), text) {
		h.t.Errorf("drc %s said %q, and not %q", strings.Join(args, " "), stderr.String(), text)
	}
	if err := plainLine(stderr.String()); err != nil {
		h.t.Errorf("drc %s: %v:\n%s", strings.Join(args, " "), err, stderr.String())
	}
}

// protected is a host with one volume "data" of so many bytes, random but for
// the first zeroes, on the stores, and its agent stopped.
func protected(t *testing.T, bytes, zeroes int) (*host, []byte) {
	t.Helper()
	h := newRepo(t, []string{"file://" + t.TempDir()}, nil)
	want := noise(77, bytes)
	clear(want[:zeroes])
	a := h.start("--volume", "name=data,path="+filepath.Join(t.TempDir(), "v")+",size="+strconv.Itoa(bytes))
	dev := h.device("data")
	for at := 0; at < bytes; at += 1 << 20 {
		must(t, dev.WriteAt(testContext(t), want[at:min(bytes, at+1<<20)], int64(at), block.WriteOptions{}))
	}
	must(t, dev.Close())
	h.drc("checkpoint", "all", "--wait")
	a.stop()
	return h, want
}

func loop(t *testing.T, bytes int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, bytes))
	dev := strings.TrimSpace(shell(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	return dev
}

func TestRestore_DevicesThatCannotTakeIt(t *testing.T) {
	needRoot(t)
	t.Parallel()
	h, want := protected(t, 8<<20, 0)
	r := h.other()
	small := loop(t, 4<<20)
	r.fails(1, "has 4194304 bytes, and the volume has 8388608: choose a larger device", "restore", "data", small, "--force")
	for _, b := range readFirst(t, small, 4<<20) {
		if b != 0 {
			t.Fatal("the device that is too small was written to")
		}
	}

	disk := loop(t, 24<<20)
	shell(t, "mkfs.ext4", "-q", disk)
	mount := t.TempDir()
	shell(t, "mount", disk, mount)
	t.Cleanup(func() { _ = syscall.Unmount(mount, syscall.MNT_DETACH) })
	r.fails(1, "is in use (mounted, or part of another device): unmount it first", "restore", "data", disk, "--force")
	must(t, syscall.Unmount(mount, 0))
	r.fails(1, "holds data: choose another device, or pass --force to overwrite it", "restore", "data", disk)
	shell(t, "e2fsck", "-fn", disk) // still a whole file system

	r.drc("restore", "data", disk, "--force")
	if !bytes.Equal(readFirst(t, disk, len(want)), want) {
		t.Fatal("the device has not what was protected")
	}
}

func readFirst(t *testing.T, device string, n int) []byte {
	t.Helper()
	f, err := os.Open(device)
	must(t, err)
	defer f.Close()
	p := make([]byte, n)
	_, err = f.ReadAt(p, 0)
	must(t, err)
	return p
}

// A full disk is said, the target does not appear, and once there is room the
// same command goes on where it was.
func TestRestore_FullDisk(t *testing.T) {
	needRoot(t)
	t.Parallel()
	// The zeroes are done before the disk is full, whatever order the rest has.
	h, want := protected(t, 40<<20, 8<<20)
	disk := loop(t, 56<<20)
	shell(t, "mkfs.ext4", "-q", "-m", "0", disk)
	mount := t.TempDir()
	shell(t, "mount", disk, mount)
	t.Cleanup(func() { _ = syscall.Unmount(mount, syscall.MNT_DETACH) })
	must(t, os.WriteFile(filepath.Join(mount, "other"), noise(1, 28<<20), 0o600))
	target := filepath.Join(mount, "data.img")
	r := h.other()
	r.fails(1, "there is no room for "+target+": free some space and run the same command again; it goes on where it stopped", "restore", "data", target)
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the target is there: %v", err)
	}
	must(t, os.Remove(filepath.Join(mount, "other")))
	var sum restoreJSON
	must(t, json.Unmarshal([]byte(r.drc("restore", "data", target, "--json")), &sum))
	if sum.ResumedBytes < 8<<20 {
		t.Error("the second run began anew")
	}
	got, err := os.ReadFile(target)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatal("what was restored differs")
	}
	left, err := os.ReadDir(mount)
	must(t, err)
	for _, e := range left {
		if strings.Contains(e.Name(), ".drc-") {
			t.Errorf("%s is left over", e.Name())
		}
	}
}

// Nothing but stores and identity is needed: another user, with another state
// folder, has the same bytes.
func TestRestore_AsAnotherUser(t *testing.T) {
	needRoot(t)
	t.Parallel()
	const nobody = 65534
	h, want := protected(t, 4<<20, 0)
	dir, err := os.MkdirTemp("", "drc-other-user-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chown(dir, nobody, nobody))
	program, err := exec.LookPath("drc")
	must(t, err)
	store := strings.TrimPrefix(h.env[0], "DRC_STORE=file://")
	identity := strings.TrimPrefix(h.env[1], "DRC_IDENTITY=")
	shell(t, "cp", "-rL", program, store, identity, dir)
	shell(t, "chown", "-R", "65534:65534", dir)
	own := filepath.Join(dir, filepath.Base(identity))
	cmd := exec.Command(filepath.Join(dir, "drc"), "restore", "data", filepath.Join(dir, "out"), "--state", filepath.Join(dir, "state"),
		"--identity", own, "--store", "file://"+filepath.Join(dir, filepath.Base(store)))
	cmd.Dir = dir
	cmd.Env = []string{"HOME=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "out"))
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatal("another user restored other bytes")
	}
}
