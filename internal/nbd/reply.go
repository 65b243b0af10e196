package nbd

import (
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"unicode/utf8"
)

const (
	// messageBytesMax bounds the text in an error chunk.
	messageBytesMax = 512
	// backlogBytes of headers may wait behind a write to a client that does not
	// read; then those who answer wait as well, and no more requests are read.
	backlogBytes = 64 << 10
)

// batch is a run of replies in the order in which they go out: headers in an
// arena, payloads in buffers of their own, and pieces, which strings both
// together for one writev.
type batch struct {
	arena  []byte
	pieces net.Buffers
	owned  []*buffer // given back when the batch has been written
	count  int       // replies
	bytes  int

	arenaTail bool        // the last piece ends where arena ends
	rest      net.Buffers // what WriteTo consumes
}

// header appends n bytes to the batch and returns them to be filled in at once.
func (b *batch) header(n int) []byte {
	start := len(b.arena)
	if start+n > cap(b.arena) {
		// Pieces keep referring to the old arena; only new headers move on.
		b.arena = make([]byte, 0, max(4096, 2*cap(b.arena), n))
		start, b.arenaTail = 0, false
	}
	b.arena = b.arena[:start+n]
	h := b.arena[start : start+n]
	if b.arenaTail {
		last := &b.pieces[len(b.pieces)-1]
		*last = b.arena[start-len(*last) : start+n]
	} else {
		b.pieces = append(b.pieces, h)
		b.arenaTail = true
	}
	b.bytes += n
	return h
}

// payload appends p, which the batch refers to until it has been written.
func (b *batch) payload(p []byte) {
	b.pieces = append(b.pieces, p)
	b.arenaTail = false
	b.bytes += len(p)
}

// own hands buf over; it is given back after the write.
func (b *batch) own(buf *buffer) { b.owned = append(b.owned, buf) }

func (b *batch) reset() {
	clear(b.pieces)
	clear(b.owned)
	b.arena, b.pieces, b.owned = b.arena[:0], b.pieces[:0], b.owned[:0]
	b.count, b.bytes, b.arenaTail = 0, 0, false
}

// simple appends a simple reply without payload.
func (b *batch) simple(cookie uint64, code uint32) {
	h := b.header(simpleHeaderBytes)
	binary.BigEndian.PutUint32(h, magicSimple)
	binary.BigEndian.PutUint32(h[4:], code)
	binary.BigEndian.PutUint64(h[8:], cookie)
}

// chunk appends the header of a structured reply chunk with room for the first
// inline bytes of its payload, and returns that room. length is the length of
// the whole payload.
func (b *batch) chunk(cookie uint64, flags, kind uint16, length uint32, inline int) []byte {
	h := b.header(structuredHeaderBytes + inline)
	binary.BigEndian.PutUint32(h, magicStructured)
	binary.BigEndian.PutUint16(h[4:], flags)
	binary.BigEndian.PutUint16(h[6:], kind)
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint32(h[16:], length)
	return h[structuredHeaderBytes:]
}

// dataChunk appends one piece of a read; p is not copied.
func (b *batch) dataChunk(cookie uint64, flags uint16, off int64, p []byte) {
	room := b.chunk(cookie, flags, chunkOffsetData, uint32(8+len(p)), 8)
	binary.BigEndian.PutUint64(room, uint64(off))
	b.payload(p)
}

func (b *batch) holeChunk(cookie uint64, flags uint16, off, n int64) {
	room := b.chunk(cookie, flags, chunkOffsetHole, 12, 12)
	binary.BigEndian.PutUint64(room, uint64(off))
	binary.BigEndian.PutUint32(room[8:], uint32(n))
}

// errorChunk appends a final error chunk with a text for humans.
func (b *batch) errorChunk(cookie uint64, code uint32, message string) {
	if len(message) > messageBytesMax {
		cut := messageBytesMax
		for cut > 0 && !utf8.RuneStart(message[cut]) {
			cut--
		}
		message = message[:cut]
	}
	room := b.chunk(cookie, chunkFlagDone, chunkError, uint32(6+len(message)), 6+len(message))
	binary.BigEndian.PutUint32(room, code)
	binary.BigEndian.PutUint16(room[4:], uint16(len(message)))
	copy(room[6:], message)
}

// replies is the outgoing side of a connection. Whoever finishes a request
// appends its reply; one of them writes, and what is appended meanwhile goes
// out together with the next write.
type replies struct {
	write func(*net.Buffers) error // consumes its argument; errors are final
	free  func(*buffer)

	unsent atomic.Int32 // replies in filling

	mu      sync.Mutex
	drained sync.Cond // signalled after each write
	filling *batch
	spare   *batch // the other one, or nil while it is being written
	broken  bool   // nothing is sent any more
	err     error  // the first write error
}

func newReplies(write func(*net.Buffers) error, free func(*buffer)) *replies {
	r := &replies{write: write, free: free, filling: &batch{}, spare: &batch{}}
	r.drained.L = &r.mu
	return r
}

// begin locks the queue and returns the batch to append one reply to; end must
// follow. Nothing in between may block.
func (r *replies) begin() *batch {
	r.mu.Lock()
	return r.filling
}

// end completes the reply begun last. With send, it goes out now (with all that
// waits), unless another goroutine is writing and will take it along. Without,
// it stays until the next flush. It may wait for a client that does not read.
func (r *replies) end(send bool) error {
	r.filling.count++
	r.unsent.Add(1)
	if r.broken {
		r.drop()
	} else if send {
		r.flushLocked()
		for r.spare == nil && !r.broken && len(r.filling.arena) > backlogBytes {
			r.drained.Wait()
		}
	}
	err := r.err
	r.mu.Unlock()
	return err
}

// flush sends what waits, unless another goroutine is writing and will take it
// along.
func (r *replies) flush() error {
	if r.unsent.Load() == 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushLocked()
	return r.err
}

func (r *replies) flushLocked() {
	for r.spare != nil && r.filling.count > 0 && !r.broken {
		out := r.filling
		r.filling, r.spare = r.spare, nil
		r.unsent.Store(0)
		r.mu.Unlock()
		out.rest = out.pieces
		err := r.write(&out.rest)
		for _, b := range out.owned {
			r.free(b)
		}
		out.reset()
		r.mu.Lock()
		r.spare = out
		if err != nil && !r.broken {
			r.err = err
			r.broken = true
		}
		if r.broken {
			r.drop()
		}
		r.drained.Broadcast()
	}
}

// drop throws away what will not be sent.
func (r *replies) drop() {
	for _, b := range r.filling.owned {
		r.free(b)
	}
	r.filling.reset()
	r.unsent.Store(0)
}

// stop makes sure that nothing is sent from now on; a write under way is the
// caller's to interrupt.
func (r *replies) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken = true
	r.drop()
	r.drained.Broadcast()
}
