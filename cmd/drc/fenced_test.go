package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/nbd"
)

// seen is what a client reads of a volume.
func seen(t testing.TB, c *nbd.Client, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	must(t, c.ReadAt(context.Background(), p, 0))
	return p
}

// refused starts an agent that must end as fenced or locked, and returns what it
// said.
func (h *host) refused(args ...string) string {
	h.t.Helper()
	before := len(h.said())
	a, err := h.tryStart(args...)
	if err == nil {
		a.kill()
		h.t.Fatalf("the agent serves\n%s", h.said()[before:])
	}
	if code := exitOf(err); code != 5 {
		h.t.Fatalf("the agent ended with %v, not with exit code 5\n%s", err, h.said()[before:])
	}
	return h.said()[before:]
}

// TestFenced_StaysSoAndTakesOverOnlyWhenAsked has two hosts take a group from
// each other. The one that was replaced takes no more writes, goes on to be read,
// does not come back unasked, and when it is asked to, history and volume are one
// again although both had gone on for themselves.
func TestFenced_StaysSoAndTakesOverOnlyWhenAsked(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	h := onFolders(t, 3)
	const size = 16 << 20
	args := []string{"--volume", "name=v,path=" + filepath.Join(t.TempDir(), "v.img") + ",size=16MiB", "--rpo", "50ms"}
	first := h.start(args...)
	c := h.device("v")
	want := make([]byte, size)
	put(t, c, want, 1, 0, 1<<20, atOnce)
	h.await("all is committed", isContinuous)

	b := h.other()
	image := filepath.Join(t.TempDir(), "b.img")
	b.drc("restore", "v", image)
	bArgs := []string{"--volume", "name=v,path=" + image, "--rpo", "50ms"}
	second := b.start(append(bArgs, "--takeover")...)
	cb, wantB := b.device("v"), bytes.Clone(want)
	for i := range 20 { // more seqs than the first one has
		put(t, cb, wantB, uint64(10+i), 2<<20+i<<16, 64<<10, atOnce)
	}
	b.await("the new agent has committed", isContinuous)

	// Acknowledged by the first one before it knew.
	put(t, c, want, 50, 5<<20, 128<<10, atOnce)
	h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
	err := c.WriteAt(ctx, noise(51, 4096), 6<<20, block.WriteOptions{})
	if !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a client of the fenced agent is told %v", err)
	}
	if !bytes.Equal(seen(t, c, size), want) {
		t.Error("a read of the fenced agent's volume returns something else than was written")
	}
	must(t, c.Close())
	first.stop()
	for range 2 { // by itself it does not come back, however often it is started
		if said := h.refused(args...); !strings.Contains(said, "--takeover") {
			t.Errorf("the refusal does not say what to do:\n%s", said)
		}
	}
	put(t, cb, wantB, 60, 8<<20, 64<<10, atOnce)
	b.await("the second agent goes on", isContinuous)
	b.sameAs("v", wantB)

	// Asked to, it goes on from its own volume; what the other one wrote stays
	// history.
	b.drc("checkpoint", "of-b", "--wait")
	again := h.start(append(args, "--takeover")...)
	c = h.device("v")
	if !bytes.Equal(seen(t, c, size), want) {
		t.Fatal("after the takeover the volume holds something else than was written to it")
	}
	put(t, c, want, 70, 9<<20, 64<<10, atOnce)
	h.await("all is committed", isContinuous)
	h.sameAs("v", want)
	h.sameAs("v", wantB, "--at", "of-b")
	_ = second.cmd.Process.Signal(syscall.SIGTERM)
	<-second.done
	second.done <- nil
	// The next start needs no order.
	again.kill()
	again = h.start(args...)
	c = h.device("v")
	put(t, c, want, 71, 10<<20, 64<<10, atOnce)
	h.await("all is committed", isContinuous)
	must(t, c.Close())
	again.stop()
	h.sameAs("v", want)
}

// TestClone_OfARunningHost copies state, buffer and volume of a host whose agent
// goes on. The copy knows the epoch in office, and yet must not take the history
// on from where it believes it to be.
func TestClone_OfARunningHost(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 3)
	image := filepath.Join(t.TempDir(), "v.img")
	args := []string{"--volume", "name=v,path=" + image + ",size=16MiB", "--rpo", "50ms"}
	first := h.start(args...)
	c := h.device("v")
	want := make([]byte, 16<<20)
	put(t, c, want, 1, 0, 1<<20, atOnce)
	h.await("all is committed", isContinuous)

	must(t, first.cmd.Process.Signal(syscall.SIGSTOP))
	clone, cloneImage := h.other(), filepath.Join(t.TempDir(), "v.img")
	for from, to := range map[string]string{h.state: clone.state, image: cloneImage} {
		out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	_ = os.Remove(filepath.Join(clone.state, "nbd.sock"))
	must(t, first.cmd.Process.Signal(syscall.SIGCONT))
	cloneArgs := []string{"--volume", "name=v,path=" + cloneImage + ",size=16MiB", "--rpo", "50ms"}

	for i := range 20 {
		put(t, c, want, uint64(10+i), 2<<20+i<<16, 64<<10, atOnce)
	}
	h.await("all is committed", isContinuous)
	if said := clone.refused(cloneArgs...); !strings.Contains(said, "--takeover") {
		t.Errorf("the refusal does not say what to do:\n%s", said)
	}
	// It has not hurt the one that is at work.
	put(t, c, want, 40, 4<<20, 64<<10, atOnce)
	h.await("the first agent goes on", isContinuous)
	h.sameAs("v", want)

	// When it is ordered to take over, its volume becomes the newest history.
	b := clone.start(append(cloneArgs, "--takeover")...)
	cb := clone.device("v")
	wantB := seen(t, cb, 16<<20)
	put(t, cb, wantB, 50, 6<<20, 64<<10, atOnce)
	clone.await("all is committed", isContinuous)
	clone.sameAs("v", wantB)
	_ = c.WriteAt(context.Background(), noise(60, 4096), 7<<20, block.WriteOptions{})
	h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
	must(t, cb.Close())
	b.stop()
	clone.sameAs("v", wantB)
}
