// Package vfs is the small file-system interface through which everything that
// must survive a crash does its local I/O: the buffer, the agent's state, the
// caches. There is the real file system (OS) and one in memory (Mem) that can
// lose power, run full and fail, so that each promise about durability is
// tested against what disks really do.
//
// What is durable is said per method. Nothing else is: a write is durable after
// File.Sync, a new, renamed or removed name after FS.SyncDir of its directory.
package vfs

import (
	"errors"
	"io"
)

// The errors of os and syscall are used as they are, so that callers test with
// errors.Is against fs.ErrNotExist, fs.ErrExist, syscall.ENOSPC and the like.

// FS is a file system. Names are slash-separated paths; an implementation may be
// used from many goroutines at once.
type FS interface {
	// Create makes a new file for reading and writing; it fails with
	// fs.ErrExist if the name is taken. The name is durable only after
	// SyncDir of its directory.
	Create(name string) (File, error)
	// Open opens an existing file for reading and writing.
	Open(name string) (File, error)
	// Remove removes a file or an empty directory; durable after SyncDir.
	Remove(name string) error
	// Rename moves a file inside one directory, replacing what has the new
	// name in one step: after a crash the new name is the old file or the new
	// one, whole. Durable after SyncDir.
	Rename(oldName, newName string) error
	// MkdirAll makes dir and its missing parents. All of them are durable on
	// return.
	MkdirAll(dir string) error
	// ReadDir lists a directory, sorted by name.
	ReadDir(dir string) ([]Entry, error)
	// SyncDir makes the present names in dir durable.
	SyncDir(dir string) error
	// Stat describes a file or directory.
	Stat(name string) (Info, error)
	// StatFS tells about the space of the file system that dir is on.
	StatFS(dir string) (Space, error)
	// Lock takes an exclusive lock on the file name, creating it if need be. It
	// fails with ErrLocked if another process, or this one, holds it. The lock
	// ends with Close or with the process.
	Lock(name string) (io.Closer, error)
}

// File is an open file. ReadAt and WriteAt may be called concurrently.
type File interface {
	io.ReaderAt
	// WriteAt writes all of p or returns an error; after an error any part may
	// have been written. The bytes survive the death of the process at once and
	// a power cut after Sync.
	io.WriterAt
	// WriteVecAt writes the concatenation of bufs at off, as WriteAt does. It
	// keeps neither bufs nor what is in it.
	WriteVecAt(bufs [][]byte, off int64) error
	// Sync makes durable what was written, and the size, but not the name. After
	// a failed Sync nothing is known about any write since the last successful
	// one, and a later success proves nothing: do not sync that file again.
	Sync() error
	// Preallocate makes the file at least sizeBytes long and reserves the space,
	// so that writing below that needs none; it fails with ENOSPC if there is
	// too little. New bytes read as zero.
	Preallocate(sizeBytes int64) error
	// Truncate sets the size.
	Truncate(sizeBytes int64) error
	// Size is the present size in bytes.
	Size() (int64, error)
	// Linked reports whether the file still has a name: one that was removed can
	// be written and synced, and is lost with the process all the same.
	Linked() (bool, error)
	Close() error
}

// Entry is one name in a directory.
type Entry struct {
	Name  string
	IsDir bool
}

// Info describes a file or directory.
type Info struct {
	SizeBytes int64
	IsDir     bool
	// Device names the physical device below, as far as it can be told: two
	// names with different Devices do not fail together.
	Device string
}

// Space is what a file system has room for.
type Space struct {
	TotalBytes int64
	FreeBytes  int64 // for this user
}

// ErrLocked means: another process works with these files. Stop it first.
var ErrLocked = errors.New("in use by another process")
