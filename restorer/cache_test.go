package restorer_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"drc/internal/block"
	"drc/internal/diskcache"
	"drc/internal/format"
	"drc/internal/object/fault"
	"drc/internal/vfs"
	"drc/restorer"
)

var _ restorer.Cache = (*diskcache.Cache)(nil)

// keep is a Cache in memory, which may return something else than what it was given.
type keep struct {
	mu    sync.Mutex
	m     map[keepKey][]byte
	spoil func(k keepKey, value []byte) []byte // nil: what it was given is returned
	drops map[uint8]int                        // by kind
	hits  map[uint8]int
}

type keepKey struct {
	kind uint8
	name [32]byte
}

func newKeep() *keep {
	return &keep{m: map[keepKey][]byte{}, drops: map[uint8]int{}, hits: map[uint8]int{}}
}

func (c *keep) Get(kind uint8, name [32]byte) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := keepKey{kind, name}
	value, ok := c.m[k]
	if !ok {
		return nil, false
	}
	c.hits[kind]++
	if c.spoil != nil {
		return c.spoil(k, value), true
	}
	return slices.Clone(value), true
}

func (c *keep) Put(kind uint8, name [32]byte, sealed []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m[keepKey{kind, name}] = slices.Clone(sealed)
}

func (c *keep) Drop(kind uint8, _ [32]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drops[kind]++ // and keeps it: a cache may return anything
}

// kinds are how many values of each kind there are.
func (c *keep) kinds() map[uint8]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[uint8]int{}
	for k := range c.m {
		out[k.kind]++
	}
	return out
}

// other is a value of another name, of the same kind or of any.
func (c *keep) other(than keepKey, sameKind bool) []byte {
	for k, value := range c.m { // in random order
		if k != than && (!sameKind || k.kind == than.kind) {
			return slices.Clone(value)
		}
	}
	return nil
}

// cached opens the history anew, as another process would, with a cache.
func (w *world) cached(c restorer.Cache) *restorer.History {
	w.t.Helper()
	cfg := w.config()
	cfg.Cache = c
	h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
	w.must(err)
	return h
}

// diskCache opens the cache in a directory.
func (w *world) diskCache(dir string) *diskcache.Cache {
	w.t.Helper()
	c, err := diskcache.Open(diskcache.Options{Dir: dir, LimitBytes: 64 << 20})
	w.must(err)
	return c
}

// asked counts and forgets the requests for parts of objects, and for whole segments.
func (w *world) asked() (segments, manifests, digests int) {
	for _, f := range w.faults {
		segments += f.Count(fault.GetRange, "*/segments/*") + f.Count(fault.Get, "*/segments/*")
		manifests += f.Count(fault.GetRange, "*/manifests/*") + f.Count(fault.Get, "*/manifests/*")
		digests += f.Count(fault.GetRange, format.DigestPrefix(w.groupID)+"*")
		f.Forget()
	}
	return segments, manifests, digests
}

// What was read once is read again without asking the stores for it: by an image of
// another process, and by one of another point.
func TestCache_SecondStartAsksForNoData(t *testing.T) {
	for stores := 1; stores <= 3; stores++ {
		t.Run(fmt.Sprint(stores), func(t *testing.T) {
			t.Parallel()
			w := everyKind(t, stores)
			newest := block.Seq(len(w.journal.writes))
			want := w.model(0, newest)
			dir := t.TempDir()
			for round := range 3 {
				c := w.diskCache(dir)
				w.asked()
				w.checkPoint(w.cached(c), "v0", "latest", want)
				segments, manifests, _ := w.asked()
				t.Logf("start %d: %d requests for segments, %d for manifests, %+v", round, segments, manifests, c.Stats())
				if first := round == 0; first != (segments > 0) || first != (manifests > 0) {
					t.Errorf("start %d: %d requests for segments, %d for manifests", round, segments, manifests)
				}
				w.must(c.Close())
			}
			c := w.diskCache(dir)
			w.check(w.cached(c)) // each point
			w.must(c.Close())
		})
	}
}

// Whatever the cache returns, what is read is right, and what is no good is dropped.
func TestCache_ReturnsAnything(t *testing.T) {
	t.Parallel()
	w := everyKind(t, 2)
	want := w.model(0, block.Seq(len(w.journal.writes)))
	c := newKeep()
	w.checkPoint(w.cached(c), "v0", "latest", want)
	for kind := uint8(1); kind <= 4; kind++ {
		if c.kinds()[kind] == 0 {
			t.Fatalf("there is nothing of kind %d: %v", kind, c.kinds())
		}
	}
	for k, value := range c.m {
		if i := bytes.Index(value, want[:64]); i >= 0 {
			t.Fatalf("a value of kind %d holds content in the clear", k.kind)
		}
	}
	flip := func(at func(n int) int) func(keepKey, []byte) []byte {
		return func(_ keepKey, p []byte) []byte {
			p = slices.Clone(p)
			p[at(len(p))] ^= 1 << w.rng.IntN(8)
			return p
		}
	}
	for name, spoil := range map[string]func(k keepKey, p []byte) []byte{
		"first byte":    flip(func(int) int { return 0 }),
		"last byte":     flip(func(n int) int { return n - 1 }),
		"any bit":       flip(func(n int) int { return w.rng.IntN(n) }),
		"noise":         func(_ keepKey, p []byte) []byte { return fill(w.rng, make([]byte, len(p))) },
		"zeroes":        func(_ keepKey, p []byte) []byte { return make([]byte, len(p)) },
		"ones":          func(_ keepKey, p []byte) []byte { return bytes.Repeat([]byte{0xff}, len(p)) },
		"truncated":     func(_ keepKey, p []byte) []byte { return slices.Clone(p[:w.rng.IntN(len(p))]) },
		"empty":         func(keepKey, []byte) []byte { return nil },
		"longer":        func(_ keepKey, p []byte) []byte { return append(slices.Clone(p), 0) },
		"of other name": func(k keepKey, _ []byte) []byte { return c.other(k, true) },
		"of other kind": func(k keepKey, _ []byte) []byte { return c.other(k, false) },
	} {
		c.mu.Lock()
		c.spoil, c.drops = spoil, map[uint8]int{}
		c.mu.Unlock()
		h := w.cached(c)
		w.checkPoint(h, "v0", "latest", want)
		for kind := uint8(1); kind <= 4; kind++ {
			if c.drops[kind] == 0 {
				t.Errorf("%s: nothing of kind %d was dropped", name, kind)
			}
		}
		im, err := restorer.OpenImage(w.ctx, w.cached(c), "v0", "latest")
		w.must(err)
		target := filepath.Join(t.TempDir(), "volume")
		_, err = restorer.Restore(w.ctx, im, target, restorer.Options{})
		w.must(err)
		got, err := os.ReadFile(target)
		w.must(err)
		w.same("restored with "+name, got, want)
		if len(h.Damage()) != 0 {
			t.Errorf("%s: the stores are blamed: %v", name, h.Damage())
		}
	}
}

// Bytes that change on the disk do not change what is read.
func TestCache_DamagedOnDisk(t *testing.T) {
	t.Parallel()
	w := everyKind(t, 1)
	want := w.model(0, block.Seq(len(w.journal.writes)))
	dir := t.TempDir()
	for range scaled(10, 200) {
		c := w.diskCache(dir)
		w.checkPoint(w.cached(c), "v0", "latest", want)
		w.must(c.Close())
		slabs, err := filepath.Glob(filepath.Join(dir, "*.slab"))
		w.must(err)
		if len(slabs) == 0 {
			t.Fatal("nothing is on the disk")
		}
		for _, name := range slabs {
			p, err := os.ReadFile(name)
			w.must(err)
			for range 1 + w.rng.IntN(200) {
				p[w.rng.IntN(len(p))] ^= byte(1 + w.rng.IntN(255))
			}
			if w.rng.IntN(4) == 0 {
				p = p[:w.rng.IntN(len(p))]
			}
			w.must(os.WriteFile(name, p, 0o600))
		}
	}
}

// A disk that is full, or becomes so, or fails, costs requests and nothing else.
func TestCache_FullDisk(t *testing.T) {
	t.Parallel()
	w := everyKind(t, 2)
	want := w.model(0, block.Seq(len(w.journal.writes)))
	for _, room := range []int64{0, 100, 64 << 10, 512 << 10} {
		fsys := vfs.NewMem()
		w.must(fsys.MkdirAll("/cache"))
		fsys.SetLimit("/cache", room)
		c, err := diskcache.Open(diskcache.Options{Dir: "/cache", LimitBytes: 64 << 20, FS: fsys})
		w.must(err)
		for range 2 {
			w.checkPoint(w.cached(c), "v0", "latest", want)
		}
		w.must(c.Close())
		w.checkPoint(w.cached(c), "v0", "latest", want) // closed too early
	}
}

// Who reads all once puts no content into the cache, and uses what is there.
func TestCache_OnePassLeavesItAlone(t *testing.T) {
	t.Parallel()
	w := everyKind(t, 2)
	want := w.model(0, block.Seq(len(w.journal.writes)))
	c := newKeep()
	ways := map[string]func(im *restorer.Image) []byte{
		"restore": func(im *restorer.Image) []byte {
			target := filepath.Join(t.TempDir(), "volume")
			_, err := restorer.Restore(w.ctx, im, target, restorer.Options{})
			w.must(err)
			got, err := os.ReadFile(target)
			w.must(err)
			return got
		},
		"one pass": func(im *restorer.Image) []byte {
			got := make([]byte, len(want))
			w.must(im.OnePass().ReadAt(w.ctx, got, 0))
			return got
		},
	}
	for name, read := range ways {
		im, err := restorer.OpenImage(w.ctx, w.cached(c), "v0", "latest")
		w.must(err)
		w.same(name, read(im), want)
		if k := c.kinds(); k[1] != 0 || k[2] != 0 || k[3] == 0 {
			t.Errorf("%s: the cache has %v", name, k)
		}
	}
	w.checkPoint(w.cached(c), "v0", "latest", want)
	w.asked()
	for name, read := range ways {
		im, err := restorer.OpenImage(w.ctx, w.cached(c), "v0", "latest")
		w.must(err)
		w.same(name, read(im), want)
		if segments, manifests, _ := w.asked(); segments+manifests != 0 {
			t.Errorf("%s with a warm cache: %d requests for segments, %d for manifests", name, segments, manifests)
		}
	}
}

// What a history reads of its digests is in the cache too, and verified.
func TestCache_DigestPages(t *testing.T) {
	w := eventful(t, 1, 600)
	all := func(h *restorer.History) (hashes []format.Hash) {
		w.must(h.Each(w.ctx, 1, func(e *restorer.Entry) bool {
			hashes = append(hashes, e.Hash)
			return true
		}))
		return hashes
	}
	want := all(w.history())
	c := newKeep()
	var asked [3]int
	for round := range asked {
		c.mu.Lock()
		if round == 2 {
			c.spoil = func(k keepKey, _ []byte) []byte { return c.other(k, true) }
		}
		c.mu.Unlock()
		w.asked()
		h := w.cached(c)
		if got := all(h); !slices.Equal(got, want) {
			t.Fatalf("start %d: the entries are others", round)
		}
		_, _, asked[round] = w.asked()
	}
	t.Logf("requests for parts of digests: %v; in the cache: %v", asked, c.kinds())
	if asked[1] >= asked[0] || asked[2] < asked[0] {
		t.Errorf("requests for parts of digests: %v", asked)
	}
}

// However many images are open, what they hold is bounded once for all, and what one
// has fetched is there for the others.
func TestMemory_IsSharedByImages(t *testing.T) {
	t.Parallel()
	w := everyKind(t, 2)
	const limit = 1 << 20
	h := w.sharing(restorer.SmallMemory(limit))
	v, _ := h.Volume("v0")
	points := checkpoints(t, h, v)
	var images []*restorer.Image
	for _, p := range points {
		images = append(images, w.checkPoint(h, "v0", "seq:"+p.Seq.String(), w.model(0, p.Seq)))
	}
	for _, im := range images {
		w.must(im.ReadAt(w.ctx, w.buffer(im.Geometry().SizeBytes), 0))
	}
	for kind, held := range h.Config().Memory.Held() {
		t.Logf("%s: %d bytes", kind, held)
		if held > limit {
			t.Errorf("%d images hold %d bytes of %s, and the limit is %d", len(images), held, kind, limit)
		}
	}

	// With a Memory of the usual size: what the first has fetched.
	h = w.sharing(restorer.NewMemory())
	want := w.model(0, points[len(points)-1].Seq)
	w.checkPoint(h, "v0", "latest", want)
	held := h.Config().Memory.Held()
	w.asked()
	again := w.sharing(h.Config().Memory) // another history
	w.checkPoint(again, "v0", "latest", want)
	if segments, _, _ := w.asked(); segments != 0 {
		t.Errorf("%d requests for segments that another image has read", segments)
	}
	for kind, n := range h.Config().Memory.Held() {
		if n != held[kind] && kind != "windows" { // these are an image's own
			t.Errorf("%s: %d bytes, and %d with another image of the same", kind, held[kind], n)
		}
	}
}

// sharing opens the history anew, with a Memory.
func (w *world) sharing(m *restorer.Memory) *restorer.History {
	w.t.Helper()
	cfg := w.config()
	cfg.Memory = m
	h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
	w.must(err)
	return h
}
