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
	"strings"
	"sync"
	"syscall"
	"testing"

	"drc/internal/control"
)

// host is one "host" of a test: a state folder, stores and an identity.
type host struct {
	t     testing.TB
	state string
	env   []string
	mu    sync.Mutex
	log   bytes.Buffer // what its agents said
}

// newRepo makes a repository on the stores and returns a host that uses it.
func newRepo(t testing.TB, stores []string, env []string, args ...string) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, state: filepath.Join(dir, "state")}
	h.env = append(env, "DRC_STORE="+strings.Join(stores, " "), "DRC_IDENTITY="+filepath.Join(dir, "identity"))
	h.drc(append([]string{"init", "--identity-is-safe"}, args...)...)
	return h
}

// other is another host with the same repository.
func (h *host) other() *host {
	return &host{t: h.t, state: filepath.Join(h.t.TempDir(), "state"), env: h.env}
}

func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command("drc", append(args, "--state", h.state)...)
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

func (h *host) status() control.Status {
	h.t.Helper()
	var s control.Status
	if err := json.Unmarshal([]byte(h.drc("status", "--json")), &s); err != nil {
		h.t.Fatalf("drc status --json: %v", err)
	}
	return s
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
