package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"drc/internal/vfs"
)

// lifeBytes is the size of the file: the time, little endian, and its CRC-32C.
const lifeBytes = 8 + 4

var lifeTable = crc32.MakeTable(crc32.Castagnoli)

// lifeFile holds the last sign of life: a time, nanoseconds since 1970. It is
// written without a sync, since it must survive only this process.
func lifeFile(dir, path string) string {
	return strings.TrimSuffix(recordFile(dir, path), ".json") + ".life"
}

// readLife returns a sign of life, 0 if there is none. One that is damaged says
// nothing. That somebody has written to the backing as well is much less likely
// then than that it was us, and to take it for ours loses nothing that was
// acknowledged: it is later than any time.
func readLife(files vfs.FS, dir, path string) int64 {
	f, err := files.Open(lifeFile(dir, path))
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	if err != nil {
		return math.MaxInt64
	}
	defer f.Close()
	var raw [lifeBytes]byte
	if n, _ := f.ReadAt(raw[:], 0); n < len(raw) || binary.LittleEndian.Uint32(raw[8:]) != crc32.Checksum(raw[:8], lifeTable) {
		return math.MaxInt64
	}
	return int64(binary.LittleEndian.Uint64(raw[:]))
}

// lifeLease is how far ahead of a change of the backing the sign of life goes.
const lifeLease = time.Second

// life is the sign of life of the process that holds a backing: a time up to
// which a change of the backing may be its own. It is written ahead of each
// change, to the page cache only: it must survive the death of this process,
// and after a reboot the time of boot takes its place. The zero life signs
// nothing.
type life struct {
	mu    sync.Mutex
	f     vfs.File
	until int64 // ns since 1970 UTC
}

// SignLife begins to keep the sign of life of b in the record folder. It must
// be called before the backing is changed.
func (b *Backing) SignLife(dir string) error {
	b.life.mu.Lock()
	defer b.life.mu.Unlock()
	if b.life.f != nil {
		return nil
	}
	files, name := b.machine.Files(), lifeFile(dir, b.path)
	if err := files.MkdirAll(dir); err != nil {
		return fmt.Errorf("make the record folder: %w", err)
	}
	f, err := files.Open(name)
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		f, err = files.Create(name)
	}
	if err != nil {
		return fmt.Errorf("open the sign of life of %s: %w", b.path, err)
	}
	b.life.f = f
	if made {
		return b.life.set(0)
	}
	return nil
}

// extend sees to it that a change made now is covered.
func (l *life) extend() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.f == nil || l.until >= now.Add(lifeLease/2).UnixNano() {
		return nil
	}
	return l.set(now.Add(lifeLease).UnixNano())
}

// exact takes the lease back to until. The caller sees to it that nobody
// changes the backing meanwhile.
func (l *life) exact(until int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil || l.until == until {
		return nil
	}
	return l.set(until)
}

func (l *life) set(until int64) error {
	var raw [lifeBytes]byte
	binary.LittleEndian.PutUint64(raw[:], uint64(until))
	binary.LittleEndian.PutUint32(raw[8:], crc32.Checksum(raw[:8], lifeTable))
	if _, err := l.f.WriteAt(raw[:], 0); err != nil {
		return fmt.Errorf("write the sign of life: %w", err)
	}
	l.until = until
	return nil
}

func (l *life) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
