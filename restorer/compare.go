package restorer

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"drc/internal/block"
)

// compareBytes is how much is compared at a time.
const compareBytes = 4 << 20

// Difference is the first place at which something differs from an image.
type Difference struct {
	Off int64
}

func (d *Difference) Error() string { return fmt.Sprintf("byte %d differs", d.Off) }

// Compare reads a whole image and compares it with content of the same size:
// it returns nil, a *Difference, or the error of reading. Content behind the
// image's end is not looked at.
func Compare(ctx context.Context, im block.Device, content io.ReaderAt) error {
	size := im.Geometry().SizeBytes
	a, b := make([]byte, compareBytes), make([]byte, compareBytes)
	for off := int64(0); off < size; off += compareBytes {
		n := min(compareBytes, size-off)
		if err := im.ReadAt(ctx, a[:n], off); err != nil {
			return err
		}
		if k, err := content.ReadAt(b[:n], off); int64(k) < n {
			return fmt.Errorf("read what is to be compared at byte %d: %w", off+int64(k), err)
		}
		if !bytes.Equal(a[:n], b[:n]) {
			for i := range n {
				if a[i] != b[i] {
					return &Difference{Off: off + i}
				}
			}
		}
	}
	return nil
}
