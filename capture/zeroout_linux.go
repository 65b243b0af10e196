package capture

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// zeroOut has the kernel write zeroes to a range of a block device.
func zeroOut(f *os.File, e block.Extent) error {
	rng := [2]uint64{uint64(e.Off), uint64(e.Len)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&rng)))
	if errno != 0 {
		return errno
	}
	return nil
}
