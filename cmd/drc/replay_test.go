package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/nbd"
	"drc/internal/realpart"
	"drc/internal/state"
)

// follower is a standby of all groups of a prefix run, which ends again and again: by
// itself when it is up to date, or by a kill at any moment.
type follower struct {
	h    *host
	into string

	mu     sync.Mutex
	copies map[string]map[block.Seq][sha256.Size]byte // by volume: what the copy held at a seq
	passes int
	kills  int
}

func newFollower(h *host, into string) *follower {
	return &follower{h: h.other(), into: into, copies: map[string]map[block.Seq][sha256.Size]byte{}}
}

// run follows until stop, and once more.
func (f *follower) run(t *testing.T, rng *rand.Rand, stop <-chan struct{}) {
	for n := 0; ; n++ {
		last := false
		select {
		case <-stop:
			last = true
		default:
		}
		f.pass(t, rng, !last && n%2 == 0)
		if last || t.Failed() {
			return
		}
	}
}

// pass runs the standby once, and kills it at some moment, or lets it come to its end.
func (f *follower) pass(t *testing.T, rng *rand.Rand, kill bool) {
	var out, said bytes.Buffer
	cmd := f.h.command("replay", "--into", f.into, "--once", "--json")
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	killed := false
	if kill {
		time.Sleep(time.Duration(rng.IntN(600)) * time.Millisecond)
		killed = cmd.Process.Kill() == nil
	}
	if err := cmd.Wait(); err != nil {
		if !killed {
			t.Errorf("drc replay: %v\n%s", err, said.String())
		}
		f.kills++
		return
	}
	var copies []control.Copy
	if err := json.Unmarshal(out.Bytes(), &copies); err != nil {
		t.Error(err)
		return
	}
	f.passes++
	at := map[string]block.Seq{}
	for _, c := range copies {
		if c.State != "following" {
			continue // it has no checkpoint yet
		}
		if other, ok := at[c.Group]; ok && other != c.Seq {
			t.Errorf("the copies of group %s are at seqs %d and %d", c.Group, other, c.Seq)
		}
		at[c.Group] = c.Seq
		raw, err := os.ReadFile(c.File)
		if err != nil {
			t.Error(err)
			return
		}
		f.note(c.Volume, c.Seq, sha256.Sum256(raw))
	}
}

func (f *follower) note(volume string, seq block.Seq, sum [sha256.Size]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.copies[volume] == nil {
		f.copies[volume] = map[block.Seq][sha256.Size]byte{}
	}
	f.copies[volume][seq] = sum
}

// check compares what the copy of a volume held, if it was seen at that seq, with the
// volume's image there.
func (f *follower) check(t *testing.T, volume string, seq block.Seq, image []byte) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	sum, ok := f.copies[volume][seq]
	if !ok {
		return
	}
	if sum != sha256.Sum256(image) {
		t.Fatalf("the standby's copy of %s at seq %d is not the volume there", volume, seq)
	}
	delete(f.copies[volume], seq)
}

// checked: each that was seen was at a checkpoint.
func (f *follower) checked(t *testing.T) {
	t.Helper()
	for volume, rest := range f.copies {
		for seq := range rest {
			t.Errorf("the standby's copy of %s was at seq %d, which is no checkpoint", volume, seq)
		}
	}
}

// standby starts drc replay and waits until it is ready.
func (h *host) standby(args ...string) *server {
	h.t.Helper()
	s := &server{h: h, cmd: h.command(append([]string{"replay"}, args...)...), done: make(chan error, 1)}
	s.cmd.Stderr = h
	out, err := s.cmd.StdoutPipe()
	must(h.t, err)
	must(h.t, s.cmd.Start())
	lines := bufio.NewScanner(out)
	ready := false
	for !ready && lines.Scan() {
		ready = lines.Text() == "ready"
	}
	go func() {
		_, _ = io.Copy(io.Discard, out)
		s.done <- s.cmd.Wait()
	}()
	if !ready {
		h.t.Fatalf("drc replay %s: %v\n%s", strings.Join(args, " "), <-s.done, h.said())
	}
	h.t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			s.kill()
		}
	})
	return s
}

// BenchmarkStandbyLag writes 16 KiB blocks at random places of a 1 GiB volume, 50 MB/s
// for half a minute (DRC_LAG_SECONDS), with one MinIO, and says how old the standby's
// copy is meanwhile: the age of its checkpoint, and its lag behind the newest.
func BenchmarkStandbyLag(b *testing.B) {
	const blockBytes, perSecond, volumeBytes = 16 << 10, 50_000_000, 1 << 30
	seconds := 30
	if s := os.Getenv("DRC_LAG_SECONDS"); s != "" {
		var err error
		seconds, err = strconv.Atoi(s)
		must(b, err)
	}
	m := realpart.MinIO(b, 1)
	h := newRepo(b, []string{m[0].URL("drc", "p")}, m[0].Env())
	h.limit = time.Duration(seconds)*time.Second + processLimit
	dir := b.TempDir()
	for b.Loop() {
		a := h.start("--volume", fmt.Sprintf("name=data,path=%s,size=%d", filepath.Join(dir, "v"), int64(volumeBytes)), "--buffer", "path="+filepath.Join(dir, "buffer")+",size=4GiB")
		dev := h.device("data")
		standby := h.other()
		standby.limit = h.limit
		s := standby.standby("--into", filepath.Join(dir, "standby"))
		ctx := testContext(b)
		var ages, lags, behind []float64
		began := time.Now()
		rng := rand.New(rand.NewPCG(1, 2))
		done := make(chan struct{})
		go func() {
			defer close(done)
			p := make([]byte, blockBytes)
			for n := int64(0); time.Since(began) < time.Duration(seconds)*time.Second; n++ {
				for i := 0; i < len(p); i += 8 {
					binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
				}
				if err := dev.WriteAt(ctx, p, blockBytes*rng.Int64N(volumeBytes/blockBytes), block.WriteOptions{}); err != nil {
					b.Error(err)
					return
				}
				time.Sleep(time.Until(began.Add(time.Duration(n * blockBytes * int64(time.Second) / perSecond))))
			}
		}()
		warm := began.Add(5 * time.Second)
		for running := true; running; {
			select {
			case <-done:
				running = false
			case <-time.After(100 * time.Millisecond):
			}
			st, err := control.NewClient(state.StandbySocketPath(standby.state)).Status(ctx)
			must(b, err)
			if len(st.Copies) == 0 || st.Copies[0].State != "following" || time.Now().Before(warm) {
				continue
			}
			at, err := time.Parse(time.RFC3339Nano, st.Copies[0].Time)
			must(b, err)
			ages = append(ages, time.Since(at).Seconds())
			lags = append(lags, st.Copies[0].LagSeconds)
			behind = append(behind, h.status().Groups[0].LagSeconds)
		}
		must(b, dev.Close())
		s.stop()
		a.stop()
		for name, all := range map[string][]float64{"age": ages, "lag": lags, "agent-lag": behind} {
			slices.Sort(all)
			if len(all) == 0 {
				b.Fatal("the standby never followed")
			}
			b.ReportMetric(all[len(all)/2], name+"-p50-s")
			b.ReportMetric(all[len(all)*99/100], name+"-p99-s")
		}
	}
}

// A standby follows over a takeover, with one store of three away for a while and
// itself killed now and then; and the host that was replaced becomes a standby of the
// new one with the volume that it has: its own writes that were not committed stay in
// its buffer, and only what differs is fetched.
func TestReplay_OverATakeover(t *testing.T) {
	t.Parallel()
	const size = 48 << 20
	stores := realpart.MinIO(t, 3)
	var urls []string
	for _, m := range stores {
		urls = append(urls, m.URL("drc", "p"))
	}
	h := newRepo(t, urls, stores[0].Env())
	dir := t.TempDir()
	image := filepath.Join(dir, "v.img")
	args := []string{"--volume", "name=v,path=" + image + ",size=48MiB", "--rpo", "100ms"}
	first := h.start(args...)
	c := h.device("v")
	put(t, c, make([]byte, size), 3, size*3/4, size/4, atOnce) // something that both hosts have
	w := &stamper{n: size / stampedBytes / 2}
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var busy sync.WaitGroup
	busy.Go(func() { w.run(ctx, c) })
	h.await("something is committed", func(s control.Status) bool { return s.Groups[0].Committed > 100 })

	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	standby, into := h.other(), filepath.Join(dir, "standby")
	follow := func() *server { return standby.standby("v", "--into", into) }
	s := follow()
	standby.awaitCopy("the standby follows", func(x control.Copy) bool { return x.State == "following" })
	stores[1].Stop()
	// What a client sees of a copy that moves is one checkpoint: a prefix.
	for range 6 {
		time.Sleep(time.Duration(rng.IntN(700)) * time.Millisecond)
		s.kill()
		s = follow()
		view, err := nbd.Dial(ctx, "unix:"+filepath.Join(standby.state, "replay.sock"), "v")
		must(t, err)
		w.prefix(t, "a view", seen(t, view, size))
		must(t, view.Close())
	}
	at := standby.copyOf().Seq
	standby.awaitCopy("the standby goes on while a store is away", func(x control.Copy) bool { return x.Seq > at+100 })
	must(t, stores[1].Start())

	b := h.other()
	b.drc("restore", "v", image+".b")
	second := b.start("--volume", "name=v,path="+image+".b", "--rpo", "100ms", "--takeover")
	h.await("the first agent is fenced", func(s control.Status) bool { return s.Groups[0].State == "fenced" })
	busy.Wait()
	want := seen(t, b.device("v"), size)
	put(t, b.device("v"), want, 7, size/2+4096, 1<<20, atOnce)
	// Where the first agent has logged something since the restore, the volume is compared.
	b.await("the second agent protects the volume", isContinuous)
	b.drc("checkpoint", "after", "--wait")
	end := b.status().Groups[0].Committed
	standby.awaitCopy("the standby has what the second agent wrote", func(x control.Copy) bool { return x.Seq >= end })
	s.stop()
	same := func(file string) {
		t.Helper()
		raw, err := os.ReadFile(file)
		must(t, err)
		if !bytes.Equal(raw, want) {
			t.Errorf("%s is not the volume", file)
		}
	}
	same(filepath.Join(into, "v.raw"))

	// The way back: the file is in use until its agent ends.
	must(t, c.Close())
	returning := []string{"replay", "v", "--into", filepath.Join(dir, "back"), "--copy", "v=" + image, "--adopt", "--once", "--json"}
	if err := h.command(returning...).Run(); exitOf(err) != exitLocked {
		t.Errorf("a volume that an agent protects became a copy: %v", err)
	}
	first.stop()
	kept := h.drc("inspect", h.state)
	h.drc(returning...)
	same(image)
	if again := h.drc("inspect", h.state); again != kept {
		t.Errorf("what the first agent keeps was\n%s\nand is\n%s", kept, again)
	}
	second.stop()
}

// copyOf is the state of the standby's only copy.
func (h *host) copyOf() control.Copy {
	h.t.Helper()
	s, err := control.NewClient(state.StandbySocketPath(h.state)).Status(testContext(h.t))
	must(h.t, err)
	return s.Copies[0]
}

// awaitCopy waits until the standby's only copy is as wanted.
func (h *host) awaitCopy(what string, ok func(control.Copy) bool) {
	h.t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	for {
		x := h.copyOf()
		if ok(x) {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("waited in vain until %s: %+v\n%s", what, x, h.said())
		}
		time.Sleep(50 * time.Millisecond)
	}
}
