package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	zero   bool
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
}

// flush says that the first n writes were flushed when the clock said at.
type flush struct {
	n  int
	at int64
}

// prefixRun is one run of the checker.
type prefixRun struct {
	t       *testing.T
	h       *host
	volumes []string
	writers []*writer
	clock   atomic.Int64
	perVol  int
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

// run writes until stop is closed. A write that was not answered because the
// agent died is sent again, as a client with a file system on it would.
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
			case <-stop:
				return false
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
		x := issued{blocks: r.pick(w, rng), zero: rng.IntN(6) == 0, start: r.clock.Add(1)}
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

// cut is how many writes of each writer a checkpoint has.
type cut []int

// check finds the cut of a checkpoint from the images of all volumes. low is
// the cut of the commit before.
func (r *prefixRun) check(images [][]byte, low cut, cutTime int64) (cut, error) {
	got := make(cut, len(r.writers))
	for _, w := range r.writers {
		least := low[w.id]
		for _, f := range w.flushed {
			if f.at < cutTime { // flushed before the commit: it must be in
				least = max(least, f.n)
			}
		}
		k, err := r.ownCut(w, images[w.volume], least)
		if err != nil {
			return nil, fmt.Errorf("writer %d: %w", w.id, err)
		}
		got[w.id] = k
	}
	// The order of real time: if a write is in, all that ended before it began
	// are in. A cut found from the writer's own blocks may be too small by
	// writes that only touched shared blocks, so it is raised as far as order
	// demands, and then must still agree with the writer's own blocks.
	for changed := true; changed; {
		changed = false
		for _, w := range r.writers {
			if got[w.id] == 0 {
				continue
			}
			began := w.writes[got[w.id]-1].start
			for _, o := range r.writers {
				for got[o.id] < len(o.writes) {
					next := o.writes[got[o.id]]
					if next.end == 0 || next.end > began {
						break
					}
					got[o.id]++
					changed = true
				}
			}
		}
		// The same blocks may be left by several prefixes (a trim undoes a
		// write): the least that order allows is the cut.
		for _, w := range r.writers {
			if k, err := r.ownCut(w, images[w.volume], got[w.id]); err == nil && k > got[w.id] {
				got[w.id] = k
				changed = true
			}
		}
		for v := range r.volumes {
			for b := r.perVol * ownBlocks; b < r.perVol*ownBlocks+shareBlocks; b++ {
				wid, n, err := readStamp(images[v][b*stampBytes : (b+1)*stampBytes])
				if err != nil {
					return nil, fmt.Errorf("volume %d, shared block %d: %w", v, b, err)
				}
				if n > got[wid] {
					got[wid] = n
					changed = true
				}
			}
		}
	}
	for _, w := range r.writers {
		if err := r.ownMatches(w, images[w.volume], got[w.id]); err != nil {
			return nil, fmt.Errorf("writer %d at its first %d writes: %w", w.id, got[w.id], err)
		}
		if got[w.id] < low[w.id] {
			return nil, fmt.Errorf("writer %d goes back from %d to %d writes", w.id, low[w.id], got[w.id])
		}
	}
	return got, r.sharedPossible(images, got)
}

// ownCut is the least k, from low on, for which a writer's own blocks are what
// its first k writes leave.
func (r *prefixRun) ownCut(w *writer, image []byte, low int) (int, error) {
	k := low
	for b := (w.id % r.perVol) * ownBlocks; b < (w.id%r.perVol+1)*ownBlocks; b++ {
		wid, n, err := readStamp(image[b*stampBytes : (b+1)*stampBytes])
		if err != nil {
			return 0, fmt.Errorf("block %d: %w", b, err)
		}
		if n > 0 && wid != w.id {
			return 0, fmt.Errorf("block %d holds a write of writer %d", b, wid)
		}
		k = max(k, n)
	}
	for ; k <= len(w.writes); k++ {
		if r.ownMatches(w, image, k) == nil {
			return k, nil
		}
	}
	return 0, fmt.Errorf("its blocks are what no prefix of its writes from the first %d on leaves", low)
}

// ownMatches reports whether a writer's own blocks are what its first k writes
// leave.
func (r *prefixRun) ownMatches(w *writer, image []byte, k int) error {
	first := (w.id % r.perVol) * ownBlocks
	var want [ownBlocks]int
	for n := 1; n <= k; n++ {
		x := w.writes[n-1]
		for _, b := range x.blocks {
			if b >= first && b < first+ownBlocks {
				want[b-first] = n
				if x.zero {
					want[b-first] = 0
				}
			}
		}
	}
	for i, n := range want {
		b := first + i
		_, have, err := readStamp(image[b*stampBytes : (b+1)*stampBytes])
		if err != nil {
			return err
		}
		if have != n {
			return fmt.Errorf("block %d holds write %d, not %d", b, have, n)
		}
	}
	return nil
}

// sharedPossible checks blocks that several writers write: what a block holds
// must be in the cut, and nothing in the cut may have begun after it ended.
func (r *prefixRun) sharedPossible(images [][]byte, got cut) error {
	for v := range r.volumes {
		for b := r.perVol * ownBlocks; b < r.perVol*ownBlocks+shareBlocks; b++ {
			wid, n, err := readStamp(images[v][b*stampBytes : (b+1)*stampBytes])
			if err != nil {
				return err
			}
			ended := int64(0) // zeroes: from the beginning, or some trim
			if n > 0 {
				if n > got[wid] {
					return fmt.Errorf("volume %d, block %d holds write %d of writer %d, of whom only %d are in", v, b, n, wid, got[wid])
				}
				if ended = r.writers[wid].writes[n-1].end; ended == 0 {
					continue
				}
			} else if r.trimmed(v, b, images, got) {
				continue
			}
			for _, w := range r.writers {
				if w.volume != v {
					continue
				}
				for i, x := range w.writes[:got[w.id]] {
					for _, y := range x.blocks {
						if y == b && x.start > ended && (w.id != wid || i+1 != n) {
							return fmt.Errorf("volume %d, block %d holds write %d of writer %d, and write %d of writer %d came later", v, b, n, wid, i+1, w.id)
						}
					}
				}
			}
		}
	}
	return nil
}

// trimmed reports whether some trim that may be in the cut may be the newest on
// a block. Writes that leave no mark on their writer's own blocks may be in the
// cut although they were not counted.
func (r *prefixRun) trimmed(v, b int, images [][]byte, got cut) bool {
	for _, w := range r.writers {
		if w.volume != v {
			continue
		}
		high := got[w.id]
		for high < len(w.writes) && r.ownMatches(w, images[v], high+1) == nil {
			high++
		}
		for _, x := range w.writes[:high] {
			for _, y := range x.blocks {
				if y == b && x.zero {
					return true
				}
			}
		}
	}
	return false
}

// TestEveryCheckpointIsAPrefix runs writers, agents that die, and the checker.
func TestEveryCheckpointIsAPrefix(t *testing.T) {
	seconds := 12
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
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			urls, env := c.stores(t)
			r := &prefixRun{t: t, h: newRepo(t, urls, env), volumes: []string{"a", "b"}, perVol: 2}
			r.run(urls, env, time.Duration(seconds)*time.Second, c.kills)
		})
	}
}

func folders(n int) func(t *testing.T) (urls, env []string) {
	return func(t *testing.T) (urls, env []string) {
		for i := range n {
			urls = append(urls, "file://"+filepath.Join(t.TempDir(), fmt.Sprint(i)))
		}
		return urls, nil
	}
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

func (r *prefixRun) run(urls, env []string, d time.Duration, kills bool) {
	t := r.t
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
	for _, v := range r.volumes {
		args = append(args, "--volume", fmt.Sprintf("name=%s,path=%s,size=%d,group=g", v, filepath.Join(dir, v), r.volumeBytes()))
	}
	ctx := testContext(t)
	a := r.h.start(args...)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range len(r.volumes) * r.perVol {
		w := &writer{id: i, volume: i / r.perVol}
		r.writers = append(r.writers, w)
		wr := rand.New(rand.NewPCG(seed, uint64(i)+2))
		wg.Go(func() { w.run(ctx, r, wr, stop) })
	}
	deaths := 0
	for end := time.Now().Add(d); time.Now().Before(end); {
		if !kills {
			time.Sleep(time.Until(end))
			break
		}
		time.Sleep(time.Duration(200+rng.IntN(1200)) * time.Millisecond)
		a.kill()
		deaths++
		a = r.h.start(args...)
	}
	close(stop)
	wg.Wait()
	a.stop()
	a = r.h.start(append(args, "--drain", "stores")...)
	a.stop()
	defer func() {
		if t.Failed() {
			t.Logf("agents said:\n%s", r.h.said())
		}
	}()
	commits := r.checkAll(urls, env)
	total, again := 0, 0
	for _, w := range r.writers {
		total += len(w.writes)
		for _, x := range w.writes {
			again += x.again
		}
	}
	t.Logf("%d commits checked, %d writes by %d writers, agent killed %d times, %d writes sent again", commits, total, len(r.writers), deaths, again)
	if commits < 50 {
		t.Errorf("only %d commits: the run shows nothing", commits)
	}
}

// checkAll restores every checkpoint and checks it.
func (r *prefixRun) checkAll(urls, env []string) int {
	t := r.t
	ctx := testContext(t)
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		t.Setenv(k, v)
	}
	identity := ""
	for _, kv := range r.h.env {
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
	for _, u := range urls {
		s, err := stores.Open(ctx, u, stores.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		all = append(all, s)
	}
	rp, err := repo.Open(ctx, all, id.RootPublic)
	if err != nil {
		t.Fatal(err)
	}
	h, va, err := restorer.Find(ctx, restorer.Config{Repo: rp, Ring: crypt.NewRing(id)}, r.volumes[0])
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	low := make(cut, len(r.writers))
	points := h.Checkpoints(va)
	for i, p := range points {
		images := make([][]byte, len(r.volumes))
		for j, name := range r.volumes {
			v, ok := h.Volume(name)
			if !ok {
				t.Fatalf("volume %s is not in the history", name)
			}
			im, err := restorer.OpenImageAt(ctx, h, restorer.Point{Checkpoint: p, Volume: v, Branch: h.Group.Branch, Hash: h.Entries[p.N-1].Hash})
			if err != nil {
				t.Fatalf("checkpoint %d (seq %d): %v", i, p.Seq, err)
			}
			images[j] = make([]byte, v.SizeBytes)
			if err := im.ReadAt(ctx, images[j], 0); err != nil {
				t.Fatalf("checkpoint %d (seq %d): %v", i, p.Seq, err)
			}
		}
		got, err := r.check(images, low, p.Time.UnixNano())
		if err != nil {
			t.Fatalf("checkpoint %d of %d (entry %d, seq %d): %v", i, len(points), p.N, p.Seq, err)
		}
		sum, again := 0, 0
		for _, w := range r.writers {
			sum += got[w.id]
			for _, x := range w.writes[:got[w.id]] {
				again += x.again
			}
		}
		// A write that was sent again may have one seq or two; and a cut found
		// from blocks may miss writes that later ones in it have covered.
		if uint64(sum) > uint64(p.Seq) {
			t.Fatalf("checkpoint %d: seq %d, and %d writes are in it", i, p.Seq, sum)
		}
		low = got
	}
	// Everything that was answered is in the last checkpoint.
	for _, w := range r.writers {
		answered := len(w.writes)
		if answered > 0 && w.writes[answered-1].end == 0 {
			answered--
		}
		if low[w.id] < answered && r.ownCovers(w, low[w.id], answered) {
			t.Fatalf("writer %d: %d writes were answered, and the last checkpoint has only %d", w.id, answered, low[w.id])
		}
	}
	return len(points)
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
