package format

import (
	"encoding/binary"
	"hash/crc32"

	"drc/internal/block"
)

// Sizes of the file of a group's bitmap. See docs/FORMAT-BUFFER.md, "Bitmap".
const (
	// BitmapPageBytes is what a header slot and a page take up each.
	BitmapPageBytes = 4096
	// BitmapSlots is how many header slots the file begins with.
	BitmapSlots = 2
	// BitmapRegionBytes is the stretch of a volume that one bit stands for: 2 MiB
	// of bits a TiB.
	BitmapRegionBytes = 64 << 10
	// BitmapPageRegions is how many bits a page has.
	BitmapPageRegions = (BitmapPageBytes - bitmapPageHeaderBytes) * 8
	// MaxBitmapVolumes bounds the volumes of one bitmap: its header is one page.
	MaxBitmapVolumes = 256

	bitmapPageHeaderBytes = 32
	magicBitmap           = "DRCG"
	magicBitmapPage       = 0x51435244 // "DRCQ", little-endian
)

// BitmapHeader says whether a group's bitmap counts, and where each volume's
// bits are.
type BitmapHeader struct {
	Repo       block.ID
	Group      block.GroupID
	Serial     uint64 // grows with each header; of all slots and disks the highest counts
	Activation uint64 // random; a page of another activation has no bits
	Active     bool   // the group is in bitmap mode
	Since      int64  // when the oldest write was captured whose history is not known, ns since 1970 UTC
	Volumes    []BitmapVolume
}

// BitmapVolume is one volume of a bitmap. Its pages follow those of the volume
// before.
type BitmapVolume struct {
	Index     block.VolumeIndex
	SizeBytes int64
}

// Pages is how many pages a volume of the size has.
func (v BitmapVolume) Pages() int64 {
	const covered = BitmapPageRegions * BitmapRegionBytes
	return (v.SizeBytes + covered - 1) / covered
}

// Encode returns the header's slot, BitmapPageBytes long.
func (h *BitmapHeader) Encode() []byte {
	var e Encoder
	e.Raw(h.Repo[:])
	e.Raw(h.Group[:])
	e.U64(h.Serial)
	e.U64(h.Activation)
	e.U8(flag(h.Active, 1))
	e.I64(h.Since)
	e.Uvarint(uint64(len(h.Volumes)))
	for _, v := range h.Volumes {
		e.U16(uint16(v.Index))
		e.I64(v.SizeBytes)
	}
	raw := make([]byte, BitmapPageBytes)
	copy(raw, appendChecked(nil, magicBitmap, 1, e.Buf))
	return raw
}

// DecodeBitmapHeader reads a header's slot.
func DecodeBitmapHeader(name string, raw []byte) (*BitmapHeader, error) {
	if len(raw) != BitmapPageBytes {
		return nil, Corrupt(name, "a header of a bitmap has %d bytes, not %d", BitmapPageBytes, len(raw))
	}
	var rest []byte
	d, err := openChecked(name, magicBitmap, 1, raw, &rest)
	if err != nil {
		return nil, err
	}
	for _, c := range rest {
		if c != 0 {
			return nil, Corrupt(name, "bytes follow the header")
		}
	}
	h := &BitmapHeader{Repo: d.ID(), Group: block.GroupID(d.ID()), Serial: d.U64(), Activation: d.U64()}
	h.Active = d.flags(1)&1 != 0
	h.Since = d.I64()
	n := d.Len(MaxBitmapVolumes, 10)
	for range n {
		v := BitmapVolume{Index: block.VolumeIndex(d.U16()), SizeBytes: d.I64()}
		if d.Err() == nil && (v.SizeBytes <= 0 || v.SizeBytes > MaxVolumeBytes) {
			d.Fail("volume %d has %d bytes", v.Index, v.SizeBytes)
		}
		for _, o := range h.Volumes {
			if o.Index == v.Index {
				d.Fail("volume %d is listed twice", v.Index)
			}
		}
		h.Volumes = append(h.Volumes, v)
	}
	if d.Err() == nil && h.Serial == 0 {
		d.Fail("serial 0 makes no sense")
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return h, nil
}

// PutBitmapPage makes p, BitmapPageBytes long, page number of an activation; its
// bits, BitmapPageBits(p), are in place.
func PutBitmapPage(p []byte, activation, number uint64) {
	clear(p[:bitmapPageHeaderBytes])
	binary.LittleEndian.PutUint32(p, magicBitmapPage)
	binary.LittleEndian.PutUint64(p[8:], activation)
	binary.LittleEndian.PutUint64(p[16:], number)
	binary.LittleEndian.PutUint32(p[4:], crc32.Checksum(p[8:BitmapPageBytes], Castagnoli))
}

// BitmapPageBits are the bits of a page, the lowest of the first byte first.
func BitmapPageBits(p []byte) []byte { return p[bitmapPageHeaderBytes:BitmapPageBytes] }

// CheckBitmapPage says what a page as it was read means for an activation: that
// its bits count, or that it has none because it was not written since. An error
// means that a write of it was torn or that it has rotted: all of its bits must
// be taken for set.
func CheckBitmapPage(name string, p []byte, activation, number uint64) (counts bool, err error) {
	if len(p) != BitmapPageBytes {
		return false, Corrupt(name, "a page of a bitmap has %d bytes, not %d", BitmapPageBytes, len(p))
	}
	zero := true
	for _, c := range p {
		if c != 0 {
			zero = false
			break
		}
	}
	if zero {
		return false, nil // made and never written
	}
	if binary.LittleEndian.Uint32(p) != magicBitmapPage || binary.LittleEndian.Uint32(p[4:]) != crc32.Checksum(p[8:], Castagnoli) {
		return false, Corrupt(name, "the checksum of page %d is wrong", number)
	}
	if n := binary.LittleEndian.Uint64(p[16:]); n != number {
		return false, Corrupt(name, "page %d stands where page %d belongs", n, number)
	}
	return binary.LittleEndian.Uint64(p[8:]) == activation, nil
}
