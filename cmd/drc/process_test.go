package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/nbd"
	"drc/internal/state"
)

// host is one "host" of a test: a state folder, stores and an identity.
type host struct {
	t     testing.TB
	urls  []string // of the stores
	state string
	env   []string
	limit time.Duration // of a process, default processLimit
	mu    sync.Mutex
	log   bytes.Buffer // what its agents said
}

// newRepo makes a repository on the stores and returns a host that uses it.
func newRepo(t testing.TB, stores []string, env []string, args ...string) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, urls: stores, state: filepath.Join(dir, "state")}
	h.env = append(env, "DRC_STORE="+strings.Join(stores, " "), "DRC_IDENTITY="+filepath.Join(dir, "identity"))
	h.drc(append([]string{"init", "--identity-is-safe"}, args...)...)
	return h
}

// onFolders makes a repository on n folders and returns a host that uses it.
func onFolders(t testing.TB, n int) *host {
	t.Helper()
	return newRepo(t, folderURLs(t, n), nil)
}

func folderURLs(t testing.TB, n int) (urls []string) {
	for i := range n {
		urls = append(urls, "file://"+filepath.Join(t.TempDir(), strconv.Itoa(i)))
	}
	return urls
}

// other is another host with the same repository.
func (h *host) other() *host {
	return &host{t: h.t, urls: h.urls, state: filepath.Join(h.t.TempDir(), "state"), env: h.env, limit: h.limit}
}

// processLimit is how long a process of a test may live. It is far more than any
// needs: what hangs says where, and which test it is, and the other tests run.
const processLimit = 6 * time.Minute

// limited is a drc command that is asked where it is, and so ends, when ctx does.
func limited(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "drc", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

func (h *host) command(args ...string) *exec.Cmd {
	limit := h.limit
	if limit == 0 {
		limit = processLimit
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	h.t.Cleanup(cancel)
	cmd := limited(ctx, append(args, "--state", h.state)...)
	cmd.Env = append(os.Environ(), h.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// drc runs a command that must succeed and returns its output.
func (h *host) drc(args ...string) string {
	h.t.Helper()
	cmd := h.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		h.t.Fatalf("drc %s: %v\n%s%s\nagents said:\n%s", strings.Join(args, " "), err, out, stderr.String(), h.said())
	}
	return string(out)
}

func (h *host) said() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.String()
}

func (h *host) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.Write(p)
}

// status is what drc status --json shows, asked without a process of its own:
// tests wait by it.
func (h *host) status() control.Status {
	h.t.Helper()
	s, err := control.NewClient(state.SocketPath(h.state)).Status(context.Background())
	if err != nil {
		h.t.Fatalf("ask the agent for its status: %v\n%s", err, h.said())
	}
	return s
}

// history is what drc history --json shows.
func (h *host) history(volume string, args ...string) (hist historyJSON) {
	h.t.Helper()
	must(h.t, json.Unmarshal([]byte(h.drc(append([]string{"history", volume, "--json"}, args...)...)), &hist))
	return hist
}

// socket is the NBD socket of the host's agent.
func (h *host) socket() string { return filepath.Join(h.state, "nbd.sock") }

// agent is a running agent.
type agent struct {
	h    *host
	cmd  *exec.Cmd
	done chan error
}

// start starts an agent and waits until it serves.
func (h *host) start(args ...string) *agent {
	h.t.Helper()
	a, err := h.tryStart(args...)
	if err != nil {
		h.t.Fatalf("drc agent %s: %v\n%s", strings.Join(args, " "), err, h.said())
	}
	return a
}

func (h *host) tryStart(args ...string) (*agent, error) {
	cmd := h.command(append([]string{"agent"}, args...)...)
	cmd.Stderr = h
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	a := &agent{h: h, cmd: cmd, done: make(chan error, 1)}
	lines := bufio.NewScanner(out)
	ready := false
	for !ready && lines.Scan() {
		ready = lines.Text() == "ready"
	}
	go func() {
		_, _ = io.Copy(io.Discard, out)
		a.done <- cmd.Wait()
	}()
	if !ready {
		return nil, <-a.done
	}
	h.t.Cleanup(func() {
		if a.cmd.ProcessState == nil {
			a.kill()
		}
	})
	return a, nil
}

// stop ends the agent in order.
func (a *agent) stop() {
	a.h.t.Helper()
	_ = a.cmd.Process.Signal(syscall.SIGTERM)
	if err := <-a.done; err != nil {
		a.h.t.Fatalf("the agent ended badly: %v\n%s", err, a.h.said())
	}
}

// kill ends the agent without a word.
func (a *agent) kill() {
	_ = a.cmd.Process.Kill()
	<-a.done
	a.done <- nil
}

// testContext ends with the test.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	return ctx
}

// put has a client write noise, and makes the same change to want, which is what
// the volume must hold.
func put(t testing.TB, c *nbd.Client, want []byte, seed uint64, off, n int, o block.WriteOptions) {
	t.Helper()
	p := noise(seed, n)
	must(t, c.WriteAt(context.Background(), p, int64(off), o))
	copy(want[off:], p)
}

// atOnce has a write made durable before it is answered.
var atOnce = block.WriteOptions{FUA: true}

// putBehind changes a volume's file without DRC, and want as well.
func putBehind(t testing.TB, path string, want []byte, seed uint64, off, n int) {
	t.Helper()
	p := noise(seed, n)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(p, int64(off))
	must(t, err)
	must(t, f.Close())
	copy(want[off:], p)
}

// sparse is a volume "v" that its agent has made, what it must hold, and a
// client of it.
type sparse struct {
	*host
	path  string
	args  []string // of its agent
	agent *agent
	dev   *nbd.Client
	want  []byte
}

// onSparse starts an agent with a volume of so many bytes on a repository in one
// folder, and connects to it.
func onSparse(t testing.TB, bytes int) *sparse {
	t.Helper()
	v := &sparse{host: onFolders(t, 1), path: filepath.Join(t.TempDir(), "v.img"), want: make([]byte, bytes)}
	v.args = []string{"--volume", "name=v,path=" + v.path + ",size=" + strconv.Itoa(bytes), "--rpo", "50ms"}
	v.again()
	return v
}

// again starts the agent, and connects.
func (v *sparse) again() {
	v.t.Helper()
	v.agent = v.start(v.args...)
	v.dev = v.device("v")
}

func (v *sparse) put(seed uint64, off, n int, o block.WriteOptions) {
	v.t.Helper()
	put(v.t, v.dev, v.want, seed, off, n, o)
}

func (v *sparse) isWhole(args ...string) {
	v.t.Helper()
	v.sameAs("v", v.want, args...)
}
