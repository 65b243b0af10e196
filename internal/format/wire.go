package format

import (
	"encoding/binary"
	"fmt"
	"math"
)

// CorruptError says that stored bytes are not what DRC wrote, and where.
type CorruptError struct {
	Object string // the object, file or structure
	Offset int64  // where in it, bytes; -1 if the whole
	Reason string
}

func (e *CorruptError) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("%s is damaged: %s", e.Object, e.Reason)
	}
	return fmt.Sprintf("%s is damaged at byte %d: %s", e.Object, e.Offset, e.Reason)
}

// Corrupt returns a *CorruptError about the whole of object.
func Corrupt(object, format string, args ...any) error {
	return &CorruptError{Object: object, Offset: -1, Reason: fmt.Sprintf(format, args...)}
}

// Encoder appends the primitive fields of stored structures: little-endian
// integers of fixed width, unsigned varints, and byte strings with a varint
// length. The zero Encoder is ready to use; Buf holds the result.
type Encoder struct{ Buf []byte }

func (e *Encoder) U8(v uint8)       { e.Buf = append(e.Buf, v) }
func (e *Encoder) U16(v uint16)     { e.Buf = binary.LittleEndian.AppendUint16(e.Buf, v) }
func (e *Encoder) U32(v uint32)     { e.Buf = binary.LittleEndian.AppendUint32(e.Buf, v) }
func (e *Encoder) U64(v uint64)     { e.Buf = binary.LittleEndian.AppendUint64(e.Buf, v) }
func (e *Encoder) I64(v int64)      { e.U64(uint64(v)) }
func (e *Encoder) Uvarint(v uint64) { e.Buf = binary.AppendUvarint(e.Buf, v) }
func (e *Encoder) Raw(p []byte)     { e.Buf = append(e.Buf, p...) }
func (e *Encoder) Bytes(p []byte)   { e.Uvarint(uint64(len(p))); e.Raw(p) }
func (e *Encoder) String(s string)  { e.Uvarint(uint64(len(s))); e.Buf = append(e.Buf, s...) }

// Decoder reads what Encoder wrote, from bytes that may be hostile. The first
// field that does not fit sets the error; every later call returns zero
// values, so that a caller checks Err once. It never allocates in proportion
// to a length it has not checked against the bytes that are there.
type Decoder struct {
	name string
	buf  []byte
	off  int
	err  error
}

// NewDecoder reads buf; name is what errors call it.
func NewDecoder(name string, buf []byte) *Decoder { return &Decoder{name: name, buf: buf} }

// Fail records that the structure is damaged at the present offset.
func (d *Decoder) Fail(format string, args ...any) {
	if d.err == nil {
		d.err = &CorruptError{Object: d.name, Offset: int64(d.off), Reason: fmt.Sprintf(format, args...)}
	}
}

// Err returns the first failure.
func (d *Decoder) Err() error { return d.err }

// Offset is the number of bytes read so far.
func (d *Decoder) Offset() int { return d.off }

// Left is the number of bytes not yet read.
func (d *Decoder) Left() int { return len(d.buf) - d.off }

// Done checks that nothing is left over and returns the first failure.
func (d *Decoder) Done() error {
	if d.err == nil && d.Left() != 0 {
		d.Fail("%d bytes too many", d.Left())
	}
	return d.err
}

// Raw returns the next n bytes. They alias the decoder's buffer.
func (d *Decoder) Raw(n int) []byte {
	if d.err != nil {
		return nil
	}
	if n < 0 || n > d.Left() {
		d.Fail("ends too early: want %d bytes, have %d", n, d.Left())
		return nil
	}
	p := d.buf[d.off : d.off+n : d.off+n]
	d.off += n
	return p
}

func (d *Decoder) U8() uint8 {
	if p := d.Raw(1); p != nil {
		return p[0]
	}
	return 0
}

func (d *Decoder) U16() uint16 {
	if p := d.Raw(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (d *Decoder) U32() uint32 {
	if p := d.Raw(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (d *Decoder) U64() uint64 {
	if p := d.Raw(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

func (d *Decoder) I64() int64 { return int64(d.U64()) }

// Uvarint reads an unsigned varint in its shortest form.
func (d *Decoder) Uvarint() uint64 {
	if d.err != nil {
		return 0
	}
	v, n := binary.Uvarint(d.buf[d.off:])
	if n <= 0 || (n > 1 && d.buf[d.off+n-1] == 0) {
		d.Fail("bad varint")
		return 0
	}
	d.off += n
	return v
}

// Len reads a varint that counts bytes or bytes-sized things still to come: it
// fails if it is more than limit or more than what is left divided by least,
// the smallest size of one counted thing.
func (d *Decoder) Len(limit, least int) int {
	v := d.Uvarint()
	if d.err != nil {
		return 0
	}
	if v > uint64(limit) {
		d.Fail("count %d is over the limit of %d", v, limit)
		return 0
	}
	if least > 0 && v > uint64(d.Left()/least) {
		d.Fail("count %d cannot fit into the %d bytes left", v, d.Left())
		return 0
	}
	return int(v)
}

// Int64 reads a varint that must fit a non-negative int64.
func (d *Decoder) Int64() int64 {
	v := d.Uvarint()
	if v > math.MaxInt64 {
		d.Fail("number %d is out of range", v)
		return 0
	}
	return int64(v)
}

// Bytes reads a byte string of at most limit bytes; it aliases the buffer.
func (d *Decoder) Bytes(limit int) []byte { return d.Raw(d.Len(limit, 1)) }

// String reads a text of at most limit bytes.
func (d *Decoder) String(limit int) string { return string(d.Bytes(limit)) }

// ID reads 16 raw bytes.
func (d *Decoder) ID() (id [16]byte) {
	copy(id[:], d.Raw(len(id)))
	return id
}

// Hash reads 32 raw bytes.
func (d *Decoder) Hash() (h [32]byte) {
	copy(h[:], d.Raw(len(h)))
	return h
}

// version reads the version of a structure without a magic text.
func (d *Decoder) version(version uint8) {
	if got := d.U8(); d.err == nil && got != version {
		d.Fail("version %d is unknown: use a newer drc", got)
	}
}

// Magic reads a structure's magic text and version and fails if they are not
// the ones expected.
func (d *Decoder) Magic(magic string, version uint8) {
	if got := d.String(8); d.err == nil && got != magic {
		d.Fail("it begins with %q, not %q", got, magic)
		return
	}
	if got := d.U8(); d.err == nil && got != version {
		d.Fail("it has version %d; this DRC reads version %d", got, version)
	}
}
