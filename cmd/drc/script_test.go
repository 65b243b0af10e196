package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"drc/internal/block"
	"drc/internal/nbd"
	"drc/internal/realpart"
)

// TestScripts runs the sessions in testdata/script: what a user types, what
// the program answers, and with which exit code it ends. Beside testscript's
// own commands they have:
//
//	exits N drc …            run drc; it must end with code N, and if that is
//	                         not 0 with one plain line
//	agent NAME STATE ARG…    start an agent and wait until it is ready; what it
//	                         says goes to NAME.log
//	stop-agent NAME, kill-agent NAME   end it by SIGTERM or SIGKILL
//	stop-impatiently NAME    send SIGTERM until it has ended, by the signal
//	wait-log NAME REGEXP     wait until the agent has said something
//	noise FILE BYTES SEED    make a file
//	write SOCKET VOLUME OFF BYTES SEED    write over NBD, and flush
//	dump SOCKET VOLUME FILE  read a volume over NBD
//	same A B                 the files are equal
//	same-tree A B            the folders hold the same names
//	garbage SOCKET           say nonsense to an NBD server until it hangs up
//	listen PATH              hold a unix socket, with someone who answers
//	weak-store               an S3 server without conditional puts, as $WEAK
//	first-object GLOB VAR    name the first of some files
//
// Each script has a store and the name of an identity in its environment, and
// the URL of a bucket on a real server as $S3.
func TestScripts(t *testing.T) {
	t.Parallel()
	minio := realpart.MinIO(t, 1)[0]
	vectors, err := filepath.Abs("../../testdata/format/v1")
	must(t, err)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			bucket := strings.ToLower(regexp.MustCompile(`[^a-zA-Z0-9]+`).ReplaceAllString(filepath.Base(e.WorkDir), "-"))
			e.Vars = append(e.Vars,
				"DRC_STORE=file://"+e.WorkDir+"/store", "DRC_IDENTITY="+e.WorkDir+"/id",
				"S3="+minio.URL(bucket, "drc"), "NO_BUCKET="+minio.MissingURL(bucket+"-missing", "drc"), "ENDPOINT="+minio.Endpoint(),
				"VECTORS="+vectors, "GOCOVERDIR="+os.Getenv("GOCOVERDIR"), "GORACE="+os.Getenv("GORACE"))
			e.Vars = append(e.Vars, minio.Env()...)
			e.Values[scriptKey{}] = &script{dir: e.WorkDir, agents: map[string]*scriptAgent{}}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": scriptExits, "agent": scriptAgentStart, "serve": scriptServe, "replay": scriptReplay, "promote": scriptPromote, "stop-agent": scriptStop, "kill-agent": scriptKill, "stop-impatiently": scriptStopImpatiently, "wait-log": scriptWaitLog, "noise": scriptNoise,
			"write": scriptWrite, "dump": scriptDump, "wait-dump": scriptWaitDump, "same": scriptSame, "same-tree": scriptSameTree, "garbage": scriptGarbage,
			"listen": scriptListen, "weak-store": scriptWeakStore, "first-object": scriptFirstObject,
		},
	})
}

type scriptKey struct{}

// script is what one script has running.
type script struct {
	dir    string
	agents map[string]*scriptAgent
}

func scriptOf(ts *testscript.TestScript) *script { return ts.Value(scriptKey{}).(*script) }

// scriptAgent is an agent of a script.
type scriptAgent struct {
	cmd  *exec.Cmd
	done chan error

	mu   sync.Mutex
	said bytes.Buffer
	more chan struct{} // closed and replaced when said grows
}

func (a *scriptAgent) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.more)
	a.more = make(chan struct{})
	return a.said.Write(p)
}

func (a *scriptAgent) text() (string, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.said.String(), a.more
}

func want(ts *testscript.TestScript, neg bool, args []string, n int, how string) {
	if neg || len(args) < n {
		ts.Fatalf("usage: %s", how)
	}
}

func number(ts *testscript.TestScript, text string) int {
	n, err := strconv.Atoi(text)
	ts.Check(err)
	return n
}

// strange is what no message for people may have in it: words of the language
// and the libraries, and of our own inside.
var strange = regexp.MustCompile(`context (canceled|deadline)|goroutine|panic|nil pointer|%!|0x[0-9a-f]{6}|\bEOF\b|dial tcp|errno|strconv|time: |arg\(s\)|flag\(s\)|<nil>|unmarshal|json: |lstat |main\.|\.go:|err=|unexpected end of`)

// plainLine checks what an unsuccessful command said.
func plainLine(stderr string) error {
	var own []string
	for _, line := range strings.Split(strings.TrimRight(stderr, "\n"), "\n") {
		if strings.HasPrefix(line, "drc: ") {
			own = append(own, line)
		}
	}
	switch {
	case len(own) != 1:
		return fmt.Errorf("%d lines begin with \"drc: \", and it should be one", len(own))
	case !strings.HasSuffix(stderr, own[0]+"\n"):
		return errors.New("the error is not the last line")
	case strange.MatchString(own[0]):
		return fmt.Errorf("%q is not for people", strange.FindString(own[0]))
	case strings.HasSuffix(own[0], "."):
		return errors.New("the message ends with a full stop")
	case len(own[0]) > 600:
		return fmt.Errorf("the message has %d bytes", len(own[0]))
	}
	return nil
}

func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 2, "exits CODE PROGRAM ARG…")
	code := 0
	err := ts.Exec(args[1], args[2:]...)
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		code = ended.ExitCode()
	} else {
		ts.Check(err)
	}
	if wanted := number(ts, args[0]); code != wanted {
		ts.Fatalf("%s ended with code %d, not %d", strings.Join(args[1:], " "), code, wanted)
	}
	if code == 0 {
		return
	}
	if err := plainLine(ts.ReadFile("stderr")); err != nil {
		ts.Fatalf("%s: %v", strings.Join(args[1:], " "), err)
	}
}

func scriptAgentStart(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 2, "agent NAME STATE ARG…")
	scriptStart(ts, "agent", args)
}

func scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 3, "serve NAME STATE ARG…")
	scriptStart(ts, "serve", args)
}

func scriptReplay(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 3, "replay NAME STATE ARG…")
	scriptStart(ts, "replay", args)
}

func scriptPromote(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 3, "promote NAME STATE VOLUME ARG…")
	scriptStart(ts, "promote", args)
}

// scriptStart starts a command that says when it is ready.
func scriptStart(ts *testscript.TestScript, command string, args []string) {
	name := args[0]
	a := &scriptAgent{done: make(chan error, 1), more: make(chan struct{})}
	ctx, cancel := context.WithTimeout(context.Background(), processLimit)
	ts.Defer(cancel)
	a.cmd = limited(ctx, append([]string{command, "--state", ts.MkAbs(args[1])}, args[2:]...)...)
	a.cmd.Dir = ts.MkAbs(".")
	for _, k := range []string{"PATH", "HOME", "TMPDIR", "DRC_STORE", "DRC_IDENTITY", "DRC_AGENT_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOCOVERDIR", "GORACE"} {
		if v := ts.Getenv(k); v != "" {
			a.cmd.Env = append(a.cmd.Env, k+"="+v)
		}
	}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.Create(ts.MkAbs(name + ".log"))
	ts.Check(err)
	a.cmd.Stderr = io.MultiWriter(log, a)
	out, err := a.cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(a.cmd.Start())
	lines := bufio.NewScanner(out)
	ready := false
	for !ready && lines.Scan() {
		ready = lines.Text() == "ready"
	}
	go func() {
		_, _ = io.Copy(io.Discard, out)
		err := a.cmd.Wait()
		a.done <- errors.Join(err, log.Close())
	}()
	if !ready {
		err := <-a.done
		said, _ := a.text()
		ts.Fatalf("%s %s did not start: %v\n%s", command, name, err, said)
	}
	scriptOf(ts).agents[name] = a
	ts.Defer(func() {
		if a.done != nil {
			_ = a.cmd.Process.Kill()
			<-a.done
		}
	})
}

func scriptEnd(ts *testscript.TestScript, args []string, s syscall.Signal) error {
	a := scriptOf(ts).agents[args[0]]
	if a == nil || a.done == nil {
		ts.Fatalf("no agent %s runs", args[0])
	}
	ts.Check(a.cmd.Process.Signal(s))
	err := <-a.done
	a.done = nil
	return err
}

func scriptStop(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 1, "stop-agent NAME")
	if err := scriptEnd(ts, args, syscall.SIGTERM); err != nil {
		said, _ := scriptOf(ts).agents[args[0]].text()
		ts.Fatalf("agent %s ended badly: %v\n%s", args[0], err, said)
	}
}

func scriptStopImpatiently(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 1, "stop-impatiently NAME")
	a := scriptOf(ts).agents[args[0]]
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	late := time.After(scriptPatience)
	for {
		_ = a.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-a.done:
			a.done = nil
			var ended *exec.ExitError
			if !errors.As(err, &ended) || !ended.Sys().(syscall.WaitStatus).Signaled() {
				ts.Fatalf("agent %s did not end by the signal: %v", args[0], err)
			}
			return
		case <-again.C:
		case <-late:
			ts.Fatalf("agent %s goes on in spite of many signals", args[0])
		}
	}
}

func scriptKill(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 1, "kill-agent NAME")
	_ = scriptEnd(ts, args, syscall.SIGKILL)
}

// scriptPatience bounds every wait of a script.
const scriptPatience = time.Minute

func scriptWaitLog(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 2, "wait-log NAME REGEXP")
	a := scriptOf(ts).agents[args[0]]
	re, err := regexp.Compile(args[1])
	ts.Check(err)
	late := time.After(scriptPatience)
	for {
		said, more := a.text()
		if re.MatchString(said) {
			return
		}
		select {
		case <-more:
		case <-late:
			ts.Fatalf("agent %s did not say %q:\n%s", args[0], args[1], said)
		}
	}
}

func scriptNoise(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 3, "noise FILE BYTES SEED")
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), noise(uint64(number(ts, args[2])), number(ts, args[1])), 0o600))
}

func scriptDial(ts *testscript.TestScript, socket, volume string) *nbd.Client {
	c, err := nbd.Dial(context.Background(), "unix:"+ts.MkAbs(socket), volume)
	ts.Check(err)
	return c
}

func scriptWrite(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 5, "write SOCKET VOLUME OFF BYTES SEED")
	c := scriptDial(ts, args[0], args[1])
	data := noise(uint64(number(ts, args[4])), number(ts, args[3]))
	ts.Check(c.WriteAt(context.Background(), data, int64(number(ts, args[2])), block.WriteOptions{}))
	ts.Check(c.Flush(context.Background()))
	ts.Check(c.Close())
}

func scriptDump(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 3, "dump SOCKET VOLUME FILE")
	c := scriptDial(ts, args[0], args[1])
	p := make([]byte, c.Geometry().SizeBytes)
	for at := 0; at < len(p); at += 1 << 20 {
		ts.Check(c.ReadAt(context.Background(), p[at:min(len(p), at+1<<20)], int64(at)))
	}
	ts.Check(c.Close())
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), p, 0o600))
}

// scriptWaitDump waits until clients that connect see what is in a file.
func scriptWaitDump(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 3, "wait-dump SOCKET VOLUME FILE")
	wanted, err := os.ReadFile(ts.MkAbs(args[2]))
	ts.Check(err)
	for end := time.Now().Add(processLimit); ; time.Sleep(50 * time.Millisecond) {
		c := scriptDial(ts, args[0], args[1])
		p := make([]byte, c.Geometry().SizeBytes)
		ts.Check(c.ReadAt(context.Background(), p, 0))
		ts.Check(c.Close())
		if bytes.Equal(p, wanted) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("volume %s does not become what is in %s", args[1], args[2])
		}
	}
}

func scriptSame(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, false, args, 2, "same A B")
	a, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	b, err := os.ReadFile(ts.MkAbs(args[1]))
	ts.Check(err)
	if bytes.Equal(a, b) == neg {
		ts.Fatalf("%s (%d bytes) and %s (%d bytes): equal is %v", args[0], len(a), args[1], len(b), !neg)
	}
}

func tree(ts *testscript.TestScript, dir string) string {
	var names []string
	ts.Check(filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(path, dir))
		return err
	}))
	return strings.Join(names, "\n")
}

func scriptSameTree(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 2, "same-tree A B")
	if a, b := tree(ts, ts.MkAbs(args[0])), tree(ts, ts.MkAbs(args[1])); a != b {
		ts.Fatalf("the folders differ:\n%s\n---\n%s", a, b)
	}
}

func scriptGarbage(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 1, "garbage SOCKET")
	c, err := net.Dial("unix", ts.MkAbs(args[0]))
	ts.Check(err)
	_, _ = c.Write(noise(1, 4096)) // the server may hang up in the middle
	_, _ = io.Copy(io.Discard, c)
	_ = c.Close()
}

func scriptListen(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 1, "listen PATH")
	l, err := net.Listen("unix", ts.MkAbs(args[0]))
	ts.Check(err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	ts.Defer(func() {
		_ = l.Close()
		<-ended
	})
}

// scriptWeakStore is an S3 server, as far as drc init asks, that overwrites
// objects in spite of If-None-Match.
func scriptWeakStore(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 0, "weak-store")
	var mu sync.Mutex
	objects := map[string][]byte{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		body, found := objects[r.URL.Path]
		switch {
		case r.Method == http.MethodPut:
			raw, err := io.ReadAll(r.Body)
			if err != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			objects[r.URL.Path] = raw
			w.Header().Set("ETag", `"d41d8cd98f00b204e9800998ecf8427e"`)
		case r.Method == http.MethodDelete:
			delete(objects, r.URL.Path)
			w.WriteHeader(http.StatusNoContent)
		case !found:
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>`)
		default:
			_, _ = w.Write(body)
		}
	}))
	ts.Defer(s.Close)
	ts.Setenv("WEAK", "s3://bucket/drc?endpoint="+s.URL+"&region=us-east-1")
}

func scriptFirstObject(ts *testscript.TestScript, neg bool, args []string) {
	want(ts, neg, args, 2, "first-object GLOB VAR")
	found, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	if len(found) == 0 {
		ts.Fatalf("nothing is like %s", args[0])
	}
	ts.Setenv(args[1], found[0])
}
