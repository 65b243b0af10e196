package vfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OS returns the real file system.
func OS() FS { return osFS{} }

type osFS struct{}

func (osFS) Create(name string) (File, error) {
	return openOS(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

func (osFS) Open(name string) (File, error) { return openOS(name, os.O_RDWR) }

func openOS(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f, fd: f.Fd()}, nil
}

func (osFS) Remove(name string) error             { return os.Remove(name) }
func (osFS) Rename(oldName, newName string) error { return os.Rename(oldName, newName) }

func (o osFS) MkdirAll(dir string) error {
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return &os.PathError{Op: "mkdir", Path: dir, Err: unix.ENOTDIR}
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := o.MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

func (osFS) ReadDir(dir string) ([]Entry, error) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(list))
	for i, e := range list {
		entries[i] = Entry{Name: e.Name(), IsDir: e.IsDir()}
	}
	return entries, nil
}

func (osFS) SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (osFS) Stat(name string) (Info, error) {
	info, err := os.Stat(name)
	if err != nil {
		return Info{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return Info{}, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return Info{SizeBytes: info.Size(), IsDir: info.IsDir(), Device: physicalDevice(uint64(st.Dev))}, nil
}

// physicalDevice names the disk below a file system's device: a partition
// stands for its disk, a mapped device with a single device below for that.
// What cannot be resolved (network and pseudo file systems, arrays) stands for
// itself.
func physicalDevice(dev uint64) string {
	number := fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
	for range 8 { // deeper stacks of mappings do not occur
		dir, err := filepath.EvalSymlinks("/sys/dev/block/" + number)
		if err != nil {
			return number
		}
		below := ""
		if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
			below = filepath.Join(filepath.Dir(dir), "dev")
		} else if slaves, err := os.ReadDir(filepath.Join(dir, "slaves")); err == nil && len(slaves) == 1 {
			below = filepath.Join(dir, "slaves", slaves[0].Name(), "dev")
		}
		if below == "" {
			return number
		}
		text, err := os.ReadFile(below)
		if err != nil {
			return number
		}
		number = strings.TrimSpace(string(text))
	}
	return number
}

func (osFS) StatFS(dir string) (Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Space{}, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return Space{
		TotalBytes: int64(st.Blocks) * int64(st.Bsize),
		FreeBytes:  int64(st.Bavail) * int64(st.Bsize),
	}, nil
}

func (osFS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", name, ErrLocked)
		}
		return nil, &os.PathError{Op: "lock", Path: name, Err: err}
	}
	// The holder's number is for people who look into the file; nobody reads it.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return f, nil
}

type osFile struct {
	*os.File
	fd   uintptr
	mu   sync.Mutex // guards iovs
	iovs []unix.Iovec
}

// maxVectors is the kernel's limit (IOV_MAX) of buffers a call.
const maxVectors = 1024

func (f *osFile) WriteVecAt(bufs [][]byte, off int64) error {
	if len(bufs) == 1 {
		_, err := f.WriteAt(bufs[0], off)
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var total int64
	iovs := f.iovs[:0]
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		iov := unix.Iovec{Base: unsafe.SliceData(b)}
		iov.SetLen(len(b))
		iovs = append(iovs, iov)
		total += int64(len(b))
	}
	f.iovs = iovs
	left := iovs
	for total > 0 {
		part := left[:min(len(left), maxVectors)]
		n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, f.fd, uintptr(unsafe.Pointer(&part[0])),
			uintptr(len(part)), uintptr(off), 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return &os.PathError{Op: "write", Path: f.Name(), Err: errno}
		case n == 0:
			return &os.PathError{Op: "write", Path: f.Name(), Err: io.ErrShortWrite}
		}
		off += int64(n)
		total -= int64(n)
		for n > 0 { // a short write: go on behind it
			if have := uintptr(left[0].Len); n >= have {
				n -= have
				left = left[1:]
				continue
			}
			left[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(left[0].Base), n))
			left[0].SetLen(int(uintptr(left[0].Len) - n))
			n = 0
		}
	}
	runtime.KeepAlive(bufs)
	clear(iovs) // keep no caller's memory alive
	return nil
}

func (f *osFile) Sync() error {
	for {
		err := unix.Fdatasync(int(f.fd))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &os.PathError{Op: "sync", Path: f.Name(), Err: err}
		}
	}
}

func (f *osFile) Preallocate(sizeBytes int64) error {
	for {
		err := unix.Fallocate(int(f.fd), 0, 0, sizeBytes)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP):
			// No reservation to be had here (tmpfs has, some network file
			// systems have not): at least the size is right.
			if size, serr := f.Size(); serr == nil && size < sizeBytes {
				return f.Truncate(sizeBytes)
			}
			return nil
		}
		return &os.PathError{Op: "preallocate", Path: f.Name(), Err: err}
	}
}

func (f *osFile) Linked() (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.fd), &st); err != nil {
		return false, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st.Nlink > 0, nil
}

func (f *osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
