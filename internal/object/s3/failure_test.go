package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"drc/internal/object"
	"drc/internal/object/objecttest"
	"drc/internal/realpart"
)

// callAll calls each operation once and returns the errors by operation.
func callAll(ctx context.Context, store object.Store) map[string]error {
	errs := map[string]error{}
	_, errs["put"] = store.Put(ctx, "a/b", []byte("x"))
	_, _, errs["get"] = store.Get(ctx, "a/b", 10, nil)
	_, errs["range"] = store.GetRange(ctx, "a/b", 0, 1, nil)
	_, errs["stat"] = store.Stat(ctx, "a/b")
	for _, err := range store.List(ctx, "", "") {
		errs["list"] = err
	}
	for _, err := range store.ListDirs(ctx, "") {
		errs["listdirs"] = err
	}
	errs["delete"] = store.Delete(ctx, "a/b")
	return errs
}

const operations = 7

func checkAll(t *testing.T, store *Store, want error) {
	t.Helper()
	errs := callAll(t.Context(), store)
	if len(errs) != operations {
		t.Errorf("only these operations failed: %v", errs)
	}
	for operation, err := range errs {
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", operation, err, want)
		}
		if err != nil && !strings.Contains(err.Error(), store.URL()) {
			t.Errorf("%s: the error does not name the store: %v", operation, err)
		}
	}
}

// checkTemporary checks that all operations fail with no error by which callers
// decide: they will try again.
func checkTemporary(t *testing.T, store *Store) {
	t.Helper()
	errs := callAll(t.Context(), store)
	if len(errs) != operations {
		t.Errorf("only these operations failed: %v", errs)
	}
	for operation, err := range errs {
		checkTemporaryError(t, operation, err)
	}
}

func checkTemporaryError(t *testing.T, operation string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s succeeded", operation)
	}
	for _, permanent := range []error{object.ErrNotFound, object.ErrExists, object.ErrDenied, object.ErrNoBucket, object.ErrUnsupported, object.ErrTooLarge, io.ErrUnexpectedEOF} {
		if errors.Is(err, permanent) {
			t.Errorf("%s: %v, which is %q", operation, err, permanent)
		}
	}
}

func TestMissingBucket(t *testing.T) {
	checkAll(t, open(t, minioServer.MissingURL("no-such-bucket", "p"), Options{}), object.ErrNoBucket)
}

func TestWrongSecret(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong-wrong")
	store := open(t, minioServer.URL("denied", ""), Options{})
	checkAll(t, store, object.ErrDenied)
	// The right one arrives: the store takes it up without being opened again.
	minioServer.SetEnv(t)
	if _, err := store.Put(t.Context(), "a", []byte("x")); err != nil {
		t.Error(err)
	}
}

func TestUnknownKey(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "nobody")
	checkAll(t, open(t, minioServer.URL("denied", ""), Options{}), object.ErrDenied)
}

func TestNoCredentials(t *testing.T) {
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_PROFILE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", t.TempDir()+"/missing")
	t.Setenv("AWS_CONFIG_FILE", t.TempDir()+"/missing")
	t.Setenv("HOME", t.TempDir())
	store := open(t, minioServer.URL("denied", ""), Options{})
	checkAll(t, store, object.ErrDenied)
	_, err := store.Stat(t.Context(), "a")
	if err == nil || !strings.Contains(err.Error(), "AWS_ACCESS_KEY_ID") {
		t.Errorf("the error names no remedy: %v", err)
	}
}

func TestCredentialsFile(t *testing.T) {
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY"} {
		t.Setenv(name, "")
	}
	var lines []string
	for _, line := range minioServer.Env() {
		key, value, _ := strings.Cut(line, "=")
		lines = append(lines, strings.ToLower(key)+" = "+value)
	}
	path := t.TempDir() + "/credentials"
	writeFile(t, path, "[default]\naws_access_key_id = nobody\naws_secret_access_key = nothing\n[tests]\n"+strings.Join(lines, "\n")+"\n")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", path)
	t.Setenv("AWS_PROFILE", "tests")
	store := open(t, minioServer.URL("file", objecttest.RandomName()), Options{})
	if _, err := store.Put(t.Context(), "a", []byte("x")); err != nil {
		t.Error(err)
	}
}

func TestConnectionRefused(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	checkTemporary(t, open(t, fmt.Sprintf("s3://bucket?endpoint=http://%s", listener.Addr()), Options{}))
}

// TestBlackHole: the endpoint takes connections and never says anything.
func TestBlackHole(t *testing.T) {
	address, accepted := blackHole(t)
	t.Run("ends by itself", func(t *testing.T) {
		checkTemporary(t, open(t, "s3://bucket?endpoint=http://"+address, Options{StallTimeout: 100 * time.Millisecond}))
	})
	t.Run("ends with the context", func(t *testing.T) {
		store := open(t, "s3://bucket?endpoint=http://"+address, Options{StallTimeout: time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan map[string]error)
		for len(accepted) > 0 {
			<-accepted
		}
		go func() { done <- callAll(ctx, store) }()
		<-accepted // the first call waits for its answer now
		cancel()
		for operation, err := range <-done {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v, want context.Canceled", operation, err)
			}
		}
	})
	t.Run("TLS handshake", func(t *testing.T) {
		checkTemporary(t, open(t, "s3://bucket?endpoint=https://"+address, Options{DialTimeout: 100 * time.Millisecond}))
	})
}

// blackHole returns the address of a listener that takes connections and does
// nothing with them, and a channel that tells of each, up to a number.
func blackHole(t *testing.T) (address string, accepted chan struct{}) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted = make(chan struct{}, 100)
	var group sync.WaitGroup
	var conns []net.Conn // belongs to the goroutine until it ended
	group.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conns = append(conns, conn)
			select {
			case accepted <- struct{}{}:
			default:
			}
		}
	})
	t.Cleanup(func() {
		listener.Close()
		group.Wait()
		for _, conn := range conns {
			conn.Close()
		}
	})
	return listener.Addr().String(), accepted
}

// TestKilledAndRestarted: a server that crashes fails calls, loses nothing that
// it confirmed, and the same Store goes on when it is back.
func TestKilledAndRestarted(t *testing.T) {
	server := realpart.MinIO(t, 1)[0]
	store := open(t, server.URL("bucket", "p"), Options{})
	var confirmed []string
	var mu sync.Mutex
	var writers sync.WaitGroup
	stop := make(chan struct{})
	some := make(chan struct{})
	var count atomic.Int64
	for writer := range 4 {
		writers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("w%d/%06d", writer, i)
				if _, err := store.Put(t.Context(), name, []byte(name)); err != nil {
					checkTemporaryError(t, "put", err)
					return // the server is gone
				}
				mu.Lock()
				confirmed = append(confirmed, name)
				mu.Unlock()
				if count.Add(1) == 50 {
					close(some)
				}
			}
		})
	}
	<-some
	server.Kill()
	close(stop)
	writers.Wait()
	checkTemporary(t, store)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	for _, name := range confirmed {
		got, _, err := store.Get(t.Context(), name, 100, nil)
		if err != nil || string(got) != name {
			t.Errorf("a confirmed object is lost: %q, %v", got, err)
		}
	}
	// Whatever became of the puts that were cut off, repeating them is safe.
	for writer := range 4 {
		for i := range 100 {
			name := fmt.Sprintf("w%d/%06d", writer, i)
			if _, err := store.Put(t.Context(), name, []byte(name)); err != nil {
				t.Error(err)
			}
		}
	}
	server.Stop()
	checkTemporary(t, store)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	if err := object.Probe(t.Context(), store); err != nil {
		t.Error(err)
	}
}

// TestSilentServer: a server that stops in the middle of its work ends calls
// within the stall timeout, and they work again when it goes on.
func TestSilentServer(t *testing.T) {
	server := realpart.MinIO(t, 1)[0]
	store := open(t, server.URL("bucket", ""), Options{StallTimeout: 200 * time.Millisecond})
	body := objecttest.Bytes(1, 17<<20)
	patient := open(t, server.URL("bucket", ""), Options{})
	if _, err := patient.Put(t.Context(), "large", body); err != nil {
		t.Fatal(err)
	}
	if err := server.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	checkTemporary(t, store)
	if _, err := store.Put(t.Context(), "other", body); err == nil {
		t.Error("a stopped server took an object")
	}
	if err := server.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := patient.Put(t.Context(), "other", body); err != nil {
		t.Error(err)
	}
}

// proxy returns the URL of a store behind a handler in front of MinIO.
func proxy(t *testing.T, wrap func(next http.Handler) http.Handler) string {
	t.Helper()
	bucket := "proxied"
	minioServer.URL(bucket, "")
	target, err := url.Parse(minioServer.Endpoint())
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	// The request's Host stays as it was: it is signed.
	reverse := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
		},
	}
	server := httptest.NewServer(wrap(reverse))
	t.Cleanup(func() {
		server.Close()
		transport.CloseIdleConnections()
	})
	return fmt.Sprintf("s3://%s/%s?endpoint=%s", bucket, objecttest.RandomName(), server.URL)
}

// TestAnswerLost: MinIO created the object, but the client never heard so. The
// repeated put meets its own success.
func TestAnswerLost(t *testing.T) {
	var puts atomic.Int64
	store := open(t, proxy(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut && puts.Add(1) == 1 {
				next.ServeHTTP(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			}
			next.ServeHTTP(w, r)
		})
	}), Options{})
	body := objecttest.Bytes(1, 1<<20)
	_, err := store.Put(t.Context(), "a", body)
	checkTemporaryError(t, "put with a lost answer", err)
	if puts.Load() != 1 {
		t.Errorf("the put was tried %d times", puts.Load())
	}
	answer, err := store.Put(t.Context(), "a", body)
	if err != nil {
		t.Error(err)
	}
	if answer.Date.IsZero() {
		t.Error("the answer has no date")
	}
	if _, err := store.Put(t.Context(), "a", body[1:]); !errors.Is(err, object.ErrExists) {
		t.Errorf("put of other bytes: %v, want ErrExists", err)
	}
}

// TestDamagedOnTheWay: a bit flips between client and server, in either direction.
func TestDamagedOnTheWay(t *testing.T) {
	var damage atomic.Bool
	store := open(t, proxy(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if damage.Load() && r.Method == http.MethodPut {
				body, _ := io.ReadAll(r.Body)
				body[len(body)/2] ^= 1
				r.Body = io.NopCloser(bytes.NewReader(body))
			}
			if !damage.Load() || r.Method != http.MethodGet {
				next.ServeHTTP(w, r)
				return
			}
			answer := httptest.NewRecorder()
			next.ServeHTTP(answer, r)
			for key, values := range answer.Header() {
				w.Header()[key] = values
			}
			w.WriteHeader(answer.Code)
			body := answer.Body.Bytes()
			body[len(body)/2] ^= 1
			w.Write(body)
		})
	}), Options{})
	body := objecttest.Bytes(1, 1<<20)
	if _, err := store.Put(t.Context(), "good", body); err != nil {
		t.Fatal(err)
	}
	damage.Store(true)
	_, err := store.Put(t.Context(), "bad", body)
	checkTemporaryError(t, "put", err)
	_, _, err = store.Get(t.Context(), "good", 1<<20, nil)
	checkTemporaryError(t, "get", err)
	damage.Store(false)
	if _, err := store.Stat(t.Context(), "bad"); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("the damaged object was kept: %v", err)
	}
}

// TestAnswerCut: an answer that ends early is a temporary error, not the end of
// the object.
func TestAnswerCut(t *testing.T) {
	store := open(t, proxy(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet {
				next.ServeHTTP(w, r)
				return
			}
			answer := httptest.NewRecorder()
			next.ServeHTTP(answer, r)
			for key, values := range answer.Header() {
				w.Header()[key] = values
			}
			w.WriteHeader(answer.Code)
			w.Write(answer.Body.Bytes()[:answer.Body.Len()/2])
			panic(http.ErrAbortHandler)
		})
	}), Options{})
	if _, err := store.Put(t.Context(), "a", objecttest.Bytes(1, 100_000)); err != nil {
		t.Fatal(err)
	}
	_, _, err := store.Get(t.Context(), "a", 100_000, nil)
	checkTemporaryError(t, "get", err)
	_, err = store.GetRange(t.Context(), "a", 10, 50_000, nil)
	checkTemporaryError(t, "range", err)
}

// TestRangeIgnored: a server that sends the whole object instead.
func TestRangeIgnored(t *testing.T) {
	store := open(t, proxy(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// The header is signed, so the answer is changed, not the question.
			if r.Method == http.MethodGet && r.Header.Get("Range") != "" {
				body := objecttest.Bytes(1, 1000)
				w.Header().Set("Content-Length", fmt.Sprint(len(body)))
				w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
				w.Write(body)
				return
			}
			next.ServeHTTP(w, r)
		})
	}), Options{})
	if _, err := store.GetRange(t.Context(), "a", 10, 20, nil); !errors.Is(err, object.ErrUnsupported) {
		t.Errorf("ignored range: %v, want ErrUnsupported", err)
	}
	if _, err := store.GetRange(t.Context(), "a", 10, 1000, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ignored range past the end: %v, want io.ErrUnexpectedEOF", err)
	}
	if got, err := store.GetRange(t.Context(), "a", 0, 1000, nil); err != nil || len(got) != 1000 {
		t.Errorf("the whole object as a range: %d bytes, %v", len(got), err)
	}
}

// TestErrorAnswers: what callers decide by, for answers that MinIO does not give
// on demand.
func TestErrorAnswers(t *testing.T) {
	for _, test := range []struct {
		status int
		code   string
		want   error // nil is temporary
		text   string
	}{
		{http.StatusConflict, "ConditionalRequestConflict", nil, "again"},
		{http.StatusNotImplemented, "NotImplemented", object.ErrUnsupported, "conditional"},
		{http.StatusForbidden, "AccessDenied", object.ErrDenied, "permission"},
		{http.StatusForbidden, "RequestTimeTooSkewed", nil, "clock"},
		{http.StatusBadRequest, "ExpiredToken", object.ErrDenied, "renew"},
		{http.StatusBadRequest, "AuthorizationHeaderMalformed", nil, "region=eu-central-1"},
		{http.StatusMovedPermanently, "PermanentRedirect", nil, "region=eu-central-1"},
		{http.StatusNotFound, "NoSuchBucket", object.ErrNoBucket, "create"},
		{http.StatusServiceUnavailable, "SlowDown", nil, "SlowDown"},
		{http.StatusInternalServerError, "InternalError", nil, "InternalError"},
		{http.StatusBadRequest, "BadDigest", nil, "BadDigest"},
		{http.StatusInsufficientStorage, "XMinioStorageFull", nil, "XMinioStorageFull"},
	} {
		t.Run(test.code, func(t *testing.T) {
			var requests atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				io.Copy(io.Discard, r.Body)
				w.WriteHeader(test.status)
				fmt.Fprintf(w, "<Error><Code>%s</Code><Message>told you</Message><Region>eu-central-1</Region></Error>", test.code)
			}))
			defer server.Close()
			store := open(t, "s3://bucket?endpoint="+server.URL, Options{})
			_, err := store.Put(t.Context(), "a/b", []byte("x"))
			if test.want == nil {
				checkTemporaryError(t, "put", err)
			} else if !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			if err != nil && (!strings.Contains(err.Error(), test.text) || !strings.Contains(err.Error(), "a/b") || !strings.Contains(err.Error(), store.URL())) {
				t.Errorf("the message lacks %q, the object or the store: %v", test.text, err)
			}
			if requests.Load() != 1 {
				t.Errorf("%d requests were made", requests.Load())
			}
		})
	}
}

// TestProbe_FindsMissingConditions: services that ignore or refuse
// If-None-Match, or know no ranges, are found.
func TestProbe_FindsMissingConditions(t *testing.T) {
	for name, test := range map[string]struct {
		store *simpleS3
		text  string
	}{
		"ignored":       {&simpleS3{}, "conditional puts"},
		"not atomic":    {&simpleS3{conditions: true, racy: true}, "conditional puts"},
		"list is late":  {&simpleS3{conditions: true, atomic: true, lateList: true}, "list"},
		"refused":       {&simpleS3{refuse: true}, "conditional puts"},
		"all is well":   {&simpleS3{conditions: true, atomic: true}, ""},
		"no deleting":   {&simpleS3{conditions: true, atomic: true, keep: true}, ""},
		"ranges absent": {&simpleS3{conditions: true, atomic: true, noRanges: true}, "range"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(test.store)
			defer server.Close()
			store := open(t, "s3://bucket/prefix?endpoint="+server.URL, Options{})
			err := object.Probe(t.Context(), store)
			if test.text == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, object.ErrUnsupported) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("%v, want ErrUnsupported and %q", err, test.text)
			}
		})
	}
}

// TestProbe_NoFalseAlarm: what is only unreachable or forbidden is not accused.
func TestProbe_NoFalseAlarm(t *testing.T) {
	if err := object.Probe(t.Context(), open(t, minioServer.MissingURL("no-such-bucket", ""), Options{})); !errors.Is(err, object.ErrNoBucket) || errors.Is(err, object.ErrUnsupported) {
		t.Errorf("missing bucket: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "nobody")
	if err := object.Probe(t.Context(), open(t, minioServer.URL("denied", ""), Options{})); !errors.Is(err, object.ErrDenied) || errors.Is(err, object.ErrUnsupported) {
		t.Errorf("wrong credentials: %v", err)
	}
}

// TestNoRequestAtOpen: opening does not need the network, not even for AWS.
func TestNoRequestAtOpen(t *testing.T) {
	address, accepted := blackHole(t)
	t.Setenv("HTTPS_PROXY", "http://"+address)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	open(t, "s3://bucket/prefix?region=eu-central-1", Options{})
	open(t, "s3://bucket?endpoint=http://"+address, Options{})
	if len(accepted) > 0 {
		t.Error("a connection was made")
	}
}

// TestPut_AnswerOfNoStore: what stands between this host and the endpoint may
// answer 200 to anything. A put that nobody stored has not succeeded.
func TestPut_AnswerOfNoStore(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, "<html>Please log in</html>")
	}))
	defer server.Close()
	_, err := open(t, "s3://bucket?endpoint="+server.URL, Options{}).Put(t.Context(), "a/b", []byte("x"))
	checkTemporaryError(t, "put", err)
	if err != nil && !strings.Contains(err.Error(), "a/b") {
		t.Errorf("the error does not name the object: %v", err)
	}
}

// TestAnswers_AreBounded: a store that goes on and on is not taken into memory
// or waited for to its end.
func TestAnswers_AreBounded(t *testing.T) {
	const most = 4 * answerBytesMax
	var sent atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("ETag", `"x"`)
		begin, piece := "<ListBucketResult><IsTruncated>false</IsTruncated>", "<Contents><Key>b</Key><Size>1</Size></Contents>"
		io.WriteString(w, begin)
		block := []byte(strings.Repeat(piece, 1000))
		for n := int64(0); n < most; {
			written, err := w.Write(block)
			n += int64(written)
			sent.Add(int64(written))
			if err != nil {
				return
			}
		}
	}))
	defer server.Close()
	store := open(t, "s3://bucket?endpoint="+server.URL, Options{})
	var err error
	for _, err = range store.List(t.Context(), "", "") {
	}
	checkTemporaryError(t, "list", err)
	for _, err = range store.ListDirs(t.Context(), "") {
	}
	checkTemporaryError(t, "list of folders", err)
	_, _ = store.Put(t.Context(), "a", []byte("x"))
	_ = store.Delete(t.Context(), "a")
	if n := sent.Load(); n > 4*(most/2) {
		t.Errorf("%d MiB were taken of four answers", n>>20)
	}
}
