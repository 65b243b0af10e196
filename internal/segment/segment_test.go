package segment_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/format/formattest"
	"drc/internal/segment"
)

func random(seed byte, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// openAll opens every chunk of a payload.
func openAll(keys *crypt.KeySet, row format.SegmentRow, payload []byte) ([][]byte, error) {
	index, err := segment.OpenIndex(keys, row, payload[len(payload)-row.IndexBytes:])
	if err != nil {
		return nil, err
	}
	var chunks [][]byte
	at := 0
	for i, f := range index.Frames {
		plain, err := segment.OpenFrame(keys, row.ID, i, f, payload[at:at+f.Stored], nil)
		if err != nil {
			return nil, err
		}
		at += f.Stored
		for _, n := range f.Chunks {
			chunks = append(chunks, plain[:n])
			plain = plain[n:]
		}
	}
	return chunks, nil
}

func TestSegment_RoundTrip(t *testing.T) {
	text := bytes.Repeat([]byte("a line of a log file, much like the one before it\n"), 4000)
	for name, chunks := range map[string][][]byte{
		"one byte":              {{7}},
		"incompressible":        {random(1, 64<<10), random(2, 200<<10), random(3, 16<<10)},
		"compressible":          {text, text[:1000], text[5:]},
		"mixed, many small":     manySmall(),
		"largest chunk":         {random(4, format.MaxChunkBytes)},
		"zeroes":                {make([]byte, 100000)},
		"chunks fill one frame": {random(5, segment.FrameBytes), random(6, 1)},
	} {
		t.Run(name, func(t *testing.T) {
			keys := crypttest.Keys()
			w := segment.NewWriter(keys)
			for i, c := range chunks {
				if got := w.Add(c); got != i {
					t.Fatalf("chunk %d has ordinal %d", i, got)
				}
			}
			id := w.ID()
			sealed := w.Finish()
			if sealed.ID != id || w.ID() == id || w.Chunks() != 0 {
				t.Error("the writer did not begin a new segment")
			}
			for _, p := range []format.Profile{{Data: 1}, {Data: 4, Parity: 1}, {Data: 2, Parity: 2}, {Data: 4, Parity: 2}} {
				row := sealed.Row(p, 0)
				objects, err := sealed.Shards(p)
				if err != nil {
					t.Fatal(err)
				}
				if len(objects) != row.Profile.Total() || row.Profile.Data > p.Data || row.Profile.Parity != p.Parity {
					t.Fatalf("%d shards of profile %+v", len(objects), row.Profile)
				}
				var payload []byte
				for i, o := range objects {
					h, body, err := segment.VerifyShard(keys, "shard", id, i, o)
					if err != nil {
						t.Fatal(err)
					}
					if h.Payload != row.Payload || h.Profile != row.Profile || h.KeySet != keys.ID {
						t.Errorf("header %+v, row %+v", h, row)
					}
					if i < h.Profile.Data {
						payload = append(payload, body...)
					}
				}
				if payload = payload[:row.Payload]; !bytes.Equal(payload, sealed.Payload) {
					t.Fatal("the data shards are not the payload")
				}
				got, err := openAll(keys, row, payload)
				if err != nil || len(got) != len(chunks) {
					t.Fatalf("%d chunks of %d, %v", len(got), len(chunks), err)
				}
				for i := range chunks {
					if !bytes.Equal(got[i], chunks[i]) {
						t.Errorf("chunk %d differs", i)
					}
				}
			}
		})
	}
}

func manySmall() (out [][]byte) {
	for i := range 500 {
		out = append(out, random(byte(i), 1+i*7))
	}
	return out
}

func TestSegment_NotWithTheWrongKeys(t *testing.T) {
	keys := crypttest.Keys()
	w := segment.NewWriter(keys)
	w.Add(random(1, 5000))
	sealed := w.Finish()
	row := sealed.Row(format.Profile{Data: 1, Parity: 1}, 0)
	objects, err := sealed.Shards(format.Profile{Data: 1, Parity: 1})
	if err != nil {
		t.Fatal(err)
	}
	// An agent's ring has the index key only: index and shards, no content.
	agent := &crypt.KeySet{ID: keys.ID, Index: keys.Index}
	if _, _, err := segment.VerifyShard(agent, "shard", sealed.ID, 0, objects[0]); err != nil {
		t.Errorf("scrubbing needs the index key only: %v", err)
	}
	index, err := segment.OpenIndex(agent, row, sealed.Payload[len(sealed.Payload)-row.IndexBytes:])
	if err != nil {
		t.Fatal(err)
	}
	stored := sealed.Payload[:index.Frames[0].Stored]
	if _, err := segment.OpenFrame(agent, sealed.ID, 0, index.Frames[0], stored, nil); !errors.Is(err, crypt.ErrWrongKey) {
		t.Errorf("an agent reads content: %v", err)
	}
	wrong := crypttest.Keys()
	wrong.Content[0] ^= 1
	if _, err := segment.OpenFrame(wrong, sealed.ID, 0, index.Frames[0], stored, nil); err == nil {
		t.Error("another content key opens a frame")
	}
	wrong.Index[0] ^= 1
	if _, err := segment.OpenIndex(wrong, row, sealed.Payload[len(sealed.Payload)-row.IndexBytes:]); err == nil {
		t.Error("another index key opens the index")
	}
	if _, _, err := segment.VerifyShard(wrong, "shard", sealed.ID, 0, objects[0]); err == nil {
		t.Error("another index key verifies a shard")
	}
	// Frames and shards do not open in another place.
	if _, err := segment.OpenFrame(keys, sealed.ID, 1, index.Frames[0], stored, nil); err == nil {
		t.Error("a frame opens as another one")
	}
	if _, err := segment.OpenFrame(keys, block.SegmentID{1}, 0, index.Frames[0], stored, nil); err == nil {
		t.Error("a frame opens in another segment")
	}
	if _, _, err := segment.VerifyShard(keys, "shard", sealed.ID, 1, objects[0]); err == nil {
		t.Error("a shard passes for another one")
	}
	if _, _, err := segment.VerifyShard(keys, "shard", block.SegmentID{1}, 0, objects[0]); err == nil {
		t.Error("a shard passes for another segment's")
	}
}

// TestVerifyShard_EveryChangedBitIsFound takes shards with several checksums,
// and flips each bit of the small one and some of each byte of the large one.
func TestVerifyShard_EveryChangedBitIsFound(t *testing.T) {
	keys := crypttest.Keys()
	small := segment.NewWriter(keys)
	small.Add(random(1, 300))
	sealed := small.Finish()
	objects, err := sealed.Shards(format.Profile{Data: 4, Parity: 1})
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range objects {
		formattest.Flips(o, func(bit int, changed []byte) {
			if _, _, err := segment.VerifyShard(keys, "shard", sealed.ID, i, changed); err == nil {
				t.Fatalf("shard %d: bit %d changed and not found", i, bit)
			}
		})
		for n := range len(o) {
			if _, _, err := segment.VerifyShard(keys, "shard", sealed.ID, i, o[:n]); err == nil {
				t.Fatalf("shard %d cut to %d bytes and not found", i, n)
			}
		}
	}
	w := segment.NewWriter(keys)
	w.Add(random(2, 150<<10))
	large := w.Finish()
	objects, err = large.Shards(format.Profile{Data: 1, Parity: 1})
	if err != nil {
		t.Fatal(err)
	}
	o := objects[1]
	for at := 0; at < len(o); at += 97 {
		o[at] ^= 1 << (at % 8)
		if _, _, err := segment.VerifyShard(keys, "shard", large.ID, 1, o); err == nil {
			t.Fatalf("byte %d changed and not found", at)
		}
		o[at] ^= 1 << (at % 8)
	}
	// Two stretches of one shard in each other's place.
	a, b := o[format.ShardHeaderSize:format.ShardHeaderSize+format.ShardSumBlock], o[format.ShardHeaderSize+format.ShardSumBlock:format.ShardHeaderSize+2*format.ShardSumBlock]
	swapped := bytes.Clone(o)
	copy(swapped[format.ShardHeaderSize:], b)
	copy(swapped[format.ShardHeaderSize+format.ShardSumBlock:], a)
	if _, _, err := segment.VerifyShard(keys, "shard", large.ID, 1, swapped); err == nil {
		t.Error("swapped stretches are not found")
	}
}

func TestOpen_EveryChangedBitOfAPayloadIsFound(t *testing.T) {
	keys := crypttest.Keys()
	w := segment.NewWriter(keys)
	w.Add(random(1, 200))
	w.Add(bytes.Repeat([]byte("text "), 100))
	sealed := w.Finish()
	row := sealed.Row(format.Profile{Data: 1}, 0)
	formattest.Flips(sealed.Payload, func(bit int, changed []byte) {
		if _, err := openAll(keys, row, changed); err == nil {
			t.Fatalf("bit %d changed and not found", bit)
		}
	})
}

// TestSegment_AnyLossWithinParity rebuilds the payload from shards verified one
// by one.
func TestSegment_AnyLossWithinParity(t *testing.T) {
	keys := crypttest.Keys()
	w := segment.NewWriter(keys)
	w.Add(random(9, 250<<10))
	sealed := w.Finish()
	p := sealed.Profile(format.Profile{Data: 4, Parity: 2})
	objects, err := sealed.Shards(format.Profile{Data: 4, Parity: 2})
	if err != nil {
		t.Fatal(err)
	}
	for a := range objects {
		for b := range a {
			shards := make([][]byte, len(objects))
			for i, o := range objects {
				if i == a || i == b {
					continue
				}
				if _, shards[i], err = segment.VerifyShard(keys, "shard", sealed.ID, i, o); err != nil {
					t.Fatal(err)
				}
			}
			if err := erasure.Reconstruct(p, shards, true); err != nil {
				t.Fatal(err)
			}
			if payload := bytes.Join(shards[:p.Data], nil)[:len(sealed.Payload)]; !bytes.Equal(payload, sealed.Payload) {
				t.Errorf("without shards %d and %d the payload differs", a, b)
			}
		}
	}
}

func TestDecompress_NeverMoreThanSaid(t *testing.T) {
	bomb, compression := segment.Compress(nil, make([]byte, 4<<20))
	if compression != format.CompressionZstd || len(bomb) > 2000 {
		t.Fatalf("%d bytes, compression %d", len(bomb), compression)
	}
	for _, plain := range []int{0, 1, 1000, 4<<20 - 1, 4<<20 + 1} {
		if out, err := segment.Decompress(nil, bomb, format.CompressionZstd, plain); err == nil || cap(out) > plain {
			t.Errorf("%d bytes wanted, got %d, %v", plain, len(out), err)
		}
	}
	if _, err := segment.Decompress(nil, []byte("abc"), format.CompressionNone, 2); err == nil {
		t.Error("plain bytes of another length are accepted")
	}
	if _, err := segment.Decompress(nil, []byte("abc"), 2, 3); err == nil {
		t.Error("an unknown compression is accepted")
	}
}

func vectorSegment() *segment.Sealed {
	w := segment.NewWriter(crypttest.Keys())
	w.Add([]byte("a short chunk"))
	w.Add(bytes.Repeat([]byte("compressible "), 100))
	w.Add(random(7, 200<<10))
	return w.Finish()
}

// segmentVector frames what of a Sealed is not in its payload, so that one file
// holds a vector: id, length of the index, payload.
func segmentVector(s *segment.Sealed) []byte {
	var e format.Encoder
	e.Raw(s.ID[:])
	e.U32(uint32(s.IndexBytes))
	e.Raw(s.Payload)
	return e.Buf
}

func parseSegmentVector(raw []byte) *segment.Sealed {
	d := format.NewDecoder("vector", raw)
	s := &segment.Sealed{ID: d.ID(), Keys: crypttest.Keys()}
	s.IndexBytes = int(d.U32())
	s.Payload = d.Raw(d.Left())
	return s
}

func TestSegment_GoldenVectors(t *testing.T) {
	raw := formattest.Frozen(t, "segment", func() []byte { return segmentVector(vectorSegment()) }, func(raw []byte) (any, error) {
		s := parseSegmentVector(raw)
		chunks, err := openAll(s.Keys, s.Row(format.Profile{Data: 1}, 0), s.Payload)
		if err != nil {
			return nil, err
		}
		var hashes []string
		for _, c := range chunks {
			hashes = append(hashes, fmt.Sprintf("%d bytes, SHA-256 %s", len(c), format.HashOf(c)))
		}
		return map[string]any{
			"id": s.ID, "index_bytes": s.IndexBytes, "payload_bytes": len(s.Payload), "content_key": hex.EncodeToString(s.Keys.Content[:]),
			"index_key": hex.EncodeToString(s.Keys.Index[:]), "chunks": hashes,
		}, nil
	})
	s := parseSegmentVector(raw)
	objects, err := s.Shards(format.Profile{Data: 2, Parity: 2})
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range objects {
		formattest.Exact(t, fmt.Sprintf("shard-%d", i), o, func(raw []byte) (any, error) {
			h, body, err := segment.VerifyShard(s.Keys, "shard", s.ID, i, raw)
			return map[string]any{"header": h, "shard": format.HashOf(body)}, err
		})
	}
}

func FuzzVerifyShard(f *testing.F) {
	w := segment.NewWriter(crypttest.Keys())
	w.Add([]byte("chunk"))
	s := w.Finish()
	objects, err := s.Shards(format.Profile{Data: 1, Parity: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(objects[0], 0)
	f.Add(objects[1], 1)
	f.Fuzz(func(t *testing.T, raw []byte, index int) {
		_, body, err := segment.VerifyShard(s.Keys, "shard", s.ID, index, raw)
		if err == nil && (index > 1 || !bytes.Equal(raw, objects[index]) || len(body) == 0) {
			t.Fatalf("%x is taken for shard %d", raw, index)
		}
	})
}

func FuzzOpenIndex(f *testing.F) {
	s := vectorSegment()
	row := s.Row(format.Profile{Data: 1}, 0)
	good := s.Payload[len(s.Payload)-s.IndexBytes:]
	f.Add(good, row.Payload, row.IndexBytes)
	f.Fuzz(func(t *testing.T, sealed []byte, payload int64, indexBytes int) {
		r := row
		r.Payload, r.IndexBytes = payload, indexBytes
		if _, err := segment.OpenIndex(s.Keys, r, sealed); err == nil && !bytes.Equal(sealed, good) {
			t.Fatalf("%x is taken for the index", sealed)
		}
	})
}

func FuzzDecompress(f *testing.F) {
	packed, _ := segment.Compress(nil, bytes.Repeat([]byte("text "), 100))
	f.Add(packed, uint8(1), 500)
	f.Fuzz(func(t *testing.T, packed []byte, compression uint8, plain int) {
		if plain < 0 || plain > 1<<20 {
			return
		}
		out, err := segment.Decompress(nil, packed, format.Compression(compression), plain)
		if err == nil && len(out) != plain {
			t.Fatalf("%d bytes, not %d", len(out), plain)
		}
	})
}
