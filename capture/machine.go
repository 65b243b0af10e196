package capture

import (
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// Machine is the computer that capture works on: the disks with the backings, the
// file system of the records, and when it was booted. There is the one that the
// kernel shows (Kernel), and simulated ones that lose power and fail.
type Machine interface {
	// Files is where records and signs of life are kept.
	Files() vfs.FS
	// OpenDisk opens and locks the backing at path, as OpenBacking says, and
	// creates it if o allows that. On an error nothing is left open, and nothing
	// that was made here is left.
	OpenDisk(path string, o BackingOptions) (Disk, error)
	// Boot is a random id of the present boot, and when it began, by the clock of
	// today. Both are zero where they cannot be told.
	Boot() (id string, at time.Time)
}

// DiskInfo describes an open disk. It does not change while it is open.
type DiskInfo struct {
	Path       string // absolute, without symbolic links
	IsDevice   bool
	Created    bool // it got its size just now, so that it holds nothing
	SizeBytes  int64
	SectorSize int // bytes: the device's, or 512 for a file
}

// Disk is an open and locked file or block device. Its methods may be called
// concurrently. What is written survives the death of the process at once, and a
// power cut after Sync. The errors are those of the kernel's calls, EINTR among
// them where it says so: then nothing was done.
type Disk interface {
	Info() DiskInfo
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// WriteVec writes adjacent parts, the first at off, with one call. It may
	// write less, without an error or with EINTR.
	WriteVec(parts [][]byte, off int64) (int, error)
	// Fallocate is fallocate(2) of a file; it may fail with EINTR.
	Fallocate(mode uint32, e block.Extent) error
	// ZeroOut writes zeroes to a range of a device; it may fail with EINTR.
	ZeroOut(e block.Extent) error
	// Sync makes durable what was written, and the times of it; it may fail with
	// EINTR. After any other error nothing is known about what was written since
	// the last success.
	Sync() error
	// Seek finds data or a hole, as lseek(2) does for SEEK_DATA and SEEK_HOLE.
	Seek(off int64, whence int) (int64, error)
	// Stat tells which file it is, and when it was changed.
	Stat() (DiskStat, error)
	// Remove removes the file that OpenDisk made, if the path still leads to it. It
	// does nothing if OpenDisk found it there.
	Remove() error
	// Close gives up the lock.
	Close() error
}

// DiskStat is what changes when a file is replaced or written to. A device's
// times mean nothing.
type DiskStat struct {
	Inode uint64
	MTime int64 // of the last change of content, ns since 1970 UTC
	CTime int64 // of the last change of any kind, ns since 1970 UTC

	Sized     bool  // SizeBytes is told
	SizeBytes int64 // at present, not as it was when it was opened
	Gone      bool  // no path leads to it any more
	Elsewhere bool  // the path that it was opened by leads to another file, or nowhere
}
