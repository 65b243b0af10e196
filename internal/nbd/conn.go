package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"drc/internal/block"
)

// conn is one client's connection, from the greeting to the end.
//
// In the transmission phase up to InFlight workers share it. One of them leads:
// it alone reads from the socket. A request that is expected to be quick is
// carried out by the leader itself, without waking anyone; before a slow one it
// passes the lead on. If a request turns out slow against expectation, the
// watchdog takes the lead away from under it. So one goroutine serves a client
// that sends one request at a time, and a held request never keeps others back.
//
// Invariant: at any time at most one goroutine holds the lead, or the lead is
// in leadToken, or the connection is ending.
type conn struct {
	server *Server
	nc     net.Conn
	remote string
	since  time.Time

	in  *reader
	out *replies

	// Agreed on during negotiation, constant afterwards.
	noZeroes    bool
	structured  bool
	metaExport  string // the export whose base:allocation was selected
	metaChosen  bool
	exportName  atomic.Pointer[string]
	dev         block.Device
	terms       terms
	transmitter transmitter

	step     net.Buffers   // what writeOut is writing
	memory   budget        // PayloadBytes
	share    *share        // of the export, see Limits.ExportPayloadBytes; set with dev
	progress atomic.Uint64 // bytes read from and written to the socket
	waits    atomic.Uint64 // how often someone began to wait for the peer
	onPeer   atomic.Int32  // goroutines that wait for the peer and hold memory
	failures failures

	mu       sync.Mutex
	draining bool                    // no more requests are read
	ended    bool                    // no more workers are started
	workers  int                     // running
	cause    error                   // why it ended; nil for an orderly end
	cancel   context.CancelCauseFunc // of the requests' context

	wg sync.WaitGroup // workers
}

// transmitter is the state of the worker scheme.
type transmitter struct {
	ctx       context.Context // of requests; it lives as long as serve
	leadToken chan struct{}   // capacity 1
	done      chan struct{}   // closed when the connection ends
	idle      atomic.Int32    // workers waiting for the lead

	// inline is a counter shifted left by one; the low bit says that the leader
	// is carrying out a request itself. Whoever clears the bit holds the lead.
	inline   atomic.Uint64
	class    atomic.Int32  // of the request that the leader carries out
	seen     atomic.Uint64 // watchdog only: inline at its previous look
	armed    atomic.Bool
	watchdog *time.Timer
	pace     [64]atomic.Int64 // by request.class: recent duration in ns
}

const (
	// watchdogPeriod bounds how long a slow request that was expected to be
	// quick keeps others of its connection back: two periods.
	watchdogPeriod = time.Millisecond
	// inlineMax is the expected duration up to which the leader carries out a
	// request itself; it is of the order of what passing the lead costs.
	inlineMax = 20 * time.Microsecond
	// observedMax bounds what one request adds to the recent duration of its
	// class, so that a very slow one does not spoil it for long.
	observedMax = time.Millisecond
	// batchReplies and batchBytes bound how many replies the leader lets wait
	// while more requests are at hand.
	batchReplies = 16
	batchBytes   = 128 << 10
	// writeStepBytes is about what is written to the socket at a time; a client
	// that takes less than twice that in Limits.StallTime may count as stalled.
	writeStepBytes = 512 << 10
)

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{server: s, nc: nc, since: time.Now()}
	c.in = newReader(c)
	c.transmitter.leadToken = make(chan struct{}, 1)
	c.transmitter.done = make(chan struct{})
	if a := nc.RemoteAddr(); a != nil {
		c.remote = a.String()
	}
	if c.remote == "" || c.remote == "@" {
		c.remote = "a local process"
	}
	c.memory.limit = s.limits.PayloadBytes
	c.out = newReplies(c.writeOut, c.freeBuffer)
	return c
}

func (c *conn) describe() Connection {
	d := Connection{Remote: c.remote, Since: c.since}
	if name := c.exportName.Load(); name != nil {
		d.Export = *name
	}
	return d
}

// serve runs the connection to its end. work is cancelled only to cut requests
// off at shutdown.
func (c *conn) serve(work context.Context) {
	defer c.nc.Close()
	// Not work's child: abort makes sure that nothing is sent any more before it
	// cancels the requests, or their errors would be sent.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(work))
	defer cancel(nil)
	c.mu.Lock()
	c.cancel = cancel
	c.mu.Unlock()

	// A cut at shutdown must also reach a read or write on the socket.
	stop := context.AfterFunc(work, func() { c.abort(context.Cause(work)) })
	defer stop()

	log := c.server.log.With("remote", c.remote)
	c.setDeadline(time.Now().Add(c.server.limits.NegotiationTime))
	release, err := c.negotiate(ctx)
	if err != nil {
		switch {
		case errors.Is(err, errLeft):
		case c.isDraining():
		case errors.Is(err, os.ErrDeadlineExceeded):
			log.Warn("nbd: client chose no export in time, connection closed", "limit", c.server.limits.NegotiationTime)
		default:
			log.Warn("nbd: negotiation failed, connection closed", "err", err)
		}
		return
	}
	if release != nil {
		defer release()
	}
	log = log.With("export", *c.exportName.Load())
	log.Debug("nbd: client connected", "structured", c.structured, "readonly", c.terms.geometry.ReadOnly)
	c.setDeadline(time.Time{})

	switch err := c.transmit(ctx); {
	case err == nil:
		log.Debug("nbd: client disconnected")
	case errors.Is(err, io.EOF), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		log.Info("nbd: client left without saying so, requests in flight were not answered")
	default:
		log.Warn("nbd: connection closed", "err", err)
	}
}

// setDeadline sets the socket's deadlines, unless drain has already cut reading.
func (c *conn) setDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nc.SetWriteDeadline(t)
	if !c.draining {
		c.nc.SetReadDeadline(t)
	}
}

// drain makes the connection end as after DISC: what is in flight is finished,
// nothing more is read.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	c.nc.SetReadDeadline(time.Unix(1, 0))
}

func (c *conn) isDraining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

// transmit runs the transmission phase. It returns nil after DISC or drain, and
// otherwise why the connection was given up; in any case no request is in
// flight any more.
func (c *conn) transmit(ctx context.Context) error {
	t := &c.transmitter
	t.ctx = ctx
	t.watchdog = time.AfterFunc(time.Hour, c.watch)
	defer t.watchdog.Stop()
	t.watchdog.Stop()
	c.in.idle = c.out.flush

	c.passLead()
	<-t.done
	c.wg.Wait()
	if err := c.out.flush(); err != nil {
		c.abort(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// finish ends the connection in order: no more requests, but answers to those
// in flight.
func (c *conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked()
}

// abort gives the connection up: requests are cancelled and no reply is sent
// any more.
func (c *conn) abort(cause error) {
	c.mu.Lock()
	if !c.ended { // after an orderly end, the client need not wait for us
		c.cause = cause
	}
	c.endLocked()
	cancel := c.cancel
	c.mu.Unlock()
	c.nc.Close() // first, or stop would wait for a write under way
	c.out.stop()
	cancel(cause)
}

func (c *conn) endLocked() {
	if !c.ended {
		c.ended = true
		close(c.transmitter.done)
	}
}

// passLead gives the lead to another worker, or to whichever becomes free next
// if all are at work.
func (c *conn) passLead() {
	t := &c.transmitter
	t.leadToken <- struct{}{}
	if t.idle.Load() > 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended && c.workers < c.server.limits.InFlight {
		c.workers++
		c.wg.Go(c.work)
	}
}

// work waits for the lead and takes it, until the connection ends.
func (c *conn) work() {
	t := &c.transmitter
	for {
		t.idle.Add(1)
		select {
		case <-t.done:
			return
		default:
		}
		select {
		case <-t.leadToken:
			t.idle.Add(-1)
		case <-t.done:
			return
		}
		if !c.lead() {
			return
		}
	}
}

// lead reads requests and sees to them until the lead is gone; false means that
// the connection has ended.
func (c *conn) lead() bool {
	t := &c.transmitter
	for {
		var q request
		err := c.read(&q)
		if err != nil {
			c.ending(err)
			return false
		}
		pace := &t.pace[q.class()]
		if time.Duration(pace.Load()) > inlineMax {
			if err := c.out.flush(); err != nil {
				c.abort(err)
				return false
			}
			c.passLead()
			start := time.Now()
			c.execute(&q, pace, start)
			if err := c.out.end(true); err != nil {
				c.abort(err)
				return false
			}
			return true
		}

		mark := c.beginInline(q.class())
		c.execute(&q, pace, time.Now())
		keeps := t.inline.CompareAndSwap(mark, mark&^1)
		wait := keeps && c.in.buffered() >= requestHeaderBytes &&
			c.out.filling.count < batchReplies && c.out.filling.bytes < batchBytes
		if err := c.out.end(!wait); err != nil {
			c.abort(err)
			return false
		}
		if !keeps {
			return true
		}
	}
}

// ending ends the connection after the leader's read returned err.
func (c *conn) ending(err error) {
	switch {
	case errors.Is(err, errLeft):
		c.finish()
	case c.isDraining():
		c.finish()
	default:
		c.abort(err)
	}
}

// beginInline notes that the leader is about to carry out a request, and sees to
// it that the watchdog looks. It returns the mark that says so.
func (c *conn) beginInline(class int) uint64 {
	t := &c.transmitter
	t.class.Store(int32(class))
	mark := (t.inline.Load() + 2) | 1
	t.inline.Store(mark)
	if !t.armed.Load() && t.armed.CompareAndSwap(false, true) {
		t.watchdog.Reset(watchdogPeriod)
	}
	return mark
}

// watch is the watchdog: it runs once a period while the leader is active.
func (c *conn) watch() {
	t := &c.transmitter
	class := t.class.Load() // of mark, if mark does not change
	mark := t.inline.Load()
	if mark == t.seen.Load() {
		if mark&1 == 0 {
			// Nothing happened for a period: rest until beginInline calls. It
			// may have come just before armed was cleared.
			t.armed.Store(false)
			if t.inline.Load() == mark || !t.armed.CompareAndSwap(false, true) {
				return
			}
		} else if t.inline.CompareAndSwap(mark, mark&^1) {
			// The next of its kind are to pass the lead on first, even if this
			// one never ends. Replies that wait go out with the new leader's
			// first read.
			t.pace[class].Store(int64(observedMax))
			c.passLead()
		}
	}
	t.seen.Store(t.inline.Load())
	select {
	case <-t.done:
	default:
		t.watchdog.Reset(watchdogPeriod)
	}
}

// takeBuffer returns a buffer of n bytes within the budgets, waiting for memory
// if necessary; freeBuffer gives it back.
func (c *conn) takeBuffer(n int) (*buffer, error) {
	size := bufferClassBytes(bufferClass(n))
	if !c.memory.try(size) {
		// What waits to be sent holds memory.
		if err := c.out.flush(); err != nil {
			return nil, err
		}
		stop := c.minding()
		err := c.memory.acquire(c.transmitter.ctx, size)
		stop()
		if err != nil {
			return nil, err
		}
	}
	if _, err := c.takeShared(size, &c.share.budget); err != nil {
		c.memory.release(size)
		return nil, err
	}
	from, err := c.takeShared(size, &c.server.memory, &c.share.own)
	if err != nil {
		c.share.release(size)
		c.memory.release(size)
		return nil, err
	}
	b := newBuffer(n)
	b.from = from
	return b, nil
}

// takeShared takes n bytes of one of the budgets that c shares with other
// connections, and returns which.
func (c *conn) takeShared(n int64, budgets ...*budget) (*budget, error) {
	for _, b := range budgets {
		if b.try(n) {
			return b, nil
		}
	}
	if err := c.out.flush(); err != nil { // as above
		return nil, err
	}
	defer c.minding()()
	return c.server.takeMemory(c.transmitter.ctx, n, budgets...)
}

func (c *conn) freeBuffer(b *buffer) {
	size, from := bufferClassBytes(b.class), b.from
	b.free()
	c.memory.release(size)
	c.share.release(size)
	from.release(size)
}

// onWait notes that someone waits for the peer and holds memory.
func (c *conn) onWait() {
	c.waits.Add(1)
	c.onPeer.Add(1)
}

// readPayload fills p from the socket. Meanwhile the peer has memory of ours.
func (c *conn) readPayload(p []byte) error {
	if len(p) > c.in.buffered() {
		c.onWait()
		defer c.onPeer.Add(-1)
	}
	return c.in.full(p)
}

// writeOut writes replies to the socket. Meanwhile the peer has memory of ours.
func (c *conn) writeOut(p *net.Buffers) error {
	c.onWait()
	defer c.onPeer.Add(-1)
	// Not all at once: who takes it slowly takes it nevertheless, and must not
	// look stalled.
	for len(*p) > 0 {
		part, n := 0, 0
		for part < len(*p) && n < writeStepBytes && len((*p)[part]) <= writeStepBytes {
			n += len((*p)[part])
			part++
		}
		var err error
		var written int64
		if part > 0 {
			step := (*p)[:part:part]
			*p = (*p)[part:]
			written, err = c.writeStep(step)
		} else {
			first := (*p)[0]
			(*p)[0] = first[writeStepBytes:]
			_, err = c.nc.Write(first[:writeStepBytes])
			written = writeStepBytes
		}
		c.progress.Add(uint64(written))
		if err != nil {
			return err
		}
	}
	return nil
}

// writeStep is WriteTo without an allocation: one goroutine writes at a time.
func (c *conn) writeStep(step net.Buffers) (int64, error) {
	c.step = step
	n, err := c.step.WriteTo(c.nc)
	c.step = nil
	return n, err
}

// Read reads from the socket for the reader.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.nc.Read(p)
	c.progress.Add(uint64(n))
	return n, err
}

// leastBytes is what moves in Limits.StallTime where a peer is not stalled: one
// that sends a byte now and then holds memory as long as one that is silent.
const leastBytes = 64 << 10

// motion is how far a connection has come.
type motion struct{ progress, waits uint64 }

func (c *conn) motion() motion { return motion{c.progress.Load(), c.waits.Load()} }

// stalled reports whether the peer alone keeps c from giving memory back, in
// one and the same payload or run of replies, and has hardly moved since.
func (c *conn) stalled(since motion) bool {
	now := c.motion()
	return c.onPeer.Load() > 0 && now.waits == since.waits && now.progress-since.progress < leastBytes && c.memory.used.Load() > 0
}
