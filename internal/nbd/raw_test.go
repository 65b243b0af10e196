package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// raw is a client that says exactly what a test tells it to.
type raw struct {
	t testing.TB
	net.Conn
}

// hangTime ends a test that would hang; no outcome depends on it.
const hangTime = 30 * time.Second

// connect dials s and reads nothing.
func connect(t testing.TB, s *serving) *raw {
	t.Helper()
	nc, err := net.Dial(s.network, s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(hangTime))
	return &raw{t, nc}
}

// greet dials s and exchanges flags.
func greet(t testing.TB, s *serving, flags uint32) *raw {
	t.Helper()
	r := connect(t, s)
	want := []byte("NBDMAGICIHAVEOPT\x00\x03")
	if got := r.bytes(18); string(got) != string(want) {
		t.Fatalf("greeting %q", got)
	}
	r.send(be32(flags))
	return r
}

// open goes on to the transmission phase of an export.
func open(t testing.TB, s *serving, export string, structured bool) *raw {
	t.Helper()
	r := greet(t, s, clientFixedNewstyle|clientNoZeroes)
	if structured {
		r.option(optStructuredReply, nil)
		r.replies(optStructuredReply, repAck)
		r.option(optSetMetaContext, metaData(export, contextAllocation))
		r.replies(optSetMetaContext, repMetaContext, repAck)
	}
	r.option(optGo, infoData(export))
	r.replies(optGo, repInfo, repInfo, repAck)
	return r
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func join(parts ...[]byte) []byte {
	var p []byte
	for _, part := range parts {
		p = append(p, part...)
	}
	return p
}

func infoData(export string, infos ...uint16) []byte {
	p := join(appendString(nil, export), be16(uint16(len(infos))))
	for _, i := range infos {
		p = append(p, be16(i)...)
	}
	return p
}

func metaData(export string, queries ...string) []byte {
	p := join(appendString(nil, export), be32(uint32(len(queries))))
	for _, q := range queries {
		p = appendString(p, q)
	}
	return p
}

func optionBytes(opt uint32, data []byte) []byte {
	return join(be64(magicOption), be32(opt), be32(uint32(len(data))), data)
}

func requestBytes(cmd, flags uint16, cookie, off uint64, length uint32) []byte {
	return join(be32(magicRequest), be16(flags), be16(cmd), be64(cookie), be64(off), be32(length))
}

func (r *raw) send(p []byte) {
	r.t.Helper()
	if _, err := r.Write(p); err != nil {
		r.t.Fatalf("send: %v", err)
	}
}

func (r *raw) bytes(n int) []byte {
	r.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		r.t.Fatalf("receive %d bytes: %v", n, err)
	}
	return p
}

// closed expects the server to hang up without another byte.
func (r *raw) closed() {
	r.t.Helper()
	var p [1]byte
	n, err := r.Read(p[:])
	var ne net.Error
	if n != 0 || errors.As(err, &ne) && ne.Timeout() {
		r.t.Fatalf("the connection is not closed: %d bytes, %v", n, err)
	}
}

func (r *raw) option(opt uint32, data []byte) {
	r.t.Helper()
	r.send(optionBytes(opt, data))
}

// replies expects replies to opt of these kinds and returns their payloads.
func (r *raw) replies(opt uint32, kinds ...uint32) []string {
	r.t.Helper()
	var payloads []string
	for _, want := range kinds {
		h := r.bytes(replyHeaderBytes)
		payload := string(r.bytes(int(binary.BigEndian.Uint32(h[16:]))))
		if magic := binary.BigEndian.Uint64(h); magic != magicReply {
			r.t.Fatalf("reply magic %#x", magic)
		}
		if got := binary.BigEndian.Uint32(h[8:]); got != opt {
			r.t.Fatalf("reply to option %d, want %d", got, opt)
		}
		if kind := binary.BigEndian.Uint32(h[12:]); kind != want {
			r.t.Fatalf("reply %#x (%q), want %#x", kind, payload, want)
		}
		payloads = append(payloads, payload)
	}
	return payloads
}

func (r *raw) request(cmd, flags uint16, cookie, off uint64, length uint32) {
	r.t.Helper()
	r.send(requestBytes(cmd, flags, cookie, off, length))
}

// simple expects a simple reply and returns its error.
func (r *raw) simple(cookie uint64) uint32 {
	r.t.Helper()
	h := r.bytes(simpleHeaderBytes)
	if magic := binary.BigEndian.Uint32(h); magic != magicSimple {
		r.t.Fatalf("a reply begins with %#x, want a simple one", magic)
	}
	if got := binary.BigEndian.Uint64(h[8:]); got != cookie {
		r.t.Fatalf("reply to %d, want %d", got, cookie)
	}
	return binary.BigEndian.Uint32(h[4:])
}

// chunk expects a structured reply chunk.
func (r *raw) chunk(cookie uint64) (kind, flags uint16, payload []byte) {
	r.t.Helper()
	h := r.bytes(structuredHeaderBytes)
	if magic := binary.BigEndian.Uint32(h); magic != magicStructured {
		r.t.Fatalf("a reply begins with %#x, want a structured one", magic)
	}
	if got := binary.BigEndian.Uint64(h[8:]); got != cookie {
		r.t.Fatalf("reply to %d, want %d", got, cookie)
	}
	return binary.BigEndian.Uint16(h[6:]), binary.BigEndian.Uint16(h[4:]), r.bytes(int(binary.BigEndian.Uint32(h[16:])))
}

// failure expects a request to have failed, whatever the form of the reply, and
// returns the error. A structured one must be final and carry a message.
func (r *raw) failure(cookie uint64, structured bool) uint32 {
	r.t.Helper()
	if !structured {
		return r.simple(cookie)
	}
	kind, flags, p := r.chunk(cookie)
	if kind != chunkError || flags != chunkFlagDone || len(p) <= 6 || int(binary.BigEndian.Uint16(p[4:])) != len(p)-6 {
		r.t.Fatalf("chunk of kind %d, flags %d, %q; want an error with a message", kind, flags, p)
	}
	return binary.BigEndian.Uint32(p)
}

// alive proves that the stream is in step: a flush is answered.
func (r *raw) alive() {
	r.t.Helper()
	const cookie = 0xa11fe
	r.request(cmdFlush, 0, cookie, 0, 0)
	if code := r.simple(cookie); code != 0 {
		r.t.Fatalf("flush: error %d", code)
	}
}

// warnings counts the log lines that an administrator would look at.
func (s *serving) warnings() int {
	return strings.Count(s.log.String(), "level=WARN") + strings.Count(s.log.String(), "level=ERROR")
}
