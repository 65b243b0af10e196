package nbd

import (
	"errors"
	"io"
)

const (
	// readerBytes holds a queue of 32 writes of 4 KiB with room to spare, so
	// that one system call fetches all that a busy client has sent.
	readerBytes = 256 << 10
	// directBytes is the rest of a payload from which on it is worth a system
	// call of its own to spare the copy through the reader's buffer.
	directBytes = 16 << 10
)

// reader buffers the incoming stream. It differs from bufio.Reader in that
// large payloads bypass the buffer, and in that it tells before it may block.
type reader struct {
	src io.Reader
	// idle, if set, is called before every read from src: what waits for a
	// better moment (queued replies) must go out now, for the client may be
	// waiting for it before it sends more.
	idle func() error

	buf  []byte
	r, w int // buf[r:w] is read from src and not consumed
}

func newReader(src io.Reader) *reader {
	return &reader{src: src, buf: make([]byte, readerBytes)}
}

// buffered is the number of bytes that can be consumed without blocking.
func (r *reader) buffered() int { return r.w - r.r }

func (r *reader) read(p []byte) (int, error) {
	if r.idle != nil {
		if err := r.idle(); err != nil {
			return 0, err
		}
	}
	n, err := r.src.Read(p)
	if n > 0 {
		return n, nil // a lasting error comes again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// next returns the following n bytes (n <= readerBytes), valid until the next
// call. Like io.ReadFull it fails with io.EOF if the stream ends before the
// first byte, and with io.ErrUnexpectedEOF if it ends inside.
func (r *reader) next(n int) ([]byte, error) {
	if r.w-r.r < n && len(r.buf)-r.r < n {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	for r.w-r.r < n {
		if r.r == r.w {
			r.r, r.w = 0, 0
		}
		m, err := r.read(r.buf[r.w:])
		r.w += m
		if err != nil {
			if errors.Is(err, io.EOF) && r.r < r.w {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	p := r.buf[r.r : r.r+n]
	r.r += n
	return p, nil
}

// full fills p, bypassing the buffer for what is large.
func (r *reader) full(p []byte) error {
	n := copy(p, r.buf[r.r:r.w])
	r.r += n
	p = p[n:]
	for len(p) >= directBytes {
		n, err := r.read(p)
		p = p[n:]
		if err != nil {
			return unexpected(err)
		}
	}
	if len(p) > 0 {
		rest, err := r.next(len(p))
		if err != nil {
			return unexpected(err)
		}
		copy(p, rest)
	}
	return nil
}

// discard consumes n bytes without keeping them.
func (r *reader) discard(n int64) error {
	for n > 0 {
		if r.r == r.w {
			r.r, r.w = 0, 0
			m, err := r.read(r.buf)
			r.w = m
			if err != nil {
				return unexpected(err)
			}
		}
		step := min(n, int64(r.w-r.r))
		r.r += int(step)
		n -= step
	}
	return nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
