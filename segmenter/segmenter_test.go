package segmenter_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/segmenter"
)

// journal is a Source in memory.
type journal struct {
	mu      sync.Mutex
	writes  []block.Write
	durable block.Seq
	bytes   int64
	onFlush func() // what happens while a batch is being cut
}

func (j *journal) add(v block.VolumeIndex, off int64, data []byte) block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	w := block.Write{Seq: block.Seq(len(j.writes) + 1), Volume: v, Kind: block.KindData, Time: int64(len(j.writes) + 1),
		Extent: block.Extent{Off: off, Len: int64(len(data))}, Data: data}
	if len(bytes.Trim(data, "\x00")) == 0 {
		w.Kind, w.Data = block.KindZero, nil
	}
	j.writes = append(j.writes, w)
	j.bytes += w.Extent.Len
	return w.Seq
}

func (j *journal) Captured() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return block.Seq(len(j.writes))
}

func (j *journal) CapturedBytes() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.bytes
}

func (j *journal) WaitCaptured(ctx context.Context, after block.Seq) error {
	if j.Captured() > after {
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}

func (j *journal) Flush(context.Context) error {
	j.mu.Lock()
	j.durable = block.Seq(len(j.writes))
	f := j.onFlush
	j.onFlush = nil
	j.mu.Unlock()
	if f != nil {
		f()
	}
	return nil
}

func (j *journal) Durable() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.durable
}

func (j *journal) Read(from, upTo block.Seq, limit int64, visit func(block.Write) error) (block.Seq, error) {
	j.mu.Lock()
	writes := j.writes[from-1 : upTo]
	j.mu.Unlock()
	for _, w := range writes {
		if limit <= 0 {
			return w.Seq, nil
		}
		limit -= w.Extent.Len
		if err := visit(w); err != nil {
			return w.Seq, err
		}
	}
	return upTo + 1, nil
}

// batches is a Sink that keeps what it gets.
type batches struct{ all []*batch.Batch }

func (b *batches) Put(_ context.Context, x *batch.Batch) error {
	b.all = append(b.all, x)
	return nil
}

// nothing is an Index that knows no chunk.
type nothing struct{}

func (nothing) Lookup(crypt.ChunkID) (segmenter.Location, bool) { return segmenter.Location{}, false }

func newSegmenter(j *journal, sink segmenter.Sink, batchBytes int64) *segmenter.Segmenter {
	return segmenter.New(config(batchBytes), j, sink, nothing{})
}

func config(batchBytes int64) segmenter.Config {
	return segmenter.Config{
		Group: format.Group{Polynomial: 0x3DA3358B4DC173, MinChunk: segmenter.DefaultMinChunk, AvgBits: segmenter.DefaultAvgBits,
			MaxChunk: segmenter.DefaultMaxChunk},
		Profile: format.Profile{Data: 4, Parity: 1}, Keys: crypttest.Keys(), Next: 1, BatchBytes: batchBytes,
	}
}

func step(t *testing.T, s *segmenter.Segmenter) bool {
	t.Helper()
	worked, err := s.Step(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return worked
}

func data(seed uint64, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)}).Read(p)
	return p
}

func TestStep_NothingToDoWithoutWrites(t *testing.T) {
	out := &batches{}
	s := newSegmenter(&journal{}, out, 0)
	if step(t, s) || len(out.all) != 0 {
		t.Errorf("a batch was cut of nothing: %+v", out.all)
	}
}

// TestStep_NewestWins: overwritten data is dropped, neighbours are joined, and
// zeroes are extents without a chunk.
func TestStep_NewestWins(t *testing.T) {
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 0)
	j.add(0, 0, data(1, 8192))
	j.add(0, 4096, data(2, 4096)) // over the second block
	j.add(0, 8192, data(3, 4096)) // a neighbour
	j.add(0, 65536, make([]byte, 8192))
	j.add(1, 0, data(4, 4096))
	if !step(t, s) {
		t.Fatal("no batch")
	}
	b := out.all[0]
	if b.From != 1 || b.To != 5 || len(b.Volumes) != 2 {
		t.Fatalf("batch of seqs %d to %d with %d volumes", b.From, b.To, len(b.Volumes))
	}
	v := b.Volumes[0].Extents
	if len(v) != 2 || v[0].Extent != (block.Extent{Off: 0, Len: 12288}) || v[0].Zero {
		t.Errorf("the three writes became %+v, not one run", v)
	}
	if last := v[len(v)-1]; !last.Zero || last.Extent != (block.Extent{Off: 65536, Len: 8192}) {
		t.Errorf("the zeroes became %+v", last)
	}
}

// TestCheckpoint_BatchEndsThere: a batch ends exactly at a named seq, also when
// the name is asked for while a batch is being cut.
func TestCheckpoint_BatchEndsThere(t *testing.T) {
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 0)
	j.add(0, 0, data(1, 4096))
	j.add(0, 4096, data(2, 4096))
	early := s.Checkpoint("early", time.Unix(0, 1))
	j.add(0, 8192, data(3, 4096))
	late := block.Seq(0)
	j.onFlush = func() {
		late = s.Checkpoint("late", time.Unix(0, 2))
		j.add(0, 12288, data(4, 4096)) // behind the name
		j.mu.Lock()
		j.durable = block.Seq(len(j.writes))
		j.mu.Unlock()
	}
	for step(t, s) {
	}
	named := map[string]block.Seq{}
	next := block.Seq(1)
	for _, b := range out.all {
		if b.From != next {
			t.Errorf("a batch begins at %d, not %d", b.From, next)
		}
		next = b.To + 1
		for _, c := range b.Items.Checkpoints {
			if c.Seq != b.To {
				t.Errorf("%s names seq %d in a batch that ends at %d", c.Name, c.Seq, b.To)
			}
			named[c.Name] = c.Seq
		}
	}
	if named["early"] != early || named["late"] != late || early != 2 || late != 3 || next != 5 {
		t.Errorf("names are at %v, batches end at %d", named, next-1)
	}
}

// TestStep_BatchesStayWithinTheirSize: a long journal becomes several batches
// without a hole, and the time of one that is full is that of its last write.
func TestStep_BatchesStayWithinTheirSize(t *testing.T) {
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 1<<20)
	for i := range 64 {
		j.add(0, int64(i)<<16, data(uint64(i), 1<<16))
	}
	for step(t, s) {
	}
	next := block.Seq(1)
	for i, b := range out.all {
		if b.From != next || b.Bytes > 1<<20+1<<16 {
			t.Errorf("batch %d: seqs %d to %d, %d bytes", i, b.From, b.To, b.Bytes)
		}
		if i < len(out.all)-1 && b.Items.Range.Time != int64(b.To) {
			t.Errorf("batch %d is full and has time %d, not that of its last write", i, b.Items.Range.Time)
		}
		next = b.To + 1
	}
	if next != 65 || len(out.all) < 4 {
		t.Errorf("%d batches up to %d", len(out.all), next-1)
	}
}

// disk is a Backing in memory; during the read of region at it runs change.
type disk struct {
	content []byte
	at      int64
	change  func()
}

func (d *disk) ReadAt(_ context.Context, p []byte, off int64) error {
	if d.change != nil && off == d.at {
		d.change()
		d.change = nil
	}
	copy(p, d.content[off:])
	return nil
}

func (d *disk) Allocation(_ context.Context, e block.Extent, visit func(block.Extent, bool) bool) error {
	visit(e, false)
	return nil
}

// known is a Baseline.
type known []manifest.Extent

func (k known) Extents(_ context.Context, _ block.VolumeIndex, e block.Extent) (out []manifest.Extent, _ error) {
	for _, x := range k {
		if e.Contains(x.Extent) {
			out = append(out, x)
		}
	}
	return out, nil
}

// TestResync_WriteDuringTheReadIsInTheSameBatch: a region that changes while it
// is read goes into a batch with the write that changed it.
func TestResync_WriteDuringTheReadIsInTheSameBatch(t *testing.T) {
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 0)
	d := &disk{content: data(1, 12<<20), at: 4 << 20}
	p := data(2, 4096)
	d.change = func() { // a client writes into the region that is being read
		j.add(0, 5<<20, p)
		copy(d.content[5<<20:], p)
	}
	s.AddResync(segmenter.Resync{Volume: 0, Backing: d, Remaining: []block.Extent{{Len: 12 << 20}},
		Begin: &format.GapBegin{Reason: format.GapInitialSync}})
	if step(t, s) {
		t.Fatal("a resync was read before it had a baseline")
	}
	s.StartResync(0, known(nil))
	for step(t, s) {
	}
	for i, b := range out.all {
		begins, ends := len(b.Items.GapBegins), len(b.Items.GapEnds)
		if (begins == 1) != (i == 0) || (ends == 1) != (i == len(out.all)-1) {
			t.Errorf("batch %d of %d has %d gap begins and %d ends", i, len(out.all), begins, ends)
		}
		if len(b.Items.Partials) == 1 == (i == len(out.all)-1) {
			t.Errorf("batch %d of %d has partials %+v", i, len(out.all), b.Items.Partials)
		}
		for _, v := range b.Volumes {
			for _, x := range v.Extents {
				if x.Overlaps(block.Extent{Off: 5 << 20, Len: 4096}) && b.To < 1 {
					t.Error("the region is in a batch without the write that changed it")
				}
			}
		}
	}
	if s.ResyncRemaining(0) != 0 {
		t.Errorf("%d bytes are left to read", s.ResyncRemaining(0))
	}
}

// TestResync_OnlyDifferencesAreStored: what equals the history is left out, and
// history up to After ends with a batch of its own.
func TestResync_OnlyDifferencesAreStored(t *testing.T) {
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 0)
	same, changed := data(1, 64<<10), data(2, 64<<10)
	hasher := crypt.NewChunkHasher(crypt.Key{})
	base := known{
		{Extent: block.Extent{Off: 0, Len: 64 << 10}, ChunkID: hasher.ID(same), ChunkLen: 64 << 10},
		{Extent: block.Extent{Off: 64 << 10, Len: 64 << 10}, ChunkID: hasher.ID(data(3, 64<<10)), ChunkLen: 64 << 10},
		{Extent: block.Extent{Off: 128 << 10, Len: 64 << 10}, ChunkID: hasher.ID(data(4, 64<<10)), ChunkLen: 64 << 10},
	}
	d := &disk{content: append(append(append([]byte(nil), same...), changed...), make([]byte, 128<<10)...), at: -1}
	j.add(0, 0, data(9, 4096)) // history from before the change: must end with a checkpoint
	s.AddResync(segmenter.Resync{Volume: 0, Backing: d, Remaining: []block.Extent{{Len: 256 << 10}}, After: 1,
		Begin: &format.GapBegin{After: 1, Reason: format.GapForeign}})
	s.StartResync(0, base)
	for step(t, s) {
	}
	first, last := out.all[0], out.all[len(out.all)-1]
	if first.To != 1 || len(first.Items.Partials)+len(first.Items.GapBegins) != 0 {
		t.Errorf("the history before the change became seqs %d to %d, partial %v", first.From, first.To, first.Items.Partials)
	}
	at := int64(64 << 10) // the first region is as the history has it
	for _, x := range last.Volumes[0].Extents {
		if x.Off != at || x.Zero != (x.Off >= 128<<10) {
			t.Errorf("stored %s (zero: %v) where %d is next", x.Extent, x.Zero, at)
		}
		at = x.End()
	}
	if at != 192<<10 { // the last region is zeroes in both
		t.Errorf("stored up to %d, not %d", at, 192<<10)
	}
}
