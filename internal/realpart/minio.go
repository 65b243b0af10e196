package realpart

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	minioUser     = "drctest"
	minioPassword = "drctestsecret"
	// minioReadyTimeout is generous: many servers may start at once on few cores.
	minioReadyTimeout = 60 * time.Second
	// minioStarts is how often a server is started on another port when somebody
	// else took the one that was free a moment ago.
	minioStarts = 5
)

// Instance is a real MinIO server on a loopback port with data of its own.
type Instance struct {
	binary string
	dir    string
	port   int

	mu      sync.Mutex
	process *process
}

// process is one run of the server.
type process struct {
	pid   int
	ended chan struct{} // closed when it was waited for
}

// MinIO starts n servers for a test and ends them when the test ends. The test
// fails if MinIO was not built.
func MinIO(t testing.TB, n int) []*Instance {
	t.Helper()
	instances, stop, err := StartMinIO(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for i, instance := range instances {
				t.Logf("log of MinIO %d:\n%s", i, instance.log())
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return instances
}

// StartMinIO does what MinIO does for callers without a test, such as TestMain.
// They must call stop, which ends the servers and removes their data.
func StartMinIO(n int) (instances []*Instance, stop func() error, err error) {
	binary, err := minioBinary()
	if err != nil {
		return nil, nil, err
	}
	root, err := os.MkdirTemp("", "drc-minio-")
	if err != nil {
		return nil, nil, err
	}
	stop = func() error {
		for _, instance := range instances {
			instance.Kill()
		}
		return os.RemoveAll(root)
	}
	for i := range n {
		instance := &Instance{binary: binary, dir: filepath.Join(root, fmt.Sprint(i+1))}
		if err := os.MkdirAll(filepath.Join(instance.dir, "data"), 0o700); err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		instances = append(instances, instance)
	}
	// Together, because each takes a second.
	errs := make([]error, n)
	var starts sync.WaitGroup
	for i, instance := range instances {
		starts.Go(func() { errs[i] = instance.Start() })
	}
	starts.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	return instances, stop, nil
}

// URL returns the URL of a store in a bucket that is there.
// The bucket is made if it is missing; the prefix may be empty.
func (i *Instance) URL(bucket, prefix string) string {
	// MinIO takes a folder in its data for a bucket.
	if err := os.MkdirAll(filepath.Join(i.dir, "data", bucket), 0o700); err != nil {
		panic(fmt.Sprintf("make bucket %s: %v", bucket, err))
	}
	return i.MissingURL(bucket, prefix)
}

// MissingURL returns the same as URL and does not make the bucket.
func (i *Instance) MissingURL(bucket, prefix string) string {
	path := bucket
	if prefix != "" {
		path += "/" + prefix
	}
	return fmt.Sprintf("s3://%s?endpoint=%s&region=us-east-1", path, i.Endpoint())
}

// Endpoint returns the server's address, http://127.0.0.1:port.
func (i *Instance) Endpoint() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return fmt.Sprintf("http://127.0.0.1:%d", i.port)
}

// Env returns the credentials as lines of an environment. They are the same for
// all instances.
func (i *Instance) Env() []string {
	return []string{"AWS_ACCESS_KEY_ID=" + minioUser, "AWS_SECRET_ACCESS_KEY=" + minioPassword}
}

// SetEnv puts the credentials into this process's environment for the test.
func (i *Instance) SetEnv(t testing.TB) {
	for _, line := range i.Env() {
		key, value, _ := strings.Cut(line, "=")
		t.Setenv(key, value)
	}
}

// Start starts the server, on the port it had before if it ran before, and
// returns when it answers. It does nothing while the server runs.
func (i *Instance) Start() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.process != nil {
		return nil
	}
	fixed := i.port != 0
	for attempt := 1; ; attempt++ {
		if !fixed {
			port, err := freePort()
			if err != nil {
				return err
			}
			i.port = port
		}
		err := i.start()
		if err == nil {
			return nil
		}
		if fixed || attempt == minioStarts || !strings.Contains(i.log(), "address already in use") {
			return fmt.Errorf("start MinIO on port %d: %w; its log ends with:\n%s", i.port, err, i.log())
		}
	}
}

// Stop asks the server to end and waits until it did.
func (i *Instance) Stop() { i.end(syscall.SIGTERM) }

// Kill ends the server at once, as a crash would.
func (i *Instance) Kill() { i.end(syscall.SIGKILL) }

// Signal sends the server a signal: SIGSTOP makes it silent, SIGCONT goes on.
func (i *Instance) Signal(signal syscall.Signal) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.process == nil {
		return errors.New("MinIO is not running")
	}
	return syscall.Kill(i.process.pid, signal)
}

func (i *Instance) end(signal syscall.Signal) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.process == nil {
		return
	}
	// The process was not waited for yet, so the pid is still its own.
	select {
	case <-i.process.ended:
	default:
		_ = syscall.Kill(i.process.pid, signal)
		// A stopped process takes no SIGTERM.
		_ = syscall.Kill(i.process.pid, syscall.SIGCONT)
	}
	<-i.process.ended
	i.process = nil
}

// start needs the lock.
func (i *Instance) start() error {
	log, err := os.Create(filepath.Join(i.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	command := exec.Command(i.binary, "server", filepath.Join(i.dir, "data"), "--address", fmt.Sprintf("127.0.0.1:%d", i.port))
	command.Env = append(os.Environ(),
		"MINIO_ROOT_USER="+minioUser, "MINIO_ROOT_PASSWORD="+minioPassword,
		"MINIO_BROWSER=off", "MINIO_CALLHOME_ENABLE=off",
		// It has its own configuration folder otherwise, in the home directory.
		"HOME="+i.dir)
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	run := &process{ended: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(run.ended)
		// The signal of Pdeathsig comes when the starting thread ends, so this
		// thread stays as long as the server does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := command.Start()
		if err == nil {
			run.pid = command.Process.Pid
		}
		started <- err
		if err == nil {
			_ = command.Wait()
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	i.process = run
	if err := i.waitReady(run); err != nil {
		select {
		case <-run.ended:
		default:
			_ = syscall.Kill(run.pid, syscall.SIGKILL)
			<-run.ended
		}
		i.process = nil
		return err
	}
	return nil
}

// waitReady returns when the server serves. Nothing tells the moment, so it asks
// again and again.
func (i *Instance) waitReady(run *process) error {
	ctx, cancel := context.WithTimeout(context.Background(), minioReadyTimeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		request, err := i.readyRequest(ctx)
		if err != nil {
			return err
		}
		if answer, err := client.Do(request); err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusForbidden {
				return nil
			}
		}
		select {
		case <-run.ended:
			return errors.New("the server ended")
		case <-ctx.Done():
			return fmt.Errorf("the server was not ready after %v", minioReadyTimeout)
		case <-ticker.C:
		}
	}
}

// readyRequest asks with an access key that nobody has. The answer is that the
// key is unknown once both the objects and the users are loaded; the server's
// own health page says yes before that.
func (i *Instance) readyRequest(ctx context.Context) (*http.Request, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/bucket/?location=", i.port), nil)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	request.Header.Set("X-Amz-Date", now.Format("20060102T150405Z"))
	request.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")
	request.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=nobody/%s/us-east-1/s3/aws4_request, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature=%064d", now.Format("20060102"), 0))
	return request, nil
}

// log returns the end of the server's log.
func (i *Instance) log() string {
	text, err := os.ReadFile(filepath.Join(i.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-2000):])
}

func freePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

var minioVersion = regexp.MustCompile(`(?m)^(?:require)?\s*github\.com/minio/minio (v\S+)`)

// minioBinary returns where minio-dev/minio.sh puts the server.
func minioBinary() (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	mod, err := os.ReadFile(filepath.Join(root, "minio-dev", "go.mod"))
	if err != nil {
		return "", err
	}
	version := minioVersion.FindSubmatch(mod)
	if version == nil {
		return "", errors.New("minio-dev/go.mod names no version of github.com/minio/minio")
	}
	tools := os.Getenv("DRC_TOOLS_DIR")
	if tools == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		tools = filepath.Join(cache, "drc", "tools")
	}
	binary := filepath.Join(tools, "minio-"+string(version[1]))
	if _, err := os.Stat(binary); err != nil {
		return "", fmt.Errorf("MinIO is not built (%w); run: make minio-build", err)
	}
	return binary, nil
}

// moduleRoot returns the folder of the checkout that the running test is in.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module drc\n")) {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("the tests do not run inside a checkout of drc")
		}
		dir = parent
	}
}
