package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"drc/internal/block"
)

// errLeft: the client ended the session in order (ABORT or DISC).
var errLeft = errors.New("the client disconnected")

// request is one command of the client, ready to be carried out.
type request struct {
	cmd    uint16
	flags  uint16
	cookie uint64
	off    uint64
	length uint32
	buf    *buffer // WRITE: the payload; READ: where to read to; else nil
	reject error   // if set, the request is only answered
}

func (q *request) extent() block.Extent {
	return block.Extent{Off: int64(q.off), Len: int64(q.length)}
}

// class groups requests that take about the same time, as an index of
// transmitter.pace.
func (q *request) class() int {
	const large = 64 << 10
	class := int(q.cmd&7) << 2
	if q.flags&cmdFlagFUA != 0 {
		class |= 1
	}
	if q.length >= large {
		class |= 2
	}
	return class
}

// modifies reports whether cmd changes the device's content.
func modifies(cmd uint16) bool {
	return cmd == cmdWrite || cmd == cmdTrim || cmd == cmdWriteZeroes
}

// parseRequest decodes a request header; p has requestHeaderBytes.
func parseRequest(p []byte, q *request) error {
	if magic := binary.BigEndian.Uint32(p); magic != magicRequest {
		return violationf("the client is out of step: a request begins with %#08x, not %#08x", magic, magicRequest)
	}
	q.flags = binary.BigEndian.Uint16(p[4:])
	q.cmd = binary.BigEndian.Uint16(p[6:])
	q.cookie = binary.BigEndian.Uint64(p[8:])
	q.off = binary.BigEndian.Uint64(p[16:])
	q.length = binary.BigEndian.Uint32(p[24:])
	return nil
}

// terms are what was agreed on, as far as it decides which requests are valid.
type terms struct {
	geometry   block.Geometry
	structured bool
	allocation bool // base:allocation was selected
}

// check returns why q is to be refused, or nil. The stream is in step either way.
func (t *terms) check(q *request) error {
	allowed := cmdFlagFUA // valid for every command, as it is advertised
	switch q.cmd {
	case cmdRead:
		if t.structured {
			allowed |= cmdFlagDF
		}
	case cmdWriteZeroes:
		allowed |= cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		allowed |= cmdFlagReqOne
	case cmdWrite, cmdFlush, cmdTrim, cmdCache:
	default:
		return fmt.Errorf("%w: unknown command %d", errInvalid, q.cmd)
	}
	if odd := q.flags &^ allowed; odd != 0 {
		return fmt.Errorf("%w: flags %#x do not apply to %s", errInvalid, odd, commandName(q.cmd))
	}
	switch {
	case q.cmd == cmdFlush:
		if q.off != 0 || q.length != 0 {
			return fmt.Errorf("%w: flush with an offset or a length", errInvalid)
		}
		return nil
	case modifies(q.cmd) && t.geometry.ReadOnly:
		return block.ErrReadOnly
	case q.cmd == cmdBlockStatus && !t.allocation:
		return fmt.Errorf("%w: block status without a metadata context", errInvalid)
	case q.cmd == cmdBlockStatus && q.length == 0:
		return fmt.Errorf("%w: block status of no bytes", errInvalid)
	}
	size := uint64(t.geometry.SizeBytes)
	if q.off > size || uint64(q.length) > size-q.off {
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, q.length, q.off, size)
	}
	if err := t.geometry.CheckRange(q.extent()); err != nil {
		return fmt.Errorf("%w: %d bytes at %d, sector size %d", err, q.length, q.off, t.geometry.SectorSize)
	}
	if (q.cmd == cmdRead || q.cmd == cmdWrite) && q.length > requestBytesMax {
		return fmt.Errorf("%w: %s of %d bytes, the maximum is %d", errInvalid, commandName(q.cmd), q.length, requestBytesMax)
	}
	return nil
}

// read reads the next request with its payload. A request that is to be refused
// comes with reject set and its payload consumed. It fails with errLeft after
// DISC, with io.EOF if the client is gone, and with a *violation.
func (c *conn) read(q *request) error {
	p, err := c.in.next(requestHeaderBytes)
	if err != nil {
		return c.readError("a request", err)
	}
	if err := parseRequest(p, q); err != nil {
		return err
	}
	if q.cmd == cmdDisc {
		return errLeft
	}
	q.reject = c.terms.check(q)
	switch {
	case q.reject != nil:
		if q.cmd == cmdWrite {
			if err := c.in.discard(int64(q.length)); err != nil {
				return c.readError("the data of a refused write", err)
			}
		}
	case q.length == 0:
	case q.cmd == cmdRead:
		if q.buf, err = c.takeBuffer(int(q.length)); err != nil {
			return err
		}
	case q.cmd == cmdWrite:
		if q.buf, err = c.takeBuffer(int(q.length)); err != nil {
			return err
		}
		if err := c.readPayload(q.buf.data); err != nil {
			c.freeBuffer(q.buf)
			return c.readError("the data of a write", err)
		}
	}
	return nil
}

func (c *conn) readError(what string, err error) error {
	if errors.Is(err, io.EOF) || c.isDraining() {
		return err
	}
	return fmt.Errorf("read %s: %w", what, err)
}
