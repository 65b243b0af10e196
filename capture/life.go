package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// lifeLease is how far ahead of a change of the backing the sign of life goes.
const lifeLease = time.Second

// life is the sign of life of the process that holds a backing: a time up to
// which a change of the backing may be its own. It is written ahead of each
// change, to the page cache only: it must survive the death of this process,
// and after a reboot the time of boot takes its place. The zero life signs
// nothing.
type life struct {
	mu    sync.Mutex
	f     *os.File
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
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the record folder: %w", err)
	}
	f, err := os.OpenFile(lifeFile(dir, b.path), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open the sign of life of %s: %w", b.path, err)
	}
	b.life.f = f
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
	var raw [8]byte
	binary.LittleEndian.PutUint64(raw[:], uint64(until))
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
