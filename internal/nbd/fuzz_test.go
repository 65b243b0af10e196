package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
)

// tape is a connection whose peer says what it says and then hangs up.
type tape struct {
	in  *bytes.Reader
	out bytes.Buffer
}

func (t *tape) Read(p []byte) (int, error)       { return t.in.Read(p) }
func (t *tape) Write(p []byte) (int, error)      { return t.out.Write(p) }
func (t *tape) Close() error                     { return nil }
func (t *tape) LocalAddr() net.Addr              { return nil }
func (t *tape) RemoteAddr() net.Addr             { return nil }
func (t *tape) SetDeadline(time.Time) error      { return nil }
func (t *tape) SetReadDeadline(time.Time) error  { return nil }
func (t *tape) SetWriteDeadline(time.Time) error { return nil }

// play lets a server of one export, "v", hear input, and returns what it says
// after the greeting.
func play(t *testing.T, input []byte) []byte {
	x := newShelf("v", blocktest.NewMemory(1<<20, nil))
	s := NewServer(Options{Exports: x, Logger: slog.New(slog.DiscardHandler)})
	nc := &tape{in: bytes.NewReader(input)}
	newConn(s, nc).serve(context.Background())
	if x.opened != x.released {
		t.Errorf("opened %d times, released %d times", x.opened, x.released)
	}
	if used := s.memory.used.Load(); used != 0 {
		t.Errorf("%d bytes of memory are not given back", used)
	}
	return nc.out.Bytes()[greetingBytes:]
}

func FuzzNegotiation(f *testing.F) {
	sr := optionBytes(optStructuredReply, nil)
	f.Add(join(be32(fixed), optionBytes(optGo, infoData("v", infoName)), requestBytes(cmdFlush, 0, 1, 0, 0)))
	f.Add(join(be32(fixed), sr, optionBytes(optSetMetaContext, metaData("v", contextAllocation)), optionBytes(optGo, infoData(""))))
	f.Add(join(be32(fixed), sr, optionBytes(optListMetaContext, metaData("v")), optionBytes(optAbort, nil)))
	f.Add(join(be32(0), optionBytes(optExportName, []byte("v"))))
	f.Add(join(be32(fixed), optionBytes(optList, nil), optionBytes(optInfo, infoData("none")), optionBytes(77, []byte("x"))))
	f.Add(join(be32(fixed), be64(magicOption), be32(optGo), be32(1<<32-1)))
	f.Add(join(be32(fixed), sr, optionBytes(optSetMetaContext, join(appendString(nil, "v"), be32(1<<32-1)))))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, input []byte) {
		out := play(t, input)
		// Up to the transmission phase, everything is in the form of replies.
		for len(out) >= replyHeaderBytes && binary.BigEndian.Uint64(out) == magicReply {
			n := int64(binary.BigEndian.Uint32(out[16:]))
			if n > int64(len(out)-replyHeaderBytes) {
				t.Fatalf("a reply of %d bytes is cut off", n)
			}
			out = out[replyHeaderBytes+n:]
		}
	})
}

func FuzzTransmission(f *testing.F) {
	f.Add(join(requestBytes(cmdRead, 0, 1, 0, 4096), requestBytes(cmdDisc, 0, 0, 0, 0)))
	f.Add(join(requestBytes(cmdWrite, cmdFlagFUA, 1, 512, 512), make([]byte, 512), requestBytes(cmdRead, cmdFlagDF, 2, 0, 1<<20), requestBytes(cmdDisc, 0, 0, 0, 0)))
	f.Add(join(requestBytes(cmdWrite, 0, 1, 1<<40, 512), make([]byte, 512), requestBytes(cmdFlush, 0, 2, 0, 0), requestBytes(cmdDisc, 0, 0, 0, 0)))
	f.Add(join(requestBytes(cmdTrim, 0, 1, 0, 1<<20), requestBytes(cmdWriteZeroes, cmdFlagNoHole|cmdFlagFastZero, 2, 0, 4096), requestBytes(cmdDisc, 0, 0, 0, 0)))
	f.Add(join(requestBytes(cmdBlockStatus, cmdFlagReqOne, 1, 0, 1<<20), requestBytes(cmdCache, 0, 2, 0, 1<<20), requestBytes(cmdDisc, 0, 0, 0, 0)))
	f.Add(join(requestBytes(99, 0xffff, 1, 1<<63, 1<<32-1), requestBytes(cmdRead, 0, 2, 1<<64-512, 1024), requestBytes(cmdDisc, 0, 0, 0, 0)))
	f.Add(requestBytes(cmdWrite, 0, 1, 0, 1<<20))
	f.Add(make([]byte, 40))
	start := join(be32(fixed), optionBytes(optStructuredReply, nil),
		optionBytes(optSetMetaContext, metaData("v", contextAllocation)), optionBytes(optGo, infoData("v")))
	f.Fuzz(func(t *testing.T, input []byte) {
		out := play(t, join(start, input))
		for len(out) >= 8 && binary.BigEndian.Uint64(out) == magicReply {
			out = out[replyHeaderBytes+int(binary.BigEndian.Uint32(out[16:])):]
		}
		asked := requestCookies(input)
		for cookie := range replyCookies(t, out) {
			if asked[cookie]--; asked[cookie] < 0 {
				t.Errorf("a reply to %d, which was not asked", cookie)
			}
		}
	})
}

// requestCookies counts the requests in a stream by cookie, up to where the
// server has to stop.
func requestCookies(p []byte) map[uint64]int {
	asked := make(map[uint64]int)
	for len(p) >= requestHeaderBytes {
		var q request
		if parseRequest(p, &q) != nil || q.cmd == cmdDisc {
			break
		}
		p = p[requestHeaderBytes:]
		if q.cmd == cmdWrite {
			if uint64(q.length) > uint64(len(p)) {
				break
			}
			p = p[q.length:]
		}
		asked[q.cookie]++
	}
	return asked
}

// FuzzClient lets a client hear an arbitrary server: it ends with an error, at
// the latest when the server hangs up.
func FuzzClient(f *testing.F) {
	reply := func(opt, kind uint32, data []byte) []byte {
		return join(be64(magicReply), be32(opt), be32(kind), be32(uint32(len(data))), data)
	}
	start := join([]byte("NBDMAGICIHAVEOPT\x00\x03"), reply(optStructuredReply, repAck, nil),
		reply(optSetMetaContext, repMetaContext, join(be32(1), []byte(contextAllocation))), reply(optSetMetaContext, repAck, nil),
		reply(optGo, repInfo, join(be16(infoExport), be64(1<<20), be16(flagHasFlags|flagSendWriteZeroes))), reply(optGo, repAck, nil))
	chunk := func(flags, kind uint16, cookie uint64, data []byte) []byte {
		return join(be32(magicStructured), be16(flags), be16(kind), be64(cookie), be32(uint32(len(data))), data)
	}
	f.Add([]byte{})
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	f.Add(start)
	f.Add(join(start, chunk(1, chunkOffsetData, 1, join(be64(0), make([]byte, 1024)))))
	f.Add(join(start, chunk(0, chunkOffsetHole, 1, join(be64(512), be32(512))), chunk(1, chunkOffsetData, 1, join(be64(0), make([]byte, 512)))))
	f.Add(join(start, chunk(1, chunkOffsetHole, 1, join(be64(1<<63), be32(1<<32-1)))))
	f.Add(join(start, chunk(1, chunkError, 1, join(be32(5), be16(200), []byte("short")))))
	f.Add(join(start, be32(magicSimple), be32(0), be64(1)))
	f.Add(join(start, be32(magicStructured), be16(0), be16(chunkOffsetData), be64(1), be32(1<<32-1)))
	f.Fuzz(func(t *testing.T, input []byte) {
		c, err := NewClient(t.Context(), &tape{in: bytes.NewReader(input)}, "v")
		if err != nil {
			return
		}
		defer c.Close()
		if c.Geometry().SizeBytes >= 4096 {
			c.ReadAt(t.Context(), make([]byte, 4096), 0)
			c.Allocation(t.Context(), block.Extent{Off: 0, Len: 4096}, func(block.Extent, bool) bool { return true })
		}
		if err := c.Flush(t.Context()); err == nil && c.flags&flagSendFlush != 0 {
			if _, err := c.nc.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Error("a flush succeeded that nobody answered")
			}
		}
	})
}
