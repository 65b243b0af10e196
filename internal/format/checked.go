package format

import (
	"encoding/binary"
	"hash/crc32"
)

// Castagnoli is the CRC-32C of all checksums that guard against rot, not
// against malice.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkedHeaderBytes is the fixed part of a checked structure: magic, version,
// three zero bytes, length of the body, CRC-32C.
const checkedHeaderBytes = 16

// appendChecked frames body, for the small files of the buffer that nothing
// else protects.
func appendChecked(dst []byte, magic string, version uint8, body []byte) []byte {
	start := len(dst)
	e := Encoder{Buf: dst}
	e.Raw([]byte(magic))
	e.U8(version)
	e.Raw([]byte{0, 0, 0})
	e.U32(uint32(len(body)))
	e.U32(0)
	e.Raw(body)
	sum := crc32.Checksum(e.Buf[start:start+12], Castagnoli)
	sum = crc32.Update(sum, Castagnoli, body)
	binary.LittleEndian.PutUint32(e.Buf[start+12:], sum)
	return e.Buf
}

// openChecked returns a decoder of the body, after all checks of the frame.
// Bytes behind the frame are damage unless rest is given, which gets them.
func openChecked(name, magic string, version uint8, raw []byte, rest *[]byte) (*Decoder, error) {
	d := NewDecoder(name, raw)
	if got := d.Raw(4); d.err == nil && string(got) != magic {
		d.Fail("it begins with %q, not %q", got, magic)
	}
	if v := d.U8(); d.err == nil && v != version {
		d.Fail("version %d is unknown", v)
	}
	if z := d.Raw(3); d.err == nil && (z[0]|z[1]|z[2]) != 0 {
		d.Fail("reserved bytes are not zero")
	}
	n := d.U32()
	sum := d.U32()
	if d.err == nil && uint64(n) > uint64(d.Left()) {
		d.Fail("ends too early: want %d bytes, have %d", n, d.Left())
	}
	body := d.Raw(int(n))
	if d.err != nil {
		return nil, d.err
	}
	have := crc32.Checksum(raw[:12], Castagnoli)
	if crc32.Update(have, Castagnoli, body) != sum {
		return nil, Corrupt(name, "its checksum is wrong")
	}
	if rest != nil {
		*rest = raw[checkedHeaderBytes+int(n):]
	} else if d.Left() != 0 {
		return nil, d.Done()
	}
	return NewDecoder(name, body), nil
}
