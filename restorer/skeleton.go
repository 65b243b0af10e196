package restorer

import (
	"slices"

	"drc/internal/format"
)

// skeletonOf makes the skeleton of a manifest of size bytes from what was read to open
// it: its header, sealed directory and tail, which is a manifest without its pages, and
// is opened like one. It returns nil if something is missing there.
func skeletonOf(name string, size int64, read []stretch) []byte {
	part := func(from, to int64) []byte {
		i := slices.IndexFunc(read, func(s stretch) bool { return s.off <= from && to <= s.off+int64(len(s.data)) })
		if i < 0 {
			return nil
		}
		return read[i].data[from-read[i].off : to-read[i].off]
	}
	raw := part(size-format.ManifestTailSize, size)
	if raw == nil {
		return nil
	}
	tail, err := format.DecodeManifestTail(name, raw, size)
	if err != nil {
		return nil
	}
	head, end := part(0, int64(tail.HeaderBytes)), part(size-int64(tail.DirectoryBytes)-format.ManifestTailSize, size)
	if head == nil || end == nil {
		return nil
	}
	return slices.Concat(head, end)
}
