package nbd

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"drc/internal/block/blocktest"
)

// Two clients of an export whose device hangs want all the memory that there is.
// A client of another export must not notice.
func TestHeld_StuckExportLeavesMemoryToOthers(t *testing.T) {
	const large = 32 << 20
	g := newGate(writes)
	stuck, well := blocktest.NewMemory(2*large, g.hook), blocktest.NewMemory(1<<20, nil)
	s := serve(t, newShelf("stuck", stuck, "well", well), Limits{TotalPayloadBytes: 4 * large})
	var sending sync.WaitGroup
	var clients []*raw
	for range 2 {
		r := open(t, s, "stuck", true)
		clients = append(clients, r)
		sending.Go(func() {
			for i := range uint64(2) {
				if _, err := r.Write(join(requestBytes(cmdWrite, 0, i, i*large, large), make([]byte, large))); err != nil {
					return // closed below
				}
			}
		})
	}
	for s.memory.used.Load() < 4*large && s.share("stuck").waiting.Load() == 0 {
		runtime.Gosched()
	}
	r := open(t, s, "well", true)
	r.request(cmdRead, 0, 7, 0, 4096)
	if kind, _, _ := r.chunk(7); kind != chunkOffsetData {
		t.Errorf("chunk %d", kind)
	}
	for _, r := range clients {
		r.Close()
	}
	sending.Wait()
	r.request(cmdDisc, 0, 0, 0, 0)
	r.closed()
	for len(s.Connections()) > 0 {
		runtime.Gosched()
	}
	if used := s.memory.used.Load() + s.share("stuck").used.Load(); used != 0 {
		t.Errorf("%d bytes are still held", used)
	}
}

// Exports whose devices hang may hold all the memory that there is, however
// many they are: a client of another export must not notice, also if its
// requests are as large as any.
func TestHeld_StuckExportsLeaveRoomForARequest(t *testing.T) {
	const large = 32 << 20
	g := newGate(writes)
	stuck, well := blocktest.NewMemory(2*large, g.hook), blocktest.NewMemory(2*large, nil)
	s := serve(t, newShelf("stuck", stuck, "well", well), Limits{TotalPayloadBytes: 1}) // raised to the least: two large requests
	var sending sync.WaitGroup
	held := open(t, s, "stuck", true)
	sending.Go(func() {
		for i := range uint64(2) {
			if _, err := held.Write(join(requestBytes(cmdWrite, 0, i, i*large, large), make([]byte, large))); err != nil {
				return // closed below
			}
		}
	})
	for s.memory.used.Load() < 2*large {
		runtime.Gosched()
	}
	// Two connections, so that one has to wait for what the export has of its own.
	var reading sync.WaitGroup
	for range 2 {
		r := open(t, s, "well", true)
		reading.Go(func() {
			for i := range uint64(3) {
				r.request(cmdRead, cmdFlagDF, i, 4096, large/2+4096)
				if kind, _, _ := r.chunk(i); kind != chunkOffsetData && kind != chunkOffsetHole {
					t.Errorf("chunk %d", kind)
				}
			}
			r.request(cmdDisc, 0, 0, 0, 0)
			r.closed()
		})
	}
	reading.Wait()
	held.Close()
	sending.Wait()
	for len(s.Connections()) > 0 {
		runtime.Gosched()
	}
	for _, export := range []string{"stuck", "well"} {
		if x := s.share(export); x.used.Load()+x.own.used.Load()+s.memory.used.Load() != 0 || x.own.waiting.Load()+s.memory.waiting.Load() != 0 {
			t.Errorf("%s: %d bytes are held of the share, %d of its own, %d in all", export, x.used.Load(), x.own.used.Load(), s.memory.used.Load())
		}
	}
}

// The device hangs, and connections wait for memory that their own requests
// hold, or those of another that waits likewise: nobody reads from the sockets.
// Clients that leave are noticed nevertheless, and their memory is free again.
func TestLoss_NoticedWhileARequestWaitsForMemory(t *testing.T) {
	for _, listen := range []string{"unix:" + filepath.Join(socketDir(t), "nbd"), "tcp:127.0.0.1:0"} {
		for clients := 1; clients <= 2; clients++ {
			noticedWhileWaiting(t, listen, clients)
		}
	}
}

func noticedWhileWaiting(t *testing.T, listen string, clients int) {
	const large = 32 << 20
	l, err := Listen(listen)
	if err != nil {
		t.Fatal(err)
	}
	g := newGate(writes)
	s := serveOn(t, l, "", newShelf("v", blocktest.NewMemory(4*large, g.hook)), Limits{StallTime: time.Millisecond})
	var all []*raw
	for range clients {
		r := open(t, s, "v", true)
		all = append(all, r)
		for i := range uint64(2 / clients) {
			r.send(join(requestBytes(cmdWrite, 0, i, i*large, large), make([]byte, large)))
			<-g.held
		}
	}
	for _, r := range all {
		r.request(cmdRead, 0, 7, 0, 4096)
	}
	for waiting := 0; waiting < clients; runtime.Gosched() {
		waiting = int(s.share("v").waiting.Load())
		s.mu.Lock()
		for c := range s.conns {
			waiting += int(c.memory.waiting.Load())
		}
		s.mu.Unlock()
	}
	for _, r := range all {
		r.Close()
	}
	for len(s.Connections()) > 0 {
		runtime.Gosched()
	}
	s.stop()
	if used := s.memory.used.Load() + s.share("v").used.Load(); used != 0 || g.now.Load() != 0 {
		t.Errorf("%s, %d clients: %d bytes and %d requests are still held", listen, clients, used, g.now.Load())
	}
}

// A CACHE request may be of 4 GiB, and a device need not look at its context:
// once the client is gone, nobody reads on.
func TestLoss_EndsACacheRequestOfMuch(t *testing.T) {
	var reads atomic.Int64
	begun := make(chan struct{}, 64)
	m := blocktest.NewMemory(32*cacheStepBytes, func(ctx context.Context, r blocktest.Request) error {
		if r.Kind == blocktest.Read {
			reads.Add(1)
			begun <- struct{}{}
			<-ctx.Done() // the device finishes all the same
		}
		return nil
	})
	s := serve(t, newShelf("v", m), Limits{})
	r := open(t, s, "v", true)
	r.request(cmdCache, 0, 1, 0, 32*cacheStepBytes)
	<-begun
	r.Close()
	for len(s.Connections()) > 0 {
		runtime.Gosched()
	}
	if n := reads.Load(); n != 1 {
		t.Errorf("%d reads, %d of them for nobody", n, n-1)
	}
}

// A client that sends a byte of a payload now and then holds the memory as long
// as one that sends nothing, and counts as stalled as that one does. One that
// begins with another payload meanwhile, or sends enough of it, does not.
func TestRead_DrippingClientIsStalled(t *testing.T) {
	s := NewServer(Options{Exports: newShelf()})
	here, there := net.Pipe()
	defer there.Close()
	c := newConn(s, here)
	c.memory.try(2 * leastBytes)
	var read sync.WaitGroup
	payload := func() {
		read.Go(func() {
			if err := c.readPayload(make([]byte, 2*leastBytes)); err != nil {
				t.Error(err)
			}
		})
	}
	send := func(n int) {
		if _, err := there.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	payload()
	send(1)
	before := c.motion()
	for range 100 {
		send(1)
	}
	if !c.stalled(before) {
		t.Error("a client that drips does not count as stalled")
	}
	for send(leastBytes); c.progress.Load()-before.progress < leastBytes; {
		runtime.Gosched()
	}
	if c.stalled(before) {
		t.Error("a client that sends counts as stalled")
	}
	before = c.motion()
	send(2*leastBytes - leastBytes - 101)
	read.Wait()
	if c.stalled(before) {
		t.Error("a client that has sent all counts as stalled")
	}
	payload()
	send(1)
	if c.stalled(before) {
		t.Error("a client that has sent all and begins again counts as stalled")
	}
	send(2*leastBytes - 1)
	read.Wait()
	here.Close()
}

// Who takes a long run of replies slowly moves nevertheless.
func TestWrite_SlowReaderMakesProgress(t *testing.T) {
	s := NewServer(Options{Exports: newShelf()})
	here, there := net.Pipe()
	defer there.Close()
	c := newConn(s, here)
	payload := make([]byte, 8*writeStepBytes)
	for i := range payload {
		payload[i] = byte(i >> 8)
	}
	done := make(chan error, 1)
	go func() { done <- c.writeOut(&net.Buffers{[]byte("head"), payload, []byte("tail")}) }()
	got := make([]byte, 0, len(payload)+8)
	for range 4 {
		before := c.progress.Load()
		n := len(got)
		got = got[:n+2*writeStepBytes]
		if _, err := io.ReadFull(there, got[n:]); err != nil {
			t.Fatal(err)
		}
		if c.progress.Load() == before {
			t.Errorf("after %d bytes were taken the client looks stalled", len(got))
		}
	}
	rest := make([]byte, 8)
	if _, err := io.ReadFull(there, rest); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if all := string(append(got, rest...)); all != "head"+string(payload)+"tail" {
		t.Error("what arrives is not what was written")
	}
	here.Close()
}
