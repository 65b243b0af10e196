package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"syscall"
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
