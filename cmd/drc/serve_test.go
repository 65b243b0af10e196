package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// server is a running drc serve.
type server struct {
	h    *host
	cmd  *exec.Cmd
	out  string // what it printed
	done chan error
}

// serve starts drc serve --json and waits until it serves.
func (h *host) serve(args ...string) *server {
	h.t.Helper()
	s := &server{h: h, cmd: h.command(append([]string{"serve", "--json"}, args...)...), done: make(chan error, 1)}
	s.cmd.Stderr = h
	out, err := s.cmd.StdoutPipe()
	must(h.t, err)
	must(h.t, s.cmd.Start())
	var printed bytes.Buffer
	var document json.RawMessage
	err = json.NewDecoder(io.TeeReader(out, &printed)).Decode(&document)
	go func() {
		_, _ = io.Copy(io.Discard, out)
		s.done <- s.cmd.Wait()
	}()
	if err != nil {
		h.t.Fatalf("drc serve %s: %v\n%s%s", strings.Join(args, " "), <-s.done, printed.String(), h.said())
	}
	s.out = string(document)
	h.t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			s.kill()
		}
	})
	return s
}

// stop ends the server in order.
func (s *server) stop() {
	s.h.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	if err := <-s.done; err != nil {
		s.h.t.Fatalf("drc serve ended badly: %v\n%s", err, s.h.said())
	}
}

// kill ends the server without a word.
func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	<-s.done
	s.done <- nil
}

// served is what drc serve --json prints.
func (h *host) served(args ...string) string {
	h.t.Helper()
	s := h.serve(args...)
	s.stop()
	return s.out
}

// socket is where the server listens.
func (s *server) socket() string { return filepath.Join(s.h.state, "serve.sock") }

// uri is how clients name an export.
func (s *server) uri(export string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", url.PathEscape(export), s.socket())
}

// wholeFiles checks that files that were synced are there.
func wholeFiles(t *testing.T, dir string, saved []savedFile) {
	t.Helper()
	for _, f := range saved {
		raw, err := os.ReadFile(filepath.Join(dir, f.name))
		if err != nil || sha256.Sum256(raw) != f.sum {
			t.Errorf("file %s, synced at %s, is not whole (%v)", f.name, f.at.UTC().Format(time.RFC3339Nano), err)
		}
	}
}

// A file system under load is exported at many points while the agent goes on: each
// export is what a restore of that point is. One of a clean point is checked and
// mounted as it is; over one of a point in the middle of work, whose journal is not
// empty, a writable export is mounted, repaired, changed, kept over a restart of the
// server and a kill, and hydrated.
func TestServe_FileSystem(t *testing.T) {
	needRoot(t)
	h := onFolders(t, 3)
	dir := t.TempDir()
	ag := h.start("--rpo", "100ms", "--log-level", "warn", "--volume", "name=v,path="+filepath.Join(dir, "v.img")+",size=128MiB")
	at := attach(t, h.socket(), "v")
	shell(t, "mkfs.ext4", "-q", "-F", at.loop)
	at.mountIt()
	stop, done := make(chan struct{}), make(chan []savedFile)
	go func() { done <- saveFiles(at.mount, "a", 1, stop) }()
	var asked time.Time // for the last one
	for i := range 6 {
		time.Sleep(500 * time.Millisecond)
		asked = time.Now()
		h.drc("checkpoint", fmt.Sprintf("busy %d", i), "--wait")
	}
	close(stop)
	saved := <-done
	shell(t, "umount", at.mount)
	h.drc("checkpoint", "clean", "--wait")

	b := h.other()
	s := b.serve("v@clean")
	restored := filepath.Join(dir, "restored.img")
	for _, name := range []string{"busy 0", "busy 1", "busy 2", "busy 3", "busy 4", "busy 5", "clean"} {
		b.drc("restore", "v", restored, "--at", name, "--force")
		shell(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.uri("v@"+name), restored)
	}
	look := attach(t, s.socket(), "v@clean", "--read-only")
	shell(t, "fsck.ext4", "-f", "-n", look.loop)
	look.mountIt("-o", "ro")
	wholeFiles(t, look.mount, saved)
	look.detach()
	s.stop()

	// A point in the middle of work.
	var before []savedFile
	for _, f := range saved {
		if f.at.Before(asked) { // the batch may be cut later, and ends where it was asked for
			before = append(before, f)
		}
	}
	if len(before) == 0 {
		t.Fatal("no file was synced before the point: the test shows nothing")
	}
	file := filepath.Join(dir, "try.img")
	s = b.serve("v", "--at", "busy 5", "--writable", file)
	try := attach(t, s.socket(), "v")
	try.mountIt() // replays the file system's journal
	wholeFiles(t, try.mount, before)
	must(t, os.Remove(filepath.Join(try.mount, before[0].name)))
	must(t, os.WriteFile(filepath.Join(try.mount, "changed"), noise(5, 100_000), 0o600))
	shell(t, "umount", try.mount)
	shell(t, "fsck.ext4", "-f", "-p", try.loop)
	try.detach()
	s.stop()

	changed := func(dir string) {
		t.Helper()
		wholeFiles(t, dir, before[1:])
		raw, err := os.ReadFile(filepath.Join(dir, "changed"))
		if err != nil || !bytes.Equal(raw, noise(5, 100_000)) {
			t.Errorf("what was changed is not as it was left: %v", err)
		}
		if exists(filepath.Join(dir, before[0].name)) {
			t.Error("a file that was removed is there again")
		}
	}
	s = b.serve("v", "--writable", file)
	try = attach(t, s.socket(), "v")
	try.mountIt()
	changed(try.mount)
	shell(t, "umount", try.mount)
	try.detach()
	s.kill()

	s = b.serve("v", "--writable", file, "--hydrate")
	for !strings.Contains(b.said(), "hydrated: all") {
		time.Sleep(20 * time.Millisecond)
	}
	s.stop()
	shell(t, "fsck.ext4", "-f", "-n", file)
	mount := t.TempDir()
	shell(t, "mount", "-o", "loop", file, mount)
	changed(mount)
	shell(t, "umount", mount)
	at.detach()
	ag.stop()
	b.drc("restore", "v", restored, "--at", "clean", "--force")
	shell(t, "fsck.ext4", "-f", "-n", restored)
}
