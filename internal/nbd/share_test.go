package nbd

import (
	"context"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

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
