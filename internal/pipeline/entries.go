package pipeline

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"drc/internal/format"
)

// What is remembered of decided entries: in entries.hash the hash of the value
// of entry n at (n-1)*32, in entries.named one byte at n-1. Both are written
// without a sync. What a power cut leaves as zeroes is not known; whatever else
// it might leave is not the hash of anything.
const (
	entryUnknown = 0
	entryPlain   = 1
	entryNamed   = 2
)

// Note implements uploader.Entries.
func (f groupFiles) Note(n uint64, hash format.Hash, named bool) error {
	if err := f.writeAt("entries.hash", hash[:], int64(n-1)*int64(len(hash))); err != nil {
		return err
	}
	kind := byte(entryPlain)
	if named {
		kind = entryNamed
	}
	return f.writeAt("entries.named", []byte{kind}, int64(n-1))
}

// Entry implements uploader.Entries.
func (f groupFiles) Entry(n uint64) (hash format.Hash, named, ok bool) {
	var kind [1]byte
	if !f.readAt("entries.hash", hash[:], int64(n-1)*int64(len(hash))) || !f.readAt("entries.named", kind[:], int64(n-1)) {
		return format.Hash{}, false, false
	}
	ok = hash != format.Hash{} && (kind[0] == entryPlain || kind[0] == entryNamed)
	return hash, kind[0] == entryNamed, ok
}

func (f groupFiles) writeAt(name string, p []byte, off int64) error {
	path := f.dir.Path(f.path(name)...)
	file, err := f.dir.Files().Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		file, err = f.dir.Files().Create(path)
	}
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	_, err = file.WriteAt(p, off)
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("write state %s: %w", path, err)
	}
	return nil
}

// readAt reports whether all of p could be read.
func (f groupFiles) readAt(name string, p []byte, off int64) bool {
	file, err := f.dir.Files().Open(f.dir.Path(f.path(name)...))
	if err != nil {
		return false
	}
	defer file.Close()
	n, err := file.ReadAt(p, off)
	return n == len(p) && (err == nil || errors.Is(err, io.EOF))
}
