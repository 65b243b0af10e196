package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/nbd"
	"drc/internal/object"
	"drc/internal/object/stores"
	"drc/internal/realpart"
	"drc/internal/repo"
	"drc/restorer"
)

// The checker of "every checkpoint is a prefix". Writers stamp each 4 KiB block
// with (writer, write number). Each write is one request with one seq, and a
// writer has one request under way at a time, so a prefix of the history is,
// for each writer, its first k writes. The checker finds k for each writer
// from the restored images and checks that
//
//   - the images are exactly what these writes leave, where that is certain
//     (a writer's own blocks), and possible, where writers overlap;
//   - the cut is one in the order of real time: a write in it that began after
//     another had ended brings that one with it;
//   - k never decreases from commit to commit;
//   - every write that was flushed before the commit was cut is in it;
//   - the seq of the checkpoint is the number of writes in it.
const (
	stampBytes  = 4096
	ownBlocks   = 24 // of each writer, on its volume
	shareBlocks = 16 // that all writers of a volume share
)

// issued is one write of one writer.
type issued struct {
	blocks []int // of its volume
	zero   bool  // zeroed or trimmed
	trim   bool
	start  int64 // in the order of events
	end    int64 // 0 while it is not answered
	again  int   // how often it was sent once more after the agent had died
}

// writer issues one write after the other.
type writer struct {
	id, volume int
	mu         sync.Mutex
	writes     []issued // write i is at i-1
	flushed    []flush

	touched, trims map[int][]int // by shared block; see index
	again          []int         // of the first k writes
}

// flush says that the first n writes were flushed when the clock said at.
type flush struct {
	n  int
	at int64
}

// prefixRun is one run of the checker, on one group.
type prefixRun struct {
	h       *host
	group   string
	volumes []string
	writers []*writer
	clock   atomic.Int64
	perVol  int
	gaps    bool // there may be some: writes of bitmap mode have no seq
}

func (r *prefixRun) volumeBytes() int64 { return int64(r.perVol*ownBlocks+shareBlocks) * stampBytes }

// blocksOf are the blocks that a writer may write: its own, and the shared ones.
func (r *prefixRun) pick(w *writer, rng *rand.Rand) []int {
	if rng.IntN(3) == 0 {
		at := r.perVol*ownBlocks + rng.IntN(shareBlocks-4)
		return []int{at, at + 1, at + 2}[:1+rng.IntN(3)]
	}
	n := 1 + rng.IntN(4)
	at := (w.id%r.perVol)*ownBlocks + rng.IntN(ownBlocks-n+1)
	out := make([]int, n)
	for i := range out {
		out[i] = at + i
	}
	return out
}

// run writes until stop is closed, and ends with a write that was answered. One
// that was not, because the agent died, is sent again, as a client with a file
// system on it would.
func (w *writer) run(ctx context.Context, r *prefixRun, rng *rand.Rand, stop <-chan struct{}) {
	var c *nbd.Client
	defer func() {
		if c != nil {
			_ = c.Close()
		}
	}()
	connect := func() bool {
		for {
			select {
			case <-ctx.Done():
				return false
			default:
			}
			var err error
			if c, err = nbd.Dial(ctx, "unix:"+r.h.socket(), r.volumes[w.volume]); err == nil {
				return true
			}
			time.Sleep(5 * time.Millisecond) // the agent is being started again
		}
	}
	if !connect() {
		return
	}
	for {
		select {
		case <-stop:
			return
		default:
		}
		if rng.IntN(4) == 0 { // some stretches are full of writes, others are not
			time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond)
		}
		x := issued{blocks: r.pick(w, rng), zero: rng.IntN(6) == 0, start: r.clock.Add(1)}
		x.trim = x.zero && rng.IntN(2) == 0
		w.mu.Lock()
		w.writes = append(w.writes, x)
		n := len(w.writes)
		w.mu.Unlock()
		fua := rng.IntN(20) == 0
		for {
			err := w.send(ctx, c, x, n, fua)
			if err == nil {
				break
			}
			_ = c.Close()
			c = nil
			if !connect() {
				return
			}
			w.mu.Lock()
			w.writes[n-1].again++
			w.mu.Unlock()
		}
		now := time.Now().UnixNano()
		w.mu.Lock()
		w.writes[n-1].end = r.clock.Add(1)
		if fua {
			w.flushed = append(w.flushed, flush{n, now})
		}
		w.mu.Unlock()
		if rng.IntN(12) == 0 {
			if c.Flush(ctx) == nil {
				now := time.Now().UnixNano()
				w.mu.Lock()
				w.flushed = append(w.flushed, flush{n, now})
				w.mu.Unlock()
			}
		}
	}
}

func (w *writer) send(ctx context.Context, c *nbd.Client, x issued, n int, fua bool) error {
	off := int64(x.blocks[0]) * stampBytes
	if x.trim {
		return c.Trim(ctx, block.Extent{Off: off, Len: int64(len(x.blocks)) * stampBytes}, block.WriteOptions{FUA: fua})
	}
	if x.zero {
		return c.Zero(ctx, block.Extent{Off: off, Len: int64(len(x.blocks)) * stampBytes}, block.ZeroOptions{FUA: fua})
	}
	p := make([]byte, len(x.blocks)*stampBytes)
	for i := range x.blocks {
		stampBlock(p[i*stampBytes:(i+1)*stampBytes], w.id, n)
	}
	return c.WriteAt(ctx, p, off, block.WriteOptions{FUA: fua})
}

// stampBlock fills a block so that any mix of two stamps is noticed.
func stampBlock(p []byte, writer, n int) {
	for at := 0; at < len(p); at += 16 {
		binary.LittleEndian.PutUint64(p[at:], uint64(writer+1)<<48|uint64(n))
		binary.LittleEndian.PutUint64(p[at+8:], uint64(at))
	}
}

// readStamp returns whose write a block holds; n is 0 for a block of zeroes.
func readStamp(p []byte) (writer, n int, err error) {
	first := binary.LittleEndian.Uint64(p)
	want := make([]byte, len(p))
	if first != 0 {
		writer, n = int(first>>48)-1, int(first&(1<<48-1))
		stampBlock(want, writer, n)
	}
	if string(want) != string(p) {
		return 0, 0, fmt.Errorf("the block is a mix of writes")
	}
	return writer, n, nil
}

// own is a writer's own blocks after its first k writes: which write each holds.
type own struct {
	k    int
	want [ownBlocks]int
}

// step takes one more of a writer's writes in.
func (r *prefixRun) step(w *writer, s *own) {
	first := (w.id % r.perVol) * ownBlocks
	x := w.writes[s.k]
	s.k++
	for _, b := range x.blocks {
		if b >= first && b < first+ownBlocks {
			s.want[b-first] = s.k
			if x.zero {
				s.want[b-first] = 0
			}
		}
	}
}

// stamped is what a block holds: a write, or zeroes if n is 0.
type stamped struct{ writer, n int }

// picture is a volume at a checkpoint. Blocks that are as they were at the one
// before are not looked at again.
type picture struct {
	image  []byte
	stamps []stamped
}

func (p *picture) next(image []byte) error {
	if p.stamps == nil {
		p.image, p.stamps = make([]byte, len(image)), make([]stamped, len(image)/stampBytes)
	}
	for b := range p.stamps {
		now := image[b*stampBytes : (b+1)*stampBytes]
		if bytes.Equal(now, p.image[b*stampBytes:(b+1)*stampBytes]) {
			continue
		}
		wid, n, err := readStamp(now)
		if err != nil {
			return fmt.Errorf("block %d: %w", b, err)
		}
		p.stamps[b] = stamped{wid, n}
	}
	copy(p.image, image)
	return nil
}

// ofOwn are the writes that a writer's own blocks hold.
func (r *prefixRun) ofOwn(w *writer, p *picture) (have [ownBlocks]int, err error) {
	first := (w.id % r.perVol) * ownBlocks
	for i, s := range p.stamps[first : first+ownBlocks] {
		if s.n > 0 && s.writer != w.id {
			return have, fmt.Errorf("block %d holds a write of writer %d", first+i, s.writer)
		}
		if s.n > len(w.writes) {
			return have, fmt.Errorf("block %d holds write %d, which was never made", first+i, s.n)
		}
		have[i] = s.n
	}
	return have, nil
}

// check finds the cut of a checkpoint from the pictures of all volumes: the
// least writes of each writer that can be in it. low is the cut of the commit
// before.
func (r *prefixRun) check(pictures []*picture, low []own, seq block.Seq, cutTime int64) ([]own, error) {
	got, have := slices.Clone(low), make([][ownBlocks]int, len(r.writers))
	// raise takes more writes of w in, up to n and until they leave its blocks
	// as they are.
	raise := func(w *writer, n int) error {
		s := got[w.id]
		for s.k < n || s.want != have[w.id] {
			if s.k == len(w.writes) {
				return fmt.Errorf("writer %d: its blocks are what no prefix of its writes from the first %d on leaves", w.id, max(n, got[w.id].k))
			}
			r.step(w, &s)
		}
		got[w.id] = s
		return nil
	}
	for _, w := range r.writers {
		var err error
		if have[w.id], err = r.ofOwn(w, pictures[w.volume]); err != nil {
			return nil, fmt.Errorf("writer %d: %w", w.id, err)
		}
		least := slices.Max(have[w.id][:])
		for _, f := range w.flushed {
			if f.at < cutTime { // flushed before the commit: it must be in
				least = max(least, f.n)
			}
		}
		if err := raise(w, least); err != nil {
			return nil, err
		}
	}
	// A cut found from the writer's own blocks may be too small by writes that
	// only touched shared blocks, so it is raised as far as these blocks and
	// the order of real time demand: if a write is in, all that ended before it
	// began are in.
	for v, p := range pictures {
		for b := r.perVol * ownBlocks; b < len(p.stamps); b++ {
			s := p.stamps[b]
			if s.n == 0 {
				continue
			}
			if s.writer >= len(r.writers) || r.writers[s.writer].volume != v || s.n > len(r.writers[s.writer].writes) {
				return nil, fmt.Errorf("volume %d, shared block %d holds write %d of writer %d, which was never made", v, b, s.n, s.writer)
			}
			if err := raise(r.writers[s.writer], s.n); err != nil {
				return nil, err
			}
		}
	}
	for changed := true; changed; {
		changed = false
		for _, w := range r.writers {
			if got[w.id].k == 0 {
				continue
			}
			began := w.writes[got[w.id].k-1].start
			for _, o := range r.writers {
				n := got[o.id].k
				for n < len(o.writes) && o.writes[n].end != 0 && o.writes[n].end < began {
					n++
				}
				if n > got[o.id].k {
					changed = true
					if err := raise(o, n); err != nil {
						return nil, err
					}
				}
			}
		}
	}
	high, err := r.most(have, got, seq)
	if err != nil {
		return nil, err
	}
	return got, r.sharedPossible(pictures, got, high)
}

// most returns how many writes of each writer can be in at most, and checks
// that a checkpoint's seq is the number of writes in it: the least are not
// more, and the most, with those that were sent again, which have one seq or
// two, are not less.
func (r *prefixRun) most(have [][ownBlocks]int, got []own, seq block.Seq) ([]int, error) {
	sum := 0
	for _, s := range got {
		sum += s.k
	}
	slack := int(seq) - sum
	if r.gaps {
		slack = math.MaxInt // nothing can be told from the seq
	} else if slack < 0 {
		return nil, fmt.Errorf("%d writes are in it, more than its seq", sum)
	}
	high, most := make([]int, len(got)), 0
	for _, w := range r.writers {
		high[w.id] = got[w.id].k
		for s := got[w.id]; s.k < len(w.writes) && s.k-got[w.id].k < slack; {
			if r.step(w, &s); s.want == have[w.id] {
				high[w.id] = s.k
			}
		}
		most += high[w.id]
		most += w.again[high[w.id]]
	}
	if most < int(seq) && !r.gaps {
		return nil, fmt.Errorf("at most %d writes are in it, fewer than its seq", most)
	}
	return high, nil
}

// sharedPossible checks blocks that several writers write: nothing in the cut
// may have begun after what a block holds had ended.
func (r *prefixRun) sharedPossible(pictures []*picture, got []own, high []int) error {
	for v, p := range pictures {
		for b := r.perVol * ownBlocks; b < len(p.stamps); b++ {
			if s := p.stamps[b]; s.n > 0 {
				if later := r.later(v, b, s, got); later.n > 0 {
					return fmt.Errorf("volume %d, block %d holds write %d of writer %d, and write %d of writer %d came later", v, b, s.n, s.writer, later.n, later.writer)
				}
				continue
			}
			// Zeroes: nobody has written it, or the newest trim of some writer.
			possible := r.later(v, b, stamped{-1, 0}, got).n == 0
			for _, w := range r.writers {
				if w.volume == v && !possible {
					if n := last(w.trims[b], high[w.id]); n > 0 {
						possible = r.later(v, b, stamped{w.id, n}, got).n == 0
					}
				}
			}
			if !possible {
				return fmt.Errorf("volume %d, block %d holds zeroes, and no trim can have been the last on it", v, b)
			}
		}
	}
	return nil
}

// later returns a write in the cut that began on a block after s had ended; its
// n is 0 if there is none.
func (r *prefixRun) later(v, b int, s stamped, got []own) stamped {
	ended := int64(0)
	if s.n > 0 {
		if ended = r.writers[s.writer].writes[s.n-1].end; ended == 0 {
			return stamped{}
		}
	}
	for _, w := range r.writers {
		if w.volume != v {
			continue
		}
		// A writer's last one is the one that began last.
		if n := last(w.touched[b], got[w.id].k); n > 0 && w.writes[n-1].start > ended && (stamped{w.id, n}) != s {
			return stamped{w.id, n}
		}
	}
	return stamped{}
}

// last is the last of some write numbers in order that is not over k, or 0.
func last(numbers []int, k int) int {
	i, found := slices.BinarySearch(numbers, k)
	if found {
		return k
	}
	if i == 0 {
		return 0
	}
	return numbers[i-1]
}

// index notes which writes touched which shared blocks, when all are made.
func (r *prefixRun) index() {
	for _, w := range r.writers {
		w.touched, w.trims, w.again = map[int][]int{}, map[int][]int{}, make([]int, 1, len(w.writes)+1)
		for i, x := range w.writes {
			w.again = append(w.again, w.again[i]+x.again)
			for _, b := range x.blocks {
				w.touched[b] = append(w.touched[b], i+1)
				if x.zero {
					w.trims[b] = append(w.trims[b], i+1)
				}
			}
		}
	}
}

// TestEveryCheckpointIsAPrefix runs writers, agents that die, and the checker:
// for DRC_PREFIX_SECONDS each, with the seed DRC_SEED.
func TestEveryCheckpointIsAPrefix(t *testing.T) {
	seconds := 8
	if s := os.Getenv("DRC_PREFIX_SECONDS"); s != "" {
		var err error
		if seconds, err = strconv.Atoi(s); err != nil {
			t.Fatalf("DRC_PREFIX_SECONDS: %v", err)
		}
	}
	cases := []struct {
		name   string
		stores func(t *testing.T) (urls, env []string)
		kills  bool
	}{
		{"one folder", folders(1), false},
		{"three folders agent killed", folders(3), true},
		{"three MinIO agent killed", minios(3), true},
	}
	commits := 0
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			urls, env := c.stores(t)
			h := newRepo(t, urls, env)
			h.limit = time.Duration(seconds)*time.Second + processLimit
			// Groups are apart from each other: each has commits of its own.
			var groups []*prefixRun
			for _, g := range []string{"g", "h"} {
				groups = append(groups, &prefixRun{h: h, group: g, volumes: []string{g + "a", g + "b"}, perVol: 2})
			}
			commits += runPrefix(t, h, groups, env, time.Duration(seconds)*time.Second, c.kills)
		})
	}
	t.Logf("%d commits checked", commits)
}

func folders(n int) func(t *testing.T) (urls, env []string) {
	return func(t *testing.T) (urls, env []string) { return folderURLs(t, n), nil }
}

func minios(n int) func(t *testing.T) (urls, env []string) {
	return func(t *testing.T) (urls, env []string) {
		for _, m := range realpart.MinIO(t, n) {
			urls = append(urls, m.URL("drc", "p"))
			env = m.Env()
		}
		return urls, env
	}
}

// runPrefix writes to all groups for as long as d, ends the agent now and then,
// and checks all commits. It returns how many there were.
func runPrefix(t *testing.T, h *host, groups []*prefixRun, env []string, d time.Duration, kills bool) (commits int) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("DRC_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("DRC_SEED: %v", err)
		}
	}
	t.Logf("seed %d (the order of processes is not repeatable)", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	dir := t.TempDir()
	args := []string{"--rpo", "10ms", "--log-level", "warn", "--buffer", "path=" + filepath.Join(dir, "buffer") + ",size=1GiB"}
	for _, r := range groups {
		for _, v := range r.volumes {
			args = append(args, "--volume", fmt.Sprintf("name=%s,path=%s,size=%d,group=%s", v, filepath.Join(dir, v), r.volumeBytes(), r.group))
		}
	}
	ctx := testContext(t)
	a := h.start(args...)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for j, r := range groups {
		for i := range len(r.volumes) * r.perVol {
			w := &writer{id: i, volume: i / r.perVol}
			r.writers = append(r.writers, w)
			wr := rand.New(rand.NewPCG(seed, uint64(j*100+i)+2))
			wg.Go(func() { w.run(ctx, r, wr, stop) })
		}
	}
	standby := newFollower(h, filepath.Join(dir, "standby"))
	stopStandby := make(chan struct{})
	var followed sync.WaitGroup
	followed.Go(func() { standby.run(t, rand.New(rand.NewPCG(seed, 99)), stopStandby) })
	deaths := 0
	for end := time.Now().Add(d); time.Now().Before(end); {
		if !kills {
			time.Sleep(time.Until(end))
			break
		}
		time.Sleep(time.Duration(200+rng.IntN(2400)) * time.Millisecond)
		a.kill()
		deaths++
		a = h.start(args...)
	}
	close(stop)
	wg.Wait()
	a.stop()
	a = h.start(append(args, "--drain", "stores")...)
	a.stop()
	close(stopStandby)
	followed.Wait()
	defer func() {
		if t.Failed() {
			t.Logf("agents said:\n%s", h.said())
		}
	}()
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		t.Setenv(k, v)
	}
	checked := make([]int, len(groups))
	t.Run("check", func(t *testing.T) { // the groups side by side
		for i, r := range groups {
			t.Run(r.group, func(t *testing.T) {
				t.Parallel()
				r.index()
				if checked[i] = r.checkAll(t, standby); checked[i] < 50 {
					t.Errorf("only %d commits of group %s: the run shows nothing", checked[i], r.group)
				}
			})
		}
	})
	standby.checked(t)
	writers, total, again := 0, 0, 0
	for i, r := range groups {
		commits += checked[i]
		for _, w := range r.writers {
			writers++
			total += len(w.writes)
			again += w.again[len(w.writes)]
		}
	}
	t.Logf("%d commits checked, %d writes by %d writers, agent killed %d times, %d writes sent again; a standby was up to date %d times and killed %d times", commits, total, writers, deaths, again, standby.passes, standby.kills)
	return commits
}

// checkAll restores every checkpoint and checks it.
func (r *prefixRun) checkAll(t *testing.T, standby *follower) int {
	ctx := testContext(t)
	h, va := r.h.historyOf(t, r.volumes[0])
	defer h.Close()
	low, pictures := make([]own, len(r.writers)), make([]*picture, len(r.volumes))
	image := make([]byte, r.volumeBytes())
	for i := range pictures {
		pictures[i] = &picture{}
	}
	points := checkpoints(t, h, va)
	for i, p := range points {
		failed := func(err error) {
			if err != nil {
				t.Helper()
				t.Fatalf("group %s, checkpoint %d of %d (entry %d, seq %d): %v", r.group, i, len(points), p.N, p.Seq, err)
			}
		}
		for j, name := range r.volumes {
			v, ok := h.Volume(name)
			if !ok {
				t.Fatalf("volume %s is not in the history", name)
			}
			failed(readImage(ctx, h, v, p, image))
			standby.check(t, name, p.Seq, image)
			failed(pictures[j].next(image))
		}
		got, err := r.check(pictures, low, p.Seq, p.Time.UnixNano())
		failed(err)
		low = got
	}
	// Everything that was answered is in the last checkpoint.
	for _, w := range r.writers {
		answered := len(w.writes)
		if answered > 0 && w.writes[answered-1].end == 0 {
			answered--
		}
		if low[w.id].k < answered && r.ownCovers(w, low[w.id].k, answered) {
			t.Fatalf("writer %d: %d writes were answered, and the last checkpoint has only %d", w.id, answered, low[w.id].k)
		}
	}
	return len(points)
}

// historyOf reads the history of a volume in this process, which must have the
// stores' credentials in its environment. The caller closes it.
func (h *host) historyOf(t *testing.T, volume string) (*restorer.History, restorer.Volume) {
	t.Helper()
	ctx := testContext(t)
	identity := ""
	for _, kv := range h.env {
		if v, ok := strings.CutPrefix(kv, "DRC_IDENTITY="); ok {
			identity = v
		}
	}
	raw, err := os.ReadFile(identity)
	if err != nil {
		t.Fatal(err)
	}
	id, err := crypt.ParseIdentity(identity, raw)
	if err != nil {
		t.Fatal(err)
	}
	var all []object.Store
	for _, u := range h.urls {
		s, err := stores.Open(ctx, u, stores.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		all = append(all, s)
	}
	rp, err := repo.Open(ctx, all, id.RootPublic)
	if err != nil {
		t.Fatal(err)
	}
	hist, v, err := restorer.Find(ctx, restorer.Config{Repo: rp, Ring: crypt.NewRing(id)}, volume)
	if err != nil {
		t.Fatal(err)
	}
	return hist, v
}

// readImage reads a volume as it was at a checkpoint.
func readImage(ctx context.Context, h *restorer.History, v restorer.Volume, at restorer.Checkpoint, image []byte) error {
	e, err := h.Entry(ctx, at.N)
	if err != nil {
		return err
	}
	im, err := restorer.OpenImageAt(ctx, h, restorer.Point{Checkpoint: at, Volume: v, Branch: h.Group.Branch, Hash: e.Hash})
	if err != nil {
		return err
	}
	return im.ReadAt(ctx, image, 0)
}

// ownCovers reports whether the writes behind k up to n leave a mark on the
// writer's own blocks, so that they cannot be missed.
func (r *prefixRun) ownCovers(w *writer, k, n int) bool {
	first := (w.id % r.perVol) * ownBlocks
	for _, x := range w.writes[k:n] {
		for _, b := range x.blocks {
			if b >= first && b < first+ownBlocks && !x.zero {
				return true
			}
		}
	}
	return false
}

// checkpoints lists the checkpoints of a volume.
func checkpoints(t testing.TB, h *restorer.History, v restorer.Volume) []restorer.Checkpoint {
	t.Helper()
	all, err := h.AllCheckpoints(context.Background(), v)
	if err != nil {
		t.Fatal(err)
	}
	return all
}
