package diskcache

import (
	"errors"
	"io"
	"path"

	"drc/internal/vfs"
)

// slab is one file of records.
//
// Only the writer appends, and only to the youngest slab; end, fileBytes and tabled
// are its own. The cache's mutex guards refs, gone and entries, which only the writer
// makes longer. What remains does not change.
type slab struct {
	id     uint32 // names it in the index, in this process
	number uint64 // in its name
	file   vfs.File

	end       int64 // of its records
	fileBytes int64 // that the file may have, if that is more than it should
	tabled    bool  // the table is behind the records

	entries []entry
	refs    int  // readers at work in it
	gone    bool // it is removed, or the cache closed: the last reader closes the file
}

// heldBytes is what the slab has on the disk, or will have once it has its table. A
// record counts as entryBytesMin at least, so that the limit bounds the index too.
func (s *slab) heldBytes() int64 {
	return max(s.fileBytes, s.end+tableBytes(len(s.entries)), int64(len(s.entries))*entryBytesMin)
}

// cut removes what is behind the records.
func (s *slab) cut() error {
	err := s.file.Truncate(s.end)
	if err == nil {
		s.fileBytes, s.tabled = 0, false
	}
	return err
}

// createSlab begins an empty slab.
func createSlab(fsys vfs.FS, dir string, number uint64) (*slab, error) {
	name := path.Join(dir, slabName(number))
	f, err := fsys.Create(name)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(encodeSlabHead(), 0); err != nil {
		_ = f.Close()
		_ = fsys.Remove(name) // it was made just now; if it stays it is empty, and goes at the next start
		return nil, err
	}
	return &slab{number: number, file: f, end: slabHeadBytes}, nil
}

// openSlab opens a slab that an earlier process has left, without looking into it. It
// returns errNotOurs if the cache has not made the file, and errUnbegun if it was
// about to.
func openSlab(fsys vfs.FS, dir string, number uint64) (*slab, error) {
	f, err := fsys.Open(path.Join(dir, slabName(number)))
	if err != nil {
		return nil, err
	}
	s := &slab{number: number, file: f, end: slabHeadBytes}
	if s.fileBytes, err = f.Size(); err == nil {
		err = checkSlabHead(f, s.fileBytes)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return s, nil
}

var (
	errNotOurs = errors.New("it has the name of a cache file and is none; it is left alone: remove it if nobody needs it")
	// errUnbegun: the file is as a power cut leaves one that was just made.
	errUnbegun = errors.New("it has no content")
)

func checkSlabHead(f vfs.File, size int64) error {
	if size == 0 {
		return errUnbegun
	}
	if size < slabHeadBytes || size > slabFileBytesMax {
		return errNotOurs
	}
	var head [slabHeadBytes]byte
	if err := readFull(f, head[:], 0); err != nil {
		return err
	}
	switch string(head[:]) {
	case string(encodeSlabHead()):
		return nil
	case string(make([]byte, slabHeadBytes)):
		return errUnbegun
	}
	return errNotOurs
}

// load finds out what is in a slab that was opened. Values are checked when they are
// used.
func (s *slab) load() {
	if s.loadTable(s.fileBytes) != nil {
		s.scan(s.fileBytes)
	}
}

// loadTable reads the table at the end of a file of so many bytes.
func (s *slab) loadTable(size int64) error {
	if size < slabHeadBytes+tailBytes {
		return errDamaged
	}
	var tail [tailBytes]byte
	if err := readFull(s.file, tail[:], size-tailBytes); err != nil {
		return err
	}
	n, sum, err := decodeTail(tail[:])
	if err != nil {
		return err
	}
	end := size - tableBytes(n)
	if end < slabHeadBytes {
		return errDamaged
	}
	rows := make([]byte, n*rowBytes)
	if err := readFull(s.file, rows, end); err != nil {
		return err
	}
	entries, err := decodeRows(rows, sum, end)
	if err != nil {
		return err
	}
	s.entries, s.end, s.tabled = entries, end, true
	return nil
}

// scan finds the records of a slab without a table by their heads, up to the first
// that is no good.
func (s *slab) scan(size int64) {
	s.entries, s.end, s.tabled = nil, slabHeadBytes, false
	var raw [recordHeadBytes]byte
	for len(s.entries) < slabEntriesMax && s.end+recordHeadBytes <= size {
		if readFull(s.file, raw[:], s.end) != nil {
			return
		}
		h, err := decodeRecordHead(raw[:])
		n := int64(recordHeadBytes + h.valueBytes)
		if err != nil || s.end+n > size {
			return
		}
		s.entries = append(s.entries, entry{hash: h.key.hash(), off: uint32(s.end), bytes: uint32(n)})
		s.end += n
	}
}

// readRecord returns the bytes of a record, unchecked.
func (s *slab) readRecord(e entry) ([]byte, error) {
	p := make([]byte, e.bytes)
	return p, readFull(s.file, p, int64(e.off))
}

// append writes a record behind the last one. The caller adds it to the entries. If
// it fails the slab is as it was: what was written is written over, or cut off.
func (s *slab) append(record [][]byte) (off, n int64, err error) {
	for _, p := range record {
		n += int64(len(p))
	}
	if s.tabled || s.fileBytes > s.end {
		if err := s.cut(); err != nil {
			return 0, 0, err
		}
	}
	if err := s.file.WriteVecAt(record, s.end); err != nil {
		s.fileBytes = s.end + n
		_ = s.cut()
		return 0, 0, err
	}
	return s.end, n, nil
}

// finish writes the table, of the entries given. If it fails the slab can be used
// without; what it holds is found one by one at the next start.
func (s *slab) finish(entries []entry) error {
	if s.tabled {
		return nil
	}
	if s.fileBytes > s.end {
		if err := s.cut(); err != nil {
			return err
		}
	}
	table := encodeTable(entries)
	if _, err := s.file.WriteAt(table, s.end); err != nil {
		s.fileBytes = s.end + int64(len(table))
		_ = s.cut()
		return err
	}
	s.tabled = true
	return nil
}

// readFull reads all of p, or fails.
func readFull(f vfs.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}
