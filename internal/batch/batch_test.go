package batch_test

import (
	"bytes"
	"reflect"
	"testing"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/format/formattest"
	"drc/internal/manifest"
)

func sample(extents int) *batch.Batch {
	sharded := format.SegmentRow{ID: block.SegmentID{1}, KeySet: block.ID{0: 0x4b}, Profile: format.Profile{Data: 4, Parity: 2}, Payload: 1 << 20, IndexBytes: 500}
	inline := format.SegmentRow{ID: block.SegmentID{2}, KeySet: block.ID{0: 0x4b}, Payload: 20, IndexBytes: 10, Inline: batch.InlineHere}
	b := &batch.Batch{
		From: 11, To: 20, KeySet: block.ID{0: 0x4b}, Bytes: 123456, Oldest: 1_700_000_000_123_456_789,
		Items: format.Items{
			Range:       &format.Range{Branch: block.BranchID{3}, From: 11, To: 20, Time: 5},
			Checkpoints: []format.NamedCheckpoint{{Name: "name", Seq: 20, Time: 6}},
		},
		Segments: []batch.Segment{{Row: sharded}, {Row: inline, Inline: []byte("the payload inline..")}},
	}
	for v := range block.VolumeIndex(2) {
		ve := batch.VolumeExtents{Volume: v + 1}
		for i := range extents {
			x := manifest.Extent{Extent: block.Extent{Off: int64(i) * 8192, Len: 4096}}
			switch i % 3 {
			case 0:
				x.Segment, x.Chunk, x.ChunkLen, x.ChunkID = sharded, i, 4096, crypt.ChunkID{byte(i), byte(v)}
			case 1:
				x.Segment, x.Chunk, x.ChunkLen, x.ChunkID = inline, i, 8192, crypt.ChunkID{byte(i), byte(v)}
				x.Offset = 512
			case 2:
				x.Zero = true
			}
			ve.Extents = append(ve.Extents, x)
		}
		b.Volumes = append(b.Volumes, ve)
	}
	return b
}

func TestBatch_RoundTrip(t *testing.T) {
	for name, b := range map[string]*batch.Batch{
		"small":          sample(5),
		"several pages":  sample(2*format.MaxPageExtents + 3),
		"nothing but to": {From: 5, To: 4, Items: format.Items{GapEnds: []block.VolumeIndex{1}}},
	} {
		got, err := batch.Decode("batch", b.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, b) {
			t.Errorf("%s: another batch came back", name)
		}
	}
}

func TestBatch_CutShortIsRefused(t *testing.T) {
	raw := sample(4).Encode()
	for n := range raw {
		if _, err := batch.Decode("batch", raw[:n:n]); err == nil {
			t.Fatalf("cut to %d of %d bytes and accepted", n, len(raw))
		}
	}
}

func TestBatch_GoldenVector(t *testing.T) {
	formattest.Exact(t, "batch", sample(4).Encode(), func(raw []byte) (any, error) { return batch.Decode("batch", raw) })
}

func FuzzDecode(f *testing.F) {
	f.Add(sample(4).Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, ok := formattest.Stable(t, raw, func(p []byte) (*batch.Batch, error) { return batch.Decode("batch", p) }, (*batch.Batch).Encode)
		if !ok {
			return
		}
		n := 0
		for _, v := range b.Volumes {
			n += len(v.Extents)
		}
		formattest.Bounded(t, raw, "extents", n, 3)
		formattest.Bounded(t, raw, "segments", len(b.Segments), 23)
		if !bytes.HasPrefix(raw, []byte("\x04DRCB\x01")) {
			t.Fatal("something else is taken for a batch")
		}
	})
}
