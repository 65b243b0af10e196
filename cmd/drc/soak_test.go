package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/nbd"
	"drc/internal/realpart"
	"drc/restorer"
)

// The soak: real agents, three MinIO behind toxiproxy, fio and stamped writers,
// a buffer of 64 MiB on a small file system, a volume on another one that is
// loop-mounted. In rounds: faults under load for some seconds; then everything
// is mended, and it is checked that
//
//   - the agent gets continuous by itself;
//   - the newest checkpoint is what the clients were told, and what they read;
//   - checkpoints picked at random are prefixes, and have what was flushed;
//   - a group that holds its writers has no gap, and another one only gaps
//     because of its buffer;
//   - after a stop in order the volumes' files are the newest checkpoint;
//   - fio found nothing wrong.
const (
	soakVolume    = 64 << 20 // of bulk
	soakFio       = 16 << 20
	soakPick      = 4 // checkpoints of each group and round
	soakStopLimit = 90 * time.Second
)

// soak is one run.
type soak struct {
	*host
	t       *testing.T
	rng     *rand.Rand
	stores  []*realpart.Instance
	wires   []*realpart.Wire
	dir     string // of volumes
	small   string // file system of the buffer
	disk    string // file system of bulk
	args    []string
	agent   *agent
	groups  []*prefixRun // of the stamped writers; the last one holds
	bulk    *bulk
	lives   atomic.Int64 // odd while the agent is being ended and started again
	history []string     // what was done in this round

	rounds, kills, stops, storeKills, wireFaults, fulls, bitmaps, fioRuns, commits, checked int
}

// TestSoak runs for DRC_SOAK_MINUTES (3) with the seed DRC_SEED. The seed decides
// what is done; the order of processes is not repeatable. What the agents said
// in a run that failed goes into the file DRC_SOAK_LOG.
func TestSoak(t *testing.T) {
	needRoot(t)
	minutes := 3.0
	if text := os.Getenv("DRC_SOAK_MINUTES"); text != "" {
		var err error
		if minutes, err = strconv.ParseFloat(text, 64); err != nil {
			t.Fatalf("DRC_SOAK_MINUTES: %v", err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("DRC_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("DRC_SEED: %v", err)
		}
	}
	limit := time.Duration(minutes * float64(time.Minute))
	s := newSoak(t, seed, limit)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("failed with DRC_SEED=%d in round %d, after: %s", seed, s.rounds, strings.Join(s.history, ", "))
			said := s.said()
			if file := os.Getenv("DRC_SOAK_LOG"); file != "" {
				must(t, os.WriteFile(file, []byte(said), 0o600))
			}
			t.Logf("agents said at last:\n%s", said[max(0, len(said)-20000):])
		}
		t.Logf("seed %d: %d rounds, agent killed %d times and stopped %d times, %d stores killed, %d wire faults, %d full file systems, %d times in bitmap mode, %d fio runs verified, %d commits, %d checkpoints checked",
			seed, s.rounds, s.kills, s.stops, s.storeKills, s.wireFaults, s.fulls, s.bitmaps, s.fioRuns, s.commits, s.checked)
	})
	// At least one round of each kind, however short the time is.
	for end := time.Now().Add(limit); s.rounds < len(soakRounds) || time.Now().Before(end); {
		s.round()
	}
}

func newSoak(t *testing.T, seed uint64, limit time.Duration) *soak {
	s := &soak{t: t, rng: rand.New(rand.NewPCG(seed, 11)), stores: realpart.MinIO(t, 3), dir: t.TempDir(), small: smallFileSystem(t, "112m"), disk: t.TempDir()}
	var urls []string
	for _, m := range s.stores {
		server := strings.TrimPrefix(m.Endpoint(), "http://")
		w := realpart.NewWire(t, server)
		s.wires = append(s.wires, w)
		urls = append(urls, strings.Replace(m.URL("drc", "p"), server, w.Address(), 1))
	}
	s.stores[0].SetEnv(t)
	s.host = newRepo(t, urls, nil)
	s.limit = limit + 20*time.Minute
	image := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, 96<<20))
	shell(t, "mkfs.ext4", "-q", "-F", image)
	shell(t, "mount", "-o", "loop", image, s.disk)
	t.Cleanup(func() { _ = unix.Unmount(s.disk, unix.MNT_DETACH) })

	s.args = []string{"--rpo", "100ms", "--log-level", "warn", "--buffer", "path=" + filepath.Join(s.small, "buffer") + ",size=64MiB"}
	volume := func(name, path string, bytes int64, rest string) {
		s.args = append(s.args, "--volume", fmt.Sprintf("name=%s,path=%s,size=%d,%s", name, path, bytes, rest))
	}
	for i, g := range []string{"p", "k"} {
		r := &prefixRun{h: s.host, group: g, volumes: []string{g + "a", g + "b"}, perVol: 2, gaps: g == "p"}
		full := []string{"bitmap", "hold"}[i]
		for _, v := range r.volumes {
			volume(v, s.path(v), r.volumeBytes(), "group="+g+",when-full="+full)
		}
		for i := range len(r.volumes) * r.perVol {
			r.writers = append(r.writers, &writer{id: i, volume: i / r.perVol})
		}
		s.groups = append(s.groups, r)
	}
	volume("bulk", s.path("bulk"), soakVolume, "group=b")
	volume("fio", s.path("fio"), soakFio, "group=b")
	s.bulk = &bulk{h: s.host, blocks: soakVolume / stampBytes}
	s.agent = s.start(s.args...)
	return s
}

func (s *soak) path(volume string) string {
	if volume == "bulk" {
		return filepath.Join(s.disk, volume)
	}
	return filepath.Join(s.dir, volume)
}

// soakRounds are what may happen in a round. Each is done once before any is
// done a second time; its steps are seeded.
var soakRounds = []func(s *soak){
	func(s *soak) { // the agent dies again and again
		for range 2 + s.rng.IntN(3) {
			s.rest(1500)
			s.restart()
		}
	},
	func(s *soak) { // stores die, and the agent too
		for range 2 + s.rng.IntN(3) {
			i := s.rng.IntN(len(s.stores))
			s.did("store %d killed", i)
			s.stores[i].Kill()
			s.storeKills++
			s.rest(1500)
			if s.rng.IntN(2) == 0 {
				s.restart()
			}
			if s.rng.IntN(3) > 0 {
				s.did("store %d started", i)
				must(s.t, s.stores[i].Start())
			}
		}
	},
	func(s *soak) { // bad wires
		for range 3 + s.rng.IntN(4) {
			s.badWire(s.rng.IntN(len(s.wires)))
			s.rest(1200)
			if s.rng.IntN(4) == 0 {
				s.restart()
			}
			if s.rng.IntN(3) == 0 {
				i := s.rng.IntN(len(s.wires))
				s.did("wire %d mended", i)
				must(s.t, s.wires[i].Mend())
			}
		}
	},
	func(s *soak) { // no store, and a buffer that fills
		s.did("all wires cut")
		for _, w := range s.wires {
			w.Cut()
			s.wireFaults++
		}
		s.bulk.flood.Store(true)
		s.until("bitmap mode", 20*time.Second, func(st control.Status) bool {
			return slices.ContainsFunc(st.Groups, func(g control.Group) bool { return g.State == "bitmap" })
		})
		s.bitmaps++
		s.rest(1500)
		for range s.rng.IntN(3) {
			s.restart()
			s.rest(1500)
		}
		s.bulk.flood.Store(false)
		if s.rng.IntN(2) == 0 { // the way back is disturbed
			s.did("all wires mended")
			for _, w := range s.wires {
				must(s.t, w.Mend())
			}
			s.rest(3000)
			s.restart()
		}
	},
	func(s *soak) { // the buffer's file system is full
		free := s.full(s.small)
		s.bulk.flood.Store(s.rng.IntN(2) == 0)
		s.rest(2500)
		if s.rng.IntN(2) == 0 {
			s.restartWhileFull(free)
		}
		s.rest(500)
		free()
	},
	func(s *soak) { // a volume's file system is full
		free := s.full(s.disk)
		s.bulk.flood.Store(true)
		s.rest(2500)
		if s.rng.IntN(2) == 0 {
			s.restartWhileFull(free)
		}
		s.rest(500)
		free()
	},
}

func (s *soak) did(format string, args ...any) {
	s.history = append(s.history, fmt.Sprintf(format, args...))
}

// rest lets some time pass under load.
func (s *soak) rest(millis int) {
	time.Sleep(time.Duration(millis/4+s.rng.IntN(millis)) * time.Millisecond)
}

// until waits for a state that has to come.
func (s *soak) until(what string, limit time.Duration, ok func(control.Status) bool) {
	for end := time.Now().Add(limit); !ok(s.status()); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.did("no %s", what)
			return
		}
	}
	s.did("%s", what)
}

// restart ends the agent, usually badly, and starts it again.
func (s *soak) restart() {
	s.lives.Add(1)
	if s.rng.IntN(4) == 0 {
		s.did("agent stopped")
		s.stops++
		s.stopAgent()
	} else {
		s.did("agent killed")
		s.kills++
		s.agent.kill()
	}
	if s.rng.IntN(3) == 0 {
		s.rest(400)
	}
	s.agent = s.start(s.args...)
	s.lives.Add(1)
}

// restartWhileFull does it while a file system is full. An agent that waits with
// its start for room goes on when there is some.
func (s *soak) restartWhileFull(free func()) {
	after := time.Duration(s.rng.IntN(1500)) * time.Millisecond
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(after)
		free()
	}()
	s.restart()
	<-done
}

// stopAgent stops the agent in order, within a bound.
func (s *soak) stopAgent() {
	s.t.Helper()
	_ = s.agent.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-s.agent.done:
		s.agent.done <- nil
		if err != nil {
			s.t.Fatalf("the agent ended badly: %v", err)
		}
	case <-time.After(soakStopLimit):
		_ = s.agent.cmd.Process.Signal(syscall.SIGQUIT) // it says where it is
		<-s.agent.done
		s.agent.done <- nil
		s.t.Fatalf("the agent does not end within %v after SIGTERM", soakStopLimit)
	}
}

// badWire does something to the wire of a store.
func (s *soak) badWire(i int) {
	w := s.wires[i]
	toxic := func(kind, attributes string) {
		s.did("wire %d: %s %s", i, kind, attributes)
		must(s.t, w.Toxic(kind, attributes, s.rng.IntN(2) == 0))
	}
	must(s.t, w.Mend())
	s.wireFaults++
	switch s.rng.IntN(5) {
	case 0:
		s.did("wire %d cut", i)
		w.Cut()
	case 1:
		toxic("latency", fmt.Sprintf(`"latency":%d,"jitter":%d`, 50+s.rng.IntN(800), s.rng.IntN(50)))
	case 2:
		toxic("reset_peer", fmt.Sprintf(`"timeout":%d`, s.rng.IntN(100)))
	case 3:
		toxic("timeout", `"timeout":0`) // nothing passes, nothing is closed
	case 4:
		toxic("limit_data", fmt.Sprintf(`"bytes":%d`, 1+s.rng.IntN(200_000))) // closed in the middle
	}
}

// full leaves no room in a file system until free is called.
func (s *soak) full(dir string) (free func()) {
	junk := fill(s.t, dir)
	s.did("%s full", filepath.Base(dir))
	s.fulls++
	return sync.OnceFunc(func() { _ = os.Remove(junk) })
}

// round lets writers write, does things to them, mends all, and checks.
func (s *soak) round() {
	t := s.t
	kind := s.rounds % len(soakRounds)
	s.rounds++
	s.history = nil
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	stop := make(chan struct{})
	var load sync.WaitGroup
	for _, r := range s.groups {
		for _, w := range r.writers {
			rng := rand.New(rand.NewPCG(s.rng.Uint64(), 1))
			load.Go(func() { w.run(ctx, r, rng, stop) })
		}
	}
	rng := rand.New(rand.NewPCG(s.rng.Uint64(), 1))
	load.Go(func() { s.bulk.run(ctx, rng, stop) })
	fioSeed := s.rng.Uint64()
	load.Go(func() { s.runFio(ctx, fioSeed, stop) })

	soakRounds[kind](s)

	s.bulk.flood.Store(false)
	for i := range s.stores {
		must(t, s.stores[i].Start())
		must(t, s.wires[i].Mend())
	}
	// Under load it must catch up as well, but how long that takes is not said.
	s.rest(500)
	close(stop)
	load.Wait()
	if ctx.Err() != nil {
		t.Fatalf("round %d: the writers' requests are not answered", s.rounds)
	}
	s.await("all is committed", isCaughtUp)
	s.check()
}

func isCaughtUp(s control.Status) bool {
	for _, g := range s.Groups {
		if g.State != "continuous" || g.Committed != g.Captured {
			return false
		}
	}
	return true
}

// check compares everything with everything; nobody writes.
func (s *soak) check() {
	t := s.t
	t.Helper()
	seen := map[string][]byte{} // what clients read
	read := func(name string, bytes int64) {
		c := s.device(name)
		defer c.Close()
		p := make([]byte, bytes)
		for at := int64(0); at < bytes; at += 4 << 20 {
			must(t, c.ReadAt(context.Background(), p[at:min(bytes, at+4<<20)], at))
		}
		seen[name] = p
	}
	for _, r := range s.groups {
		for _, v := range r.volumes {
			read(v, r.volumeBytes())
		}
	}
	read("bulk", soakVolume)
	read("fio", soakFio)
	s.stops++
	s.stopAgent()
	for name, want := range seen {
		if !bytes.Equal(contentOf(t, s.path(name)), want) {
			t.Fatalf("round %d: after a clean stop the file of volume %s is not what its clients saw", s.rounds, name)
		}
	}
	s.commits = 0
	for _, r := range s.groups {
		s.checkPrefixes(r, seen)
	}
	s.checkBulk(seen)
	s.agent = s.start(s.args...)
}

// picked are the checkpoints of a group to look at: some at random, and the
// newest one. It looks at the gaps too.
func (s *soak) picked(hist *restorer.History, volumes []string) (points []restorer.Checkpoint) {
	t := s.t
	t.Helper()
	for i, name := range volumes {
		v, ok := hist.Volume(name)
		if !ok {
			t.Fatalf("round %d: volume %s is not in the history", s.rounds, name)
		}
		for _, g := range hist.Gaps(v) {
			if g.Open {
				t.Fatalf("round %d: volume %s is continuous, and the gap after seq %d has no end", s.rounds, name, g.After)
			}
			if strings.HasPrefix(name, "k") {
				t.Fatalf("round %d: volume %s holds its writers, and has a gap after seq %d: %v", s.rounds, name, g.After, g.Reason)
			}
			if why := fmt.Sprint(g.Reason); !strings.Contains(why, "buffer") {
				t.Fatalf("round %d: volume %s has a gap after seq %d because of %s", s.rounds, name, g.After, why)
			}
		}
		ps := checkpoints(t, hist, v)
		if i == 0 {
			points = ps
			continue
		}
		// The checkpoints that both have: a resync ends volume by volume.
		points = slices.DeleteFunc(points, func(p restorer.Checkpoint) bool {
			return !slices.ContainsFunc(ps, func(o restorer.Checkpoint) bool { return o.N == p.N })
		})
	}
	if len(points) == 0 {
		t.Fatalf("round %d: %v have no checkpoint", s.rounds, volumes)
	}
	s.commits += len(points)
	var out []restorer.Checkpoint
	for range soakPick {
		out = append(out, points[s.rng.IntN(len(points))])
	}
	return append(out, points[len(points)-1])
}

func (s *soak) checkPrefixes(r *prefixRun, seen map[string][]byte) {
	t := s.t
	t.Helper()
	hist, _ := s.historyOf(t, r.volumes[0])
	defer hist.Close()
	r.index()
	points := s.picked(hist, r.volumes)
	image := make([]byte, r.volumeBytes())
	for i, p := range points {
		failed := func(err error) {
			if err != nil {
				t.Helper()
				t.Fatalf("round %d, group %s, checkpoint of entry %d, seq %d: %v", s.rounds, r.group, p.N, p.Seq, err)
			}
		}
		pictures := make([]*picture, len(r.volumes))
		for j, name := range r.volumes {
			v, _ := hist.Volume(name)
			failed(readImage(context.Background(), hist, v, p, image))
			pictures[j] = &picture{}
			failed(pictures[j].next(image))
			if i == len(points)-1 && !bytes.Equal(image, seen[name]) {
				failed(fmt.Errorf("the newest checkpoint of volume %s is not what its clients read", name))
			}
		}
		got, err := r.check(pictures, make([]own, len(r.writers)), p.Seq, p.Time.UnixNano())
		failed(err)
		s.checked++
		if i < len(points)-1 {
			continue
		}
		for _, w := range r.writers { // all was answered
			if n := len(w.writes); got[w.id].k < n && r.ownCovers(w, got[w.id].k, n) {
				failed(fmt.Errorf("writer %d: %d writes were answered, and the newest checkpoint has only %d", w.id, n, got[w.id].k))
			}
		}
	}
}

func (s *soak) checkBulk(seen map[string][]byte) {
	t := s.t
	t.Helper()
	hist, bulk := s.historyOf(t, "bulk")
	defer hist.Close()
	points := s.picked(hist, []string{"bulk", "fio"})
	image := make([]byte, soakVolume)
	for i, p := range points {
		failed := func(err error) {
			if err != nil {
				t.Helper()
				t.Fatalf("round %d, group b, checkpoint of entry %d, seq %d: %v", s.rounds, p.N, p.Seq, err)
			}
		}
		failed(readImage(context.Background(), hist, bulk, p, image))
		newest := i == len(points)-1
		failed(s.bulk.check(image, p.Time.UnixNano(), newest))
		s.checked++
		if newest {
			if !bytes.Equal(image, seen["bulk"]) {
				failed(fmt.Errorf("the newest checkpoint of volume bulk is not what its clients read"))
			}
			fio, _ := hist.Volume("fio")
			failed(readImage(context.Background(), hist, fio, p, image[:soakFio]))
			if !bytes.Equal(image[:soakFio], seen["fio"]) {
				failed(fmt.Errorf("the newest checkpoint of volume fio is not what its clients read"))
			}
		}
	}
}

// runFio has fio write and verify until stop is closed. It may fail only when
// the agent is ended meanwhile; as it then waits for answers for ever, it is
// ended too.
func (s *soak) runFio(ctx context.Context, seed uint64, stop <-chan struct{}) {
	for n := uint64(0); ; n++ {
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
		life := s.lives.Load()
		if life%2 == 1 {
			continue
		}
		run, end := context.WithCancel(ctx)
		cmd := exec.CommandContext(run, realpart.Path(s.t, "fio"), "--name=soak", "--ioengine=nbd", "--uri=nbd+unix:///fio?socket="+s.socket(),
			"--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=8", "--size="+strconv.Itoa(soakFio), "--io_size=4m", "--rate=4m",
			"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed="+strconv.FormatUint(seed%1_000_000+n, 10))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.WaitDelay = time.Second
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			for run.Err() == nil && s.lives.Load() == life {
				time.Sleep(20 * time.Millisecond)
			}
			end()
		}()
		out, err := cmd.CombinedOutput()
		end()
		<-watched
		died := s.lives.Load() != life || ctx.Err() != nil
		switch {
		case bytes.Contains(out, []byte("verify:")) || err != nil && !died:
			s.t.Errorf("round %d: fio: %v\n%s", s.rounds, err, out)
			return
		case err == nil:
			s.fioRuns++
		}
	}
}

// bulk writes much to one volume, one request after the other; a request that
// was not answered is sent again. So each state of the volume is what its first
// k requests leave.
type bulk struct {
	h      *host
	blocks int
	flood  atomic.Bool // at full speed

	ops     []bulkOp
	flushed []flush
}

// bulkOp writes stamps of its number, counted from 1, or zeroes.
type bulkOp struct {
	at, n int // blocks
	zero  bool
}

func (b *bulk) run(ctx context.Context, rng *rand.Rand, stop <-chan struct{}) {
	var c *nbd.Client
	defer func() {
		if c != nil {
			_ = c.Close()
		}
	}()
	p := make([]byte, 256*stampBytes)
	for {
		select {
		case <-stop:
			return
		default:
		}
		if !b.flood.Load() {
			time.Sleep(time.Duration(rng.IntN(40)) * time.Millisecond)
		}
		op := bulkOp{n: 1 + rng.IntN(256), zero: rng.IntN(8) == 0}
		if !b.flood.Load() {
			op.n = 1 + rng.IntN(16)
		}
		op.at = rng.IntN(b.blocks - op.n + 1)
		b.ops = append(b.ops, op)
		k := len(b.ops)
		e := block.Extent{Off: int64(op.at) * stampBytes, Len: int64(op.n) * stampBytes}
		for i := range op.n {
			stampBlock(p[i*stampBytes:(i+1)*stampBytes], 0, k)
		}
		for {
			var err error
			if c == nil {
				c, err = nbd.Dial(ctx, "unix:"+b.h.socket(), "bulk")
			}
			if err == nil {
				if op.zero {
					err = c.Trim(ctx, e, block.WriteOptions{})
				} else {
					err = c.WriteAt(ctx, p[:e.Len], e.Off, block.WriteOptions{})
				}
			}
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return
			}
			if c != nil {
				_ = c.Close()
				c = nil
			}
			time.Sleep(10 * time.Millisecond) // no agent, or no room
		}
		if rng.IntN(10) == 0 && c.Flush(ctx) == nil {
			b.flushed = append(b.flushed, flush{k, time.Now().UnixNano()})
		}
	}
}

// check finds out that an image is what a prefix leaves which has all that was
// flushed before the cut; the newest must have all.
func (b *bulk) check(image []byte, cutTime int64, newest bool) error {
	have, least := make([]int, b.blocks), 0
	for i := range have {
		_, n, err := readStamp(image[i*stampBytes : (i+1)*stampBytes])
		if err != nil {
			return fmt.Errorf("block %d: %w", i, err)
		}
		have[i] = n
		least = max(least, n)
	}
	for _, f := range b.flushed {
		if f.at < cutTime {
			least = max(least, f.n)
		}
	}
	if newest {
		least = len(b.ops)
	}
	if least > len(b.ops) {
		return fmt.Errorf("write %d was never made", least)
	}
	want := make([]int, b.blocks)
	for k := 0; ; k++ {
		if k >= least {
			if slices.Equal(want, have) {
				return nil
			}
			// Only what leaves zeroes may follow the newest stamp.
			if k == len(b.ops) || !b.ops[k].zero {
				i := 0
				for want[i] == have[i] {
					i++
				}
				return fmt.Errorf("after %d writes block %d holds write %d, and not %d", k, i, have[i], want[i])
			}
		}
		op := b.ops[k]
		for i := op.at; i < op.at+op.n; i++ {
			want[i] = k + 1
			if op.zero {
				want[i] = 0
			}
		}
	}
}
