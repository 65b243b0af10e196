package format_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

var (
	vectorGroup   = block.GroupID{0: 0x6a, 15: 1}
	vectorBranch  = block.BranchID{0: 0xb0, 15: 1}
	vectorSegment = block.SegmentID{0: 0x5e, 1: 0x91, 15: 1}
	vectorStore   = block.ID{0: 0x57, 15: 1}
	vectorKeySet  = block.ID{0: 0x4b, 15: 1}
)

const vectorTime = 1_700_000_000_123_456_789

// vectorItems has an item of every kind that an entry with writes may have.
func vectorItems(manifest bool) *format.Items {
	it := &format.Items{
		Group: &format.Group{
			Name: "databases", Branch: vectorBranch, ChunkIDKey: [32]byte{0: 0xc1, 31: 2}, Polynomial: 0x3DA3358B4DC173,
			MinChunk: 16 << 10, AvgBits: 16, MaxChunk: 256 << 10,
		},
		Volumes: []format.Volume{
			{Index: 1, ID: block.VolumeID{0: 0x71}, Name: "pgdata", SizeBytes: 1 << 40, SectorSize: 4096},
			{Index: 2, ID: block.VolumeID{0: 0x72}, Name: "wal-ä", SizeBytes: 512, SectorSize: 512},
		},
		Range:       &format.Range{Branch: vectorBranch, From: 1001, To: 1234, Time: vectorTime, Dates: []format.StoreDate{{Store: vectorStore, Time: vectorTime + 5}}},
		Segments:    []format.InlineSegment{{ID: vectorSegment, Payload: []byte("payload of an inline segment")}},
		Checkpoints: []format.NamedCheckpoint{{Name: "before-upgrade", Seq: 1234, Time: vectorTime}},
		Partials:    []format.Partial{{Volume: 2, Remaining: []block.Extent{{Off: 0, Len: 4096}, {Off: 1 << 33, Len: 1 << 30}}}},
		GapBegins:   []format.GapBegin{{Volume: 2, After: 1000, Reason: format.GapBuffer}},
		GapEnds:     []block.VolumeIndex{1},
		Degraded:    []format.Degraded{{Segment: vectorSegment, Placed: 0b101101}},
	}
	if manifest {
		it.Manifest = []byte("a whole manifest")
	} else {
		it.Reference = &format.ManifestReference{ID: block.ID{0: 0x3a}, Bytes: 123456, Hash: format.HashOf([]byte("m"))}
	}
	return it
}

// vectorBranchItems is what an entry says that begins a branch.
func vectorBranchItems() *format.Items {
	id := block.BranchID{0: 0xb1, 15: 2}
	return &format.Items{
		Range: &format.Range{Branch: id, From: 1235, To: 1234, Time: vectorTime},
		Branch: &format.Branch{
			ID: id, Parent: vectorBranch, ForkN: 77, ForkHash: format.HashOf([]byte("entry 77")), ForkSeq: 1234,
			Volumes: []format.BranchVolume{{Index: 1, Name: "pgdata-2"}, {Index: 2, Name: "wal-ä-2"}},
		},
	}
}

// vectorHandoverItems is what the last entry of an author says that hands over.
func vectorHandoverItems() *format.Items {
	return &format.Items{
		Range:    &format.Range{Branch: vectorBranch, From: 1235, To: 1234, Time: vectorTime},
		Handover: &format.Handover{Seq: 1234, Time: vectorTime + 7},
	}
}

func vectorIndex() *format.SegmentIndex {
	return &format.SegmentIndex{Frames: []format.Frame{
		{Stored: 70016, Compression: format.CompressionZstd, Chunks: []int{65536, 16384, 50000}},
		{Stored: 4112, Compression: format.CompressionNone, Chunks: []int{4096}},
	}}
}

func vectorShard() *format.ShardHeader {
	return &format.ShardHeader{
		Segment: vectorSegment, KeySet: vectorKeySet, Profile: format.Profile{Data: 2, Parity: 2}, Index: 3,
		Payload: 100001, ShardBytes: 50048,
	}
}

func vectorManifestHeader() *format.ManifestHeader {
	return &format.ManifestHeader{
		ID: block.ID{0: 0x3a}, Group: vectorGroup, Branch: vectorBranch, FromN: 7, ToN: 9, From: 1001, To: 1234,
		KeySet: vectorKeySet, Cert: []byte("certificate"),
	}
}

func vectorTail() *format.ManifestTail {
	t := &format.ManifestTail{HeaderBytes: 128, DirectoryBytes: 300}
	for i := range t.Signature {
		t.Signature[i] = byte(i)
	}
	return t
}

func vectorDirectory() *format.Directory {
	return &format.Directory{
		KeySets: [][]byte{[]byte("sealed key set")},
		Pages: []format.PageRow{
			{Volume: 1, First: 4096, End: 1 << 20, Extents: 17, Offset: 128, StoredBytes: 600, PlainBytes: 900, Part: 0},
			{
				Volume: 1, First: 1 << 20, End: 1 << 40, Extents: 1024, Home: block.ID{0: 0x3b}, HomeName: "groups/x/manifests/y", HomeKeySet: vectorKeySet,
				Offset: 5000, StoredBytes: 30000, PlainBytes: 50000, Part: 12,
			},
			{Volume: 2, First: 0, End: 512, Extents: 1, Offset: 728, StoredBytes: 40, PlainBytes: 30, Part: 1},
		},
	}
}

func vectorPage() *format.Page {
	return &format.Page{
		Segments: []format.SegmentRow{
			{ID: vectorSegment, KeySet: vectorKeySet, Profile: format.Profile{Data: 4, Parity: 2}, Payload: 8 << 20, IndexBytes: 900},
			{ID: block.SegmentID{0: 0x5f}, KeySet: block.ID{0: 0x4c}, Payload: 5000, IndexBytes: 60, Inline: 8},
			{ID: block.SegmentID{0: 0x60}, KeySet: vectorKeySet, Profile: format.Profile{Data: 1, Parity: 2}, Payload: 20000, IndexBytes: 80, Expiry: 15},
		},
		Extents: []format.ManifestExtent{
			{Extent: block.Extent{Off: 0, Len: 1 << 30}, Zero: true},
			{Extent: block.Extent{Off: 1 << 30, Len: 65536}, Segment: 0, Chunk: 3, ChunkID: [16]byte{1, 2, 3}, ChunkLen: 65536},
			{Extent: block.Extent{Off: 1<<30 + 65536, Len: 512}, Segment: 1, Chunk: 0, Offset: 1024, ChunkID: [16]byte{4, 5, 6}, ChunkLen: 4096},
			{Extent: block.Extent{Off: 1 << 40, Len: 4096}, Segment: 2, Chunk: 1, ChunkID: [16]byte{7, 8, 9}, ChunkLen: 4096},
		},
	}
}

// vectorNames are object names, one a line.
func vectorNames() []byte {
	m := format.ManifestName{Branch: vectorBranch, From: 7, To: 0x1f, Expiry: 2, ID: block.ID{0: 0x3a}}
	names := []string{
		format.RepoRecordName(1),
		format.LogName(vectorGroup, 0),
		format.LogName(vectorGroup, 0xabcdef),
		m.Name(vectorGroup),
		format.SegmentName(vectorGroup, vectorSegment, 0, 5),
		format.SegmentName(vectorGroup, vectorSegment, 15, 63),
	}
	return []byte(strings.Join(names, "\n") + "\n")
}

// TestStores_GoldenVectors holds the bytes of the structures on the stores that
// are neither signed nor sealed, or lie inside of those that are.
func TestStores_GoldenVectors(t *testing.T) {
	formattest.Exact(t, "items", vectorItems(false).Encode(), func(raw []byte) (any, error) { return format.DecodeItems("items", raw) })
	formattest.Exact(t, "items-manifest", vectorItems(true).Encode(), func(raw []byte) (any, error) { return format.DecodeItems("items", raw) })
	formattest.Exact(t, "items-branch", vectorBranchItems().Encode(), func(raw []byte) (any, error) { return format.DecodeItems("items", raw) })
	formattest.Exact(t, "items-handover", vectorHandoverItems().Encode(), func(raw []byte) (any, error) { return format.DecodeItems("items", raw) })
	formattest.Exact(t, "segment-index", vectorIndex().Encode(), func(raw []byte) (any, error) {
		return format.DecodeSegmentIndex("index", raw, 70016+4112)
	})
	formattest.Exact(t, "shard-header", vectorShard().Append(nil), func(raw []byte) (any, error) { return format.DecodeShardHeader("shard", raw) })
	formattest.Exact(t, "manifest-header", vectorManifestHeader().Encode(), func(raw []byte) (any, error) {
		h, n, err := format.DecodeManifestHeader("header", raw)
		if err == nil && n != len(raw) {
			err = fmt.Errorf("read %d of %d bytes", n, len(raw))
		}
		return h, err
	})
	formattest.Exact(t, "manifest-tail", vectorTail().Append(nil), func(raw []byte) (any, error) {
		return format.DecodeManifestTail("tail", raw, 1000)
	})
	formattest.Exact(t, "manifest-directory", vectorDirectory().Encode(), func(raw []byte) (any, error) { return format.DecodeDirectory("directory", raw) })
	formattest.Exact(t, "manifest-page", vectorPage().Encode(), func(raw []byte) (any, error) { return format.DecodePage("page", raw) })
	formattest.Exact(t, "names", vectorNames(), func(raw []byte) (any, error) {
		lines := strings.Split(string(raw), "\n")
		index, ok1 := format.ParseLogName(vectorGroup, lines[2])
		m, ok2 := format.ParseManifestName(vectorGroup, lines[3])
		if !ok1 || !ok2 {
			return nil, fmt.Errorf("a name does not parse: %t %t", ok1, ok2)
		}
		return map[string]any{"names": lines, "log": index, "manifest": m}, nil
	})
}

// TestStores_CutShortIsRefused: no beginning of a structure is a structure.
// Items are a list without an end of its own, so there it need only not panic.
func TestStores_CutShortIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		raw    []byte
		decode func([]byte) error
	}{
		"items":              {vectorItems(true).Encode(), func(raw []byte) error { _, _ = format.DecodeItems("x", raw); return errAlways }},
		"items of a branch":  {vectorBranchItems().Encode(), func(raw []byte) error { _, _ = format.DecodeItems("x", raw); return errAlways }},
		"segment index":      {vectorIndex().Encode(), func(raw []byte) error { _, err := format.DecodeSegmentIndex("x", raw, 70016+4112); return err }},
		"shard header":       {vectorShard().Append(nil), func(raw []byte) error { _, err := format.DecodeShardHeader("x", raw); return err }},
		"manifest header":    {vectorManifestHeader().Encode(), func(raw []byte) error { _, _, err := format.DecodeManifestHeader("x", raw); return err }},
		"manifest tail":      {vectorTail().Append(nil), func(raw []byte) error { _, err := format.DecodeManifestTail("x", raw, 1000); return err }},
		"manifest directory": {vectorDirectory().Encode(), func(raw []byte) error { _, err := format.DecodeDirectory("x", raw); return err }},
		"manifest page":      {vectorPage().Encode(), func(raw []byte) error { _, err := format.DecodePage("x", raw); return err }},
	} {
		for n := range len(c.raw) {
			if c.decode(c.raw[:n:n]) == nil {
				t.Errorf("%s cut to %d of %d bytes is accepted", name, n, len(c.raw))
			}
		}
		if name != "manifest header" && !strings.HasPrefix(name, "items") { // these may have something behind them
			if c.decode(append(bytes.Clone(c.raw), 0)) == nil {
				t.Errorf("%s with a byte too many is accepted", name)
			}
		}
	}
}

var errAlways = fmt.Errorf("always")
