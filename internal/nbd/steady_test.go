package nbd

import (
	"encoding/binary"
	"io"
	"testing"

	"drc/internal/block/blocktest"
)

// In the steady state a small request allocates nothing: garbage collection must
// not come between a client and its device.
func TestSteady_SmallRequestsAllocateNothing(t *testing.T) {
	m := blocktest.NewMemory(1<<20, nil)
	fill(t, m, 0, 1<<20)
	for _, form := range []struct {
		structured bool
		answer     int // bytes of the answer to a read
	}{{false, simpleHeaderBytes + 4096}, {true, structuredHeaderBytes + 8 + 4096}} {
		s := serve(t, newShelf("v", m), Limits{})
		r := open(t, s, "v", form.structured)
		const depth = 16
		send, receive := []byte(nil), make([]byte, depth*(form.answer+simpleHeaderBytes))
		for i := range uint64(depth) {
			send = append(send, requestBytes(cmdRead, 0, i, i*4096, 4096)...)
			send = append(append(send, requestBytes(cmdWrite, 0, i, i*8192, 4096)...), make([]byte, 4096)...)
		}
		allocs := testing.AllocsPerRun(200, func() {
			if _, err := r.Write(send); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(r, receive); err != nil {
				t.Fatal(err)
			}
		})
		if magic := binary.BigEndian.Uint32(receive); magic != magicSimple && magic != magicStructured {
			t.Fatalf("%x", magic)
		}
		perRequest := allocs / (2 * depth)
		t.Logf("structured=%t: %.3f allocations a request", form.structured, perRequest)
		if perRequest > 0.1 && !raceEnabled { // the race detector makes pools forget
			t.Errorf("structured=%t: %.3f allocations a request", form.structured, perRequest)
		}
	}
}
