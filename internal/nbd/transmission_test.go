package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
)

// bothForms runs a test with and without structured replies.
func bothForms(t *testing.T, test func(t *testing.T, structured bool)) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%t", structured), func(t *testing.T) { test(t, structured) })
	}
}

func oneExport(t testing.TB, hook blocktest.Hook) (*serving, *blocktest.Memory) {
	m := blocktest.NewMemory(1<<20, hook)
	return serve(t, newShelf("v", m), Limits{}), m
}

func TestRequest_RejectedWritesAreDrained(t *testing.T) {
	bothForms(t, func(t *testing.T, structured bool) {
		m := blocktest.NewMemory(1<<20, nil)
		ro := blocktest.NewMemoryGeometry(block.Geometry{SizeBytes: 1 << 20, SectorSize: 512, ReadOnly: true}, nil)
		big := blocktest.NewMemory(64<<20, nil)
		s := serve(t, newShelf("v", m, "ro", ro, "big", big), Limits{})
		for _, c := range []struct {
			name   string
			export string
			flags  uint16
			off    uint64
			length uint32
			want   uint32
		}{
			{"past the end", "v", 0, 1<<20 - 512, 1024, wireENOSPC},
			{"far past the end", "v", 0, 1<<64 - 512, 512, wireENOSPC},
			{"longer than the device", "v", 0, 0, 2 << 20, wireENOSPC},
			{"misaligned", "v", 0, 100, 512, wireEINVAL},
			{"odd length", "v", 0, 0, 100, wireEINVAL},
			{"unknown flag", "v", 1 << 9, 0, 512, wireEINVAL},
			{"flag of another command", "v", cmdFlagReqOne, 0, 512, wireEINVAL},
			{"read-only", "ro", 0, 0, 65536, wireEPERM},
			{"read-only and past the end", "ro", 0, 4 << 20, 512, wireEPERM},
			{"over the maximum", "big", 0, 0, requestBytesMax + 512, wireEINVAL},
		} {
			r := open(t, s, c.export, structured)
			// The payload looks like requests: who does not drain it, answers.
			payload := bytes.Repeat(requestBytes(cmdFlush, 0, 0xbad, 0, 0), int(c.length)/requestHeaderBytes+1)[:c.length]
			r.send(join(requestBytes(cmdWrite, c.flags, 7, c.off, c.length), payload))
			if code := r.failure(7, structured); code != c.want {
				t.Errorf("%s: error %d, want %d", c.name, code, c.want)
			}
			r.alive()
		}
		if m.Pages() != 0 || big.Pages() != 0 {
			t.Error("a rejected write had an effect")
		}
	})
}

func TestRequest_OnlyWriteCarriesData(t *testing.T) {
	s, _ := oneExport(t, nil)
	bothForms(t, func(t *testing.T, structured bool) {
		r := open(t, s, "v", structured)
		for i, c := range []struct {
			cmd, flags uint16
			off        uint64
			length     uint32
			want       uint32
		}{
			{99, 0, 0, 4096, wireEINVAL},     // unknown command
			{8, 0, 0, 1<<32 - 1, wireEINVAL}, // unknown command
			{cmdRead, 1 << 5, 0, 512, wireEINVAL},
			{cmdRead, cmdFlagNoHole, 0, 512, wireEINVAL},
			{cmdTrim, cmdFlagNoHole, 0, 512, wireEINVAL},
			{cmdCache, cmdFlagDF, 0, 512, wireEINVAL},
			{cmdFlush, 0, 512, 0, wireEINVAL},
			{cmdFlush, 0, 0, 512, wireEINVAL},
			{cmdRead, 0, 1 << 20, 512, wireEINVAL},
			{cmdRead, 0, 1<<63 + 512, 512, wireEINVAL},
			{cmdRead, 0, 1<<64 - 512, 1024, wireEINVAL},
			{cmdRead, 0, 0, 1<<32 - 512, wireEINVAL},
			{cmdRead, 0, 1, 512, wireEINVAL},
			{cmdRead, 0, 512, 511, wireEINVAL},
			{cmdTrim, 0, 1 << 20, 512, wireENOSPC},
			{cmdTrim, 0, 0, 1<<32 - 512, wireENOSPC},
			{cmdTrim, 0, 1, 512, wireEINVAL},
			{cmdWriteZeroes, 0, 1<<20 - 512, 1024, wireENOSPC},
			{cmdWriteZeroes, 0, 512, 5, wireEINVAL},
			{cmdCache, 0, 1 << 20, 4096, wireEINVAL},
			{cmdBlockStatus, 0, 1 << 20, 4096, wireEINVAL},
			{cmdBlockStatus, 0, 0, 0, wireEINVAL},
		} {
			cookie := uint64(1000 + i)
			r.request(c.cmd, c.flags, cookie, c.off, c.length)
			if code := r.failure(cookie, structured); code != c.want {
				t.Errorf("case %d %+v: error %d", i, c, code)
			}
		}
		r.alive()
	})
}

func TestRequest_OfNoBytesSucceeds(t *testing.T) {
	s, _ := oneExport(t, func(context.Context, blocktest.Request) error { return errors.New("the device was asked") })
	bothForms(t, func(t *testing.T, structured bool) {
		r := open(t, s, "v", structured)
		for _, cmd := range []uint16{cmdWrite, cmdTrim, cmdWriteZeroes, cmdCache} {
			r.request(cmd, 0, uint64(cmd), 1<<20, 0)
			if code := r.simple(uint64(cmd)); code != 0 {
				t.Errorf("%s: error %d", commandName(cmd), code)
			}
		}
		r.request(cmdRead, 0, 5, 0, 0)
		if structured {
			if kind, flags, p := r.chunk(5); kind != chunkNone || flags != chunkFlagDone || len(p) != 0 {
				t.Errorf("read: chunk %d", kind)
			}
		} else if code := r.simple(5); code != 0 {
			t.Errorf("read: error %d", code)
		}
	})
}

func TestReply_DeviceErrorsAreTranslated(t *testing.T) {
	var fail atomic.Pointer[error]
	s, _ := oneExport(t, func(context.Context, blocktest.Request) error { return *fail.Load() })
	bothForms(t, func(t *testing.T, structured bool) {
		r := open(t, s, "v", structured)
		for _, c := range []struct {
			err  error
			want uint32
		}{
			{block.ErrNoSpace, wireENOSPC},
			{fmt.Errorf("disk 3: %w", block.ErrNoSpace), wireENOSPC},
			{block.ErrReadOnly, wireEPERM},
			{block.ErrMisaligned, wireEINVAL},
			{block.ErrStopping, wireESHUTDOWN},
			{block.ErrUnsupported, wireENOTSUP},
			{errors.New("the disk is on fire"), wireEIO},
			{errors.New(strings.Repeat("ü", 5000)), wireEIO},
		} {
			fail.Store(&c.err)
			for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes, cmdCache} {
				r.request(cmd, 0, 9, 0, 4096)
				if cmd == cmdWrite {
					r.send(make([]byte, 4096))
				}
				// In particular no success header goes before a failed read.
				if code := r.failure(9, structured); code != c.want {
					t.Errorf("%s, %.40v: error %d, want %d", commandName(cmd), c.err, code, c.want)
				}
			}
			r.request(cmdFlush, 0, 9, 0, 0)
			if code := r.failure(9, structured); code != c.want {
				t.Errorf("flush, %.40v: error %d, want %d", c.err, code, c.want)
			}
		}
		fail.Store(&block.ErrOutOfRange)
		r.request(cmdRead, 0, 9, 0, 512)
		if code := r.failure(9, structured); code != wireEINVAL {
			t.Errorf("read out of range: error %d", code)
		}
		r.request(cmdTrim, 0, 9, 0, 512)
		if code := r.failure(9, structured); code != wireENOSPC {
			t.Errorf("trim out of range: error %d", code)
		}
	})
}

// A client may not say what it was told: the log does, and does not drown in it.
func TestReply_FailuresAreLogged(t *testing.T) {
	s, _ := oneExport(t, func(_ context.Context, q blocktest.Request) error {
		if q.Kind == blocktest.Read {
			return block.ErrNoSpace
		}
		return errors.New("the disk is on fire")
	})
	r := open(t, s, "v", true)
	for range 50 {
		r.request(cmdRead, 0, 8, 4096, 4096)
		r.failure(8, true)
		r.request(cmdFlush, 0, 9, 0, 0)
		r.failure(9, true)
	}
	said := s.log.String()
	if n := strings.Count(said, "the disk is on fire"); n != 1 {
		t.Errorf("50 failures at once are logged %d times:\n%s", n, said)
	}
	if !strings.Contains(said, "command=flush") || strings.Contains(said, "command=read") {
		t.Errorf("logged: %s", said)
	}
}

func TestReply_ReadsAreNeverSimpleOnceStructured(t *testing.T) {
	s, m := oneExport(t, nil)
	want := fill(t, m, 4096, 4096)
	r := open(t, s, "v", true)
	r.request(cmdRead, 0, 1, 4096, 4096)
	kind, flags, p := r.chunk(1)
	if kind != chunkOffsetData || flags != chunkFlagDone || binary.BigEndian.Uint64(p) != 4096 || !bytes.Equal(p[8:], want) {
		t.Errorf("chunk %d, flags %d", kind, flags)
	}
	r = open(t, s, "v", false)
	r.request(cmdRead, 0, 1, 4096, 4096)
	if code := r.simple(1); code != 0 || !bytes.Equal(r.bytes(4096), want) {
		t.Errorf("error %d or wrong data", code)
	}
}

func TestReply_HolesAreHoleChunks(t *testing.T) {
	s, m := oneExport(t, nil)
	fill(t, m, 256<<10, 128<<10)
	fill(t, m, 512<<10, 4096)
	r := open(t, s, "v", true)
	whole := content(t, m)
	for _, c := range []struct {
		flags       uint16
		off, length int
		want        string
	}{
		{0, 0, 1 << 20, "hole 262144, data 131072, hole 131072, data 4096, hole 520192"},
		{0, 0, 128 << 10, "hole 131072"},
		{0, 256 << 10, 128 << 10, "data 131072"},
		{0, 192 << 10, 64<<10 + 512, "hole 65536, data 512"},
		{cmdFlagDF, 0, 1 << 20, "data 1048576"},
		{cmdFlagDF, 0, 128 << 10, "hole 131072"},
	} {
		r.request(cmdRead, c.flags, 3, uint64(c.off), uint32(c.length))
		var got []string
		data := make([]byte, c.length)
		for flags := uint16(0); flags&chunkFlagDone == 0; {
			var kind uint16
			var p []byte
			kind, flags, p = r.chunk(3)
			at := int(binary.BigEndian.Uint64(p)) - c.off
			switch kind {
			case chunkOffsetData:
				got = append(got, fmt.Sprint("data ", copy(data[at:], p[8:])))
			case chunkOffsetHole:
				got = append(got, fmt.Sprint("hole ", binary.BigEndian.Uint32(p[8:])))
			default:
				t.Fatalf("chunk %d", kind)
			}
		}
		if text := strings.Join(got, ", "); text != c.want {
			t.Errorf("%+v: %s", c, text)
		}
		if !bytes.Equal(data, whole[c.off:c.off+c.length]) {
			t.Errorf("%+v: wrong data", c)
		}
	}
}

// A write between the question for holes and the read must not be torn: what the
// device read is what counts.
func TestReply_HoleThatWasJustWrittenIsData(t *testing.T) {
	var m *blocktest.Memory
	want := bytes.Repeat([]byte{0xee}, 64<<10)
	m = blocktest.NewMemory(1<<20, func(ctx context.Context, r blocktest.Request) error {
		if r.Kind == blocktest.Read {
			return m.WriteAt(ctx, want, 128<<10, block.WriteOptions{})
		}
		return nil
	})
	if err := m.WriteAt(t.Context(), want[:4096], 0, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	c := serve(t, newShelf("v", m), Limits{}).dial(t, "v")
	got := make([]byte, 256<<10)
	if err := c.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[128<<10:192<<10], want) {
		t.Fatal("the write got lost behind a hole")
	}
}

func TestReply_BlockStatus(t *testing.T) {
	s, m := oneExport(t, nil)
	fill(t, m, 64<<10, 64<<10)
	r := open(t, s, "v", true)
	for _, c := range []struct {
		flags       uint16
		off, length int
		want        []uint32
	}{
		{0, 0, 1 << 20, []uint32{64 << 10, 3, 64 << 10, 0, 896 << 10, 3}},
		{cmdFlagReqOne, 0, 1 << 20, []uint32{64 << 10, 3}},
		{0, 96 << 10, 64 << 10, []uint32{32 << 10, 0, 32 << 10, 3}},
		{cmdFlagReqOne | cmdFlagFUA, 70 << 10, 512, []uint32{512, 0}},
	} {
		r.request(cmdBlockStatus, c.flags, 4, uint64(c.off), uint32(c.length))
		kind, flags, p := r.chunk(4)
		want := be32(contextAllocationID)
		for _, v := range c.want {
			want = append(want, be32(v)...)
		}
		if kind != chunkBlockStatus || flags != chunkFlagDone || !bytes.Equal(p, want) {
			t.Errorf("%+v: chunk %d %x", c, kind, p)
		}
	}
}

func TestRequest_HugeTrimAndZeroesAllocateNothing(t *testing.T) {
	m := blocktest.NewMemory(1<<43, nil)
	s := serve(t, newShelf("v", m), Limits{})
	r := open(t, s, "v", true)
	fill(t, m, 1<<32, 4096)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, cmd := range []uint16{cmdTrim, cmdWriteZeroes} {
		for i := range uint64(50) {
			r.request(cmd, 0, i, i<<32, 1<<32-512)
			if code := r.simple(i); code != 0 {
				t.Fatalf("%s: error %d", commandName(cmd), code)
			}
		}
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
		t.Errorf("%d bytes allocated for 100 requests", got)
	}
	if m.Pages() != 0 {
		t.Errorf("%d pages are left", m.Pages())
	}
}

func TestFlags_ReachTheDevice(t *testing.T) {
	var seen []blocktest.Request
	var mu sync.Mutex
	s, _ := oneExport(t, func(_ context.Context, r blocktest.Request) error {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r)
		if r.Fast {
			return block.ErrUnsupported
		}
		return nil
	})
	r := open(t, s, "v", false)
	e := block.Extent{Off: 4096, Len: 4096}
	for _, c := range []struct {
		cmd, flags uint16
		want       blocktest.Request
		code       uint32
	}{
		{cmdWrite, 0, blocktest.Request{Kind: blocktest.Write, Extent: e}, 0},
		{cmdWrite, cmdFlagFUA, blocktest.Request{Kind: blocktest.Write, Extent: e, FUA: true}, 0},
		{cmdTrim, 0, blocktest.Request{Kind: blocktest.Zero, Extent: e}, 0},
		{cmdTrim, cmdFlagFUA, blocktest.Request{Kind: blocktest.Zero, Extent: e, FUA: true}, 0},
		{cmdWriteZeroes, cmdFlagNoHole, blocktest.Request{Kind: blocktest.Zero, Extent: e, NoHole: true}, 0},
		{cmdWriteZeroes, cmdFlagFastZero | cmdFlagFUA, blocktest.Request{Kind: blocktest.Zero, Extent: e, Fast: true, FUA: true}, wireENOTSUP},
		{cmdRead, cmdFlagFUA, blocktest.Request{Kind: blocktest.Read, Extent: e}, 0},
		{cmdCache, 0, blocktest.Request{Kind: blocktest.Read, Extent: e}, 0},
		{cmdFlush, cmdFlagFUA, blocktest.Request{Kind: blocktest.Flush}, 0},
	} {
		off, length := uint64(e.Off), uint32(e.Len)
		if c.cmd == cmdFlush {
			off, length = 0, 0
		}
		r.request(c.cmd, c.flags, 1, off, length)
		if c.cmd == cmdWrite {
			r.send(make([]byte, length))
		}
		if code := r.simple(1); code != c.code {
			t.Errorf("%+v: error %d", c, code)
		}
		if c.cmd == cmdRead {
			r.bytes(int(length))
		}
		mu.Lock()
		if got := seen[len(seen)-1]; got != c.want {
			t.Errorf("the device saw %+v, want %+v", got, c.want)
		}
		mu.Unlock()
	}
}

// What was answered on one connection is covered by a flush on another, because
// the device has it before the answer goes out.
func TestFlush_CoversOtherConnections(t *testing.T) {
	var written, flushed atomic.Int64
	s, _ := oneExport(t, func(_ context.Context, r blocktest.Request) error {
		switch r.Kind {
		case blocktest.Write:
			written.Add(1)
		case blocktest.Flush:
			flushed.Store(written.Load())
		}
		return nil
	})
	a, b, c := s.dial(t, "v"), s.dial(t, "v"), s.dial(t, "v")
	for i := range int64(100) {
		for _, w := range []*Client{a, b} {
			if err := w.WriteAt(t.Context(), make([]byte, 512), i*512, block.WriteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := flushed.Load(); got != 2*(i+1) {
			t.Fatalf("the flush covers %d writes of %d", got, 2*(i+1))
		}
	}
}

// gate holds requests that are to be held until it is opened.
type gate struct {
	held    chan struct{} // one value for each request that has arrived
	release chan struct{}
	hold    func(blocktest.Request) bool
	now     atomic.Int64 // requests at the gate
	most    atomic.Int64
}

func newGate(hold func(blocktest.Request) bool) *gate {
	return &gate{held: make(chan struct{}, 1024), release: make(chan struct{}), hold: hold}
}

func (g *gate) hook(ctx context.Context, r blocktest.Request) error {
	if !g.hold(r) {
		return nil
	}
	n := g.now.Add(1)
	defer g.now.Add(-1)
	for most := g.most.Load(); n > most && !g.most.CompareAndSwap(most, n); most = g.most.Load() {
	}
	g.held <- struct{}{}
	select {
	case <-g.release:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func writes(r blocktest.Request) bool { return r.Kind == blocktest.Write }

func TestHeld_WriteDoesNotHoldOthersBack(t *testing.T) {
	g := newGate(writes)
	m := blocktest.NewMemory(1<<20, g.hook)
	s := serve(t, newShelf("v", m), Limits{InFlight: 4})
	r := open(t, s, "v", false)
	for round := range 3 { // from then on, writes are known to be slow
		for i := range uint64(3) {
			r.send(join(requestBytes(cmdWrite, 0, i, i*4096, 4096), make([]byte, 4096)))
			r.alive()
		}
		for range 3 {
			<-g.held
		}
		for range 3 {
			g.release <- struct{}{}
		}
		seen := map[uint64]bool{}
		for range 3 {
			h := r.bytes(simpleHeaderBytes)
			seen[binary.BigEndian.Uint64(h[8:])] = true
		}
		if len(seen) != 3 {
			t.Fatalf("round %d: replies to %v", round, seen)
		}
	}
}

func TestHeld_RequestsAreBounded(t *testing.T) {
	g := newGate(writes)
	m := blocktest.NewMemory(1<<20, g.hook)
	s := serve(t, newShelf("v", m), Limits{InFlight: 5})
	r := open(t, s, "v", true)
	const n = 100
	go func() {
		for i := range uint64(n) {
			r.Write(join(requestBytes(cmdWrite, 0, i, i*512, 512), make([]byte, 512)))
		}
	}()
	for range 5 {
		<-g.held
	}
	answered := map[uint64]bool{}
	for i := range n {
		g.release <- struct{}{}
		h := r.bytes(simpleHeaderBytes)
		answered[binary.BigEndian.Uint64(h[8:])] = true
		if i < n-5 {
			<-g.held
		}
	}
	if most := g.most.Load(); most != 5 || len(answered) != n {
		t.Fatalf("%d requests at a time, %d answered", most, len(answered))
	}
}

func TestDisc_FinishesWhatIsInFlight(t *testing.T) {
	g := newGate(writes)
	s, m := oneExport(t, g.hook)
	r := open(t, s, "v", true)
	for i := range uint64(3) {
		r.send(join(requestBytes(cmdWrite, 0, i, i*4096, 4096), bytes.Repeat([]byte{1}, 4096)))
		<-g.held
	}
	r.request(cmdDisc, 0, 0, 0, 0)
	close(g.release)
	seen := map[uint64]bool{}
	for range 3 {
		h := r.bytes(simpleHeaderBytes)
		seen[binary.BigEndian.Uint64(h[8:])] = true
	}
	r.closed()
	if len(seen) != 3 || m.Pages() != 3 {
		t.Fatalf("replies to %v, %d pages", seen, m.Pages())
	}
	s.stop()
	if s.warnings() != 0 {
		t.Error(s.log)
	}
}

func TestDisc_EachRequestIsAnsweredOnce(t *testing.T) {
	s, _ := oneExport(t, nil)
	r := open(t, s, "v", true)
	const n = 2000
	go func() {
		var p []byte
		for i := range uint64(n) {
			switch i % 4 {
			case 0:
				p = append(p, requestBytes(cmdTrim, 0, i, 0, 4096)...)
			case 1:
				p = append(append(p, requestBytes(cmdWrite, 0, i, 4096, 4096)...), make([]byte, 4096)...)
			case 2:
				p = append(p, requestBytes(cmdFlush, 0, i, 0, 0)...)
			case 3:
				p = append(p, requestBytes(99, 0, i, 0, 0)...)
			}
		}
		r.Write(append(p, requestBytes(cmdDisc, 0, 0, 0, 0)...))
	}()
	stream, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]int{}
	for cookie := range replyCookies(t, stream) {
		seen[cookie]++
	}
	for i := range uint64(n) {
		if seen[i] != 1 {
			t.Fatalf("request %d was answered %d times", i, seen[i])
		}
	}
}

// replyCookies walks a stream of replies to requests other than simple reads and
// yields the cookie of each that is complete.
func replyCookies(t testing.TB, p []byte) func(func(uint64) bool) {
	return func(yield func(uint64) bool) {
		for len(p) > 0 {
			switch {
			case len(p) >= simpleHeaderBytes && binary.BigEndian.Uint32(p) == magicSimple:
				if !yield(binary.BigEndian.Uint64(p[8:])) {
					return
				}
				p = p[simpleHeaderBytes:]
			case len(p) >= structuredHeaderBytes && binary.BigEndian.Uint32(p) == magicStructured &&
				len(p) >= structuredHeaderBytes+int(binary.BigEndian.Uint32(p[16:])):
				if binary.BigEndian.Uint16(p[4:])&chunkFlagDone != 0 && !yield(binary.BigEndian.Uint64(p[8:])) {
					return
				}
				p = p[structuredHeaderBytes+int(binary.BigEndian.Uint32(p[16:])):]
			default:
				t.Errorf("the stream of replies is out of step at %x", p[:min(len(p), 32)])
				return
			}
		}
	}
}

func TestLoss_CancelsRequestsAndReleasesAfterThem(t *testing.T) {
	g := newGate(writes)
	m := blocktest.NewMemory(1<<20, g.hook)
	x := newShelf("v", m)
	s := serve(t, x, Limits{})
	r := open(t, s, "v", true)
	r.send(join(requestBytes(cmdWrite, 0, 1, 0, 4096), make([]byte, 4096)))
	<-g.held
	r.Close()                      // the held write sees its context end
	for len(s.Connections()) > 0 { // or stop would come first
		runtime.Gosched()
	}
	s.stop()
	if g.now.Load() != 0 || x.released != 1 {
		t.Fatalf("%d requests held, %d released", g.now.Load(), x.released)
	}
	if m.Pages() != 0 {
		t.Error("a cancelled write had an effect")
	}
}

func TestHostile_TransmissionGarbage(t *testing.T) {
	for name, input := range map[string][]byte{
		"bad magic":          make([]byte, requestHeaderBytes),
		"another protocol":   []byte("POST / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"cut in the header":  requestBytes(cmdRead, 0, 1, 0, 512)[:20],
		"cut in the data":    join(requestBytes(cmdWrite, 0, 1, 0, 4096), make([]byte, 4095)),
		"cut in large data":  join(requestBytes(cmdWrite, 0, 1, 0, 512<<10), make([]byte, 511<<10)),
		"cut in doomed data": join(requestBytes(cmdWrite, 0, 1, 1<<40, 1<<32-512), make([]byte, 100)),
	} {
		t.Run(name, func(t *testing.T) {
			s, m := oneExport(t, nil)
			other := open(t, s, "v", true)
			r := open(t, s, "v", true)
			r.send(input)
			if strings.HasPrefix(name, "cut") {
				r.Close()
			} else {
				r.closed()
			}
			for len(s.Connections()) > 1 { // or stop would come first
				runtime.Gosched()
			}
			other.alive()
			other.request(cmdDisc, 0, 0, 0, 0)
			other.closed()
			s.stop()
			if s.warnings() != 1 {
				t.Errorf("%d warnings, want one:\n%s", s.warnings(), s.log)
			}
			if m.Pages() != 0 {
				t.Error("half a write had an effect")
			}
		})
	}
}

// grained is a device on a file system whose blocks are smaller than its
// sectors.
type grained struct{ block.Device }

func (grained) Allocation(_ context.Context, e block.Extent, visit func(block.Extent, bool) bool) error {
	const kib = 1024
	for at := e.Off; at < e.End(); at += kib {
		// Holes of 11 KiB and of 2, in pieces.
		n := at / kib % 16
		if !visit(block.Extent{Off: at, Len: kib}, n != 1 && n != 4) {
			return nil
		}
	}
	return nil
}

// What a server tells of a volume consists of whole sectors, whatever the file
// system below tells: a client may take nothing else.
func TestStatus_OfWholeSectors(t *testing.T) {
	m := blocktest.NewMemoryGeometry(block.Geometry{SizeBytes: 1 << 20, SectorSize: 4096}, nil)
	r := open(t, serve(t, newShelf("v", grained{m}), Limits{}), "v", true)
	want := map[uint16][]byte{
		0:             join(be32(8192), be32(0), be32(8192), be32(stateHole|stateZero), be32(8192), be32(0), be32(8192), be32(stateHole|stateZero)),
		cmdFlagReqOne: join(be32(8192), be32(0)),
	}
	for flags, runs := range want {
		r.request(cmdBlockStatus, flags, 3, 0, 32<<10)
		if kind, _, p := r.chunk(3); kind != chunkBlockStatus || !bytes.Equal(p, join(be32(contextAllocationID), runs)) {
			t.Errorf("flags %d: chunk %d, % x", flags, kind, p)
		}
	}
	r.request(cmdRead, 0, 4, 0, 64<<10)
	for {
		kind, flags, p := r.chunk(4)
		n := len(p) - 8
		if kind == chunkOffsetHole {
			n = int(binary.BigEndian.Uint32(p[8:]))
		}
		if off := binary.BigEndian.Uint64(p); off%4096 != 0 || n%4096 != 0 {
			t.Errorf("chunk %d of %d bytes at %d", kind, n, off)
		}
		if flags&chunkFlagDone != 0 {
			break
		}
	}
}

// Two clients take all memory for writes whose data they never send. A third
// that needs some has one of them closed, or both.
func TestHostile_StalledClientsGiveMemoryUp(t *testing.T) {
	m := blocktest.NewMemory(64<<20, nil)
	s := serve(t, newShelf("v", m), Limits{TotalPayloadBytes: 1, StallTime: time.Millisecond}) // raised to the least: 64 MiB
	a, b, c := open(t, s, "v", true), open(t, s, "v", true), open(t, s, "v", true)
	for _, r := range []*raw{a, b} {
		r.send(join(requestBytes(cmdWrite, 0, 1, 0, 32<<20), make([]byte, 100)))
	}
	for s.memory.used.Load() != 64<<20 {
		runtime.Gosched()
	}
	c.request(cmdRead, 0, 7, 0, 4096)
	if kind, _, _ := c.chunk(7); kind != chunkOffsetData {
		t.Errorf("chunk %d", kind)
	}
	s.stop()
	a.closed()
	b.closed()
	if s.warnings() == 0 || s.memory.used.Load() != 0 {
		t.Errorf("%d bytes held\n%s", s.memory.used.Load(), s.log)
	}
}

func TestShutdown_AnswersWhatIsInFlight(t *testing.T) {
	g := newGate(writes)
	s, m := oneExport(t, g.hook)
	r, idle, choosing := open(t, s, "v", false), open(t, s, "v", true), greet(t, s, fixed)
	r.send(join(requestBytes(cmdWrite, 0, 1, 0, 4096), bytes.Repeat([]byte{1}, 4096)))
	<-g.held
	stopped := make(chan struct{})
	go func() { s.stop(); close(stopped) }()
	idle.closed()
	choosing.closed()
	g.release <- struct{}{}
	if code := r.simple(1); code != 0 || m.Pages() != 1 {
		t.Fatalf("error %d", code)
	}
	r.closed()
	<-stopped
	if s.warnings() != 0 {
		t.Error(s.log)
	}
}

func TestShutdown_CancelsWhatOutlastsTheGraceTime(t *testing.T) {
	g := newGate(writes)
	m := blocktest.NewMemory(1<<20, g.hook)
	s := serve(t, newShelf("v", m), Limits{GraceTime: time.Millisecond})
	r := open(t, s, "v", false)
	r.send(join(requestBytes(cmdWrite, 0, 1, 0, 4096), make([]byte, 4096)))
	<-g.held
	s.stop()
	r.closed() // without a reply
}
