package format

import (
	"encoding/binary"
	"hash/crc32"
	"slices"

	"drc/internal/block"
)

// Sizes of the journal's structures, bytes. See docs/FORMAT-BUFFER.md.
const (
	// JournalBlockBytes is what the header of a journal file takes up, and the
	// boundary at which records go on after a sync.
	JournalBlockBytes = 4096
	// JournalAlignBytes is the boundary of every record.
	JournalAlignBytes = 64
	// JournalRecordHeaderBytes is the fixed part of a record.
	JournalRecordHeaderBytes = 64
	// JournalFileHeaderBytes is the encoded header of a journal file.
	JournalFileHeaderBytes = 144
	// MaxJournalPayloadBytes bounds the data of one write.
	MaxJournalPayloadBytes = 64 << 20
	// MaxJournalFileBytes bounds a journal file.
	MaxJournalFileBytes = 1 << 40
	// JournalMarkBytes is the length of a journal's mark.
	JournalMarkBytes = 80
	// JournalMarkSlots is how many slots the file of a journal's mark has, of
	// JournalMarkSlotBytes each: a mark, and zeroes behind it. The second one is
	// of zeroes only until it is needed.
	JournalMarkSlots     = 2
	JournalMarkSlotBytes = 4096

	magicJournalFile   = "DRCJ"
	magicJournalMark   = "DRCN"
	magicJournalRecord = 0x57435244 // "DRCW", little-endian
)

// JournalFile is the header of a journal file: one use of it. The copies of a
// file on different disks have the same header.
type JournalFile struct {
	Repo        block.ID
	Group       block.GroupID
	Number      uint64    // of this use; grows by one a use
	Incarnation uint64    // random, in every record of this use
	Oldest      uint64    // number of the oldest file that was needed then
	First       block.Seq // of the first record
	Prev        uint32    // checksum of record First-1
	Durable     block.Seq // known durable when the header was written
	Released    block.Seq // needed by nobody when the header was written
	SizeBytes   int64     // of the file
}

// Encode returns JournalFileHeaderBytes bytes.
func (h *JournalFile) Encode() []byte {
	var e Encoder
	e.Raw(h.Repo[:])
	e.Raw(h.Group[:])
	e.U64(h.Number)
	e.U64(h.Incarnation)
	e.U64(h.Oldest)
	e.U64(uint64(h.First))
	e.U32(h.Prev)
	e.U32(0)
	e.U64(uint64(h.Durable))
	e.U64(uint64(h.Released))
	e.I64(h.SizeBytes)
	e.Raw(make([]byte, JournalFileHeaderBytes-checkedHeaderBytes-len(e.Buf)))
	return appendChecked(nil, magicJournalFile, 1, e.Buf)
}

// Checksum is what the first record of the file chains to.
func (h *JournalFile) Checksum() uint32 {
	return binary.LittleEndian.Uint32(h.Encode()[12:])
}

// DecodeJournalFile reads the header at the start of raw.
func DecodeJournalFile(name string, raw []byte) (*JournalFile, error) {
	if len(raw) > JournalFileHeaderBytes {
		raw = raw[:JournalFileHeaderBytes]
	}
	d, err := openChecked(name, magicJournalFile, 1, raw, nil)
	if err != nil {
		return nil, err
	}
	h := &JournalFile{Repo: d.ID(), Group: block.GroupID(d.ID()), Number: d.U64(), Incarnation: d.U64(),
		Oldest: d.U64(), First: block.Seq(d.U64()), Prev: d.U32()}
	d.zeroes(4)
	h.Durable, h.Released, h.SizeBytes = block.Seq(d.U64()), block.Seq(d.U64()), d.I64()
	d.zeroes(JournalFileHeaderBytes - checkedHeaderBytes - d.Offset())
	switch {
	case d.Err() != nil:
	case h.Number == 0 || h.Oldest == 0 || h.Oldest > h.Number:
		d.Fail("file numbers %d and %d make no sense", h.Number, h.Oldest)
	case h.First == 0 || h.Durable >= h.First || h.Released > h.Durable:
		d.Fail("sequence numbers %d, %d, %d make no sense", h.First, h.Durable, h.Released)
	case h.SizeBytes < JournalBlockBytes || h.SizeBytes > MaxJournalFileBytes || h.SizeBytes%JournalBlockBytes != 0:
		d.Fail("file size %d makes no sense", h.SizeBytes)
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return h, nil
}

// zeroes reads n bytes that must be zero.
func (d *Decoder) zeroes(n int) {
	for _, b := range d.Raw(n) {
		if b != 0 {
			d.Fail("reserved bytes are not zero")
			return
		}
	}
}

// JournalRecord is the header of one write in a journal file.
type JournalRecord struct {
	Checksum    uint32 // over the rest of the header and the payload
	Prev        uint32 // checksum of the record before, of the file's header for the first
	Incarnation uint64 // of the file
	Seq         block.Seq
	Time        int64
	Volume      block.VolumeIndex
	Kind        block.Kind
	Extent      block.Extent
	Durable     block.Seq // known durable when the record was written
}

// PayloadBytes is the number of bytes of payload behind the header.
func (r *JournalRecord) PayloadBytes() int64 {
	if r.Kind == block.KindData {
		return r.Extent.Len
	}
	return 0
}

// SizeBytes is what the record takes up in the file, with its padding.
func (r *JournalRecord) SizeBytes() int64 { return JournalRecordBytes(r.PayloadBytes()) }

// JournalRecordBytes is what a record with a payload takes up in a file.
func JournalRecordBytes(payloadBytes int64) int64 {
	const a = JournalAlignBytes
	return JournalRecordHeaderBytes + (payloadBytes+a-1)/a*a
}

// Put writes the header into dst, which has JournalRecordHeaderBytes, computes
// the checksum over it and the payload, and keeps that in r.
func (r *JournalRecord) Put(dst, payload []byte) {
	_ = dst[JournalRecordHeaderBytes-1]
	le := binary.LittleEndian
	le.PutUint32(dst[0:], magicJournalRecord)
	le.PutUint32(dst[8:], r.Prev)
	le.PutUint16(dst[12:], uint16(r.Volume))
	dst[14], dst[15] = uint8(r.Kind), 0
	le.PutUint64(dst[16:], r.Incarnation)
	le.PutUint64(dst[24:], uint64(r.Seq))
	le.PutUint64(dst[32:], uint64(r.Time))
	le.PutUint64(dst[40:], uint64(r.Extent.Off))
	le.PutUint64(dst[48:], uint64(r.Extent.Len))
	le.PutUint64(dst[56:], uint64(r.Durable))
	r.Checksum = journalChecksum(dst, payload)
	le.PutUint32(dst[4:], r.Checksum)
}

func journalChecksum(header, payload []byte) uint32 {
	sum := crc32.Update(0, Castagnoli, header[8:JournalRecordHeaderBytes])
	return crc32.Update(sum, Castagnoli, payload)
}

// ParseJournalRecord reads the header at the start of raw and reports whether
// it may be one of the given incarnation. Its checksum is not yet checked: that
// takes the payload, see Check. It allocates nothing, because recovery asks it
// about bytes that are mostly none.
func ParseJournalRecord(raw []byte, incarnation uint64) (r JournalRecord, ok bool) {
	if len(raw) < JournalRecordHeaderBytes {
		return r, false
	}
	le := binary.LittleEndian
	if le.Uint32(raw) != magicJournalRecord || le.Uint64(raw[16:]) != incarnation || raw[15] != 0 {
		return r, false
	}
	r = JournalRecord{
		Checksum: le.Uint32(raw[4:]), Prev: le.Uint32(raw[8:]), Incarnation: incarnation,
		Seq: block.Seq(le.Uint64(raw[24:])), Time: int64(le.Uint64(raw[32:])),
		Volume: block.VolumeIndex(le.Uint16(raw[12:])), Kind: block.Kind(raw[14]),
		Extent:  block.Extent{Off: int64(le.Uint64(raw[40:])), Len: int64(le.Uint64(raw[48:]))},
		Durable: block.Seq(le.Uint64(raw[56:])),
	}
	switch {
	case r.Kind != block.KindData && r.Kind != block.KindZero:
		return r, false
	case r.Extent.Off < 0 || r.Extent.Len < 0 || r.Extent.End() < 0:
		return r, false
	case r.Kind == block.KindData && r.Extent.Len > MaxJournalPayloadBytes:
		return r, false
	case r.Seq == 0 || r.Durable >= r.Seq:
		return r, false
	}
	return r, true
}

// Check reports whether the checksum fits header and payload.
func (r *JournalRecord) Check(header, payload []byte) bool {
	return int64(len(payload)) == r.PayloadBytes() && journalChecksum(header, payload) == r.Checksum
}

// JournalMark is what a journal knows beside its files: from where on it is
// needed, and, after a clean stop, how far it is durable.
type JournalMark struct {
	Repo     block.ID
	Group    block.GroupID
	Serial   uint64    // grows with each mark; the highest of all disks counts
	Oldest   uint64    // files with a lower number are free
	Released block.Seq // records up to here are needed by nobody
	Durable  block.Seq // records up to here were durable
}

// Encode returns the mark without the rest of its slot.
func (m *JournalMark) Encode() []byte {
	var e Encoder
	e.Raw(m.Repo[:])
	e.Raw(m.Group[:])
	e.U64(m.Serial)
	e.U64(m.Oldest)
	e.U64(uint64(m.Released))
	e.U64(uint64(m.Durable))
	return appendChecked(nil, magicJournalMark, 1, e.Buf)
}

// DecodeJournalMarks returns the newest mark in a mark's file, and its slot. A slot that is damaged, as a torn write leaves it, is passed
// over if the other one is whole, and damaged says so. An older file that is one mark
// and nothing else is in slot -1.
func DecodeJournalMarks(name string, raw []byte) (newest *JournalMark, slot int, damaged error) {
	if len(raw) == JournalMarkBytes {
		m, err := DecodeJournalMark(name, raw)
		return m, -1, err
	}
	if len(raw) != JournalMarkSlots*JournalMarkSlotBytes {
		return nil, -1, Corrupt(name, "the marks of a journal have %d bytes, not %d", JournalMarkSlots*JournalMarkSlotBytes, len(raw))
	}
	for i := range JournalMarkSlots {
		p := raw[i*JournalMarkSlotBytes:][:JournalMarkSlotBytes]
		if !slices.ContainsFunc(p, func(c byte) bool { return c != 0 }) {
			continue
		}
		m, err := DecodeJournalMark(name, p[:JournalMarkBytes])
		if err == nil && slices.ContainsFunc(p[JournalMarkBytes:], func(c byte) bool { return c != 0 }) {
			err = Corrupt(name, "bytes follow mark %d", i)
		}
		if err != nil {
			damaged = err
		} else if newest == nil || m.Serial > newest.Serial {
			newest, slot = m, i
		}
	}
	if newest == nil && damaged == nil {
		damaged = Corrupt(name, "no mark is in it")
	}
	return newest, slot, damaged
}

// DecodeJournalMark reads one mark.
func DecodeJournalMark(name string, raw []byte) (*JournalMark, error) {
	d, err := openChecked(name, magicJournalMark, 1, raw, nil)
	if err != nil {
		return nil, err
	}
	m := &JournalMark{Repo: d.ID(), Group: block.GroupID(d.ID()), Serial: d.U64(), Oldest: d.U64(),
		Released: block.Seq(d.U64()), Durable: block.Seq(d.U64())}
	if d.Err() == nil && (m.Oldest == 0 || m.Serial == 0) {
		d.Fail("file number %d or serial %d makes no sense", m.Oldest, m.Serial)
	}
	if d.Err() == nil && m.Released > m.Durable {
		d.Fail("sequence numbers %d and %d make no sense", m.Released, m.Durable)
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return m, nil
}
