package restorer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/format/formattest"
	"drc/internal/object"
	"drc/internal/object/dir"
	"drc/internal/object/mem"
	"drc/internal/repo"
	"drc/restorer"
	"drc/segmenter"
)

// oldRepository is testdata/repos/v1/<name>/expected.json: what a repository
// that some release wrote must give in all later ones.
type oldRepository struct {
	Repository block.ID      `json:"repository"`
	Group      block.GroupID `json:"group"`
	Entries    int           `json:"entries"`
	Volumes    []oldVolume   `json:"volumes"`
}

type oldVolume struct {
	Name      string     `json:"name"`
	SizeBytes int64      `json:"size_bytes"`
	Points    []oldPoint `json:"points"`
	Gaps      []string   `json:"gaps,omitempty"`
}

// oldPoint is a checkpoint and the SHA-256 of the whole volume there.
type oldPoint struct {
	Seq    block.Seq   `json:"seq"`
	Names  []string    `json:"names,omitempty"`
	SHA256 format.Hash `json:"sha256"`
}

// TestOldRepositories restores what older releases wrote: all that was written
// once must be readable for ever. Repositories are only ever added; with
// -update, those of the present release are made if they are missing.
func TestOldRepositories(t *testing.T) {
	root := formattest.Path(t, "repos", "v1")
	if _, err := os.Stat(filepath.Join(root, "one-store")); os.IsNotExist(err) && formattest.Update() {
		generateOneStore(t, filepath.Join(root, "one-store"))
	}
	found, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range found {
		if e.IsDir() {
			t.Run(e.Name(), func(t *testing.T) { checkOldRepository(t, filepath.Join(root, e.Name())) })
		}
	}
}

func checkOldRepository(t *testing.T, folder string) {
	ctx := t.Context()
	var want oldRepository
	text, err := os.ReadFile(filepath.Join(folder, "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(filepath.Join(folder, "identity"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := crypt.ParseIdentity("identity", file)
	if err != nil {
		t.Fatal(err)
	}
	store, err := dir.Open(filepath.Join(folder, "store"), dir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	// A copy without the first shard of each segment must give the same.
	poor := mem.New(mem.Options{Name: "poor"})
	copyStore(t, poor, store, func(name string) bool { return !strings.HasSuffix(name, ".00") })
	for _, s := range []object.Store{store, poor} {
		r, err := repo.Open(ctx, []object.Store{s}, id.RootPublic)
		if err != nil {
			t.Fatal(err)
		}
		if r.ID != want.Repository {
			t.Errorf("%s is repository %s", s.URL(), r.ID)
		}
		h, err := restorer.OpenHistory(ctx, restorer.Config{Repo: r, Ring: crypt.NewRing(id), Patience: -1}, want.Group)
		if err != nil {
			t.Fatal(err)
		}
		if int(h.N()) != want.Entries || h.Unconfirmed() || len(h.Warnings) > 0 {
			t.Errorf("%s: %d entries, unconfirmed %t, warnings %q", s.URL(), int(h.N()), h.Unconfirmed(), h.Warnings)
		}
		for _, v := range want.Volumes {
			checkOldVolume(t, h, v)
		}
		if s == object.Store(store) && len(h.Damage()) > 0 {
			t.Errorf("damage: %v", h.Damage())
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
}

func checkOldVolume(t *testing.T, h *restorer.History, want oldVolume) {
	v, ok := h.Volume(want.Name)
	if !ok || v.SizeBytes != want.SizeBytes {
		t.Fatalf("volume %s: %+v", want.Name, v)
	}
	points := checkpoints(t, h, v)
	if len(points) != len(want.Points) {
		t.Fatalf("volume %s has %d checkpoints, not %d", want.Name, len(points), len(want.Points))
	}
	for i, p := range want.Points {
		if points[i].Seq != p.Seq || !slices.Equal(points[i].Names, p.Names) {
			t.Errorf("checkpoint %d of volume %s: %+v", i, want.Name, points[i])
		}
		for _, at := range append([]string{"seq:" + p.Seq.String()}, p.Names...) {
			im, err := restorer.OpenImage(t.Context(), h, want.Name, at)
			if err != nil {
				t.Fatal(err)
			}
			content := make([]byte, v.SizeBytes)
			if err := im.ReadAt(t.Context(), content, 0); err != nil {
				t.Fatal(err)
			}
			if got := format.HashOf(content); got != p.SHA256 {
				t.Errorf("volume %s at %s has SHA-256 %s, not %s", want.Name, at, got, p.SHA256)
			}
		}
	}
	var gaps []string
	for _, g := range h.Gaps(v) {
		gaps = append(gaps, describeGap(g))
	}
	if !slices.Equal(gaps, want.Gaps) {
		t.Errorf("volume %s has gaps %q, not %q", want.Name, gaps, want.Gaps)
	}
}

func describeGap(g restorer.Gap) string {
	return fmt.Sprintf("after seq %s until %s, %s", g.After, g.Until, g.Reason)
}

func copyStore(t *testing.T, to, from object.Store, take func(name string) bool) {
	t.Helper()
	for _, name := range names(t, from, "") {
		if !take(name) {
			continue
		}
		body, _, err := from.Get(t.Context(), name, format.MaxManifestBytes, nil)
		if err == nil {
			_, err = to.Put(t.Context(), name, body)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// generator writes a repository and keeps what its volumes shall hold.
type generator struct {
	*world
	contents [][]byte
	broken   bool // volume 1 is in a gap
	want     oldRepository
}

func (g *generator) change(v block.VolumeIndex, off int64, data []byte) {
	g.write(v, off, data)
	copy(g.contents[v][off:], data)
}

func (g *generator) clear(v block.VolumeIndex, e block.Extent) {
	g.zero(v, e)
	clear(g.contents[v][e.Off:e.End()])
}

// checkpoint cuts a batch and notes what is expected there.
func (g *generator) checkpoint(names ...string) {
	seq := g.journal.Captured()
	for _, n := range names {
		g.w.seg.Checkpoint(n, g.clock.now())
	}
	g.cut()
	for i := range g.want.Volumes {
		v := &g.want.Volumes[i]
		if g.broken && i == 1 {
			continue
		}
		p := oldPoint{Seq: seq, Names: names, SHA256: format.HashOf(g.contents[i])}
		if n := len(v.Points); n > 0 && v.Points[n-1].Seq == seq {
			v.Points[n-1] = p
		} else {
			v.Points = append(v.Points, p)
		}
	}
}

// ReadAt and Allocation make a volume's content the backing of a resync.
func (g *generator) ReadAt(_ context.Context, p []byte, off int64) error {
	copy(p, g.contents[1][off:])
	return nil
}

func (g *generator) Allocation(_ context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	visit(e, false)
	return nil
}

// generateOneStore writes a repository with all that the first release can say:
// inline and sharded segments, an inline and a referenced manifest, zeroes,
// duplicates, a named checkpoint, three epochs and key sets, a range that
// overlaps, a gap with partial entries.
func generateOneStore(t *testing.T, folder string) {
	w := newWorld(t, options{stores: 1, profile: format.Profile{Data: 2, Parity: 1}, volumes: []int64{96 << 10, 4 << 20}, seed: 7})
	g := &generator{world: w, want: oldRepository{Repository: w.repo.ID, Group: w.groupID}}
	for _, v := range w.volumes {
		g.contents = append(g.contents, make([]byte, v.SizeBytes))
		g.want.Volumes = append(g.want.Volumes, oldVolume{Name: v.Name, SizeBytes: v.SizeBytes})
	}
	random := rand.NewChaCha8([32]byte{1})
	noise := func(n int) []byte {
		p := make([]byte, n)
		_, _ = random.Read(p)
		return p
	}
	text := bytes.Repeat([]byte("all that was written once must be readable for ever. "), 1000)

	x := w.start()
	g.change(0, 4096, text[:8192])
	g.checkpoint()
	large := noise(150 << 10)
	g.change(1, 1<<20, large)
	g.change(1, 512, text)
	g.checkpoint("with-noise")
	g.clear(1, block.Extent{Off: 1<<20 + 8192, Len: 65536})
	g.change(1, 3<<20, large) // known chunks
	g.change(0, 90<<10, noise(1024))
	g.checkpoint()
	x.stop()

	// The second start cuts the last write again, with later ones.
	w.journal.durable--
	x = w.start()
	w.journal.durable++
	g.change(0, 0, text[100:4196])
	g.checkpoint()
	for i := range 3000 { // so many extents that the manifest goes out as an object
		g.change(1, 1<<20+int64(i)*1024, bytes.Repeat([]byte{byte(i), byte(i >> 8), 'x', 'y'}, 128))
	}
	g.checkpoint("many-extents")
	x.stop()

	// Volume 1 is changed behind the agent's back.
	after := w.journal.Captured()
	copy(g.contents[1][2<<20:], noise(20<<10))
	g.broken = true
	x = w.start()
	x.seg.AddResync(segmenter.Resync{
		Volume: 1, Backing: g, Remaining: []block.Extent{{Len: 4 << 20}}, After: after,
		Begin: &format.GapBegin{Volume: 1, After: after, Reason: format.GapForeign},
	})
	g.change(1, 0, noise(512))
	g.change(0, 8192, noise(512))
	g.checkpoint()
	x.seg.StartResync(1, w)
	g.broken = false
	g.checkpoint()
	g.want.Volumes[1].Gaps = []string{fmt.Sprintf("after seq %s until %s, %s", after, w.journal.Captured(), format.GapForeign)}
	g.clear(0, block.Extent{Len: 96 << 10})
	g.checkpoint("the-end")
	x.stop()

	g.want.Entries = int(w.history().N())
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	store, err := dir.Open(filepath.Join(folder, "store"), dir.Options{Create: true})
	w.must(err)
	copyStore(t, store, w.stores[0], func(string) bool { return true })
	expected, err := json.MarshalIndent(g.want, "", "  ")
	w.must(err)
	w.must(os.WriteFile(filepath.Join(folder, "expected.json"), append(expected, '\n'), 0o644))
	w.must(os.WriteFile(filepath.Join(folder, "identity"), w.id.Encode(time.Unix(1_700_000_000, 0)), 0o600))
}
