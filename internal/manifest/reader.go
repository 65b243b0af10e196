package manifest

import (
	"encoding/binary"
	"sort"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/segment"
)

// Manifest is an opened manifest: header and directory, no pages yet.
type Manifest struct {
	Header    format.ManifestHeader
	Directory *format.Directory
	name      string
	ring      *crypt.Ring
}

// ReadFunc returns the n bytes from off of a manifest object.
type ReadFunc func(off, n int64) ([]byte, error)

// Open reads and verifies header and directory of a manifest of size bytes.
// Key sets that travel in its directory are added to ring; the one that sealed
// the manifest must be in the ring already, or a *crypt.NoKeySetError is returned.
func Open(ring *crypt.Ring, name string, size int64, read ReadFunc) (*Manifest, error) {
	if size < format.ManifestTailSize {
		return nil, format.Corrupt(name, "it has only %d bytes", size)
	}
	// One read usually has everything but the header.
	guess := min(size, 64<<10)
	end, err := read(size-guess, guess)
	if err != nil {
		return nil, err
	}
	tail, err := format.DecodeManifestTail(name, end[len(end)-format.ManifestTailSize:], size)
	if err != nil {
		return nil, err
	}
	span := int64(tail.DirectoryBytes) + format.ManifestTailSize
	if span > int64(len(end)) {
		if end, err = read(size-span, span); err != nil {
			return nil, err
		}
	}
	sealed := end[int64(len(end))-span : len(end)-format.ManifestTailSize]
	var head []byte
	if int64(len(end)) == size {
		head = end[:tail.HeaderBytes]
	} else if head, err = read(0, int64(tail.HeaderBytes)); err != nil {
		return nil, err
	}
	h, n, err := format.DecodeManifestHeader(name, head)
	if err != nil {
		return nil, err
	}
	if n != len(head) {
		return nil, format.Corrupt(name, "its header has %d bytes, not %d", n, len(head))
	}
	cert, err := crypt.VerifyCertificate(ring.Root(), h.Cert)
	if err != nil {
		return nil, err
	}
	signedBytes := append(append([]byte(nil), head...), sealed...)
	if !crypt.VerifyAgent(cert, crypt.ContextManifest, signedBytes, tail.Signature[:]) {
		return nil, format.Corrupt(name, "its signature is wrong")
	}
	keys, ok := ring.Set(h.KeySet)
	if !ok {
		return nil, &crypt.NoKeySetError{KeySet: h.KeySet}
	}
	sealer := crypt.NewSealer(keys.Index.Derive(h.ID[:], crypt.LabelManifest))
	body, err := sealer.Open(nil, format.DirectoryPart, sealed, partAD(h.ID, format.DirectoryPart))
	if err != nil || len(body) < 5 {
		return nil, format.Corrupt(name, "its directory fails authentication")
	}
	plainLen := binary.LittleEndian.Uint32(body[1:])
	if plainLen > format.MaxDirectoryBytes {
		return nil, format.Corrupt(name, "a directory of %d bytes", plainLen)
	}
	plain, err := segment.Decompress(nil, body[5:], format.Compression(body[0]), int(plainLen))
	if err != nil {
		return nil, format.Corrupt(name, "its directory %v", err)
	}
	dir, err := format.DecodeDirectory(name, plain)
	if err != nil {
		return nil, err
	}
	for _, raw := range dir.KeySets {
		if _, err := ring.Add(raw); err != nil {
			return nil, err
		}
	}
	return &Manifest{Header: h, Directory: dir, name: name, ring: ring}, nil
}

// OpenBytes opens a manifest that is in memory.
func OpenBytes(ring *crypt.Ring, name string, raw []byte) (*Manifest, error) {
	return Open(ring, name, int64(len(raw)), BytesReader(name, raw))
}

// BytesReader reads a manifest that is in memory.
func BytesReader(name string, raw []byte) ReadFunc {
	return func(off, n int64) ([]byte, error) {
		if off < 0 || n < 0 || off > int64(len(raw)) || n > int64(len(raw))-off {
			return nil, format.Corrupt(name, "a part reaches past its end")
		}
		return raw[off : off+n], nil
	}
}

// Pages returns the rows of volume v that touch e, in address order.
func (m *Manifest) Pages(v block.VolumeIndex, e block.Extent) []format.PageRow {
	pages := m.Directory.Pages
	from := sort.Search(len(pages), func(i int) bool {
		return pages[i].Volume > v || (pages[i].Volume == v && pages[i].End > e.Off)
	})
	to := from
	for to < len(pages) && pages[to].Volume == v && pages[to].First < e.End() {
		to++
	}
	return pages[from:to]
}

// OpenPage opens a page from its sealed bytes. The extents are in address
// order.
func (m *Manifest) OpenPage(row format.PageRow, sealed []byte) ([]Extent, error) {
	id, set := row.Home, row.HomeKeySet
	if id.IsZero() {
		id, set = m.Header.ID, m.Header.KeySet
	}
	keys, ok := m.ring.Set(set)
	if !ok {
		return nil, &crypt.NoKeySetError{KeySet: set}
	}
	return openPage(keys, m.name, id, row, sealed)
}

func openPage(keys *crypt.KeySet, name string, id block.ID, row format.PageRow, sealed []byte) ([]Extent, error) {
	sealer := crypt.NewSealer(keys.Index.Derive(id[:], crypt.LabelManifest))
	body, err := sealer.Open(nil, uint64(row.Part), sealed, partAD(id, row.Part))
	if err != nil || len(body) < 1 {
		return nil, &format.CorruptError{Object: name, Offset: row.Offset, Reason: "a page fails authentication"}
	}
	plain, err := segment.Decompress(nil, body[1:], format.Compression(body[0]), row.PlainBytes)
	if err != nil {
		return nil, format.Corrupt(name, "a page %v", err)
	}
	page, err := format.DecodePage(name, plain)
	if err != nil {
		return nil, err
	}
	out := make([]Extent, len(page.Extents))
	for i, x := range page.Extents {
		if x.Off < row.First || x.End() > row.End {
			return nil, format.Corrupt(name, "an extent lies outside its page")
		}
		out[i] = Extent{Extent: x.Extent, Zero: x.Zero}
		if !x.Zero {
			out[i].Segment = page.Segments[x.Segment]
			out[i].Chunk, out[i].Offset, out[i].ChunkID, out[i].ChunkLen = x.Chunk, x.Offset, x.ChunkID, x.ChunkLen
		}
	}
	return out, nil
}
