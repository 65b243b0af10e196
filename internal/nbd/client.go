package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"drc/internal/block"
)

// Client is a connection to one export of an NBD server, as a block.Device. Any
// number of requests may be in flight at once, from many goroutines.
//
// Requests longer than the server's maximum are split; only the pieces are
// ordered as a whole against others. A request whose ctx ends returns at once,
// but the server may still carry it out.
type Client struct {
	nc       net.Conn
	in       *reader
	geometry block.Geometry
	flags    uint16
	max      int64 // bytes in one READ or WRITE

	structured bool
	allocation uint32 // id of base:allocation, if hasContext
	hasContext bool

	sendMu sync.Mutex // one request on the wire after the other
	header [requestHeaderBytes]byte
	vector [2][]byte
	pieces net.Buffers

	mu      sync.Mutex
	calls   map[uint64]*call
	cookie  uint64
	broken  error
	reading chan struct{} // closed when the receiver has ended
}

var _ block.Device = (*Client)(nil)

// call is a request in flight.
type call struct {
	cmd    uint16
	off    int64
	p      []byte // READ: where the data goes
	missed int64  // READ: bytes not yet received
	status []statusRun
	err    error
	done   chan struct{}

	// The caller has gone: p is no longer ours. It cannot go while filling.
	abandoned bool
	filling   bool
}

type statusRun struct {
	length int64
	state  uint32
}

// Dial connects to the server at uri ("unix:/path" or "tcp:host:port") and opens
// an export; the empty name is the server's default. ctx bounds the dialling
// only. The caller closes the Client.
func Dial(ctx context.Context, uri, export string) (*Client, error) {
	network, address, err := splitURI(uri)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("dial NBD server: %w: is it running?", err)
	}
	c, err := NewClient(ctx, nc, export)
	if err != nil {
		return nil, fmt.Errorf("open export %q at %s: %w", export, uri, err)
	}
	return c, nil
}

// NewClient opens an export over nc, which it takes over and closes in any case.
// ctx bounds the negotiation only.
func NewClient(ctx context.Context, nc net.Conn, export string) (*Client, error) {
	c := &Client{nc: nc, in: newReader(nc), calls: make(map[uint64]*call), max: requestBytesMax, reading: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	err := c.negotiate(export)
	if !stop() || err != nil {
		nc.Close()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	go c.receive()
	return c, nil
}

// Close ends the session and waits until the connection is down. Requests in
// flight fail with ErrClosed.
func (c *Client) Close() error {
	c.nc.SetWriteDeadline(time.Now().Add(time.Second)) // a dead server must not hold us
	c.sendMu.Lock()
	putRequest(c.header[:], cmdDisc, 0, 0, 0, 0)
	_, _ = c.nc.Write(c.header[:]) // the server may be gone; the connection ends in any case
	c.sendMu.Unlock()
	c.fail(ErrClosed)
	<-c.reading
	return nil
}

// Geometry implements block.Device.
func (c *Client) Geometry() block.Geometry { return c.geometry }

// ReadAt implements block.Device.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := c.geometry.CheckRange(block.Extent{Off: off, Len: int64(len(p))}); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(int64(len(p)), c.max)
		if _, err := c.do(ctx, &call{cmd: cmdRead, off: off, p: p[:n], missed: n}, 0, n, nil); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// WriteAt implements block.Device.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, o block.WriteOptions) error {
	if err := c.checkWrite(block.Extent{Off: off, Len: int64(len(p))}); err != nil {
		return err
	}
	flags, flush := c.fua(o.FUA)
	for len(p) > 0 {
		n := min(int64(len(p)), c.max)
		if _, err := c.do(ctx, &call{cmd: cmdWrite, off: off}, flags, n, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	if flush {
		return c.Flush(ctx)
	}
	return nil
}

func (c *Client) checkWrite(e block.Extent) error {
	if c.geometry.ReadOnly {
		return block.ErrReadOnly
	}
	return c.geometry.CheckRange(e)
}

// fua returns the flags for a durable write, or that a flush must follow because
// the server does not know them.
func (c *Client) fua(wanted bool) (flags uint16, flush bool) {
	if !wanted {
		return 0, false
	}
	if c.flags&flagSendFUA != 0 {
		return cmdFlagFUA, false
	}
	return 0, true
}

// Zero implements block.Device.
func (c *Client) Zero(ctx context.Context, e block.Extent, o block.ZeroOptions) error {
	if err := c.checkWrite(e); err != nil {
		return err
	}
	if o.Fast && c.flags&flagSendFastZero == 0 {
		return block.ErrUnsupported
	}
	if c.flags&flagSendWriteZeroes == 0 {
		return c.writeZeroes(ctx, e, o.FUA)
	}
	flags, flush := c.fua(o.FUA)
	if o.NoHole {
		flags |= cmdFlagNoHole
	}
	if o.Fast {
		flags |= cmdFlagFastZero
	}
	const step = 1 << 30 // lengths have 32 bits
	for e.Len > 0 {
		n := min(e.Len, step)
		if _, err := c.do(ctx, &call{cmd: cmdWriteZeroes, off: e.Off}, flags, n, nil); err != nil {
			return err
		}
		e.Off, e.Len = e.Off+n, e.Len-n
	}
	if flush {
		return c.Flush(ctx)
	}
	return nil
}

// Trim discards e: a server may make it zeroes, or leave it as it is. One that
// knows no TRIM leaves it.
func (c *Client) Trim(ctx context.Context, e block.Extent, o block.WriteOptions) error {
	if err := c.checkWrite(e); err != nil {
		return err
	}
	flags, flush := c.fua(o.FUA)
	if c.flags&flagSendTrim != 0 {
		const step = 1 << 30 // lengths have 32 bits
		for e.Len > 0 {
			n := min(e.Len, step)
			if _, err := c.do(ctx, &call{cmd: cmdTrim, off: e.Off}, flags, n, nil); err != nil {
				return err
			}
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
	if flush {
		return c.Flush(ctx)
	}
	return nil
}

// writeZeroes is Zero for a server that knows no WRITE_ZEROES.
func (c *Client) writeZeroes(ctx context.Context, e block.Extent, fua bool) error {
	zeroes := make([]byte, min(e.Len, 1<<20, c.max))
	for e.Len > 0 {
		n := min(e.Len, int64(len(zeroes)))
		if err := c.WriteAt(ctx, zeroes[:n], e.Off, block.WriteOptions{FUA: fua}); err != nil {
			return err
		}
		e.Off, e.Len = e.Off+n, e.Len-n
	}
	return nil
}

// Flush implements block.Device. Without the server's support there is nothing
// volatile to flush.
func (c *Client) Flush(ctx context.Context) error {
	if c.flags&flagSendFlush == 0 {
		return nil
	}
	_, err := c.do(ctx, &call{cmd: cmdFlush}, 0, 0, nil)
	return err
}

// Allocation implements block.Device. A server that does not tell has no holes.
func (c *Client) Allocation(ctx context.Context, e block.Extent, visit func(block.Extent, bool) bool) error {
	if err := c.geometry.CheckRange(e); err != nil {
		return err
	}
	if !c.hasContext {
		if e.Len > 0 {
			visit(e, false)
		}
		return nil
	}
	const step = 1 << 30
	for e.Len > 0 {
		n := min(e.Len, step)
		runs, err := c.do(ctx, &call{cmd: cmdBlockStatus, off: e.Off}, 0, n, nil)
		if err != nil {
			return err
		}
		for _, r := range runs {
			piece := block.Extent{Off: e.Off, Len: min(r.length, e.Len)}
			e.Off, e.Len = e.Off+piece.Len, e.Len-piece.Len
			if !visit(piece, r.state&(stateHole|stateZero) == stateHole|stateZero) {
				return nil
			}
		}
	}
	return nil
}

func putRequest(h []byte, cmd, flags uint16, cookie uint64, off, length int64) {
	binary.BigEndian.PutUint32(h, magicRequest)
	binary.BigEndian.PutUint16(h[4:], flags)
	binary.BigEndian.PutUint16(h[6:], cmd)
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint64(h[16:], uint64(off))
	binary.BigEndian.PutUint32(h[24:], uint32(length))
}

// do sends one request and waits for its reply.
func (c *Client) do(ctx context.Context, l *call, flags uint16, length int64, payload []byte) ([]statusRun, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	l.done = make(chan struct{})
	c.mu.Lock()
	if c.broken != nil {
		c.mu.Unlock()
		return nil, c.broken
	}
	c.cookie++
	cookie := c.cookie
	c.calls[cookie] = l
	c.mu.Unlock()

	c.sendMu.Lock()
	putRequest(c.header[:], l.cmd, flags, cookie, l.off, length)
	c.vector = [2][]byte{c.header[:], payload}
	c.pieces = c.vector[:]
	_, err := c.pieces.WriteTo(c.nc)
	c.vector[1] = nil
	c.sendMu.Unlock()
	if err != nil {
		c.fail(fmt.Errorf("%w: send: %w", ErrClosed, err))
	}

	select {
	case <-l.done:
	case <-ctx.Done():
		c.mu.Lock()
		if !l.filling {
			l.abandoned = true
			c.mu.Unlock()
			return nil, context.Cause(ctx)
		}
		c.mu.Unlock()
		<-l.done // data is arriving in the caller's buffer
	}
	return l.status, l.err
}

// fail ends the connection: every call gets err.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken == nil {
		c.broken = err
	}
	c.nc.Close()
}

// receive dispatches replies until the connection ends.
func (c *Client) receive() {
	defer close(c.reading)
	for {
		err := c.receiveOne()
		if err == nil {
			continue
		}
		if errors.Is(err, io.EOF) {
			err = errors.New("the server closed the connection")
		}
		c.fail(fmt.Errorf("%w: %w", ErrClosed, err))
		c.mu.Lock()
		defer c.mu.Unlock()
		for cookie, l := range c.calls {
			l.err = c.broken
			delete(c.calls, cookie)
			close(l.done)
		}
		return
	}
}

func (c *Client) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.calls[cookie]
	if l == nil {
		return nil, violationf("the server answers request %d, which is not in flight", cookie)
	}
	return l, nil
}

// settle ends a call, whose reply is complete.
func (c *Client) settle(cookie uint64, l *call) {
	c.mu.Lock()
	delete(c.calls, cookie)
	c.mu.Unlock()
	if l.err == nil && l.cmd == cmdRead && l.missed != 0 {
		l.err = fmt.Errorf("nbd read: the server left out %d bytes", l.missed)
	}
	if l.err == nil && l.cmd == cmdBlockStatus && len(l.status) == 0 {
		l.err = errors.New("nbd block status: the server gave no answer")
	}
	close(l.done)
}

func (c *Client) receiveOne() error {
	h, err := c.in.next(simpleHeaderBytes)
	if err != nil {
		return err
	}
	switch magic := binary.BigEndian.Uint32(h); magic {
	case magicSimple:
		return c.receiveSimple(binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[4:]))
	case magicStructured:
		flags, kind := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
		cookie := binary.BigEndian.Uint64(h[8:])
		p, err := c.in.next(4)
		if err != nil {
			return unexpected(err)
		}
		return c.receiveChunk(cookie, flags, kind, int64(binary.BigEndian.Uint32(p)))
	default:
		return violationf("the server is out of step: a reply begins with %#08x", magic)
	}
}

func (c *Client) receiveSimple(cookie uint64, code uint32) error {
	l, err := c.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case code != 0:
		l.err = deviceError(l.cmd, code, "")
	case l.cmd == cmdRead && c.structured:
		return violationf("the server answers a read with a simple reply")
	case l.cmd == cmdRead:
		if err := c.fill(l, 0, int64(len(l.p))); err != nil {
			return err
		}
	}
	c.settle(cookie, l)
	return nil
}

// fill receives n bytes into l.p[at:], or past it if the caller has gone.
func (c *Client) fill(l *call, at, n int64) error {
	c.mu.Lock()
	l.filling = !l.abandoned
	c.mu.Unlock()
	l.missed -= n
	if !l.filling {
		return c.in.discard(n)
	}
	return c.in.full(l.p[at : at+n])
}

// receiveChunk reads the payload of a structured reply chunk.
func (c *Client) receiveChunk(cookie uint64, flags, kind uint16, length int64) error {
	l, err := c.find(cookie)
	if err != nil {
		return err
	}
	if !c.structured {
		return violationf("the server sends structured replies unasked")
	}
	switch {
	case kind == chunkNone:
		if length != 0 || flags&chunkFlagDone == 0 {
			return violationf("the server sent a malformed final chunk")
		}
	case kind == chunkOffsetData && l.cmd == cmdRead && length > 8:
		p, err := c.in.next(8)
		if err != nil {
			return unexpected(err)
		}
		at, err := l.within(binary.BigEndian.Uint64(p), length-8)
		if err != nil {
			return err
		}
		if err := c.fill(l, at, length-8); err != nil {
			return err
		}
	case kind == chunkOffsetHole && l.cmd == cmdRead && length == 12:
		p, err := c.in.next(12)
		if err != nil {
			return unexpected(err)
		}
		n := int64(binary.BigEndian.Uint32(p[8:]))
		at, err := l.within(binary.BigEndian.Uint64(p), n)
		if err != nil {
			return err
		}
		c.mu.Lock()
		if !l.abandoned {
			clear(l.p[at : at+n])
		}
		c.mu.Unlock()
		l.missed -= n
	case kind == chunkBlockStatus && l.cmd == cmdBlockStatus && length >= 12 && length%8 == 4 && length <= readerBytes:
		p, err := c.in.next(int(length))
		if err != nil {
			return unexpected(err)
		}
		if id := binary.BigEndian.Uint32(p); id != c.allocation {
			return violationf("the server answers for metadata context %d", id)
		}
		for p = p[4:]; len(p) > 0; p = p[8:] {
			r := statusRun{int64(binary.BigEndian.Uint32(p)), binary.BigEndian.Uint32(p[4:])}
			if r.length == 0 {
				return violationf("the server sent an extent of no bytes")
			}
			l.status = append(l.status, r)
		}
	case kind&chunkErrorBit != 0 && length >= 6 && length <= readerBytes:
		p, err := c.in.next(int(length))
		if err != nil {
			return unexpected(err)
		}
		n := int(binary.BigEndian.Uint16(p[4:]))
		if n > len(p)-6 {
			return violationf("the server sent a malformed error chunk")
		}
		if l.err == nil {
			l.err = deviceError(l.cmd, binary.BigEndian.Uint32(p), string(p[6:6+n]))
		}
	default:
		return violationf("the server sent an unexpected chunk: type %d, %d bytes, for %s", kind, length, commandName(l.cmd))
	}
	if flags&chunkFlagDone != 0 {
		c.settle(cookie, l)
	}
	return nil
}

// within returns where [off, off+n) begins in the read's buffer.
func (l *call) within(off uint64, n int64) (int64, error) {
	at := int64(off) - l.off
	if off > 1<<62 || at < 0 || n <= 0 || n > int64(len(l.p))-at || n > l.missed {
		return 0, violationf("the server sent %d bytes at %d for a read of %d at %d", n, off, len(l.p), l.off)
	}
	return at, nil
}
