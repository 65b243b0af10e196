package format_test

import (
	"fmt"
	"math"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

func vectorDigestHeader() *format.DigestHeader {
	return &format.DigestHeader{
		ID: block.ID{0: 0xd1, 15: 9}, Group: vectorGroup, N: 0x1234, Hash: format.Hash{1, 2, 3}, KeySet: block.ID{0: 0x4b, 15: 1},
		Sealed: []byte("a key set"), Cert: []byte("a certificate"),
	}
}

func vectorDigestTail() *format.DigestTail {
	return &format.DigestTail{HeaderBytes: 300, RootBytes: 500, Signature: [64]byte{0: 7, 63: 9}}
}

func vectorDigestRefs() []format.DigestRef {
	return []format.DigestRef{
		{Home: block.ID{0: 0xd0}, HomeN: 256, HomeKeySet: block.ID{0: 0x4a}, Part: 0, Offset: 400, Stored: 9000, Plain: 20000, MinTime: 1_700_000_000_000_000_001, MaxTime: 1_700_000_000_000_000_009, Last: 300},
		{Part: 1, Offset: 9400, Stored: 9100, Plain: 20100, MinTime: math.MaxInt64, MaxTime: math.MinInt64, Last: 300},
	}
}

func vectorDigestRows() []format.DigestRow {
	it := vectorItems(false)
	it.Manifest, it.Segments = nil, nil
	a, b := block.ID{0: 0xa0}, block.ID{0: 0xb0}
	return []format.DigestRow{
		{N: 257, Hash: format.Hash{1}, Epoch: format.Epoch{Number: 3, Random: block.ID{0: 1}}, Places: []format.DigestPlace{{Store: a, Index: 258}, {Store: b, Index: 300}}, Items: it},
		{N: 258, Hash: format.Hash{2}, Epoch: format.Epoch{Number: 3, Random: block.ID{0: 1}}, Inline: true, Items: &format.Items{}},
		{N: 300, Hash: format.Hash{3}, Epoch: format.Epoch{Number: 4, Random: block.ID{0: 2}}, Places: []format.DigestPlace{{Store: b, Index: 301}}, Items: &format.Items{GapEnds: []block.VolumeIndex{1}}},
	}
}

func vectorDigestRoot() *format.DigestRoot {
	return &format.DigestRoot{
		Logs: []format.DigestLog{
			{Store: block.ID{0: 0xa0}, Next: 260, Last: format.Hash{9}, Promised: format.Epoch{Number: 4, Random: block.ID{0: 2}}, Decided: 257,
				N: 258, Epoch: format.Epoch{Number: 4, Random: block.ID{0: 2}}, Hash: format.Hash{2}, Index: 259},
			{Store: block.ID{0: 0xb0}, Next: 1, Last: format.Hash{8}, Promised: format.Epoch{Number: 1}},
		},
		Entries: format.DigestList{Levels: [][]format.DigestRef{vectorDigestRefs(), {}, vectorDigestRefs()[:1]}, Tail: format.EncodeDigestRows(vectorDigestRows())},
		Marks:   format.DigestList{Tail: format.EncodeDigestRows(vectorDigestRows()[2:])},
		KeySets: format.DigestList{Tail: format.EncodeDigestKeySets([][]byte{[]byte("one"), []byte("two")})},
	}
}

func TestDigest_GoldenVectors(t *testing.T) {
	formattest.Exact(t, "digest-header", vectorDigestHeader().Encode(), func(raw []byte) (any, error) {
		h, n, err := format.DecodeDigestHeader("header", raw)
		if err == nil && n != len(raw) {
			err = fmt.Errorf("read %d of %d bytes", n, len(raw))
		}
		return h, err
	})
	formattest.Exact(t, "digest-tail", vectorDigestTail().Append(nil), func(raw []byte) (any, error) {
		return format.DecodeDigestTail("tail", raw, 1000)
	})
	formattest.Exact(t, "digest-root", vectorDigestRoot().Encode(), func(raw []byte) (any, error) { return format.DecodeDigestRoot("root", raw) })
	formattest.Exact(t, "digest-references", format.EncodeDigestRefs(vectorDigestRefs()), func(raw []byte) (any, error) { return format.DecodeDigestRefs("page", raw) })
	formattest.Exact(t, "digest-entries", format.EncodeDigestRows(vectorDigestRows()), func(raw []byte) (any, error) { return format.DecodeDigestRows("page", raw) })
	formattest.Exact(t, "digest-keysets", format.EncodeDigestKeySets([][]byte{[]byte("one"), []byte("two")}), func(raw []byte) (any, error) {
		return format.DecodeDigestKeySets("page", raw)
	})
	formattest.Exact(t, "digest-name", []byte(format.DigestName(vectorGroup, 0x1234, block.ID{0: 0xd1, 15: 9})), func(raw []byte) (any, error) {
		n, id, ok := format.ParseDigestName(vectorGroup, string(raw))
		if !ok {
			return nil, fmt.Errorf("%s does not parse", raw)
		}
		return map[string]any{"n": n, "id": id}, nil
	})
}

func TestDigest_CutShortIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		raw    []byte
		decode func([]byte) error
	}{
		"header":     {vectorDigestHeader().Encode(), func(raw []byte) error { _, _, err := format.DecodeDigestHeader("x", raw); return err }},
		"tail":       {vectorDigestTail().Append(nil), func(raw []byte) error { _, err := format.DecodeDigestTail("x", raw, 1000); return err }},
		"root":       {vectorDigestRoot().Encode(), func(raw []byte) error { _, err := format.DecodeDigestRoot("x", raw); return err }},
		"references": {format.EncodeDigestRefs(vectorDigestRefs()), func(raw []byte) error { _, err := format.DecodeDigestRefs("x", raw); return err }},
		"entries":    {format.EncodeDigestRows(vectorDigestRows()), func(raw []byte) error { _, err := format.DecodeDigestRows("x", raw); return err }},
		"key sets":   {format.EncodeDigestKeySets([][]byte{[]byte("one")}), func(raw []byte) error { _, err := format.DecodeDigestKeySets("x", raw); return err }},
	} {
		if err := c.decode(c.raw); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for n := range len(c.raw) {
			if c.decode(c.raw[:n:n]) == nil {
				t.Errorf("%s cut to %d of %d bytes is accepted", name, n, len(c.raw))
			}
		}
		if c.decode(append(c.raw[:len(c.raw):len(c.raw)], 0)) == nil && name != "header" {
			t.Errorf("%s with a byte more is accepted", name)
		}
	}
}

// What no writer may say of a digest.
func TestDigest_ValuesOutOfRange(t *testing.T) {
	full := make([]format.DigestRef, format.DigestRows)
	for name, spoil := range map[string]func(*format.DigestRoot){
		"a log of nothing":             func(x *format.DigestRoot) { x.Logs[0].Next = 0 },
		"an entry behind its log":      func(x *format.DigestRoot) { x.Logs[0].Index = x.Logs[0].Next },
		"a level that should be above": func(x *format.DigestRoot) { x.Entries.Levels[0] = full },
		"too many levels":              func(x *format.DigestRoot) { x.Entries.Levels = make([][]format.DigestRef, 9) },
		"a page with the root's number": func(x *format.DigestRoot) {
			x.Entries.Levels[0][0].Part = format.DigestRootPart
		},
		"a page behind the limit": func(x *format.DigestRoot) { x.Entries.Levels[0][0].Offset = format.MaxDigestBytes + 1 },
		"a huge page":             func(x *format.DigestRoot) { x.Entries.Levels[0][0].Plain = format.MaxDigestPageBytes + 1 },
	} {
		x := vectorDigestRoot()
		spoil(x)
		if _, err := format.DecodeDigestRoot("x", x.Encode()); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	for name, spoil := range map[string]func([]format.DigestRow){
		"entries out of order": func(r []format.DigestRow) { r[1].N = r[0].N - 1 },
		"one entry twice":      func(r []format.DigestRow) { r[1].N = r[0].N },
		"entry 0":              func(r []format.DigestRow) { r[0].N = 0 },
		"a manifest":           func(r []format.DigestRow) { r[1].Items = &format.Items{Manifest: []byte("m")} },
		"a segment":            func(r []format.DigestRow) { r[1].Items = &format.Items{Segments: []format.InlineSegment{{}}} },
	} {
		rows := vectorDigestRows()
		spoil(rows)
		if _, err := format.DecodeDigestRows("x", format.EncodeDigestRows(rows)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzDigestRoot(f *testing.F) {
	f.Add(vectorDigestRoot().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		x, ok := formattest.Stable(t, raw, func(p []byte) (*format.DigestRoot, error) { return format.DecodeDigestRoot("root", p) }, (*format.DigestRoot).Encode)
		if !ok {
			return
		}
		formattest.Bounded(t, raw, "logs", len(x.Logs), 160)
		for _, l := range []format.DigestList{x.Entries, x.Marks, x.KeySets} {
			for _, refs := range l.Levels {
				formattest.Bounded(t, raw, "references", len(refs), 44)
			}
		}
	})
}

func FuzzDigestRows(f *testing.F) {
	f.Add(format.EncodeDigestRows(vectorDigestRows()))
	f.Fuzz(func(t *testing.T, raw []byte) {
		rows, ok := formattest.Stable(t, raw, func(p []byte) ([]format.DigestRow, error) { return format.DecodeDigestRows("page", p) }, format.EncodeDigestRows)
		if ok {
			formattest.Bounded(t, raw, "rows", len(rows), 37)
		}
	})
}

func FuzzDigestHeader(f *testing.F) {
	f.Add(vectorDigestHeader().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		formattest.Stable(t, raw, func(p []byte) (format.DigestHeader, error) {
			h, n, err := format.DecodeDigestHeader("header", p)
			if n > len(p) {
				t.Fatalf("%d bytes read of %d", n, len(p))
			}
			return h, err
		}, func(h format.DigestHeader) []byte { return h.Encode() })
	})
}
