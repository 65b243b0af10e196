package format

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"drc/internal/block"
)

// Sizes of the file beside an overlay. See docs/FORMAT-OVERLAY.md.
const (
	// OverlayBlockBytes is the stretch of a volume that one bit stands for.
	OverlayBlockBytes = 4096
	// OverlayHeaderBytes is what the header takes up.
	OverlayHeaderBytes = 4096
	// OverlaySectorBytes is what a state and a page take up each: a disk writes it
	// whole or not at all.
	OverlaySectorBytes = 512
	// OverlayPageWords is how many words of 64 bits each bitmap of a page has.
	OverlayPageWords = 30
	// OverlayPageBlocks is how many blocks a page is about.
	OverlayPageBlocks = OverlayPageWords * 64
	// OverlayDirectoryWords is how many words of 64 bits a page of the directory has.
	OverlayDirectoryWords = 2 * OverlayPageWords
	// OverlayDirectoryPages is how many pages a page of the directory is about.
	OverlayDirectoryPages = OverlayDirectoryWords * 64
	// MaxOverlayBytes bounds the volumes that there can be an overlay of: some bits
	// for each page are kept in memory.
	MaxOverlayBytes = 1 << 50

	overlayStateOffset     = OverlayHeaderBytes
	overlayDirectoryOffset = 8192
	overlayPageHeaderBytes = 32
	overlayVersion         = 1
	magicOverlay           = "DRCO"
	magicOverlayState      = "DRCT"
	magicOverlayPage       = 0x45435244 // "DRCE", little-endian
	magicOverlayDirectory  = 0x44435244 // "DRCD", little-endian
	maxBootBytes           = 64
)

// OverlayHeader says which image a file is an overlay of. It never changes.
type OverlayHeader struct {
	Repo       block.ID
	Group      block.GroupID
	Volume     block.VolumeID
	Branch     block.BranchID
	Entry      uint64 // number of the log entry that the image ends with
	Hash       Hash   // of that entry, or of all that the image is made of
	Seq        block.Seq
	SizeBytes  int64
	SectorSize uint32
	Name       string // of the volume
	Overlay    uint64 // random: tells the pages of this file from those of others
}

// Encode returns the header, OverlayHeaderBytes long.
func (h *OverlayHeader) Encode() []byte {
	var e Encoder
	e.Raw(h.Repo[:])
	e.Raw(h.Group[:])
	e.Raw(h.Volume[:])
	e.Raw(h.Branch[:])
	e.U64(h.Entry)
	e.Raw(h.Hash[:])
	e.U64(uint64(h.Seq))
	e.I64(h.SizeBytes)
	e.U32(h.SectorSize)
	e.String(h.Name)
	e.U64(h.Overlay)
	raw := make([]byte, OverlayHeaderBytes)
	copy(raw, appendChecked(nil, magicOverlay, overlayVersion, e.Buf))
	return raw
}

// Validate says what is wrong with the fields of a header, if anything.
func (h *OverlayHeader) Validate() error {
	switch {
	case h.SectorSize != 512 && h.SectorSize != 4096:
		return fmt.Errorf("sectors of %d bytes are neither of 512 nor of 4096", h.SectorSize)
	case h.SizeBytes <= 0 || h.SizeBytes > MaxOverlayBytes:
		return fmt.Errorf("a volume of %d bytes cannot have an overlay: the limits are 1 and %d", h.SizeBytes, int64(MaxOverlayBytes))
	case h.SizeBytes%int64(h.SectorSize) != 0:
		return fmt.Errorf("%d bytes are no whole number of sectors of %d", h.SizeBytes, h.SectorSize)
	case len(h.Name) > MaxNameBytes:
		return fmt.Errorf("the volume's name has %d bytes; the limit is %d", len(h.Name), MaxNameBytes)
	}
	return nil
}

// DecodeOverlayHeader reads a header.
func DecodeOverlayHeader(name string, raw []byte) (*OverlayHeader, error) {
	d, err := openPadded(name, magicOverlay, OverlayHeaderBytes, raw)
	if err != nil {
		return nil, err
	}
	h := &OverlayHeader{
		Repo: d.ID(), Group: block.GroupID(d.ID()), Volume: block.VolumeID(d.ID()), Branch: block.BranchID(d.ID()),
		Entry: d.U64(), Hash: d.Hash(), Seq: block.Seq(d.U64()), SizeBytes: d.I64(), SectorSize: d.U32(),
		Name: d.String(MaxNameBytes), Overlay: d.U64(),
	}
	if d.Err() == nil {
		if err := h.Validate(); err != nil {
			d.Fail("%v", err)
		}
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return h, nil
}

// openPadded returns a decoder of the body of a checked structure that takes up
// sizeBytes, with zeroes behind it.
func openPadded(name, magic string, sizeBytes int, raw []byte) (*Decoder, error) {
	if len(raw) != sizeBytes {
		return nil, Corrupt(name, "it has %d bytes, not %d", len(raw), sizeBytes)
	}
	if string(raw[:4]) == magic && raw[4] != overlayVersion {
		return nil, fmt.Errorf("%s has version %d, and this DRC knows version %d: use the DRC that made it, or a newer one", name, raw[4], overlayVersion)
	}
	var rest []byte
	d, err := openChecked(name, magic, overlayVersion, raw, &rest)
	if err != nil {
		return nil, err
	}
	if !allZero(rest) {
		return nil, Corrupt(name, "bytes follow it that are not zero")
	}
	return d, nil
}

func allZero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// OverlayPhase is how far an overlay has come.
type OverlayPhase uint8

// The phases, each of which follows the one before.
const (
	OverlayMaking   OverlayPhase = 1 // the file for the data may not be there yet
	OverlayPartial  OverlayPhase = 2 // the data is in part in the file, in part in the base
	OverlayComplete OverlayPhase = 3 // all data is in the file, durably
)

// OverlayState says how far an overlay is, and which bits count.
type OverlayState struct {
	Phase      OverlayPhase
	Boot       string // of the machine, when the activation began; nothing: bits of Written count no more
	Activation uint64 // random: a page's bits of Written count if they are of it
}

// Encode returns the state, OverlaySectorBytes long.
func (s *OverlayState) Encode() []byte {
	var e Encoder
	e.U8(uint8(s.Phase))
	e.String(s.Boot)
	e.U64(s.Activation)
	raw := make([]byte, OverlaySectorBytes)
	copy(raw, appendChecked(nil, magicOverlayState, overlayVersion, e.Buf))
	return raw
}

// DecodeOverlayState reads a state.
func DecodeOverlayState(name string, raw []byte) (*OverlayState, error) {
	d, err := openPadded(name, magicOverlayState, OverlaySectorBytes, raw)
	if err != nil {
		return nil, err
	}
	s := &OverlayState{Phase: OverlayPhase(d.U8()), Boot: d.String(maxBootBytes), Activation: d.U64()}
	if d.Err() == nil && (s.Phase < OverlayMaking || s.Phase > OverlayComplete) {
		d.Fail("phase %d is unknown", s.Phase)
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return s, nil
}

// OverlayPage is the two bitmaps of the blocks of one page. Every bit of Durable
// is in Written too.
type OverlayPage struct {
	Activation uint64
	Written    [OverlayPageWords]uint64 // the block's content is in the file
	Durable    [OverlayPageWords]uint64 // and was synced there, once
}

// Put writes the page, the so-manieth of an overlay, to raw, OverlaySectorBytes long.
func (p *OverlayPage) Put(raw []byte, overlay, number uint64) {
	at := putOverlayPage(raw, magicOverlayPage, overlay, number, p.Activation)
	for i, w := range p.Written {
		binary.LittleEndian.PutUint64(at[8*i:], w)
	}
	at = at[8*OverlayPageWords:]
	for i, w := range p.Durable {
		binary.LittleEndian.PutUint64(at[8*i:], w)
	}
	sealOverlayPage(raw)
}

// ParseOverlayPage reads the so-manieth page of an overlay. made is false if it was
// never written: then it has no bits.
func ParseOverlayPage(name string, raw []byte, overlay, number uint64) (p OverlayPage, made bool, err error) {
	if len(raw) == OverlaySectorBytes && allZero(raw) {
		return OverlayPage{}, false, nil
	}
	at, err := openOverlayPage(name, raw, magicOverlayPage, overlay, number)
	if err != nil {
		return OverlayPage{}, false, err
	}
	p.Activation = binary.LittleEndian.Uint64(raw[24:])
	for i := range p.Written {
		p.Written[i] = binary.LittleEndian.Uint64(at[8*i:])
		p.Durable[i] = binary.LittleEndian.Uint64(at[8*(OverlayPageWords+i):])
		if p.Durable[i]&^p.Written[i] != 0 {
			return OverlayPage{}, false, Corrupt(name, "page %d calls blocks durable that it does not call written", number)
		}
	}
	return p, true, nil
}

// OverlayDirectory is a page of the directory: which pages were written, durably.
type OverlayDirectory struct {
	Made [OverlayDirectoryWords]uint64
}

// Put writes the so-manieth page of an overlay's directory to raw,
// OverlaySectorBytes long.
func (p *OverlayDirectory) Put(raw []byte, overlay, number uint64) {
	at := putOverlayPage(raw, magicOverlayDirectory, overlay, number, 0)
	for i, w := range p.Made {
		binary.LittleEndian.PutUint64(at[8*i:], w)
	}
	sealOverlayPage(raw)
}

// ParseOverlayDirectory reads the so-manieth page of an overlay's directory.
func ParseOverlayDirectory(name string, raw []byte, overlay, number uint64) (p OverlayDirectory, err error) {
	at, err := openOverlayPage(name, raw, magicOverlayDirectory, overlay, number)
	if err != nil {
		return OverlayDirectory{}, err
	}
	if binary.LittleEndian.Uint64(raw[24:]) != 0 {
		return OverlayDirectory{}, Corrupt(name, "reserved bytes of page %d are not zero", number)
	}
	for i := range p.Made {
		p.Made[i] = binary.LittleEndian.Uint64(at[8*i:])
	}
	return p, nil
}

// putOverlayPage writes what both kinds of pages begin with and returns where
// their bits go.
func putOverlayPage(raw []byte, magic uint32, overlay, number, activation uint64) (bits []byte) {
	binary.LittleEndian.PutUint32(raw, magic)
	binary.LittleEndian.PutUint64(raw[8:], overlay)
	binary.LittleEndian.PutUint64(raw[16:], number)
	binary.LittleEndian.PutUint64(raw[24:], activation)
	return raw[overlayPageHeaderBytes:OverlaySectorBytes]
}

func sealOverlayPage(raw []byte) {
	binary.LittleEndian.PutUint32(raw[4:], crc32.Checksum(raw[8:OverlaySectorBytes], Castagnoli))
}

// openOverlayPage checks what both kinds of pages begin with and returns their
// bits.
func openOverlayPage(name string, raw []byte, magic uint32, overlay, number uint64) (bits []byte, err error) {
	if len(raw) != OverlaySectorBytes {
		return nil, Corrupt(name, "a page has %d bytes, not %d", len(raw), OverlaySectorBytes)
	}
	if binary.LittleEndian.Uint32(raw) != magic || binary.LittleEndian.Uint32(raw[4:]) != crc32.Checksum(raw[8:], Castagnoli) {
		return nil, Corrupt(name, "the checksum of page %d is wrong", number)
	}
	if o := binary.LittleEndian.Uint64(raw[8:]); o != overlay {
		return nil, Corrupt(name, "page %d is of another overlay", number)
	}
	if n := binary.LittleEndian.Uint64(raw[16:]); n != number {
		return nil, Corrupt(name, "page %d stands where page %d belongs", n, number)
	}
	return raw[overlayPageHeaderBytes:], nil
}

// OverlayLayout says where in the file beside an overlay things are.
type OverlayLayout struct {
	Blocks         int64 // of the volume; the last one may be shorter than the others
	Pages          int64
	DirectoryPages int64
}

// LayOutOverlay returns the layout for a volume of sizeBytes.
func LayOutOverlay(sizeBytes int64) OverlayLayout {
	l := OverlayLayout{Blocks: (sizeBytes + OverlayBlockBytes - 1) / OverlayBlockBytes}
	l.Pages = (l.Blocks + OverlayPageBlocks - 1) / OverlayPageBlocks
	l.DirectoryPages = (l.Pages + OverlayDirectoryPages - 1) / OverlayDirectoryPages
	return l
}

// StateOffset is where the state is.
func (l OverlayLayout) StateOffset() int64 { return overlayStateOffset }

// DirectoryOffset is where page number n of the directory is.
func (l OverlayLayout) DirectoryOffset(n int64) int64 {
	return overlayDirectoryOffset + n*OverlaySectorBytes
}

// PageOffset is where page number n is.
func (l OverlayLayout) PageOffset(n int64) int64 {
	return (l.DirectoryOffset(l.DirectoryPages)+4095)/4096*4096 + n*OverlaySectorBytes
}

// SizeBytes is the size of the file.
func (l OverlayLayout) SizeBytes() int64 { return l.PageOffset(l.Pages) }

// PageBlocks is how many blocks page number n is about.
func (l OverlayLayout) PageBlocks(n int64) int {
	return int(min(OverlayPageBlocks, l.Blocks-n*OverlayPageBlocks))
}
