package nbd

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
)

const fixed = clientFixedNewstyle | clientNoZeroes

func twoExports(t testing.TB, limits Limits) (*serving, *shelf) {
	x := newShelf("a", blocktest.NewMemory(1<<20, nil), "b", blocktest.NewMemory(2<<20, nil))
	return serve(t, x, limits), x
}

func TestOption_ExportNameWithAndWithoutZeroes(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	for flags, extra := range map[uint32]int{0: 124, clientFixedNewstyle: 124, fixed: 0} {
		r := greet(t, s, flags)
		r.option(optExportName, []byte("b"))
		p := r.bytes(10 + extra)
		if size := binary.BigEndian.Uint64(p); size != 2<<20 {
			t.Errorf("flags %d: size %d", flags, size)
		}
		if f := binary.BigEndian.Uint16(p[8:]); f&flagHasFlags == 0 || f&flagCanMultiConn == 0 || f&flagSendDF != 0 {
			t.Errorf("flags %d: transmission flags %#x", flags, f)
		}
		if strings.Trim(string(p[10:]), "\x00") != "" {
			t.Errorf("flags %d: zeroes %q", flags, p[10:])
		}
		r.alive()
	}
}

func TestOption_UnknownExportNameHangsUp(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	r.option(optExportName, []byte("none"))
	r.closed()
	open(t, s, "a", false).alive()
}

func TestOption_EmptyNameIsTheOnlyExport(t *testing.T) {
	one := serve(t, newShelf("only", blocktest.NewMemory(1<<20, nil)), Limits{})
	r := greet(t, one, fixed)
	r.option(optInfo, infoData("", infoName, infoDescription))
	p := r.replies(optInfo, repInfo, repInfo, repInfo, repInfo, repAck)
	if p[2] != "\x00\x01only" || p[3] != "\x00\x02volume only" {
		t.Errorf("%q", p)
	}
	two, _ := twoExports(t, Limits{})
	r = greet(t, two, fixed)
	r.option(optGo, infoData(""))
	r.replies(optGo, repErrUnknown)
	r.option(optGo, infoData("a"))
	r.replies(optGo, repInfo, repInfo, repAck)
	r.alive()
}

func TestOption_ListIsOneReplyAnExport(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	r.option(optList, nil)
	p := r.replies(optList, repServer, repServer, repAck)
	if p[0] != "\x00\x00\x00\x01avolume a" || p[1] != "\x00\x00\x00\x01bvolume b" {
		t.Errorf("%q", p)
	}
}

func TestOption_WrongLengthsAreInvalidAndStayInStep(t *testing.T) {
	s, x := twoExports(t, Limits{})
	good := infoData("a", infoBlockSize)
	meta := metaData("a", contextAllocation)
	r := greet(t, s, fixed)
	r.option(optStructuredReply, nil)
	r.replies(optStructuredReply, repAck)
	for _, bad := range []struct {
		name string
		opt  uint32
		data []byte
	}{
		{"list with data", optList, []byte{0}},
		{"structured reply with data", optStructuredReply, []byte("x")},
		{"go without data", optGo, nil},
		{"go cut in the length", optGo, good[:3]},
		{"go cut in the name", optGo, good[:4]},
		{"go cut in the count", optGo, good[:6]},
		{"go cut in the list", optGo, good[:len(good)-1]},
		{"go with a tail", optGo, append(good[:len(good):len(good)], 0)},
		{"info with a name past the end", optInfo, join(be32(1<<32-1), good[4:])},
		{"info with a count past the end", optInfo, join(appendString(nil, "a"), be16(0xffff))},
		{"go with NUL in the name", optGo, infoData("a\x00")},
		{"go with a name that is no text", optGo, infoData("\xff")},
		{"go with a long name", optGo, infoData(strings.Repeat("n", nameBytesMax+1))},
		{"set without data", optSetMetaContext, nil},
		{"set cut in the name", optSetMetaContext, meta[:4]},
		{"set cut in the count", optSetMetaContext, meta[:7]},
		{"set cut in a query", optSetMetaContext, meta[:len(meta)-1]},
		{"set with a tail", optSetMetaContext, append(meta[:len(meta):len(meta)], 0)},
		{"set with a count past the end", optSetMetaContext, join(appendString(nil, "a"), be32(1<<32-1))},
		{"list contexts with a tail", optListMetaContext, append(metaData("a"), 1, 2, 3)},
	} {
		r.option(bad.opt, bad.data)
		h := r.bytes(replyHeaderBytes)
		r.bytes(int(binary.BigEndian.Uint32(h[16:])))
		if kind := binary.BigEndian.Uint32(h[12:]); kind != repErrInvalid {
			t.Errorf("%s: reply %#x", bad.name, kind)
		}
	}
	r.option(optGo, good)
	r.replies(optGo, repInfo, repInfo, repAck)
	r.alive()
	if x.opened != 1 {
		t.Errorf("%d opens", x.opened)
	}
}

func TestOption_UnknownOnesAreSkipped(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	for _, opt := range []uint32{optStartTLS, 4, 8 + 3, 12345, 1<<32 - 1} {
		r.option(opt, []byte("whatever"))
		r.replies(opt, repErrUnsup)
	}
	r.option(optStartTLS, nil)
	r.replies(optStartTLS, repErrUnsup)
	r.option(optGo, infoData("a"))
	r.replies(optGo, repInfo, repInfo, repAck)
	r.alive()
}

func TestOption_AbortIsAcknowledged(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	r.option(optAbort, nil)
	r.replies(optAbort, repAck)
	r.closed()
	s.stop()
	if s.warnings() != 0 {
		t.Error(s.log)
	}
}

func TestOption_MetaContextsNeedStructuredReplies(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	for _, opt := range []uint32{optSetMetaContext, optListMetaContext} {
		r.option(opt, metaData("a", contextAllocation))
		r.replies(opt, repErrInvalid)
	}
}

func TestOption_ListMetaContextQueries(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	r.option(optStructuredReply, nil)
	r.replies(optStructuredReply, repAck)
	for _, c := range []struct {
		opt     uint32
		queries []string
		matches bool
	}{
		{optListMetaContext, nil, true},
		{optListMetaContext, []string{"base:"}, true},
		{optListMetaContext, []string{"x-none:y", contextAllocation}, true},
		{optListMetaContext, []string{"qemu:"}, false},
		{optListMetaContext, []string{"base:none"}, false},
		{optSetMetaContext, nil, false},
		{optSetMetaContext, []string{"base:"}, false},
		{optSetMetaContext, []string{"x:y", contextAllocation, contextAllocation}, true},
	} {
		r.option(c.opt, metaData("a", c.queries...))
		if !c.matches {
			r.replies(c.opt, repAck)
			continue
		}
		p := r.replies(c.opt, repMetaContext, repAck)
		if id := binary.BigEndian.Uint32([]byte(p[0])); p[0][4:] != contextAllocation || (id == 0) != (c.opt == optListMetaContext) {
			t.Errorf("%v: %q", c, p)
		}
	}
	r.option(optSetMetaContext, metaData("none", contextAllocation))
	r.replies(optSetMetaContext, repErrUnknown)
}

func TestOption_MetaContextIsForItsExportOnly(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	for _, c := range []struct {
		name string
		set  []string // exports for which it is set, in order; "-" sets nothing
		ok   bool
	}{
		{"same", []string{"a"}, true},
		{"other", []string{"b"}, false},
		{"replaced", []string{"b", "a"}, true},
		{"taken back", []string{"a", "-"}, false},
		{"failed later", []string{"a", "none"}, false},
	} {
		r := greet(t, s, fixed)
		r.option(optStructuredReply, nil)
		r.replies(optStructuredReply, repAck)
		for _, e := range c.set {
			switch e {
			case "-":
				r.option(optSetMetaContext, metaData("a"))
				r.replies(optSetMetaContext, repAck)
			case "none":
				r.option(optSetMetaContext, metaData("none", contextAllocation))
				r.replies(optSetMetaContext, repErrUnknown)
			default:
				r.option(optSetMetaContext, metaData(e, contextAllocation))
				r.replies(optSetMetaContext, repMetaContext, repAck)
			}
		}
		r.option(optGo, infoData("a"))
		r.replies(optGo, repInfo, repInfo, repAck)
		r.request(cmdBlockStatus, 0, 1, 0, 4096)
		kind, _, _ := r.chunk(1)
		if ok := kind == chunkBlockStatus; ok != c.ok {
			t.Errorf("%s: chunk %d", c.name, kind)
		}
	}
}

func TestOption_EachOpenIsReleasedOnce(t *testing.T) {
	s, x := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	r.option(optInfo, infoData("a"))
	r.replies(optInfo, repInfo, repInfo, repAck)
	r.option(optInfo, infoData("b"))
	r.replies(optInfo, repInfo, repInfo, repAck)
	r.option(optGo, infoData("b"))
	r.replies(optGo, repInfo, repInfo, repAck)
	r.request(cmdDisc, 0, 0, 0, 0)
	r.closed()
	r = greet(t, s, fixed)
	r.option(optExportName, []byte("a"))
	r.bytes(10)
	r.Close()
	s.stop()
	if x.opened != 4 || x.released != 4 {
		t.Fatalf("opened %d, released %d", x.opened, x.released)
	}
}

func TestOption_RefusedExportsSayWhy(t *testing.T) {
	s, x := twoExports(t, Limits{})
	for want, err := range map[uint32]error{
		repErrShutdown: block.ErrStopping,
		repErrPolicy:   errors.New("the volume is being restored"),
		repErrUnknown:  ErrUnknownExport,
	} {
		x.mu.Lock()
		x.fail = err
		x.mu.Unlock()
		r := greet(t, s, fixed)
		r.option(optGo, infoData("a"))
		if p := r.replies(optGo, want); !strings.Contains(p[0], err.Error()) {
			t.Errorf("%q does not say %q", p[0], err)
		}
	}
}

func TestHostile_HugeOptionIsRefusedUnread(t *testing.T) {
	s, _ := twoExports(t, Limits{})
	r := greet(t, s, fixed)
	r.send(join(be64(magicOption), be32(optGo), be32(1<<32-1)))
	r.replies(optGo, repErrTooBig)
	r.closed()
	r = greet(t, s, fixed)
	r.send(join(be64(magicOption), be32(optExportName), be32(1<<32-1)))
	r.closed()
	s.stop()
	if s.warnings() != 2 {
		t.Error(s.log)
	}
}

func TestHostile_NegotiationGarbage(t *testing.T) {
	for name, input := range map[string][]byte{
		"http":              []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"unknown flags":     be32(fixed | 1<<7),
		"bad magic":         join(be32(fixed), make([]byte, 16)),
		"cut in the flags":  {0, 0},
		"cut in the header": join(be32(fixed), be64(magicOption)),
		"cut in the data":   join(be32(fixed), be64(magicOption), be32(optGo), be32(100), []byte("few")),
		"option unagreed":   join(be32(0), optionBytes(optList, nil)),
		"name is no text":   join(be32(fixed), optionBytes(optExportName, []byte("\xff\xfe"))),
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := twoExports(t, Limits{})
			r := connect(t, s)
			r.bytes(greetingBytes)
			r.send(input)
			if strings.HasPrefix(name, "cut") {
				r.Close()
			} else {
				r.closed()
			}
			for len(s.Connections()) > 0 { // or stop would come first
				runtime.Gosched()
			}
			open(t, s, "a", true).alive() // the server lives
			s.stop()
			if s.warnings() != 1 {
				t.Errorf("%d warnings, want one:\n%s", s.warnings(), s.log)
			}
		})
	}
}

func TestHostile_SilentClientIsCutOff(t *testing.T) {
	s, _ := twoExports(t, Limits{NegotiationTime: time.Millisecond})
	r := connect(t, s)
	r.bytes(greetingBytes)
	r.closed()
	s.stop()
	if !strings.Contains(s.log.String(), "chose no export in time") {
		t.Error(s.log)
	}
}

func TestHostile_TooManyConnections(t *testing.T) {
	s, _ := twoExports(t, Limits{Connections: 2})
	a, b := open(t, s, "a", true), open(t, s, "b", true)
	connect(t, s).closed()
	a.alive()
	b.alive()
	if n := len(s.Connections()); n != 2 {
		t.Errorf("%d connections", n)
	}
}

// hidden are exports of which none is listed.
type hidden struct{ *shelf }

func (hidden) List() []Export { return nil }

// What is not listed is opened if it is there, by each way of asking for it.
func TestOption_UnlistedExports(t *testing.T) {
	s := serve(t, hidden{newShelf("a", blocktest.NewMemory(1<<20, nil))}, Limits{})
	r := greet(t, s, fixed)
	r.option(optList, nil)
	r.replies(optList, repAck)
	r.option(optStructuredReply, nil)
	r.replies(optStructuredReply, repAck)
	r.option(optSetMetaContext, metaData("none", contextAllocation))
	r.replies(optSetMetaContext, repErrUnknown)
	r.option(optInfo, infoData("none"))
	r.replies(optInfo, repErrUnknown)
	r.option(optSetMetaContext, metaData("a", contextAllocation))
	r.replies(optSetMetaContext, repMetaContext, repAck)
	open(t, s, "a", false).alive()
	r = greet(t, s, fixed)
	r.option(optGo, infoData(""))
	r.replies(optGo, repErrUnknown)
}
