package nbd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/block/blocktest"
)

func TestListen_SocketIsForItsOwnerOnly(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if l.Addr().String() != path {
		t.Errorf("address %s", l.Addr())
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the socket is still there: %v", err)
	}
}

func TestListen_LivingServerIsLeftAlone(t *testing.T) {
	s := serve(t, newShelf("v", blocktest.NewMemory(1<<20, nil)), Limits{})
	if _, err := Listen(s.uri); !errors.Is(err, ErrInUse) {
		t.Fatalf("%v", err)
	}
	open(t, s, "v", true).alive()

	l, err := Listen("tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Listen("tcp:" + l.Addr().String()); !errors.Is(err, ErrInUse) {
		t.Fatalf("%v", err)
	}
}

// dead leaves a socket file behind, as a killed server does.
func dead(t *testing.T, path string) {
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
}

func TestListen_StaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	dead(t, path)
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListen_OtherFilesAreLeftAlone(t *testing.T) {
	path := filepath.Join(socketDir(t), "data")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:" + path); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Fatalf("%v", err)
	}
	if p, err := os.ReadFile(path); err != nil || string(p) != "precious" {
		t.Fatalf("%q, %v", p, err)
	}
}

func TestListen_CloseLeavesASuccessorAlone(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	keep := path + ".old" // keeps the inode number from being used again
	if err := os.Rename(path, keep); err != nil {
		t.Fatal(err)
	}
	dead(t, path)
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("the successor's socket is gone: %v", err)
	}
}

func TestListen_OneOfTwoAtOnceWins(t *testing.T) {
	for range 20 {
		path := filepath.Join(socketDir(t), "s")
		dead(t, path)
		type result struct {
			l   net.Listener
			err error
		}
		results := make(chan result)
		for range 4 {
			go func() {
				l, err := Listen("unix:" + path)
				results <- result{l, err}
			}()
		}
		var won []net.Listener
		for range 4 {
			if r := <-results; r.err == nil {
				won = append(won, r.l)
			} else if !errors.Is(r.err, ErrInUse) {
				t.Error(r.err)
			}
		}
		if len(won) != 1 {
			t.Fatalf("%d servers listen on one socket", len(won))
		}
		won[0].Close()
	}
}

func TestListen_RefusesWhatItCannotServeSafely(t *testing.T) {
	for uri, want := range map[string]string{
		"":                                     "use unix:/path",
		"nbd://x":                              "use unix:/path",
		"/path":                                "use unix:/path",
		"unix:relative":                        "must begin with /",
		"unix:/" + strings.Repeat("x", 200):    "use a shorter one",
		"unix:/no/such/directory/s":            "create the directory",
		"tcp:127.0.0.1":                        "use tcp:host:port",
		"tcp::10809":                           "listens to everyone",
		"tcp:0.0.0.0:10809":                    "loopback only",
		"tcp:[::]:10809":                       "loopback only",
		"tcp:192.0.2.1:10809":                  "loopback only",
		"tcp:[::ffff:192.0.2.1]:10809":         "loopback only",
		"unix:@abstract":                       "must begin with /",
		"tcp:" + strings.Repeat("9", 20) + ":": "resolve",
	} {
		l, err := Listen(uri)
		if err == nil {
			l.Close()
			t.Errorf("%q: no error", uri)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", uri, err)
		}
	}
	for _, uri := range []string{"tcp:localhost:0", "tcp:127.0.0.1:0"} {
		l, err := Listen(uri)
		if err != nil {
			t.Errorf("%q: %v", uri, err)
			continue
		}
		l.Close()
	}
}
