package diskcache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path"
	"strconv"
	"strings"
)

const (
	lockName   = "drc-cache.lock"
	slabPrefix = "drc-cache-"
	slabSuffix = ".slab"
	// slabNumberMax bounds the numbers in names, so that there always is a next one.
	slabNumberMax = 1 << 62
)

const (
	slabMagic       = "DRCCACHE"
	slabVersion     = 1
	slabHeadBytes   = 16
	recordMagic     = 0x52435244 // "DRCR"
	recordHeadBytes = 52
	rowBytes        = 16
	tailMagic       = 0x54435244 // "DRCT"
	tailBytes       = 16
)

// Bounds of what is taken for a slab, whoever has written it.
const (
	slabBytesMax     = 1 << 30
	slabEntriesMax   = slabBytesMax / entryBytesMin
	slabFileBytesMax = slabHeadBytes + slabBytesMax + recordHeadBytes + MaxValueBytes + slabEntriesMax*rowBytes + tailBytes
	// entryBytesMin is the average size of a record below which a slab is closed
	// for the number of its records: it bounds the index.
	entryBytesMin = 4 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// errDamaged says that bytes are not what was written, or never were ours.
var errDamaged = errors.New("damaged")

func slabName(number uint64) string { return fmt.Sprintf("%s%016x%s", slabPrefix, number, slabSuffix) }

// parseSlabName returns the number in a slab's name.
func parseSlabName(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(path.Base(name), slabPrefix)
	if !ok {
		return 0, false
	}
	if digits, ok = strings.CutSuffix(digits, slabSuffix); !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 16, 64)
	return n, err == nil && n < slabNumberMax && slabName(n) == name
}

func encodeSlabHead() []byte {
	p := append(make([]byte, 0, slabHeadBytes), slabMagic...)
	p = binary.LittleEndian.AppendUint32(p, slabVersion)
	return binary.LittleEndian.AppendUint32(p, checksum(p))
}

// key names a value.
type key struct {
	kind uint8
	name [32]byte
}

// hash is what the index knows of a key. Names are spread evenly, as hashes are; two
// keys with one hash take each other's place, and are told apart when read.
func (k *key) hash() uint64 {
	h := binary.LittleEndian.Uint64(k.name[:]) ^ uint64(k.kind)*0x9e3779b97f4a7c15
	for i := 8; i < len(k.name); i += 8 {
		h = (h<<23 | h>>41) ^ binary.LittleEndian.Uint64(k.name[i:])
	}
	return h
}

func encodeRecordHead(k *key, value []byte) []byte {
	p := binary.LittleEndian.AppendUint32(make([]byte, 0, recordHeadBytes), recordMagic)
	p = append(p, k.kind, 0, 0, 0)
	p = binary.LittleEndian.AppendUint32(p, uint32(len(value)))
	p = binary.LittleEndian.AppendUint32(p, checksum(value))
	p = append(p, k.name[:]...)
	return binary.LittleEndian.AppendUint32(p, checksum(p))
}

// recordHead is what stands before a value.
type recordHead struct {
	key        key
	valueBytes int
	sum        uint32 // of the value
}

// decodeRecordHead reads a head of recordHeadBytes.
func decodeRecordHead(p []byte) (h recordHead, err error) {
	const sumAt = recordHeadBytes - 4
	n := binary.LittleEndian.Uint32(p[8:])
	if binary.LittleEndian.Uint32(p) != recordMagic || p[5] != 0 || p[6] != 0 || p[7] != 0 ||
		n == 0 || n > MaxValueBytes || binary.LittleEndian.Uint32(p[sumAt:]) != checksum(p[:sumAt]) {
		return h, errDamaged
	}
	h = recordHead{key: key{kind: p[4]}, valueBytes: int(n), sum: binary.LittleEndian.Uint32(p[12:])}
	copy(h.key.name[:], p[16:])
	return h, nil
}

// decodeRecord returns the value in a record, which it aliases, and its key.
func decodeRecord(p []byte) (key, []byte, error) {
	if len(p) < recordHeadBytes {
		return key{}, nil, errDamaged
	}
	h, err := decodeRecordHead(p)
	value := p[recordHeadBytes:]
	if err != nil || h.valueBytes != len(value) || checksum(value) != h.sum {
		return key{}, nil, errDamaged
	}
	return h.key, value, nil
}

// entry is what a slab and its table say of a record.
type entry struct {
	hash  uint64
	off   uint32 // of the record in the file
	bytes uint32 // of the record
	used  uint32 // when it was last, on the cache's clock; 0: not since it was written here
}

// tableBytes is how large the table of n entries is.
func tableBytes(n int) int64 { return int64(n)*rowBytes + tailBytes }

func encodeTable(entries []entry) []byte {
	p := make([]byte, 0, tableBytes(len(entries)))
	for _, e := range entries {
		p = binary.LittleEndian.AppendUint64(p, e.hash)
		p = binary.LittleEndian.AppendUint32(p, e.off)
		p = binary.LittleEndian.AppendUint32(p, e.bytes)
	}
	tail := binary.LittleEndian.AppendUint32(make([]byte, 0, tailBytes), tailMagic)
	tail = binary.LittleEndian.AppendUint32(tail, uint32(len(entries)))
	tail = binary.LittleEndian.AppendUint32(tail, checksum(p))
	tail = binary.LittleEndian.AppendUint32(tail, checksum(tail))
	return append(p, tail...)
}

// decodeTail returns the number of rows before a tail of tailBytes, and their checksum.
func decodeTail(p []byte) (rows int, sum uint32, err error) {
	const sumAt = tailBytes - 4
	n := binary.LittleEndian.Uint32(p[4:])
	if binary.LittleEndian.Uint32(p) != tailMagic || n > slabEntriesMax || binary.LittleEndian.Uint32(p[sumAt:]) != checksum(p[:sumAt]) {
		return 0, 0, errDamaged
	}
	return int(n), binary.LittleEndian.Uint32(p[8:]), nil
}

// decodeRows reads the rows of a table, of records that all lie before end.
func decodeRows(p []byte, sum uint32, end int64) ([]entry, error) {
	if checksum(p) != sum {
		return nil, errDamaged
	}
	entries := make([]entry, len(p)/rowBytes)
	for i := range entries {
		row := p[i*rowBytes:]
		e := entry{hash: binary.LittleEndian.Uint64(row), off: binary.LittleEndian.Uint32(row[8:]), bytes: binary.LittleEndian.Uint32(row[12:])}
		if e.off < slabHeadBytes || e.bytes <= recordHeadBytes || e.bytes > recordHeadBytes+MaxValueBytes || int64(e.off)+int64(e.bytes) > end {
			return nil, errDamaged
		}
		entries[i] = e
	}
	return entries, nil
}
