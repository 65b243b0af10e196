package vfs

import "errors"

// ErrNoHoles means: this file system cannot do that to a file. Nothing was done.
var ErrNoHoles = errors.New("not possible on this file system")

// SparseFile is a File that holds the raw content of a volume: a few pieces of
// data in a large file of fixed size, with holes between them that read as
// zeroes. The files of OS and Mem are such files.
//
// Offsets and lengths are in bytes, and need no alignment. Changes are durable
// after Sync, as writes are; none of them changes the size. They may be called
// concurrently with each other and with reads and writes.
type SparseFile interface {
	File
	// TryLock takes an exclusive lock on the file itself, whatever it is called
	// later. It fails with ErrLocked if another open file, of this process or
	// another one, has it. The lock ends with Close or with the process.
	TryLock() error
	// PunchHole makes n bytes from off read as zeroes and gives up their space. It
	// fails with ErrNoHoles where it cannot be done.
	PunchHole(off, n int64) error
	// ZeroRange makes n bytes from off read as zeroes and keeps space for them. It
	// fails with ErrNoHoles where it cannot be done, and with ENOSPC; the content is
	// then as it was.
	ZeroRange(off, n int64) error
	// Reserve sees to it that writes of n bytes from off find space; the content
	// stays. It fails with ErrNoHoles where it cannot be done, and with ENOSPC.
	Reserve(off, n int64) error
	// NextData is the first offset from off on that may hold data, or the size if
	// only a hole is left. Where it cannot be told, all is data.
	NextData(off int64) (int64, error)
	// NextHole is the first offset from off on that is in a hole; the end of the
	// file is one.
	NextHole(off int64) (int64, error)
}
