package format_test

import (
	"errors"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
)

// TestItems_UnknownKinds: critical ones make the entry unreadable, others are
// passed over.
func TestItems_UnknownKinds(t *testing.T) {
	with := func(kind uint16) []byte {
		e := format.Encoder{Buf: vectorItems(true).Encode()}
		e.U16(kind)
		e.Bytes([]byte("from the future"))
		return e.Buf
	}
	for _, kind := range []uint16{12, 15, 16, 17, 18, 19, 20} {
		_, err := format.DecodeItems("entry", with(kind))
		var corrupt *format.CorruptError
		if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), "newer drc") {
			t.Errorf("kind %d: %v", kind, err)
		}
	}
	it, err := format.DecodeItems("entry", with(0x8000))
	if err != nil || len(it.Volumes) != 2 {
		t.Errorf("an optional kind: %+v, %v", it, err)
	}
}

// TestItems_ValuesOutOfRange lists statements that no writer may make.
func TestItems_ValuesOutOfRange(t *testing.T) {
	for name, spoil := range map[string]func(*format.Items){
		"volume of a negative size":      func(it *format.Items) { it.Volumes[0].SizeBytes = -4096 },
		"volume over the limit":          func(it *format.Items) { it.Volumes[0].SizeBytes = format.MaxVolumeBytes + 4096 },
		"sector size":                    func(it *format.Items) { it.Volumes[0].SectorSize = 1024 },
		"size is no multiple of sectors": func(it *format.Items) { it.Volumes[0].SizeBytes = 512 },
		"minimum chunk of 0":             func(it *format.Items) { it.Group.MinChunk = 0 },
		"minimum chunk over maximum":     func(it *format.Items) { it.Group.MinChunk = it.Group.MaxChunk + 1 },
		"maximum chunk over the limit":   func(it *format.Items) { it.Group.MaxChunk = format.MaxChunkBytes + 1 },
		"average of 2^32":                func(it *format.Items) { it.Group.AvgBits = 32 },
		"empty region":                   func(it *format.Items) { it.Partials[0].Remaining[0].Len = 0 },
		"region at a negative address":   func(it *format.Items) { it.Partials[0].Remaining[0].Off = -1 },
		"region behind the limit":        func(it *format.Items) { it.Partials[0].Remaining[0].Off = format.MaxVolumeBytes },
		"manifest and reference":         func(it *format.Items) { it.Reference = &format.ManifestReference{} },
		"manifest of negative size":      func(it *format.Items) { it.Manifest, it.Reference = nil, &format.ManifestReference{Bytes: -1} },
		"inline segment over the limit":  func(it *format.Items) { it.Segments[0].Payload = make([]byte, format.MaxInlineBytes+1) },
		"long name":                      func(it *format.Items) { it.Volumes[0].Name = strings.Repeat("n", format.MaxNameBytes+1) },
	} {
		it := vectorItems(true)
		spoil(it)
		if _, err := format.DecodeItems("entry", it.Encode()); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	twice := append(vectorItems(true).Encode(), (&format.Items{Manifest: []byte("another")}).Encode()...)
	if _, err := format.DecodeItems("entry", twice); err == nil {
		t.Error("two manifests are accepted")
	}
}

// TestItems_BranchesAndHandovers lists what no entry that begins a branch, or hands
// over, may say.
func TestItems_BranchesAndHandovers(t *testing.T) {
	for name, spoil := range map[string]func(*format.Items){
		"no range":                       func(it *format.Items) { it.Range = nil },
		"a range of another branch":      func(it *format.Items) { it.Range.Branch = vectorBranch },
		"a range that ends elsewhere":    func(it *format.Items) { it.Range.To++ },
		"its own parent":                 func(it *format.Items) { it.Branch.Parent = it.Branch.ID },
		"a fork from nothing":            func(it *format.Items) { it.Branch.ForkN = 0 },
		"two volumes of one name":        func(it *format.Items) { it.Branch.Volumes[1].Name = it.Branch.Volumes[0].Name },
		"a volume without a name":        func(it *format.Items) { it.Branch.Volumes[1].Name = "" },
		"an index twice":                 func(it *format.Items) { it.Branch.Volumes[1].Index = it.Branch.Volumes[0].Index },
		"volumes that are not in order":  func(it *format.Items) { it.Branch.Volumes[0].Index = 3 },
		"writes":                         func(it *format.Items) { it.Manifest = []byte("a manifest") },
		"the end of a gap":               func(it *format.Items) { it.GapEnds = []block.VolumeIndex{1} },
		"a volume that joins":            func(it *format.Items) { it.Volumes = vectorItems(true).Volumes },
		"a handover":                     func(it *format.Items) { it.Handover = &format.Handover{Seq: 1234} },
		"a name of a volume is too long": func(it *format.Items) { it.Branch.Volumes[0].Name = strings.Repeat("n", format.MaxNameBytes+1) },
	} {
		it := vectorBranchItems()
		spoil(it)
		if _, err := format.DecodeItems("entry", it.Encode()); err == nil {
			t.Errorf("an entry that begins a branch: %s: it is accepted", name)
		}
	}
	for name, spoil := range map[string]func(*format.Items){
		"no range":    func(it *format.Items) { it.Range = nil },
		"another seq": func(it *format.Items) { it.Handover.Seq-- },
	} {
		it := vectorHandoverItems()
		spoil(it)
		if _, err := format.DecodeItems("entry", it.Encode()); err == nil {
			t.Errorf("an entry that hands over: %s: it is accepted", name)
		}
	}
	for name, it := range map[string]*format.Items{"branch": vectorBranchItems(), "handover": vectorHandoverItems()} {
		raw := it.Encode()
		e := format.Encoder{Buf: raw}
		e.Buf = append(e.Buf, raw...)
		if _, err := format.DecodeItems("entry", e.Buf); err == nil {
			t.Errorf("two items %s are accepted", name)
		}
	}
}

func TestManifest_NumbersThatDoNotFit(t *testing.T) {
	for name, spoil := range map[string]func(*format.Page){
		"inline with shards":            func(p *format.Page) { p.Segments[0].Inline = 3 },
		"inline with parity":            func(p *format.Page) { p.Segments[1].Profile.Parity = 2 },
		"neither inline nor shards":     func(p *format.Page) { p.Segments[1].Inline = 0 },
		"index over payload":            func(p *format.Page) { p.Segments[0].IndexBytes = 9 << 20 },
		"too many shards":               func(p *format.Page) { p.Segments[0].Profile.Parity = 61 },
		"expiry class":                  func(p *format.Page) { p.Segments[0].Expiry = 16 },
		"extent past its chunk":         func(p *format.Page) { p.Extents[2].Offset = 3585 },
		"extent of a segment not there": func(p *format.Page) { p.Extents[1].Segment = 3 },
		"empty extent":                  func(p *format.Page) { p.Extents[0].Len = 0 },
		"extent past the limit":         func(p *format.Page) { p.Extents[0].Len = format.MaxVolumeBytes + 1 },
	} {
		p := vectorPage()
		spoil(p)
		if _, err := format.DecodePage("page", p.Encode()); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	for name, spoil := range map[string]func(*format.Directory){
		"pages overlap":          func(d *format.Directory) { d.Pages[1].First = 1<<20 - 1 },
		"pages not in order":     func(d *format.Directory) { d.Pages[0].Volume = 3 },
		"page of no bytes":       func(d *format.Directory) { d.Pages[2].End = 0 },
		"page over the limit":    func(d *format.Directory) { d.Pages[0].PlainBytes = format.MaxPageBytes + 1 },
		"page past any volume":   func(d *format.Directory) { d.Pages[2].End = format.MaxVolumeBytes + 1 },
		"page past any manifest": func(d *format.Directory) { d.Pages[0].Offset = format.MaxManifestBytes + 1 },
		"part of the directory":  func(d *format.Directory) { d.Pages[0].Part = format.DirectoryPart },
		"too many extents":       func(d *format.Directory) { d.Pages[0].Extents = format.MaxPageExtents + 1 },
		"name of home too long":  func(d *format.Directory) { d.Pages[1].HomeName = strings.Repeat("n", 1025) },
		"key set over the limit": func(d *format.Directory) { d.KeySets[0] = make([]byte, format.MaxKeySetBytes+1) },
	} {
		d := vectorDirectory()
		spoil(d)
		if _, err := format.DecodeDirectory("directory", d.Encode()); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	for name, spoil := range map[string]func(*format.ShardHeader){
		"no data shards":        func(h *format.ShardHeader) { h.Profile.Data = 0 },
		"too many shards":       func(h *format.ShardHeader) { h.Profile.Parity = 63 },
		"index past the shards": func(h *format.ShardHeader) { h.Index = 4 },
		"no payload":            func(h *format.ShardHeader) { h.Payload, h.ShardBytes = 0, 0 },
		"negative payload":      func(h *format.ShardHeader) { h.Payload = -1 },
		"payload over limit":    func(h *format.ShardHeader) { h.Payload = format.MaxSegmentBytes + 1 },
		"another shard length":  func(h *format.ShardHeader) { h.ShardBytes += 64 },
	} {
		h := vectorShard()
		spoil(h)
		if _, err := format.DecodeShardHeader("shard", h.Append(nil)); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if _, err := format.DecodeManifestTail("tail", vectorTail().Append(nil), 128+300+format.ManifestTailSize-1); err == nil {
		t.Error("a tail of a larger manifest is accepted")
	}
}

func TestSegmentIndex_MustFitItsPayload(t *testing.T) {
	raw := vectorIndex().Encode()
	for _, n := range []int64{0, 70016 + 4111, 70016 + 4113, -1} {
		if _, err := format.DecodeSegmentIndex("index", raw, n); err == nil {
			t.Errorf("it is accepted for frames of %d bytes", n)
		}
	}
	for name, f := range map[string]format.Frame{
		"no chunks":           {Stored: 100},
		"empty chunk":         {Stored: 100, Chunks: []int{5, 0}},
		"large chunk":         {Stored: 100, Chunks: []int{format.MaxChunkBytes + 1}},
		"large frame":         {Stored: 100, Chunks: []int{1 << 20, 1 << 20, 1 << 20, 1 << 20, 1}},
		"unknown compression": {Stored: 100, Chunks: []int{5}, Compression: 2},
	} {
		x := format.SegmentIndex{Frames: []format.Frame{f}}
		if _, err := format.DecodeSegmentIndex("index", x.Encode(), 100); err == nil {
			t.Errorf("a frame with %s is accepted", name)
		}
	}
}

func TestNames_OnlyTheExactForm(t *testing.T) {
	log := format.LogName(vectorGroup, 0xabc)
	m := format.ManifestName{Branch: vectorBranch, From: 2, To: 0xabc, ID: block.ID{0: 0xfe}}
	for _, name := range []string{
		"", log + "0", log[:len(log)-1], strings.ToUpper(log), strings.Replace(log, "abc", "ABC", 1), log[:len(log)-3] + "+bc",
		format.LogName(block.GroupID{9}, 0xabc),
	} {
		if _, ok := format.ParseLogName(vectorGroup, name); ok {
			t.Errorf("%q is taken for a log object", name)
		}
	}
	good := m.Name(vectorGroup)
	if got, ok := format.ParseManifestName(vectorGroup, good); !ok || got != m {
		t.Errorf("%q: %+v %t", good, got, ok)
	}
	for _, bad := range []format.ManifestName{
		{Branch: vectorBranch, From: 0, To: 1}, {Branch: vectorBranch, From: 2, To: 1},
	} {
		if _, ok := format.ParseManifestName(vectorGroup, bad.Name(vectorGroup)); ok {
			t.Errorf("%+v is taken for a manifest", bad)
		}
	}
	for i := range good {
		changed := good[:i] + "x" + good[i+1:]
		if got, ok := format.ParseManifestName(vectorGroup, changed); ok {
			t.Errorf("%q is taken for manifest %+v", changed, got)
		}
	}
}

// TestNames_OrderIsOrderOfNumbers: listings rely on it.
func TestNames_OrderIsOrderOfNumbers(t *testing.T) {
	numbers := []uint64{0, 1, 9, 10, 15, 16, 255, 256, 1 << 32, 1<<64 - 1}
	for i := 1; i < len(numbers); i++ {
		a, b := numbers[i-1], numbers[i]
		if format.LogName(vectorGroup, a) >= format.LogName(vectorGroup, b) {
			t.Errorf("log %d does not sort before %d", a, b)
		}
		x := format.ManifestName{Branch: vectorBranch, From: 1, To: a, ID: block.ID{0: 0xff}}
		y := format.ManifestName{Branch: vectorBranch, From: 1, To: b}
		if x.Name(vectorGroup) >= y.Name(vectorGroup) {
			t.Errorf("manifest to %d does not sort before %d", a, b)
		}
	}
}
