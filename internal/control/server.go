package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Agent is what the server asks.
type Agent interface {
	Status() Status
	Checkpoint(ctx context.Context, r CheckpointRequest) (CheckpointAnswer, error)
	AddVolume(ctx context.Context, r VolumeRequest) (Volume, error)
	Buffer(ctx context.Context, r BufferRequest) (Buffer, error)
	Kept(ctx context.Context) (Kept, error)
	Demote(ctx context.Context, r DemoteRequest) (DemoteAnswer, error)
}

// CodedError is an error that knows the command line's exit code.
type CodedError struct {
	Code int
	Err  error
}

func (e *CodedError) Error() string { return e.Err.Error() }
func (e *CodedError) Unwrap() error { return e.Err }

const (
	maxRequestBytes = 64 << 10
	readTimeout     = 10 * time.Second
)

// Listen opens the control socket, mode 0600. A socket that a dead agent left
// is replaced; the state folder's lock makes sure that it is dead.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old control socket: %w", err)
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("open the control socket %s: %w", path, err)
	}
	return l, nil
}

// Serve answers on l until ctx ends.
func Serve(ctx context.Context, l net.Listener, a Agent) error {
	return serve(ctx, l, handler(a))
}

// ServeStandby answers on l, until ctx ends, to who asks for the status of a standby,
// or asks it to end.
func ServeStandby(ctx context.Context, l net.Listener, status func() Status, end func()) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, status()) })
	mux.HandleFunc("POST /v1/end", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", "3")
		_, _ = w.Write([]byte("{}\n"))
		_ = http.NewResponseController(w).Flush() // before the end closes the connection
		end()
	})
	return serve(ctx, l, mux)
}

func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readTimeout,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the control socket: %w", err)
	}
	return nil
}

func handler(a Agent) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		answer(w, a.Status())
	})
	mux.HandleFunc("GET /v1/kept", func(w http.ResponseWriter, r *http.Request) {
		k, err := a.Kept(r.Context())
		if err != nil {
			fail(w, http.StatusConflict, err)
			return
		}
		answer(w, k)
	})
	mux.HandleFunc("POST /v1/checkpoints", post(a.Checkpoint))
	mux.HandleFunc("POST /v1/volumes", post(a.AddVolume))
	mux.HandleFunc("POST /v1/buffer", post(a.Buffer))
	mux.HandleFunc("POST /v1/demote", post(a.Demote))
	return mux
}

// post decodes a request strictly, and answers with what do returns.
func post[In, Out any](do func(context.Context, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequestBytes))
		d.DisallowUnknownFields()
		err := d.Decode(&in)
		if err == nil && !errors.Is(d.Decode(&struct{}{}), io.EOF) {
			err = errors.New("something follows it")
		}
		if err != nil {
			fail(w, http.StatusBadRequest, &CodedError{2, fmt.Errorf("the request is not valid: %w", err)})
			return
		}
		out, err := do(r.Context(), in)
		if err != nil {
			fail(w, http.StatusConflict, err)
			return
		}
		answer(w, out)
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the peer may be gone; nobody is left to tell
}

func fail(w http.ResponseWriter, status int, err error) {
	f := Failure{Error: err.Error(), Code: 1}
	var coded *CodedError
	if errors.As(err, &coded) {
		f.Code = coded.Code
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(f)
}
