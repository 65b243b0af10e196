package replay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"
	"sync"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
	"drc/restorer"
)

// A redo file holds what a step changes. Integers are little-endian.
//
//	header:  "DRCR" | version u8 | group 16 bytes | step 16 random bytes
//	         number of moves u32 | moves | CRC-32C of all of it
//	move:    copy 16 bytes | from: entry u64, hash 32 bytes | to: entry u64, hash 32 bytes, seq u64, time i64 ns
//	records: move u32 | kind u8 (1 data, 2 zeroes) | offset u64 | length u64 | CRC-32C of step, these and the data | data
//	trailer: 0xffffffff u32 | kind u8 = 3 | bytes of the records u64 | number of records u64 | CRC-32C of step and these
//
// Records do not overlap, and have no order. Each checksum covers the step, so that
// what an earlier step has left in the file is never taken for a part of this one.
const (
	redoMagic       = "DRCR"
	redoVersion     = 1
	redoData        = 1
	redoZeroes      = 2
	redoEnd         = 3
	redoRecordBytes = 4 + 1 + 8 + 8 + 4
	redoTrailerMove = 0xffffffff
	maxRedoMoves    = 1 << 16
	redoBuffer      = 1 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// move is what a step does to one copy.
type move struct {
	copy     block.ID
	from, to position
}

// redoHeader is the head of a redo file.
type redoHeader struct {
	group block.GroupID
	step  block.ID
	moves []move
}

func (h *redoHeader) encode() []byte {
	p := append([]byte(redoMagic), redoVersion)
	p = append(p, h.group[:]...)
	p = append(p, h.step[:]...)
	p = binary.LittleEndian.AppendUint32(p, uint32(len(h.moves)))
	for _, m := range h.moves {
		p = append(p, m.copy[:]...)
		p = binary.LittleEndian.AppendUint64(p, m.from.Entry)
		p = append(p, m.from.Hash[:]...)
		p = binary.LittleEndian.AppendUint64(p, m.to.Entry)
		p = append(p, m.to.Hash[:]...)
		p = binary.LittleEndian.AppendUint64(p, uint64(m.to.Seq))
		p = binary.LittleEndian.AppendUint64(p, uint64(m.to.Time.UnixNano()))
	}
	return binary.LittleEndian.AppendUint32(p, crc32.Checksum(p, castagnoli))
}

// errNoRedo: the file holds no step that is whole.
var errNoRedo = errors.New("the redo file holds no whole step")

const moveBytes = 16 + 8 + 32 + 8 + 32 + 8 + 8

func decodeRedoHeader(r io.ReaderAt) (h redoHeader, size int64, err error) {
	const fixed = 4 + 1 + 16 + 16 + 4
	var head [fixed]byte
	if err := readAll(r, head[:], 0); err != nil {
		return h, 0, err
	}
	n := int64(binary.LittleEndian.Uint32(head[fixed-4:]))
	if string(head[:4]) != redoMagic || head[4] != redoVersion || n == 0 || n > maxRedoMoves {
		return h, 0, errNoRedo
	}
	p := make([]byte, fixed+n*moveBytes+4)
	if err := readAll(r, p, 0); err != nil {
		return h, 0, err
	}
	body := p[:len(p)-4]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(p[len(body):]) {
		return h, 0, errNoRedo
	}
	d := format.NewDecoder("redo file", body[5:])
	h.group, h.step = block.GroupID(d.ID()), d.ID()
	d.U32()
	for range n {
		m := move{copy: d.ID()}
		m.from.Entry, m.from.Hash = d.U64(), d.Hash()
		m.to.Entry, m.to.Hash, m.to.Seq = d.U64(), d.Hash(), block.Seq(d.U64())
		m.to.Time = timeOf(d.I64())
		h.moves = append(h.moves, m)
	}
	if d.Done() != nil {
		return h, 0, errNoRedo
	}
	return h, int64(len(p)), nil
}

// readAll reads all of p; where the file ends before that the error is errNoRedo.
func readAll(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return errNoRedo
	}
	return err
}

// redoWriter writes a redo file. Add may be called from several goroutines.
type redoWriter struct {
	file vfs.File
	step block.ID
	seed uint32 // checksum of step
	end  int64  // of the header

	mu      sync.Mutex
	at      int64
	records uint64
	touch   func(move int, e block.Extent) // is told what is changed, one after the other
}

// beginRedo begins a step in the file name, which it makes if need be.
func beginRedo(fsys vfs.FS, dir, name string, h redoHeader, touch func(move int, e block.Extent)) (_ *redoWriter, err error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		if f, err = fsys.Create(name); err == nil {
			if err = fsys.SyncDir(dir); err != nil {
				_ = f.Close()
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the redo file: %w", err)
	}
	raw := h.encode()
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(raw, 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, noRoom("the redo file "+name, err)
	}
	w := &redoWriter{file: f, step: h.step, seed: crc32.Checksum(h.step[:], castagnoli), end: int64(len(raw)), touch: touch}
	w.at = w.end
	return w, nil
}

// add adds what is changed by a move.
func (w *redoWriter) add(move int, changes []restorer.Change) error {
	heads := make([]byte, 0, len(changes)*redoRecordBytes)
	bufs := make([][]byte, 0, 2*len(changes))
	total := int64(0)
	for _, c := range changes {
		from := len(heads)
		kind := uint8(redoData)
		if c.Zero {
			kind = redoZeroes
		}
		heads = binary.LittleEndian.AppendUint32(heads, uint32(move))
		heads = append(heads, kind)
		heads = binary.LittleEndian.AppendUint64(heads, uint64(c.Off))
		heads = binary.LittleEndian.AppendUint64(heads, uint64(c.Len))
		heads = binary.LittleEndian.AppendUint32(heads, crc32.Update(crc32.Update(w.seed, castagnoli, heads[from:]), castagnoli, c.Data))
		bufs = append(bufs, heads[from:])
		if len(c.Data) > 0 {
			bufs = append(bufs, c.Data)
		}
		total += redoRecordBytes + int64(len(c.Data))
	}
	w.mu.Lock()
	at := w.at
	w.at += total
	w.records += uint64(len(changes))
	for _, c := range changes {
		w.touch(move, c.Extent)
	}
	w.mu.Unlock()
	for part := range slices.Chunk(bufs, 512) {
		if err := w.file.WriteVecAt(part, at); err != nil {
			return err
		}
		for _, p := range part {
			at += int64(len(p))
		}
	}
	return nil
}

// finish makes the step durable.
func (w *redoWriter) finish() error {
	p := binary.LittleEndian.AppendUint32(nil, redoTrailerMove)
	p = append(p, redoEnd)
	p = binary.LittleEndian.AppendUint64(p, uint64(w.at-w.end))
	p = binary.LittleEndian.AppendUint64(p, w.records)
	p = binary.LittleEndian.AppendUint32(p, crc32.Update(w.seed, castagnoli, p))
	if _, err := w.file.WriteAt(p, w.at); err != nil {
		return err
	}
	return w.file.Sync()
}

// redo is a step that is whole in its file.
type redo struct {
	redoHeader
	file vfs.File
	end  int64 // of the header
}

// openRedo opens a redo file and checks all of it. If it holds no step that is whole
// the error is errNoRedo.
func openRedo(fsys vfs.FS, name string) (_ *redo, err error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoRedo
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	r := &redo{file: f}
	if r.redoHeader, r.end, err = decodeRedoHeader(f); err != nil {
		return nil, err
	}
	return r, r.each(func(int, restorer.Change) error { return nil })
}

// each visits the records. Data is valid during the visit, and comes in pieces.
func (r *redo) each(visit func(move int, c restorer.Change) error) error {
	seed := crc32.Checksum(r.step[:], castagnoli)
	size, err := r.file.Size()
	if err != nil {
		return err
	}
	in := newReader(r.file, r.end)
	var data []byte
	for count := uint64(0); ; count++ {
		began := in.at
		head, err := in.next(redoRecordBytes)
		if err != nil {
			return err
		}
		move, kind := binary.LittleEndian.Uint32(head), head[4]
		a, b := binary.LittleEndian.Uint64(head[5:]), binary.LittleEndian.Uint64(head[13:])
		want := binary.LittleEndian.Uint32(head[21:])
		sum := crc32.Update(seed, castagnoli, head[:21])
		if kind == redoEnd {
			if move != redoTrailerMove || sum != want || a != uint64(began-r.end) || b != count {
				return errNoRedo
			}
			return nil
		}
		c := restorer.Change{Extent: block.Extent{Off: int64(a), Len: int64(b)}, Zero: kind == redoZeroes}
		if int64(move) >= int64(len(r.moves)) || (kind != redoData && kind != redoZeroes) || c.Off < 0 || c.Len <= 0 || c.End() < c.Off || c.End() > format.MaxVolumeBytes ||
			(kind == redoData && c.Len > size-in.at) {
			return errNoRedo
		}
		if kind == redoData {
			if int64(cap(data)) < c.Len {
				data = make([]byte, c.Len)
			}
			data = data[:c.Len]
			if err := in.read(data); err != nil {
				return err
			}
			sum = crc32.Update(sum, castagnoli, data)
			c.Data = data
		}
		if sum != want {
			return errNoRedo
		}
		if err := visit(int(move), c); err != nil {
			return err
		}
	}
}

// close lets go of the file.
func (r *redo) close() error { return r.file.Close() }

// reader reads a file in order.
type reader struct {
	file io.ReaderAt
	at   int64 // of the next byte
	buf  []byte
	have []byte
}

func newReader(f io.ReaderAt, at int64) *reader {
	return &reader{file: f, at: at, buf: make([]byte, redoBuffer)}
}

// next returns the next n bytes, which are few.
func (r *reader) next(n int) ([]byte, error) {
	if len(r.have) < n {
		k := copy(r.buf, r.have)
		m, err := r.file.ReadAt(r.buf[k:], r.at+int64(k))
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, err
		}
		r.have = r.buf[:k+m]
		if len(r.have) < n {
			return nil, errNoRedo
		}
	}
	p := r.have[:n]
	r.have = r.have[n:]
	r.at += int64(n)
	return p, nil
}

// read fills p with the next bytes.
func (r *reader) read(p []byte) error {
	n := copy(p, r.have)
	r.have = r.have[n:]
	if n < len(p) {
		if err := readAll(r.file, p[n:], r.at+int64(n)); err != nil {
			return err
		}
	}
	r.at += int64(len(p))
	return nil
}
