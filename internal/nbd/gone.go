package nbd

import (
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerLookPeriod is how often a connection that waits for memory looks whether
// its client is still there.
const peerLookPeriod = 100 * time.Millisecond

// minding sees to it that a client that leaves is noticed while its connection
// waits for memory; the caller ends it with stop. Nobody reads from the socket
// then, so that the end of the stream would not be seen, and what is waited for
// may never come: of a device that hangs, the requests of this very client may
// hold it.
//
// A client that has closed its socket is given up at once. One that has only
// ended its sending may still wait for its answers, and has StallTime for that;
// to the server, a TCP client that is gone looks like one too.
func (c *conn) minding() (stop func()) {
	var mu sync.Mutex // of timer and over
	var timer *time.Timer
	over := false
	start := time.Now()
	look := func() {
		gone, half := c.peerLeft()
		if gone || (half && time.Since(start) >= c.server.limits.StallTime) {
			c.abort(fmt.Errorf("the client left while its request waited for memory: %w", io.EOF))
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if !over {
			timer.Reset(peerLookPeriod)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(peerLookPeriod, look)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		timer.Stop()
	}
}

// peerLeft reports whether the client has closed its socket (gone), or sends no
// more (half). A connection that is no socket is always there.
func (c *conn) peerLeft() (gone, half bool) {
	s, ok := c.nc.(syscall.Conn)
	if !ok {
		return false, false
	}
	r, err := s.SyscallConn()
	if err != nil {
		return false, false
	}
	// A failure says that the connection is closed on this side, or that the
	// call was interrupted; the next look tells.
	_ = r.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if n, err := unix.Poll(p, 0); err == nil && n == 1 {
			gone = p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
			half = p[0].Revents&unix.POLLRDHUP != 0
		}
	})
	return gone, half
}
