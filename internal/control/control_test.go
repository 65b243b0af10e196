package control_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"drc/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agent answers with what the test gives it.
type agent struct {
	asked      chan struct{} // gets one when Checkpoint begins, if it is not nil
	err        error
	checkpoint control.CheckpointRequest
	calls      int
}

func (a *agent) Status() control.Status { return control.Status{State: "continuous", PID: 7} }

func (a *agent) Checkpoint(ctx context.Context, r control.CheckpointRequest) (control.CheckpointAnswer, error) {
	a.calls++
	a.checkpoint = r
	if a.asked != nil {
		a.asked <- struct{}{}
		<-ctx.Done()
		return control.CheckpointAnswer{}, ctx.Err()
	}
	return control.CheckpointAnswer{Name: r.Name, Seq: 5}, a.err
}

func (a *agent) AddVolume(_ context.Context, r control.VolumeRequest) (control.Volume, error) {
	a.calls++
	return control.Volume{Name: r.Name}, a.err
}

func (a *agent) Buffer(context.Context, control.BufferRequest) (control.Buffer, error) {
	a.calls++
	return control.Buffer{}, a.err
}

func (a *agent) Kept(context.Context) (control.Kept, error) {
	return control.Kept{Kind: control.KeptWrites}, a.err
}

func (a *agent) Demote(_ context.Context, r control.DemoteRequest) (control.DemoteAnswer, error) {
	a.calls++
	return control.DemoteAnswer{Volumes: []string{r.Volume}}, a.err
}

// serve serves a until the function that it returns is called.
func serve(t *testing.T, a control.Agent) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "control.sock")
	l, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- control.Serve(ctx, l, a) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		ended <- nil
	}
	t.Cleanup(stop)
	return socket, stop
}

// TestListen_OnlyTheOwner: the socket is its owner's from the first moment on,
// and one that a dead agent left is no hindrance.
func TestListen_OnlyTheOwner(t *testing.T) {
	socket, stop := serve(t, &agent{})
	st, err := os.Stat(socket)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	stop()
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	l, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestClient_SaysWhatIsWrong: an error keeps its text and its exit code on the
// way, and an agent that is not there is told from one that fails.
func TestClient_SaysWhatIsWrong(t *testing.T) {
	ctx := context.Background()
	a := &agent{}
	socket, stop := serve(t, a)
	c := control.NewClient(socket)
	if s, err := c.Status(ctx); err != nil || s.PID != 7 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, tc := range []struct {
		err  error
		code int
	}{{errors.New("plain"), 1}, {&control.CodedError{Code: 3, Err: errors.New("none such")}, 3},
		{fmt.Errorf("wrapped: %w", &control.CodedError{Code: 5, Err: errors.New("fenced")}), 5}} {
		a.err = tc.err
		_, err := c.Checkpoint(ctx, control.CheckpointRequest{Name: "x"})
		var coded *control.CodedError
		if !errors.As(err, &coded) || coded.Code != tc.code || err.Error() != tc.err.Error() {
			t.Errorf("%v became %v", tc.err, err)
		}
	}
	stop()
	if _, err := c.Status(ctx); !errors.Is(err, control.ErrNoAgent) {
		t.Errorf("after the agent's end: %v", err)
	}
	if _, err := control.NewClient(filepath.Join(t.TempDir(), "none")).Status(ctx); !errors.Is(err, control.ErrNoAgent) {
		t.Errorf("no socket: %v", err)
	}
}

// TestServe_EndsWithARequestUnderWay: a stop does not wait for those who wait for
// a commit, and tells them.
func TestServe_EndsWithARequestUnderWay(t *testing.T) {
	a := &agent{asked: make(chan struct{}, 1)}
	socket, stop := serve(t, a)
	answered := make(chan error, 1)
	go func() {
		_, err := control.NewClient(socket).Checkpoint(context.Background(), control.CheckpointRequest{Name: "x", Wait: true})
		answered <- err
	}()
	<-a.asked
	stop()
	if err := <-answered; err == nil {
		t.Error("the client believes that all is well")
	}
}

// TestServe_HostileBytes: nothing that is not exactly a request reaches the agent.
func TestServe_HostileBytes(t *testing.T) {
	a := &agent{}
	socket, _ := serve(t, a)
	post := func(path, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
	}
	for _, raw := range []string{
		"\x00\x01\x02\x03\r\n\r\n",
		"GET /v1/checkpoints HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n",
		"DELETE /v1/volumes HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n",
		post("/v1/other", "{}"),
		post("/v1/checkpoints", ""),
		post("/v1/checkpoints", "[]"),
		post("/v1/checkpoints", `{"name":1}`),
		post("/v1/checkpoints", `{"name":"x","wiat":true}`),
		post("/v1/checkpoints", `{"name":"x"} {"name":"y"}`),
		post("/v1/checkpoints", `{"name":"`+strings.Repeat("x", 1<<20)+`"}`),
		"GET /v1/status HTTP/1.1\r\nHost: agent\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
	} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, raw) // it may be refused before it is all read
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			if resp.StatusCode < 400 {
				t.Errorf("%.60q: %s", raw, resp.Status)
			}
			resp.Body.Close()
		}
		conn.Close()
	}
	if a.calls != 0 {
		t.Errorf("the agent was asked %d times", a.calls)
	}
	if _, err := control.NewClient(socket).Status(context.Background()); err != nil {
		t.Error(err)
	}
}
