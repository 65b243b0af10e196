package format_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

// bufferVector is one golden vector of a structure of the buffer.
type bufferVector struct {
	name   string
	raw    []byte
	decode func(raw []byte) (any, error)
}

var vectorPayload = bytes.Repeat([]byte{0xd1, 0x5c, 0, 7}, 128)

func bufferVectors() []bufferVector {
	label := &format.Label{
		Repo: block.ID{0: 0x11, 15: 0x01}, Host: block.ID{0: 0x22}, Disk: block.ID{0: 0x33}, Generation: 3, Joining: true,
		Members: []format.Member{{Disk: block.ID{0: 0x33}, Path: "/var/lib/drc/buffer"}, {Disk: block.ID{0: 0x44}, Path: "/mnt/b"}},
	}
	file := &format.JournalFile{
		Repo: block.ID{0: 0x11, 15: 0x01}, Group: block.GroupID{0: 0x55}, Number: 9, Incarnation: 0x0123456789abcdef,
		Oldest: 4, First: 1001, Prev: 0xdeadbeef, Durable: 1000, Released: 700, SizeBytes: 64 << 20,
	}
	record := &format.JournalRecord{
		Prev: 0xcafe0001, Incarnation: 0x0123456789abcdef, Seq: 1002, Time: 1700000000123456789, Volume: 2,
		Kind: block.KindData, Extent: block.Extent{Off: 1 << 40, Len: int64(len(vectorPayload))}, Durable: 1000,
	}
	header := make([]byte, format.JournalRecordHeaderBytes)
	record.Put(header, vectorPayload)
	mark := &format.JournalMark{Repo: block.ID{0: 0x11, 15: 0x01}, Group: block.GroupID{0: 0x55}, Serial: 12, Oldest: 4, Released: 700, Durable: 1000}
	batch := &format.SpooledBatch{
		Repo: block.ID{0: 0x11, 15: 0x01}, Group: block.GroupID{0: 0x55}, ID: block.ID{0: 0x66}, Serial: 2, From: 901, To: 1000, Logged: true,
		Disks: []block.ID{{0: 0x33}, {0: 0x44}}, Record: []byte("opaque"),
		Shards: []format.SpooledShard{
			{Segment: block.SegmentID{0: 0x77}, Index: 0, Parity: 2, SizeBytes: 70000, Checksum: 0x01020304, Copies: []int{0}},
			{Segment: block.SegmentID{0: 0x77}, Index: 1, Parity: 2, SizeBytes: 70000, Checksum: 0x05060708, Placed: true},
			{Segment: block.SegmentID{0: 0x78}, Index: 3, Parity: 1, SizeBytes: 512, Checksum: 0x090a0b0c, Copies: []int{1, 0}},
		},
	}
	ends := &format.SpooledBatch{
		Repo: block.ID{0: 0x11, 15: 0x01}, Group: block.GroupID{0: 0x55}, ID: block.ID{0: 0x66}, Serial: 1, From: 901, To: 1000,
		Disks: []block.ID{{0: 0x33}}, Record: []byte("opaque"),
		Shards: []format.SpooledShard{{Segment: block.SegmentID{0: 0x77}, Index: 1, Parity: 2, SizeBytes: 70000, Checksum: 0x01020304, Copies: []int{0},
			Head: []byte("head"), Tail: []byte("tail")}},
	}
	bitmap := &format.BitmapHeader{
		Repo: block.ID{0: 0x11, 15: 0x01}, Group: block.GroupID{0: 0x55}, Serial: 7, Activation: 0xfedcba9876543210, Active: true,
		Since: 1700000000123456789, Volumes: []format.BitmapVolume{{Index: 0, SizeBytes: 1 << 40}, {Index: 3, SizeBytes: 512}},
	}
	return []bufferVector{
		{"buffer-label", label.Encode(), func(raw []byte) (any, error) { return format.DecodeLabel("label", raw) }},
		{"journal-file", file.Encode(), func(raw []byte) (any, error) { return format.DecodeJournalFile("file", raw) }},
		{"journal-record", append(header, vectorPayload...), func(raw []byte) (any, error) {
			r, ok := format.ParseJournalRecord(raw, 0x0123456789abcdef)
			if !ok || !r.Check(raw[:format.JournalRecordHeaderBytes], raw[format.JournalRecordHeaderBytes:]) {
				return nil, format.Corrupt("record", "not valid")
			}
			return &r, nil
		}},
		{"journal-mark", mark.Encode(), func(raw []byte) (any, error) { return format.DecodeJournalMark("mark", raw) }},
		{"bitmap-header", bitmap.Encode(), func(raw []byte) (any, error) { return format.DecodeBitmapHeader("bitmap", raw) }},
		{"spooled-batch", batch.Encode(), func(raw []byte) (any, error) { return format.DecodeSpooledBatch("batch", raw) }},
		{"spooled-batch-ends", ends.Encode(), func(raw []byte) (any, error) { return format.DecodeSpooledBatch("batch", raw) }},
	}
}

// TestBuffer_GoldenVectors holds the bytes of the buffer's structures: what was
// written once must be readable for ever.
func TestBuffer_GoldenVectors(t *testing.T) {
	for _, v := range bufferVectors() {
		t.Run(v.name, func(t *testing.T) { formattest.Exact(t, v.name, v.raw, v.decode) })
	}
}

// TestBuffer_EveryChangedBitIsFound: each structure's checksum covers all of it.
func TestBuffer_EveryChangedBitIsFound(t *testing.T) {
	for _, v := range bufferVectors() {
		for bit := range len(v.raw) * 8 {
			raw := bytes.Clone(v.raw)
			raw[bit/8] ^= 1 << (bit % 8)
			if _, err := v.decode(raw); err == nil {
				t.Fatalf("%s: bit %d changed and not found", v.name, bit)
			}
		}
		for n := range len(v.raw) {
			if _, err := v.decode(v.raw[:n:n]); err == nil && v.name != "journal-record" {
				t.Fatalf("%s: cut to %d bytes and not found", v.name, n)
			}
		}
	}
}

// fuzzBuffer: hostile bytes give an error or a value that encodes to the same
// bytes; never a panic.
func fuzzBuffer(f *testing.F, name string, encode func(any) []byte) {
	for _, v := range bufferVectors() {
		if v.name != name {
			continue
		}
		f.Add(v.raw)
		f.Fuzz(func(t *testing.T, raw []byte) {
			raw = resealed(raw, v.raw[:4])
			got, err := v.decode(bytes.Clone(raw))
			if err == nil && encode != nil && !bytes.Equal(encode(got), raw) {
				t.Fatalf("%x decodes to %+v, which encodes to something else", raw, got)
			}
		})
	}
}

// resealed gives raw the right length and checksum, so that fuzzing gets behind
// them.
func resealed(raw, magic []byte) []byte {
	if len(raw) < 16 || string(magic) == "DRCW" {
		return raw
	}
	raw = bytes.Clone(raw)
	binary.LittleEndian.PutUint32(raw[8:], uint32(len(raw)-16))
	sum := crc32.Checksum(raw[:12], format.Castagnoli)
	binary.LittleEndian.PutUint32(raw[12:], crc32.Update(sum, format.Castagnoli, raw[16:]))
	return raw
}

func FuzzLabel(f *testing.F) {
	fuzzBuffer(f, "buffer-label", func(v any) []byte { return v.(*format.Label).Encode() })
}

func FuzzJournalFile(f *testing.F) { fuzzBuffer(f, "journal-file", nil) }

func FuzzJournalMark(f *testing.F) {
	fuzzBuffer(f, "journal-mark", func(v any) []byte { return v.(*format.JournalMark).Encode() })
}

func FuzzBitmapHeader(f *testing.F) {
	for _, v := range bufferVectors() {
		if v.name == "bitmap-header" {
			f.Add(v.raw)
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		raw = bytes.Clone(raw)
		if len(raw) == format.BitmapPageBytes { // behind length and checksum
			n := min(int(binary.LittleEndian.Uint32(raw[8:])), len(raw)-16)
			binary.LittleEndian.PutUint32(raw[8:], uint32(n))
			sum := crc32.Checksum(raw[:12], format.Castagnoli)
			binary.LittleEndian.PutUint32(raw[12:], crc32.Update(sum, format.Castagnoli, raw[16:16+n]))
		}
		if h, err := format.DecodeBitmapHeader("bitmap", raw); err == nil && !bytes.Equal(h.Encode(), raw) {
			t.Fatalf("%x decodes to %+v, which encodes to something else", raw, h)
		}
	})
}

// TestBitmapPage_GoldenVector holds the bytes of a page, and what damage to it
// means.
func TestBitmapPage_GoldenVector(t *testing.T) {
	const activation, number = 0xfedcba9876543210, 8
	p := make([]byte, format.BitmapPageBytes)
	if counts, err := format.CheckBitmapPage("page", p, activation, number); counts || err != nil {
		t.Errorf("a page that was never written: %v, %v", counts, err)
	}
	bits := format.BitmapPageBits(p)
	if len(bits)*8 != format.BitmapPageRegions {
		t.Fatalf("%d bytes of bits", len(bits))
	}
	bits[0], bits[4063] = 0x81, 0x40
	format.PutBitmapPage(p, activation, number)
	formattest.Exact(t, "bitmap-page", p, func(raw []byte) (any, error) {
		counts, err := format.CheckBitmapPage("page", raw, activation, number)
		return map[string]any{"counts": counts, "first": raw[32], "last": raw[4095]}, err
	})
	if counts, err := format.CheckBitmapPage("page", p, activation+1, number); counts || err != nil {
		t.Errorf("a page of another activation: %v, %v", counts, err)
	}
	if _, err := format.CheckBitmapPage("page", p, activation, number+1); err == nil {
		t.Error("a page in another's place was taken")
	}
	for bit := range len(p) * 8 {
		raw := bytes.Clone(p)
		raw[bit/8] ^= 1 << (bit % 8)
		if _, err := format.CheckBitmapPage("page", raw, activation, number); err == nil {
			t.Fatalf("bit %d changed and not found", bit)
		}
	}
}

func FuzzSpooledBatch(f *testing.F) {
	fuzzBuffer(f, "spooled-batch", func(v any) []byte { return v.(*format.SpooledBatch).Encode() })
}

func FuzzJournalRecord(f *testing.F) { fuzzBuffer(f, "journal-record", nil) }
