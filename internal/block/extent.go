package block

import "fmt"

// Extent is a byte range [Off, Off+Len) of a volume. Len is never negative; an
// Extent of length zero is empty and overlaps nothing.
type Extent struct {
	Off int64 // byte offset of the first byte
	Len int64 // length in bytes
}

// End is the offset just behind the last byte.
func (e Extent) End() int64 { return e.Off + e.Len }

// Empty reports whether e covers no byte.
func (e Extent) Empty() bool { return e.Len <= 0 }

// Overlaps reports whether e and o share at least one byte.
func (e Extent) Overlaps(o Extent) bool {
	return !e.Empty() && !o.Empty() && e.Off < o.End() && o.Off < e.End()
}

// Contains reports whether every byte of o is in e.
func (e Extent) Contains(o Extent) bool { return e.Off <= o.Off && o.End() <= e.End() }

// Intersect returns what e and o share, or an empty Extent.
func (e Extent) Intersect(o Extent) Extent {
	off, end := max(e.Off, o.Off), min(e.End(), o.End())
	if end <= off {
		return Extent{}
	}
	return Extent{Off: off, Len: end - off}
}

func (e Extent) String() string { return fmt.Sprintf("%d+%d", e.Off, e.Len) }
