package capture

import (
	"errors"

	"golang.org/x/sys/unix"
)

// system is the calls that change a backing and may fail in ways that only a
// test can bring about.
type system struct {
	fallocate func(fd int, mode uint32, off, lenBytes int64) error
	fsync     func(fd int) error
	pwritev   func(fd int, parts [][]byte, off int64) (int, error)
}

var kernel = system{fallocate: unix.Fallocate, fsync: unix.Fsync, pwritev: unix.Pwritev}

// uninterrupted calls f again as long as a signal interrupts it, and returns
// any other outcome.
func uninterrupted(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
