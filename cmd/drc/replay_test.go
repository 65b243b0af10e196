package main

import (
	"bufio"
	"bytes"
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
