package capture

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"drc/internal/block"
	"drc/internal/vfs"
)

// Kernel returns the real machine.
func Kernel() Machine { return kernelMachine{} }

type kernelMachine struct{}

func (kernelMachine) Files() vfs.FS { return vfs.OS() }

func (kernelMachine) Boot() (id string, at time.Time) {
	if raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		id = strings.TrimSpace(string(raw))
	}
	raw, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return id, time.Time{}
	}
	var up float64
	if _, err := fmt.Sscan(string(raw), &up); err != nil {
		return id, time.Time{}
	}
	return id, time.Now().Add(-time.Duration(up * float64(time.Second)))
}

// kernelDisk is a file or block device of the kernel's.
type kernelDisk struct {
	f    *os.File
	made bool // by OpenDisk
	info DiskInfo
	sys  system
}

func (kernelMachine) OpenDisk(path string, o BackingOptions) (_ Disk, err error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("volume path %s: %w", path, err)
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real
	}
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	made := false
	st, err := os.Stat(abs)
	if errors.Is(err, os.ErrNotExist) && o.CreateBytes > 0 && !o.ReadOnly {
		if link, err := os.Readlink(abs); err == nil {
			return nil, fmt.Errorf("%s is a symbolic link to %s, which does not exist: correct the path, or remove the link", abs, link)
		}
		made = true
		mode |= os.O_CREATE | os.O_EXCL
	} else if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s %w: give size=… to create it, or correct the path", abs, ErrMissing)
		}
		return nil, fmt.Errorf("open volume: %w", err)
	} else if st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
		mode |= unix.O_EXCL // fails while the device is mounted
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is neither a file nor a block device", abs)
	}
	f, err := os.OpenFile(abs, mode, 0o600)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s: %w (mounted, or part of another device): unmount it first", abs, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	d := &kernelDisk{f: f, made: made, info: DiskInfo{Path: abs, SectorSize: 512}, sys: kernel}
	how := unix.LOCK_EX
	if o.ReadOnly {
		how = unix.LOCK_SH
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close() // and no more: whoever has the lock has the file, also one made here
		return nil, fmt.Errorf("%s: %w: stop the other agent or program that holds it", abs, ErrInUse)
	}
	defer func() {
		if err != nil {
			_ = d.Remove()
			_ = d.Close()
		}
	}()
	if !d.isAtPath() {
		d.made = false
		return nil, fmt.Errorf("%s was removed or replaced while it was being opened: try again", abs)
	}
	if st, err = f.Stat(); err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	d.info.IsDevice = st.Mode()&os.ModeDevice != 0
	if o.CreateBytes > 0 && st.Mode().IsRegular() && st.Size() == 0 && !o.ReadOnly {
		d.info.Created = true
		if err := f.Truncate(o.CreateBytes); err != nil {
			if errors.Is(err, unix.EFBIG) {
				return nil, fmt.Errorf("create %s: %d bytes are more than a file can have on this file system: choose a smaller size, or another place", abs, o.CreateBytes)
			}
			return nil, fmt.Errorf("create %s with %d bytes: %w", abs, o.CreateBytes, err)
		}
		if err := vfs.OS().SyncDir(filepath.Dir(abs)); err != nil {
			return nil, fmt.Errorf("sync folder %s: %w", filepath.Dir(abs), err)
		}
	}
	if d.info.SizeBytes, err = f.Seek(0, io.SeekEnd); err != nil {
		return nil, fmt.Errorf("find the size of %s: %w", abs, err)
	}
	if d.info.IsDevice {
		if n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err == nil && n == 4096 {
			d.info.SectorSize = n
		}
	}
	return d, nil
}

func (d *kernelDisk) Info() DiskInfo                           { return d.info }
func (d *kernelDisk) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *kernelDisk) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }

func (d *kernelDisk) WriteVec(parts [][]byte, off int64) (int, error) {
	return d.sys.pwritev(int(d.f.Fd()), parts, off)
}

func (d *kernelDisk) Fallocate(mode uint32, e block.Extent) error {
	return d.sys.fallocate(int(d.f.Fd()), mode, e.Off, e.Len)
}

func (d *kernelDisk) ZeroOut(e block.Extent) error { return zeroOut(d.f, e) }
func (d *kernelDisk) Sync() error                  { return d.sys.fsync(int(d.f.Fd())) }

func (d *kernelDisk) Seek(off int64, whence int) (int64, error) {
	return unix.Seek(int(d.f.Fd()), off, whence)
}

func (d *kernelDisk) Stat() (DiskStat, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.f.Fd()), &st); err != nil {
		return DiskStat{}, err
	}
	out := DiskStat{Inode: st.Ino, MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano()}
	if !d.info.IsDevice {
		out.Sized, out.SizeBytes, out.Gone, out.Elsewhere = true, st.Size, st.Nlink == 0, !d.isAtPath()
	}
	return out, nil
}

func (d *kernelDisk) Remove() error {
	if !d.made || !d.isAtPath() {
		return nil
	}
	return os.Remove(d.info.Path)
}

// isAtPath reports whether the path still leads to what is open.
func (d *kernelDisk) isAtPath() bool {
	mine, err := d.f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(d.info.Path)
	return err == nil && os.SameFile(mine, there)
}

func (d *kernelDisk) Close() error { return d.f.Close() }
