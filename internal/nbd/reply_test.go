package nbd

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
)

func flatten(p *net.Buffers) []byte { return bytes.Join(*p, nil) }

func TestReplies_FinishedDuringAWriteGoOutTogether(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	var sent [][]byte
	r := newReplies(func(p *net.Buffers) error {
		sent = append(sent, flatten(p))
		if len(sent) == 1 {
			close(begun)
			<-goOn
		}
		return nil
	}, func(*buffer) {})
	done := make(chan struct{})
	go func() {
		r.begin().simple(0, 0)
		r.end(true)
		close(done)
	}()
	<-begun
	for i := uint64(1); i < 50; i++ {
		r.begin().simple(i, 0)
		r.end(true)
	}
	close(goOn)
	<-done
	if len(sent) != 2 || len(sent[1]) != 49*simpleHeaderBytes {
		t.Fatalf("%d writes, not 2", len(sent))
	}
}

// Headers stay where they are when the arena grows under them.
func TestBatch_KeepsOrderAndContent(t *testing.T) {
	var b batch
	var want []byte
	for round := range 3 {
		b.reset()
		want = want[:0]
		for i := range uint64(1000) {
			switch {
			case i%5 == 4:
				p := bytes.Repeat([]byte{byte(i)}, int(i))
				b.dataChunk(i, 0, int64(i), p)
				want = join(want, be32(magicStructured), be16(0), be16(chunkOffsetData), be64(i), be32(uint32(8+i)), be64(i), p)
			case i%7 == 6:
				b.errorChunk(i, wireEIO, "oh")
				want = join(want, be32(magicStructured), be16(1), be16(chunkError), be64(i), be32(8), be32(wireEIO), be16(2), []byte("oh"))
			default:
				b.simple(i, uint32(round))
				want = join(want, be32(magicSimple), be32(uint32(round)), be64(i))
			}
		}
		if !bytes.Equal(flatten(&b.pieces), want) || b.bytes != len(want) {
			t.Fatalf("round %d: wrong bytes", round)
		}
	}
	if len(b.pieces) > 2*200+10 {
		t.Errorf("%d pieces: neighbouring headers were not joined", len(b.pieces))
	}
}

func TestBatch_ErrorMessageIsCutBetweenRunes(t *testing.T) {
	var b batch
	b.errorChunk(1, wireEIO, "x"+string(bytes.Repeat([]byte("ü"), 1000)))
	p := flatten(&b.pieces)[structuredHeaderBytes:]
	if n := int(binary.BigEndian.Uint16(p[4:])); n != messageBytesMax-1 || n != len(p)-6 {
		t.Fatalf("message of %d bytes", n)
	}
}

func TestReplies_AreDroppedAfterStop(t *testing.T) {
	freed := 0
	r := newReplies(func(*net.Buffers) error { t.Error("sent"); return nil }, func(b *buffer) { freed++; b.free() })
	r.begin().own(newBuffer(4096))
	r.end(false)
	r.stop()
	r.begin().own(newBuffer(4096))
	r.end(true)
	if err := r.flush(); err != nil || freed != 2 {
		t.Fatalf("%d buffers freed, err %v", freed, err)
	}
}
