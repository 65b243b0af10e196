package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"drc/internal/block"
)

// Export is one entry of the list that clients may ask for.
type Export struct {
	Name        string // at most 4096 bytes of UTF-8 without NUL
	Description string // for people; may be empty
}

// Exports says what a Server serves. Its methods may be called from many
// goroutines at once.
type Exports interface {
	// List names the exports, in the order to show them. What is not in the list
	// may be opened all the same: there may be too many names to list.
	List() []Export
	// Open returns the device behind an export. It is called for each
	// connection, and also when a client only asks for the size, so it must be
	// cheap and should return the same device each time: that flushes on one
	// connection cover the others rests on it. release is called once, after
	// the connection's last request has returned; it may be nil. It fails with
	// ErrUnknownExport if there is no such export (any more); the text of every
	// error is shown to the client.
	Open(ctx context.Context, name string) (dev block.Device, release func(), err error)
}

// Limits bound what clients can make a Server use. A zero field means its
// default.
type Limits struct {
	// Connections at a time, over all listeners; further ones are closed at
	// once. Default 256.
	Connections int
	// OptionBytes is the longest option during negotiation. Default 64 KiB.
	OptionBytes int
	// InFlight is the number of requests of one connection that the device may
	// be working on at a time. Default 128.
	InFlight int
	// PayloadBytes is the memory for data being read or written, for one
	// connection. Default and least value 64 MiB: two requests of 32 MiB.
	PayloadBytes int64
	// ExportPayloadBytes is the same for all connections to one export, so that
	// one whose device hangs does not keep the memory from the others. Default
	// and least value: PayloadBytes.
	ExportPayloadBytes int64
	// TotalPayloadBytes is the same for all connections together. Where it is
	// used up each export may have 32 MiB more, the largest request, so that
	// however many exports hang, the others go on. Default 512 MiB.
	TotalPayloadBytes int64
	// NegotiationTime is how long a client may take to choose an export.
	// Default 30 s.
	NegotiationTime time.Duration
	// StallTime is how long a client may hold payload memory and send or take
	// less than 64 KiB of a payload while other connections wait for memory.
	// Without anyone waiting it may stall for ever. It is also how long a client
	// that has ended its sending is kept while its own request waits for memory.
	// Default 30 s.
	StallTime time.Duration
	// GraceTime is how long requests in flight may take at shutdown before
	// they are cancelled. Default 10 s.
	GraceTime time.Duration
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	setTime := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&l.Connections, 256)
	set(&l.OptionBytes, 64<<10)
	set(&l.InFlight, 128)
	l.PayloadBytes = max(l.PayloadBytes, 2*requestBytesMax)
	l.ExportPayloadBytes = max(l.ExportPayloadBytes, l.PayloadBytes)
	if l.TotalPayloadBytes <= 0 {
		l.TotalPayloadBytes = 512 << 20
	}
	l.TotalPayloadBytes = max(l.TotalPayloadBytes, l.PayloadBytes)
	setTime(&l.NegotiationTime, 30*time.Second)
	setTime(&l.StallTime, 30*time.Second)
	setTime(&l.GraceTime, 10*time.Second)
	return l
}

// Options configure a Server.
type Options struct {
	Exports Exports      // required
	Logger  *slog.Logger // default: slog.Default()
	Limits  Limits
}

// Server serves Exports. Its methods may be called from many goroutines at
// once.
type Server struct {
	exports Exports
	log     *slog.Logger
	limits  Limits
	memory  budget // TotalPayloadBytes

	mu     sync.Mutex
	conns  map[*conn]struct{}
	shares map[string]*share // by the export's name: ExportPayloadBytes
}

// NewServer returns a Server; it starts nothing.
func NewServer(o Options) *Server {
	if o.Exports == nil {
		panic("nbd: NewServer without Exports")
	}
	log := o.Logger
	if log == nil {
		log = slog.Default()
	}
	s := &Server{
		exports: o.Exports,
		log:     log,
		limits:  o.Limits.withDefaults(),
		conns:   make(map[*conn]struct{}),
		shares:  make(map[string]*share),
	}
	s.memory.limit = s.limits.TotalPayloadBytes
	return s
}

// Connection describes one client, for status displays.
type Connection struct {
	Export string    // empty while the client is choosing
	Remote string    // the peer's address; a unix peer has none
	Since  time.Time // when it was accepted
}

// Connections lists the clients of this moment, in no order.
func (s *Server) Connections() []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Connection, 0, len(s.conns))
	for c := range s.conns {
		list = append(list, c.describe())
	}
	return list
}

// errShutdown is the cause with which requests are cancelled that outlast the
// grace time.
var errShutdown = errors.New("the NBD server is shutting down")

// Serve accepts clients on l until ctx ends. Then it closes l, lets requests in
// flight finish and answers them, for at most GraceTime, and cancels those that
// remain; it returns when the device has let go of the last. It returns nil
// after ctx has ended, and an error if l fails before. It may be called for
// several listeners at once; it closes its own in any case.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// Requests outlive ctx by the grace time.
	work, cancelWork := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancelWork(nil)
	stopListening := context.AfterFunc(ctx, func() { l.Close() })
	defer stopListening()

	var mine connSet
	err := s.accept(ctx, work, l, &mine)
	l.Close()

	mine.each((*conn).drain)
	grace := time.AfterFunc(s.limits.GraceTime, func() {
		if n := mine.len(); n > 0 {
			s.log.Warn("nbd: requests in flight outlasted the grace time and are cancelled",
				"connections", n, "grace", s.limits.GraceTime)
		}
		cancelWork(errShutdown)
	})
	mine.wait()
	grace.Stop()
	return err
}

// accept runs until ctx ends (then it returns nil) or l fails.
func (s *Server) accept(ctx, work context.Context, l net.Listener, mine *connSet) error {
	const retryDelayMax = time.Second
	var delay time.Duration
	for {
		nc, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			var ne net.Error
			if !errors.As(err, &ne) || errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept NBD clients on %s: %w", l.Addr(), err)
			}
			// Out of file descriptors or the like: it passes when clients leave.
			delay = min(max(2*delay, 5*time.Millisecond), retryDelayMax)
			s.log.Warn("nbd: cannot accept a client, trying again", "address", l.Addr().String(), "err", err, "delay", delay)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
			continue
		}
		delay = 0
		c := newConn(s, nc)
		if !s.add(c) {
			s.log.Warn("nbd: too many connections, one was closed", "limit", s.limits.Connections, "remote", c.remote)
			nc.Close()
			continue
		}
		mine.start(c, func() {
			defer s.remove(c)
			c.serve(work)
		})
		if ctx.Err() != nil {
			c.drain()
		}
	}
}

func (s *Server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= s.limits.Connections {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// share is the memory of all connections to one export.
func (s *Server) share(export string) *share {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.shares[export]
	if x == nil {
		x = &share{}
		x.limit, x.own.limit = s.limits.ExportPayloadBytes, requestBytesMax
		s.shares[export] = x
	}
	return x
}

// errStalled: see Limits.StallTime.
var errStalled = errors.New("the client neither sent nor took data while others waited for the memory it held")

// takeMemory takes n bytes of one of the budgets, waiting for them: of the
// server's memory or what the export has of its own, or of the export's share.
// While it waits, connections are closed whose peer holds memory of the first
// and does not move. It returns which budget it was.
func (s *Server) takeMemory(ctx context.Context, n int64, budgets ...*budget) (*budget, error) {
	var stop func() bool
	var watch func(before map[*conn]motion)
	var mu sync.Mutex // of stop and over
	over := false
	watch = func(before map[*conn]motion) {
		var stalled []*conn
		now := make(map[*conn]motion)
		s.mu.Lock()
		for c := range s.conns {
			ours := budgets[0] == &s.memory || (c.share != nil && budgets[0] == &c.share.budget)
			if m, ok := before[c]; ok && ours && c.stalled(m) {
				stalled = append(stalled, c)
			}
			now[c] = c.motion()
		}
		s.mu.Unlock()
		for _, c := range stalled {
			c.abort(errStalled)
		}
		mu.Lock()
		defer mu.Unlock()
		if !over {
			stop = time.AfterFunc(s.limits.StallTime, func() { watch(now) }).Stop
		}
	}
	watch(nil)
	from, err := acquireAny(ctx, n, budgets...)
	mu.Lock()
	over = true
	stop()
	mu.Unlock()
	return from, err
}

// connSet holds the connections of one Serve call and waits for them.
type connSet struct {
	wg  sync.WaitGroup
	mu  sync.Mutex
	set map[*conn]struct{}
}

func (s *connSet) start(c *conn, run func()) {
	s.mu.Lock()
	if s.set == nil {
		s.set = make(map[*conn]struct{})
	}
	s.set[c] = struct{}{}
	s.mu.Unlock()
	s.wg.Go(func() {
		defer func() {
			s.mu.Lock()
			delete(s.set, c)
			s.mu.Unlock()
		}()
		run()
	})
}

func (s *connSet) each(f func(*conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.set {
		f(c)
	}
}

func (s *connSet) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.set)
}

func (s *connSet) wait() { s.wg.Wait() }
