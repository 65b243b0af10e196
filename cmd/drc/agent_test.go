package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/nbd"
	"drc/internal/realpart"
)

// device is a client's connection to a volume.
func (h *host) device(volume string) *nbd.Client {
	h.t.Helper()
	c, err := nbd.Dial(context.Background(), "unix:"+h.socket(), volume)
	if err != nil {
		h.t.Fatalf("connect to volume %s: %v\n%s", volume, err, h.said())
	}
	h.t.Cleanup(func() { _ = c.Close() })
	return c
}

func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	_, _ = r.Read(p)
	return p
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await waits until the agent's status is as wanted.
func (h *host) await(what string, ok func(s control.Status) bool) {
	h.t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	for {
		s := h.status()
		if ok(s) {
			return
		}
		if time.Now().After(deadline) {
			raw, _ := json.MarshalIndent(s, "", " ")
			h.t.Fatalf("waited in vain until %s:\n%s\n%s", what, raw, h.said())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func isContinuous(s control.Status) bool {
	return s.State == "continuous" && s.Groups[0].Committed == s.Groups[0].Captured
}

// restored restores a volume on another host and returns its content.
func (h *host) restored(volume string, args ...string) []byte {
	h.t.Helper()
	target := filepath.Join(h.t.TempDir(), "restored")
	h.other().drc(append([]string{"restore", volume, target}, args...)...)
	raw, err := os.ReadFile(target)
	must(h.t, err)
	return raw
}

func (h *host) sameAs(volume string, want []byte, args ...string) {
	h.t.Helper()
	if got := h.restored(volume, args...); !bytes.Equal(got, want) {
		first, last := -1, 0
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				if first < 0 {
					first = i
				}
				last = i
			}
		}
		h.t.Fatalf("what was restored of %s %v differs from what was written (%d and %d bytes; from %d to %d)", volume, args, len(got), len(want), first, last)
	}
}

// storeFiles are the objects in folders, by their path.
func storeFiles(t testing.TB, urls []string, part string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, u := range urls {
		root := strings.TrimPrefix(u, "file://")
		must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.Contains(path, part) {
				return err
			}
			raw, err := os.ReadFile(path)
			out[path] = raw
			return err
		}))
	}
	return out
}

func TestInitialSync_WhileClientsWrite(t *testing.T) {
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	want := noise(1, 48<<20)
	clear(want[10<<20 : 22<<20]) // zeroes that are stored
	must(t, os.WriteFile(path, want, 0o600))
	must(t, os.Truncate(path, 64<<20)) // and a hole
	want = append(want, make([]byte, 16<<20)...)
	a := h.start("--volume", "name=v,path="+path, "--rpo", "50ms", "--bandwidth", "20MiB")
	if s := h.status(); s.State != "initial-sync" {
		t.Errorf("state is %s, not initial-sync", s.State)
	}
	if n := h.history("v").Branches[0].Checkpoints; n != 0 {
		t.Errorf("there are %d checkpoints before the initial sync has ended", n)
	}
	c := h.device("v")
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 2000 {
		off := rng.Int64N(int64(len(want)-65536)) / 4096 * 4096
		n := 4096 * (1 + rng.IntN(8))
		if i%7 == 0 {
			must(t, c.Zero(context.Background(), block.Extent{Off: off, Len: int64(n)}, block.ZeroOptions{}))
			clear(want[off : off+int64(n)])
			continue
		}
		put(t, c, want, uint64(i)+10, int(off), n, block.WriteOptions{})
	}
	must(t, c.Flush(context.Background()))
	h.await("the initial sync has ended", isContinuous)
	h.sameAs("v", want)
	a.stop()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the volume's file is not what its clients saw (%v)", err)
	}
	hist := h.history("v")
	if len(hist.Gaps) != 1 || hist.Gaps[0].Open || hist.Gaps[0].Reason != "initial sync" {
		t.Errorf("the history shows %+v, not one closed gap for the initial sync", hist.Gaps)
	}
}

func TestInitialSync_KilledAndResumed(t *testing.T) {
	h := onFolders(t, 1)
	path := filepath.Join(t.TempDir(), "v.img")
	want := noise(2, 96<<20)
	must(t, os.WriteFile(path, want, 0o600))
	args := []string{"--volume", "name=v,path=" + path, "--rpo", "50ms", "--bandwidth", "60MiB"}
	least := int64(len(want))
	for range 3 {
		a := h.start(args...)
		c := h.device("v")
		put(t, c, want, uint64(least), 1<<20, 8192, atOnce)
		h.await("the initial sync has advanced", func(s control.Status) bool {
			return s.Groups[0].Volumes[0].ResyncRemainingBytes < least-16<<20 || s.State == "continuous"
		})
		least = h.status().Groups[0].Volumes[0].ResyncRemainingBytes
		a.kill()
	}
	a := h.start(args[:4]...)
	h.await("the initial sync has ended", isContinuous)
	h.sameAs("v", want)
	a.stop()
}

func TestForeignChange_GapAndOnlyTheDifference(t *testing.T) {
	v := onSparse(t, 32<<20)
	for off := 0; off < 20<<20; off += 1 << 20 {
		v.put(uint64(off>>20)+3, off, 1<<20, block.WriteOptions{})
	}
	must(t, v.dev.Flush(context.Background()))
	v.await("all is committed", isContinuous)
	v.drc("checkpoint", "ours", "--wait")
	must(t, v.dev.Close())
	v.agent.stop()
	ours := bytes.Clone(v.want)
	before := len(storeFiles(t, v.urls, "/segments/"))

	// Somebody writes to the file without DRC.
	putBehind(t, v.path, v.want, 4, 5<<20, 300<<10)

	v.again()
	v.await("the volume has been compared", isContinuous)
	v.isWhole()
	v.sameAs("v", ours, "--at", "ours")
	after := storeFiles(t, v.urls, "/segments/")
	if len(after)-before > 20 {
		t.Errorf("%d shards were added for 300 KiB of difference", len(after)-before)
	}
	gaps := v.history("v").Gaps
	if len(gaps) != 1 || gaps[0].Open || !strings.Contains(gaps[0].Reason, "without DRC") {
		t.Errorf("the history shows %+v, not one closed gap", gaps)
	}
	must(t, v.dev.Close())
	v.agent.stop()

	// A clean stop and an untouched file: nothing is compared, nothing is added.
	v.again()
	if s := v.status(); s.State != "continuous" {
		t.Errorf("after a clean stop the state is %s", s.State)
	}
	v.agent.stop()
	if n := len(v.history("v").Gaps); n != 1 {
		t.Errorf("a clean restart left %d gaps", n)
	}
}

// Somebody puts back what was there before the last writes, which are on their
// way to the stores: it equals what the stores have, and not what they are about
// to have.
func TestForeignChange_BackToWhatTheStoresHave(t *testing.T) {
	v := onSparse(t, 32<<20)
	for i := range 5 {
		v.put(uint64(i)+1, i<<20, 1<<20, block.WriteOptions{})
	}
	must(t, v.dev.Flush(context.Background()))
	v.await("all is committed", isContinuous)
	v.agent.stop()
	older := bytes.Clone(v.want)

	quick := v.args
	v.args = append(slices.Clone(quick), "--rpo", "1h") // nothing more goes to the stores
	v.again()
	for i := range 5 {
		v.put(uint64(i)+6, i<<20, 1<<20, atOnce)
	}
	v.agent.kill()
	time.Sleep(1100 * time.Millisecond) // the sign of life is that far ahead
	for i := range 5 {
		putBehind(t, v.path, v.want, uint64(i)+1, i<<20, 1<<20)
	}
	if !bytes.Equal(v.want, older) {
		t.Fatal("the test does not put back what it should")
	}
	v.args = quick
	v.again()
	v.await("the volume has been compared", isContinuous)
	v.isWhole()
}

func TestStores_LearnNothingAndGetNothingTwice(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 2)
	a := h.start("--volume", "name=secret-volume,path="+filepath.Join(t.TempDir(), "v")+",size=64MiB,group=secret-group", "--rpo", "50ms")
	c := h.device("secret-volume")
	pattern := bytes.Repeat([]byte("PLAINTEXT-PATTERN"), 300000)[:4<<20]
	write := func(off int64, p []byte) {
		t.Helper()
		must(t, c.WriteAt(context.Background(), p, off, block.WriteOptions{FUA: true}))
		h.await("all is committed", isContinuous)
	}
	write(0, pattern)
	write(8<<20, noise(5, 4<<20))
	write(4096*1000, []byte(strings.Repeat("PLAINTEXT-PATTERN", 300))[:4096]) // small: travels inline
	h.drc("checkpoint", "secret-name", "--wait")
	segments := len(storeFiles(t, h.urls, "/segments/"))
	write(0, pattern)                  // unchanged
	write(32<<20, pattern)             // elsewhere, the same
	write(40<<20, make([]byte, 4<<20)) // zeroes
	must(t, c.Zero(context.Background(), block.Extent{Off: 48 << 20, Len: 8 << 20}, block.ZeroOptions{}))
	h.await("all is committed", isContinuous)
	if n := len(storeFiles(t, h.urls, "/segments/")); n != segments {
		t.Errorf("unchanged data and zeroes made %d new shards", n-segments)
	}
	a.stop()
	for name, raw := range storeFiles(t, h.urls, "/") {
		for _, word := range []string{"PLAINTEXT", "secret-volume", "secret-group", "secret-name"} {
			if bytes.Contains(raw, []byte(word)) || strings.Contains(name, word) && !strings.Contains(t.TempDir(), word) {
				t.Errorf("%s shows %q", name, word)
			}
		}
	}
}

func TestSecondAgent_RefusedThenTakesOver(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 3)
	args := func() []string {
		return []string{"--volume", "name=v,path=" + filepath.Join(t.TempDir(), "v.img") + ",size=16MiB", "--rpo", "50ms"}
	}
	first := h.start(args()...)
	c := h.device("v")
	want := make([]byte, 16<<20)
	put(t, c, want, 6, 0, 1<<20, atOnce)
	h.await("all is committed", isContinuous)

	b := h.other()
	image := filepath.Join(t.TempDir(), "b.img")
	b.drc("restore", "v", image)
	bArgs := []string{"--volume", "name=v,path=" + image, "--rpo", "50ms"}
	_, err := b.tryStart(bArgs...)
	if code := exitOf(err); code != 5 {
		t.Fatalf("a second agent ended with %v (exit %d), not with exit code 5\n%s", err, code, b.said())
	}
	if !strings.Contains(b.said(), "--takeover") {
		t.Errorf("the refusal does not say what to do:\n%s", b.said())
	}
	segments := len(storeFiles(t, h.urls, "/segments/"))

	second := b.start(append(bArgs, "--takeover")...)
	cb := b.device("v")
	put(t, cb, want, 7, 2<<20, 64<<10, atOnce)
	b.await("the new agent has committed", isContinuous)
	if n := len(storeFiles(t, h.urls, "/segments/")) - segments; n > 6 {
		t.Errorf("going on from what was restored put %d new shards: the volume was uploaded again", n)
	}

	// The first one can commit nothing any more, and says so.
	_ = c.WriteAt(context.Background(), noise(8, 4096), 3<<20, block.WriteOptions{})
	h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
	if err := c.WriteAt(context.Background(), noise(8, 4096), 3<<20, block.WriteOptions{}); err == nil {
		t.Error("a fenced agent still takes writes")
	}
	first.stop()
	b.sameAs("v", want)
	second.stop()
	b.sameAs("v", want)
}

func TestFullBuffer_HoldsWritersAndGoesOn(t *testing.T) {
	t.Parallel()
	m := realpart.MinIO(t, 1)[0]
	h := newRepo(t, []string{m.URL("drc", "p")}, m.Env())
	dir := t.TempDir()
	a := h.start("--volume", "name=v,path="+filepath.Join(dir, "v.img")+",size=512MiB,when-full=hold", "--rpo", "50ms",
		"--buffer", "path="+filepath.Join(dir, "buffer")+",size=64MiB", "--drain", "stores")
	m.Kill()
	c := h.device("v")
	want := noise(9, 192<<20)
	var written atomic.Int64
	done := make(chan error, 1)
	go func() {
		for off := 0; off < len(want); off += 1 << 20 {
			if err := c.WriteAt(context.Background(), want[off:off+1<<20], int64(off), block.WriteOptions{}); err != nil {
				done <- err
				return
			}
			written.Add(1 << 20)
		}
		done <- c.Flush(context.Background())
	}()
	h.await("writers are held back", func(s control.Status) bool { return s.State == "stalled" && s.Groups[0].WritersWaiting })
	if n := written.Load(); n == 0 || n >= int64(len(want)) {
		t.Errorf("%d bytes were taken by a buffer of 64 MiB", n)
	}
	p := make([]byte, 1<<20)
	if s := h.status(); s.Stores[0].Waiting.Objects == 0 || s.Groups[0].Waiting.Bytes == 0 || s.Stores[0].State != "down" {
		t.Errorf("status does not show what waits for the store: %+v", s)
	}
	must(t, c.ReadAt(context.Background(), p, 0)) // reads go on
	if !bytes.Equal(p, want[:1<<20]) {
		t.Error("a read while the buffer is full returns something else than was written")
	}
	must(t, m.Start())
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(90 * time.Second):
		t.Fatalf("the writers were not let go after the store had come back:\n%s", h.said())
	}
	h.await("all is committed", isContinuous)
	a.stop()
	h.sameAs("v", append(bytes.Clone(want), make([]byte, 320<<20)...))
}

func TestStoreDown_DegradedThenHealed(t *testing.T) {
	t.Parallel()
	ms := realpart.MinIO(t, 3)
	var urls []string
	for _, m := range ms {
		urls = append(urls, m.URL("drc", "p"))
	}
	h := newRepo(t, urls, ms[0].Env())
	a := h.start("--volume", "name=v,path="+filepath.Join(t.TempDir(), "v.img")+",size=32MiB", "--rpo", "50ms")
	c := h.device("v")
	want := make([]byte, 32<<20)
	write := func(seed uint64, off int) { put(t, c, want, seed, off, 2<<20, atOnce) }
	write(1, 0)
	h.await("all is committed", isContinuous)
	ms[1].Kill()
	write(2, 4<<20)
	h.await("a degraded entry is committed", isContinuous)
	s := h.status()
	if s.Stores[1].State != "down" || s.Stores[1].LastError == "" || s.Stores[1].Since == "" {
		t.Errorf("status does not show the store that is down: %+v", s.Stores[1])
	}
	if w := s.Stores[1].Waiting; w.Objects == 0 || w.Bytes < 256<<10 || w != s.Groups[0].Waiting || s.Stores[0].Waiting.Objects > 0 {
		t.Errorf("2 MiB were written, of which a third belongs on the store that is down, and status shows waiting: %+v of %+v", w, s.Groups[0].Waiting)
	}
	h.sameAs("v", want) // from the other two
	must(t, ms[1].Start())
	write(3, 8<<20)
	// The buffer keeps the shards of a store until it has them.
	h.await("the store is up and has everything", func(s control.Status) bool {
		kept, err := filepath.Glob(filepath.Join(h.state, "buffer", "spool", "*", "*"))
		must(t, err)
		return isContinuous(s) && s.Stores[1].State == "up" && len(kept) == 0 && s.Stores[1].Waiting.Objects == 0 && !s.Groups[0].Exposed
	})
	a.stop()
	// Any other store may go now.
	ms[0].Kill()
	h.sameAs("v", want)
	must(t, ms[0].Start())
	ms[2].Kill()
	h.sameAs("v", want)
}

// exitOf is the exit code in an error of a process.
func exitOf(err error) int {
	type coder interface{ ExitCode() int }
	if c, ok := err.(coder); ok {
		return c.ExitCode()
	}
	return -1
}

func TestIdleAgent_MakesNoRequest(t *testing.T) {
	t.Parallel()
	m := realpart.MinIO(t, 1)[0]
	target, err := url.Parse(m.Endpoint())
	must(t, err)
	var requests atomic.Int64
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host // the Host header stays: it is signed
	}}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	_ = m.URL("drc", "p") // makes the bucket
	h := newRepo(t, []string{"s3://drc/p?endpoint=" + front.URL + "&region=us-east-1"}, m.Env())
	a := h.start("--volume", "name=v,path="+filepath.Join(t.TempDir(), "v.img")+",size=16MiB", "--rpo", "100ms")
	c := h.device("v")
	must(t, c.WriteAt(context.Background(), noise(1, 4096), 0, block.WriteOptions{FUA: true}))
	before := requests.Load()
	h.await("all is committed", isContinuous)
	if n := requests.Load() - before; n > 4 {
		t.Errorf("one small write cost %d requests", n)
	}
	settled := requests.Load()
	ticks := cpuTicks(t, a.cmd.Process.Pid)
	time.Sleep(time.Minute) // what is tested is that nothing happens in it
	if n := requests.Load() - settled; n != 0 {
		t.Errorf("an idle agent made %d requests in a minute", n)
	}
	if n := cpuTicks(t, a.cmd.Process.Pid) - ticks; n > 100 {
		t.Errorf("an idle agent used %d ticks of CPU in a minute", n)
	}
	a.stop()
}

// cpuTicks is the CPU time that a process has used, in hundredths of a second.
func cpuTicks(t *testing.T, pid int) (n int) {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	for _, f := range fields[11:13] {
		var v int
		if _, err := fmt.Sscan(f, &v); err != nil {
			t.Fatal(err)
		}
		n += v
	}
	return n
}

func TestAgentKey_WritesAndCannotRead(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	key := filepath.Join(t.TempDir(), "agent.key")
	h.drc("key", "agent", key)
	w := h.other()
	w.env = append(w.env, "DRC_IDENTITY=", "DRC_AGENT_KEY="+key)
	path := filepath.Join(t.TempDir(), "v.img")
	args := []string{"--volume", "name=v,path=" + path + ",size=16MiB", "--rpo", "50ms"}
	want := make([]byte, 16<<20)
	for i := range 3 { // also over restarts, a killed one among them
		a := w.start(args...)
		c := w.device("v")
		put(t, c, want, uint64(i), i<<20, 300<<10, atOnce)
		w.await("all is committed", isContinuous)
		_ = c.Close()
		if i == 1 {
			a.kill()
		} else {
			a.stop()
		}
	}
	h.sameAs("v", want)
	cmd := w.command("restore", "v", filepath.Join(t.TempDir(), "r"))
	out, err := cmd.CombinedOutput()
	if exitOf(err) != 2 || !strings.Contains(string(out), "identity") {
		t.Errorf("restore with an agent key: %v\n%s", err, out)
	}
	// It can compare a volume that was changed without DRC.
	putBehind(t, path, want, 99, 7<<20, 8192)
	a := w.start(args...)
	w.await("the volume has been compared", isContinuous)
	a.stop()
	h.sameAs("v", want)
}

// TestAgent_OutlivesItsReaders: what reads the agent's output and log may die.
func TestAgent_OutlivesItsReaders(t *testing.T) {
	t.Parallel()
	h := onFolders(t, 1)
	cmd := h.command("agent", "--log-level", "debug", "--volume", "name=v,path="+filepath.Join(t.TempDir(), "v.img")+",size=1MiB")
	out, err := cmd.StdoutPipe()
	must(t, err)
	log, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill() }()
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "ready" {
	}
	must(t, out.Close())
	must(t, log.Close())
	for i := range 3 { // a client that just goes away is logged
		c := h.device("v")
		must(t, c.WriteAt(context.Background(), noise(uint64(i), 4096), 0, block.WriteOptions{FUA: true}))
		raw, err := net.Dial("unix", h.socket())
		must(t, err)
		_, _ = raw.Write(noise(1, 4096))
		_, _ = io.Copy(io.Discard, raw)
		must(t, raw.Close())
		must(t, c.Close())
	}
	h.drc("checkpoint", "one", "--wait")
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	must(t, cmd.Wait())
}
