package nbd

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"drc/internal/block"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shelf is an Exports for tests.
type shelf struct {
	list    []Export
	devices map[string]block.Device

	mu       sync.Mutex
	opened   int
	released int
	fail     error // if set, Open fails with it
}

// newShelf exports devices under the names that come with them, in that order.
func newShelf(pairs ...any) *shelf {
	s := &shelf{devices: make(map[string]block.Device)}
	for i := 0; i < len(pairs); i += 2 {
		name := pairs[i].(string)
		s.list = append(s.list, Export{Name: name, Description: "volume " + name})
		s.devices[name] = pairs[i+1].(block.Device)
	}
	return s
}

func (s *shelf) List() []Export { return s.list }

func (s *shelf) Open(_ context.Context, name string) (block.Device, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return nil, nil, s.fail
	}
	d := s.devices[name]
	if d == nil {
		return nil, nil, ErrUnknownExport
	}
	s.opened++
	return d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.released++
	}, nil
}

// logText collects log lines.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// serving is a Server at work.
type serving struct {
	*Server
	uri           string // for Dial
	network, path string // of the listener
	log           *logText
	stop          func() // ends Serve and waits for it; may be called again
}

// serve starts a server on a unix socket and stops it when the test ends.
func serve(t testing.TB, exports Exports, limits Limits) *serving {
	t.Helper()
	path := filepath.Join(socketDir(t), "nbd")
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, "unix:"+path, exports, limits)
}

// socketDir is a directory with a short path.
func socketDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func serveOn(t testing.TB, l net.Listener, uri string, exports Exports, limits Limits) *serving {
	t.Helper()
	log := &logText{}
	s := NewServer(Options{Exports: exports, Limits: limits,
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return &serving{Server: s, uri: uri, network: l.Addr().Network(), path: l.Addr().String(), log: log, stop: stop}
}

// dial opens an export and closes it when the test ends.
func (s *serving) dial(t testing.TB, export string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), s.uri, export)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
