package segmenter_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/segment"
	"drc/segmenter"
)

// replay lays the content of batches over image, as a restore would, from the
// shards alone.
func replay(t *testing.T, all []*batch.Batch, image []byte) {
	t.Helper()
	keys := crypttest.Keys()
	for _, b := range all {
		chunks := map[block.SegmentID][][]byte{}
		for _, s := range b.Segments {
			payload := s.Inline
			if payload == nil {
				for i := range s.Row.Profile.Data {
					_, body, err := segment.VerifyShard(keys, "shard", s.Row.ID, i, s.Shards[i])
					if err != nil {
						t.Fatal(err)
					}
					payload = append(payload, body...)
				}
				payload = payload[:s.Row.Payload]
			}
			index, err := segment.OpenIndex(keys, s.Row, payload[len(payload)-s.Row.IndexBytes:])
			if err != nil {
				t.Fatal(err)
			}
			at := 0
			for i, f := range index.Frames {
				plain, err := segment.OpenFrame(keys, s.Row.ID, i, f, payload[at:at+f.Stored], nil)
				if err != nil {
					t.Fatal(err)
				}
				at += f.Stored
				for _, n := range f.Chunks {
					chunks[s.Row.ID] = append(chunks[s.Row.ID], plain[:n])
					plain = plain[n:]
				}
			}
		}
		for _, v := range b.Volumes {
			for _, x := range v.Extents {
				if x.Zero {
					clear(image[x.Off:x.End()])
					continue
				}
				c := chunks[x.Segment.ID][x.Chunk]
				if len(c) != x.ChunkLen || int64(len(c)) != x.Len {
					t.Fatalf("extent %s refers to a chunk of %d bytes", x.Extent, len(c))
				}
				copy(image[x.Off:], c)
			}
		}
	}
}

// TestStep_ContentIsTheNewest: whatever the writes are, batches hold what the
// volume held, also after later batches have used the same memory.
func TestStep_ContentIsTheNewest(t *testing.T) {
	const size = 24 << 20
	for _, batchBytes := range []int64{1 << 20, 16 << 20} {
		r := rand.New(rand.NewPCG(7, uint64(batchBytes)))
		j, out := &journal{}, &batches{}
		s := newSegmenter(j, out, batchBytes)
		want := make([]byte, size)
		write := func(off, n int64, zero bool) {
			p := make([]byte, n)
			if !zero {
				copy(p, data(r.Uint64(), int(n)))
			}
			copy(want[off:], p)
			j.add(0, off, p)
		}
		for range 30 {
			switch r.IntN(4) {
			case 0: // a run of small writes in order
				off := r.Int64N(size/4096-300) * 4096
				for i := range int64(r.IntN(300)) {
					write(off+i*4096, 4096, false)
				}
			case 1: // a large one, larger than the memory is cut into
				n := (1 + r.Int64N(6<<20/512)) * 512
				write(r.Int64N((size-n)/512)*512, n, false)
			case 2:
				for range r.IntN(100) {
					n := (1 + r.Int64N(64)) * 512
					write(r.Int64N((size-n)/512)*512, n, false)
				}
			case 3:
				n := (1 + r.Int64N(512)) * 4096
				write(r.Int64N((size-n)/4096)*4096, n, true)
			}
			if r.IntN(3) == 0 {
				step(t, s)
			}
		}
		for step(t, s) {
		}
		got := make([]byte, size)
		replay(t, out.all, got)
		if !bytes.Equal(got, want) {
			t.Errorf("batches of %d bytes: the content is not what was written", batchBytes)
		}
	}
}

// vast is a large volume on which a block here and there differs from the
// history, which is all zeroes.
type vast struct {
	every int64
	reads int64
}

func (v *vast) ReadAt(_ context.Context, p []byte, off int64) error {
	v.reads += int64(len(p))
	clear(p)
	for at := (off + v.every - 1) / v.every * v.every; at < off+int64(len(p)); at += v.every {
		copy(p[at-off:], bytes.Repeat([]byte{1 + byte(at/v.every)%250}, 4096))
	}
	return nil
}

func (v *vast) Allocation(_ context.Context, e block.Extent, visit func(block.Extent, bool) bool) error {
	visit(e, false)
	return nil
}

// TestResync_KeepsOnlyWhatHasChanged: a batch of a resync that finds a block
// here and there reads far, and what it stores is these blocks.
func TestResync_KeepsOnlyWhatHasChanged(t *testing.T) {
	const size, every = 256 << 20, 1 << 20
	j, out := &journal{}, &batches{}
	s := newSegmenter(j, out, 0)
	v := &vast{every: every}
	s.AddResync(segmenter.Resync{Volume: 0, Backing: v, Remaining: []block.Extent{{Len: size}},
		Begin: &format.GapBegin{Reason: format.GapInitialSync}})
	s.StartResync(0, known(nil))
	for step(t, s) {
	}
	n := int64(0)
	for _, b := range out.all {
		for _, vol := range b.Volumes {
			for _, x := range vol.Extents {
				if x.Zero || x.Off != n*every || x.Len != 4096 ||
					x.ChunkID != crypt.NewChunkHasher(crypt.Key{}).ID(bytes.Repeat([]byte{1 + byte(n)%250}, 4096)) {
					t.Fatalf("extent %d is %+v", n, x)
				}
				n++
			}
		}
	}
	if n != size/every || v.reads != size {
		t.Errorf("%d blocks are stored, %d bytes were read", n, v.reads)
	}
}
