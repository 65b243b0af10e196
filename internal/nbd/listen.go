package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// socketPathMax is the longest path of a unix socket, which the kernel sets.
const socketPathMax = 107

// splitURI takes "unix:/path" and "tcp:host:port" apart.
func splitURI(uri string) (network, address string, err error) {
	network, address, _ = strings.Cut(uri, ":")
	switch network {
	case "unix":
		if !filepath.IsAbs(address) {
			return "", "", fmt.Errorf("NBD address %q: the path of a unix socket must begin with /", uri)
		}
		if len(address) > socketPathMax {
			return "", "", fmt.Errorf("NBD address %q: the path has %d bytes, the system allows %d for a socket: use a shorter one", uri, len(address), socketPathMax)
		}
		return network, address, nil
	case "tcp":
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			return "", "", fmt.Errorf("NBD address %q: use tcp:host:port", uri)
		}
		if _, err := net.LookupPort("tcp", port); err != nil {
			return "", "", fmt.Errorf("NBD address %q: %q is no port: use one from 1 to 65535, like 10809", uri, port)
		}
		return network, address, nil
	}
	return "", "", fmt.Errorf("NBD address %q: use unix:/path or tcp:host:port", uri)
}

// CheckListen refuses an address on which Listen would never listen.
func CheckListen(uri string) error {
	network, address, err := splitURI(uri)
	if err != nil || network == "unix" {
		return err
	}
	host, _, _ := net.SplitHostPort(address)
	_, err = loopback(host)
	return err
}

// Listen opens the address of a server: "unix:/path" or "tcp:host:port".
//
// A unix socket has mode 0600 before anyone can connect. A socket file that a
// dead server left behind is replaced; if a server answers on it, Listen fails
// with ErrInUse, and any other kind of file is left alone. Closing the listener
// removes the file, unless another one has taken its place.
//
// TCP is for loopback addresses only, as there is no encryption and no
// authentication. Port 0 chooses a free port; see the listener's Addr.
func Listen(uri string) (net.Listener, error) {
	network, address, err := splitURI(uri)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		return listenUnix(address)
	}
	host, port, _ := net.SplitHostPort(address)
	ip, err := loopback(host)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(ip.String(), port))
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("listen on %s: %w", uri, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", uri, err)
	}
	return l, nil
}

// loopback resolves host to an address that only this machine can reach.
func loopback(host string) (net.IP, error) {
	const hint = "NBD has no encryption here, so TCP is for loopback only: use 127.0.0.1, [::1], localhost or a unix socket"
	ips := []net.IP{net.ParseIP(host)}
	if ips[0] == nil {
		if host == "" {
			return nil, errors.New("an NBD address without a host listens to everyone: " + hint)
		}
		var err error
		if ips, err = net.LookupIP(host); err != nil {
			return nil, fmt.Errorf("resolve NBD host %q: %w", host, err)
		}
	}
	for _, ip := range ips {
		if !ip.IsLoopback() {
			return nil, fmt.Errorf("NBD address %s can be reached by others: %s", host, hint)
		}
	}
	return ips[0], nil
}

func listenUnix(path string) (net.Listener, error) {
	// The lock keeps two servers that start at once from each taking the
	// other's new socket for a stale one.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: %w: create the directory first", path, err)
	}
	defer dir.Close()
	if err := flock(dir); err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: lock its directory: %w", path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}

	// Made by hand, for between bind and listen nobody can connect yet: that is
	// when the mode is set.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: %w", path, err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close() // the listener has its own descriptor
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: %w", path, err)
	}
	l, err := listenBound(file, path)
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("listen on unix socket %s: %w", path, err)
	}
	return l, nil
}

func listenBound(file *os.File, path string) (net.Listener, error) {
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Listen(int(file.Fd()), unix.SOMAXCONN); err != nil {
		return nil, err
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return &unixListener{Listener: l, path: path, info: info}, nil
}

// flock locks dir until it is closed.
func flock(dir *os.File) error {
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			return err
		}
	}
}

// removeStale removes a socket file on which nobody answers.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen on unix socket %s: %w", path, err)
	}
	if info.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("listen on unix socket %s: the path exists and is no socket: remove it or choose another", path)
	}
	var d net.Dialer
	nc, err := d.DialContext(context.Background(), "unix", path)
	if err == nil {
		nc.Close()
		return fmt.Errorf("listen on unix socket %s: %w: stop it or choose another path", path, ErrInUse)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("listen on unix socket %s: cannot tell whether its server lives: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("listen on unix socket %s: remove the one that a dead server left: %w", path, err)
	}
	return nil
}

// unixListener removes its socket file when it is closed.
type unixListener struct {
	net.Listener
	path string
	info os.FileInfo // of the file as created

	once sync.Once
	err  error
}

func (l *unixListener) Close() error {
	l.once.Do(func() {
		if info, err := os.Lstat(l.path); err == nil && os.SameFile(info, l.info) {
			os.Remove(l.path)
		}
		l.err = l.Listener.Close()
	})
	return l.err
}
