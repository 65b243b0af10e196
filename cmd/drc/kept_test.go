package main

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/control"
)

// kept is what drc inspect of a folder shows.
func (h *host) kept(dir string) (k control.Kept) {
	h.t.Helper()
	must(h.t, json.Unmarshal([]byte(h.drc("inspect", dir, "--json")), &k))
	return k
}

// listsExactly checks what is kept of the only volume.
func listsExactly(t testing.TB, what string, k control.Kept, after block.Seq, writes int64, regions ...control.KeptRegion) {
	t.Helper()
	if len(k.Groups) != 1 || len(k.Groups[0].Volumes) != 1 {
		t.Fatalf("%s: %+v", what, k)
	}
	g := k.Groups[0]
	v := g.Volumes[0]
	if g.Name != "v" || v.Name != "v" || g.Logged != after || g.From != after+1 || g.To != after+block.Seq(writes) || g.Writes != writes {
		t.Errorf("%s: %d writes from %s to %s behind %s, want %d behind %s: %+v", what, g.Writes, g.From, g.To, g.Logged, writes, after, g)
	}
	if !slices.Equal(v.Regions, regions) {
		t.Errorf("%s: the regions are %v, want %v", what, v.Regions, regions)
	}
	if g.Oldest == "" || v.Oldest == "" || g.Oldest > g.Newest && g.Newest != "" {
		t.Errorf("%s: the times are %q to %q", what, g.Oldest, g.Newest)
	}
}

// TestInspect_WhatAFencedAgentKeeps has an agent take writes when another one is
// in office already. None of them can become history, and each is listed: by the
// fenced agent, and when it is stopped from its state folder and from its buffer.
func TestInspect_WhatAFencedAgentKeeps(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	h := onFolders(t, 3)
	image := filepath.Join(t.TempDir(), "v.img")
	args := []string{"--volume", "name=v,path=" + image + ",size=16MiB", "--rpo", "12s"}
	first := h.start(args...)
	c := h.device("v")
	want := make([]byte, 16<<20)
	put(t, c, want, 1, 0, 1<<20, atOnce)
	h.drc("checkpoint", "before", "--wait")
	h.await("all is committed", isContinuous)
	before := h.status().Groups[0].Captured

	b := h.other()
	b.drc("restore", "v", image+".b")
	second := b.start("--volume", "name=v,path="+image+".b", "--rpo", "50ms", "--takeover")
	cb, wantB := b.device("v"), bytes.Clone(want)
	put(t, cb, wantB, 2, 2<<20, 64<<10, atOnce)
	b.await("the new agent has committed", isContinuous)

	writes := h.status().Groups[0].Captured
	put(t, c, want, 10, 4<<20, 128<<10, block.WriteOptions{})
	put(t, c, want, 11, 4<<20+128<<10, 4096, block.WriteOptions{FUA: true}) // next to it
	put(t, c, want, 12, 9<<20, 512, block.WriteOptions{})
	put(t, c, want, 13, 4<<20+64<<10, 64<<10, block.WriteOptions{}) // again
	must(t, c.Zero(ctx, block.Extent{Off: 1 << 20, Len: 1 << 20}, block.ZeroOptions{}))
	clear(want[1<<20 : 2<<20])
	must(t, c.Flush(ctx))
	n := int64(h.status().Groups[0].Captured - writes)
	if writes != before || n < 5 {
		t.Fatalf("%d writes behind %s, which was %s", n, writes, before)
	}
	regions := []control.KeptRegion{{Off: 1 << 20, Len: 1 << 20}, {Off: 4 << 20, Len: 128<<10 + 4096}, {Off: 9 << 20, Len: 512}}
	listsExactly(t, "before it knows", h.kept(h.state), before, n, regions...)
	h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
	k := h.kept(h.state)
	listsExactly(t, "fenced", k, before, n, regions...)
	if !k.Running || !k.Groups[0].Fenced || !strings.Contains(k.Groups[0].Advice, "--takeover") {
		t.Errorf("%+v", k)
	}
	must(t, c.Close())
	first.stop()
	tree := filesOf(t, h.state)
	listsExactly(t, "stopped", h.kept(h.state), before, n, regions...)
	listsExactly(t, "of the buffer", h.kept(filepath.Join(h.state, "buffer")), before, n, regions...)
	sameTree(t, tree, filesOf(t, h.state))
	text := h.drc("inspect", h.state)
	if !strings.Contains(text, "at 4194304") || !strings.Contains(text, "135168 bytes") {
		t.Errorf("as text: %s", text)
	}
	second.stop()
	h.sameAs("v", wantB) // of all that nothing is history
}

// TestInspect_BatchesThatWait lists what is in sealed batches only, after a kill,
// and the next agent brings just that to the stores.
func TestInspect_BatchesThatWait(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	args := []string{"--volume", "name=v,path=" + path + ",size=16MiB,when-full=hold", "--rpo", "50ms", "--buffer", "path=" + filepath.Join(h.state, "buffer") + ",size=8MiB"}
	a := h.start(args...)
	c := h.device("v")
	want := make([]byte, 16<<20)
	put(t, c, want, 1, 0, 1<<20, atOnce)
	h.await("all is committed", isContinuous)
	before := h.status().Groups[0].Captured
	back := unreachable(t, h.urls)
	for i := range 48 { // compressible: batches take less than the journal
		p := bytes.Repeat(noise(uint64(100+i), 4096), 64)
		off := int64(1+i) << 18
		must(t, c.WriteAt(ctx, p, off, block.WriteOptions{}))
		copy(want[off:], p)
	}
	h.await("what was written is sealed", func(s control.Status) bool { return s.Groups[0].Sealed == s.Groups[0].Captured })
	n := int64(h.status().Groups[0].Captured - before)
	a.kill()
	k := h.kept(h.state)
	listsExactly(t, "killed", k, before, n, control.KeptRegion{Off: 1 << 18, Len: 48 << 18})
	only := 0
	for _, b := range k.Groups[0].Batches {
		if !b.InJournal && !b.Logged && b.SafeInBuffer && b.LastError == "" {
			only++
		}
	}
	if only == 0 {
		t.Errorf("there is no batch whose writes the journal lacks: %+v", k.Groups[0].Batches)
	}
	back()
	a = h.start(args...)
	h.await("all is committed", isContinuous)
	a.stop()
	h.sameAs("v", want)
	if g := h.kept(h.state).Groups[0]; g.Writes != 0 || len(g.Batches) != 0 || g.From != 0 {
		t.Errorf("all is committed, and kept is %+v", g)
	}
}
