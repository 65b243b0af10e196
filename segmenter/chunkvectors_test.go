package segmenter

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"os"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

// cutVector says how a run of a volume is cut. Its content is made of Parts,
// one behind the other.
type cutVector struct {
	Name  string    `json:"name"`
	Off   int64     `json:"off"` // where in the volume the run begins, bytes
	Parts []cutPart `json:"parts"`
	// Zeroes and Chunks are the extents that come out, as offset and length in
	// bytes of the volume.
	Zeroes [][2]int64 `json:"zeroes"`
	Chunks [][2]int64 `json:"chunks"`
}

// cutPart is Bytes bytes: zeroes, or the stream that begins at byte 0 of
// SHA-256(u64 0) ‖ SHA-256(u64 1) ‖ …, little-endian.
type cutPart struct {
	Zero  bool `json:"zero"`
	Bytes int  `json:"bytes"`
}

type cutVectors struct {
	Polynomial string      `json:"polynomial"`
	MinChunk   uint32      `json:"min_chunk"`
	AvgBits    uint8       `json:"avg_bits"`
	MaxChunk   uint32      `json:"max_chunk"`
	Runs       []cutVector `json:"runs"`
}

const vectorPolynomial = 0x3DA3358B4DC173

func (p cutPart) content() []byte {
	if p.Zero {
		return make([]byte, p.Bytes)
	}
	var out []byte
	for i := uint64(0); len(out) < p.Bytes; i++ {
		sum := sha256.Sum256(binary.LittleEndian.AppendUint64(nil, i))
		out = append(out, sum[:]...)
	}
	return out[:p.Bytes]
}

// TestCut_GoldenVectors holds the cut points: another writer must find the
// same, or nothing deduplicates any more.
func TestCut_GoldenVectors(t *testing.T) {
	v := cutVectors{
		Polynomial: "3da3358b4dc173", MinChunk: DefaultMinChunk, AvgBits: DefaultAvgBits, MaxChunk: DefaultMaxChunk,
		Runs: []cutVector{
			{Name: "a run of the minimum is one chunk", Parts: []cutPart{{Bytes: DefaultMinChunk}}},
			{Name: "one byte more goes through the chunker", Parts: []cutPart{{Bytes: DefaultMinChunk + 1}}},
			{Name: "a long run", Parts: []cutPart{{Bytes: 1 << 20}}},
			{Name: "the same run elsewhere is cut alike", Off: 4096 * 7, Parts: []cutPart{{Bytes: 1 << 20}}},
			{Name: "zero blocks are taken out first", Parts: []cutPart{{Bytes: 100 << 10}, {Zero: true, Bytes: 8 << 10}, {Bytes: 100 << 10}}},
			{Name: "zero blocks lie on multiples of 4096 of the volume", Off: 512, Parts: []cutPart{{Bytes: 1024}, {Zero: true, Bytes: 12 << 10}, {Bytes: 1024}}},
			{Name: "a whole piece of zeroes at a ragged end", Off: 4096 - 512, Parts: []cutPart{{Zero: true, Bytes: 512 + 4096 + 512}}},
		},
	}
	cut := newCutter(format.Group{Polynomial: vectorPolynomial, MinChunk: v.MinChunk, AvgBits: v.AvgBits, MaxChunk: v.MaxChunk})
	for i := range v.Runs {
		r := &v.Runs[i]
		var content []byte
		for _, p := range r.Parts {
			content = append(content, p.content()...)
		}
		splitZeroes(block.Extent{Off: r.Off, Len: int64(len(content))}, content, func(e block.Extent, p []byte) {
			cut.cut(p, func(at int, piece []byte) {
				r.Chunks = append(r.Chunks, [2]int64{e.Off + int64(at), int64(len(piece))})
			})
		}, func(e block.Extent) { r.Zeroes = append(r.Zeroes, [2]int64{e.Off, e.Len}) })
	}
	have, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	have = append(have, '\n')
	path := formattest.Path(t, "format", "v1", "chunking.json")
	if formattest.Update() {
		if err := os.WriteFile(path, have, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want) {
		t.Errorf("the runs are cut into\n%s\nthe vectors are\n%s", have, want)
	}
}

// TestCut_FingerprintIsThatOfTheWindow computes the fingerprint at each cut in
// another way: as docs/FORMAT.md describes it.
func TestCut_FingerprintIsThatOfTheWindow(t *testing.T) {
	data := cutPart{Bytes: 1 << 20}.content()
	cut := newCutter(format.Group{Polynomial: vectorPolynomial, MinChunk: DefaultMinChunk, AvgBits: DefaultAvgBits, MaxChunk: DefaultMaxChunk})
	cut.cut(data, func(at int, piece []byte) {
		end := at + len(piece)
		if len(piece) == DefaultMaxChunk || end == len(data) {
			return
		}
		h := uint64(0)
		for _, b := range data[end-64 : end] {
			for bit := 7; bit >= 0; bit-- {
				h = h<<1 | uint64((b^0x5a)>>bit&1)
				if h>>53 != 0 {
					h ^= vectorPolynomial
				}
			}
		}
		if h&(1<<DefaultAvgBits-1) != 0 {
			t.Errorf("cut at %d, where the fingerprint is %#x", end, h)
		}
	})
}
