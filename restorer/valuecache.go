package restorer

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"drc/internal/block"
	"drc/internal/format"
)

// valueRecordBytes is what stands before each value in the cache's file: its
// length (u32, little-endian) and its SHA-256.
const valueRecordBytes = 4 + 32

// valueCache keeps log values on the local disk in one file, one record after
// the other. Each is checked against its hash whenever it is read, and what
// follows a record that is no good is cut off: nothing here needs to be
// durable or right.
type valueCache struct {
	name string
	mu   sync.Mutex
	file *os.File
	at   map[format.Hash]valuePlace
	end  int64
}

type valuePlace struct {
	off int64
	len int
}

// openValueCache opens the cache of a group's values. It returns nil if there
// is none to be had: another process is using it, or the directory cannot be
// written.
func openValueCache(cfg Config, group block.GroupID) *valueCache {
	if cfg.CacheDir == "" {
		return nil
	}
	dir := filepath.Join(cfg.CacheDir, cfg.Repo.ID.String())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		cfg.Logger.Warn("there is no local cache", "error", err)
		return nil
	}
	name := filepath.Join(dir, group.String()+".values")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		cfg.Logger.Warn("there is no local cache", "error", err)
		return nil
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close() // in use: this process goes without
		return nil
	}
	c := &valueCache{name: name, file: f, at: map[format.Hash]valuePlace{}}
	c.load()
	return c
}

// load finds the records by their heads; their content is checked when it is
// used.
func (c *valueCache) load() {
	info, err := c.file.Stat()
	if err != nil {
		return
	}
	var head [valueRecordBytes]byte
	for c.end+valueRecordBytes <= info.Size() {
		if _, err := c.file.ReadAt(head[:], c.end); err != nil {
			break
		}
		n := int64(binary.LittleEndian.Uint32(head[:]))
		if n == 0 || n > format.MaxValueBytes || c.end+valueRecordBytes+n > info.Size() {
			break
		}
		c.at[format.Hash(head[4:])] = valuePlace{c.end + valueRecordBytes, int(n)}
		c.end += valueRecordBytes + n
	}
}

func (c *valueCache) get(hash format.Hash) ([]byte, bool) {
	c.mu.Lock()
	p, ok := c.at[hash]
	c.mu.Unlock()
	if !ok {
		return nil, false
	}
	raw := make([]byte, p.len)
	if _, err := c.file.ReadAt(raw, p.off); err == nil && format.HashOf(raw) == hash {
		return raw, true
	}
	c.mu.Lock()
	delete(c.at, hash)
	c.mu.Unlock()
	return nil, false
}

func (c *valueCache) put(hash format.Hash, raw []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.at[hash]; ok {
		return
	}
	record := binary.LittleEndian.AppendUint32(make([]byte, 0, valueRecordBytes+len(raw)), uint32(len(raw)))
	record = append(append(record, hash[:]...), raw...)
	if _, err := c.file.WriteAt(record, c.end); err != nil {
		return // the disk is full: what is not cached is fetched
	}
	c.at[hash] = valuePlace{c.end + valueRecordBytes, len(raw)}
	c.end += int64(len(record))
}

func (c *valueCache) close() error { return c.file.Close() }
