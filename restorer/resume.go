package restorer

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

const (
	// ResumeSuffix ends the name of the file that says how far a restore is.
	ResumeSuffix = ".drc-resume"
	magicResume  = "DRCU"
	// regionBytes is the unit in which an interrupted restore goes on.
	regionBytes = 4 << 20
	// maxResumeBytes bounds the file.
	maxResumeBytes = 1 << 30
)

// saveEveryBytes is how much is written before progress is made durable; a
// variable for tests.
var saveEveryBytes int64 = 512 << 20

// resumeVersion is 2 since the note has a sum of each region.
const resumeVersion = 2

// progress says which regions of a target hold what they shall. It belongs to
// one point: that and only that is gone on with. Each region's sum tells, when
// it is gone on with, whether the region is still as it was left.
type progress struct {
	repo   block.ID
	group  block.GroupID
	volume block.VolumeID
	entry  format.Hash // of the point, and of what was laid over it
	size   int64
	inode  uint64   // of the file that was written to
	done   []byte   // bit i: region i
	sums   []uint32 // of each region: the pieceSums of its pieces, combined by exclusive or
}

func newProgress(im *Image) *progress {
	size := im.point.Volume.SizeBytes
	regions := (size + regionBytes - 1) / regionBytes
	return &progress{
		repo: im.history.cfg.Repo.ID, group: im.history.GroupID, volume: im.point.Volume.ID, entry: im.identity(),
		size: size, done: make([]byte, (regions+7)/8), sums: make([]uint32, regions),
	}
}

func (p *progress) isDone(region int64) bool { return p.done[region/8]&(1<<(region%8)) != 0 }
func (p *progress) set(region int64)         { p.done[region/8] |= 1 << (region % 8) }

// unset makes a region one that is still to be restored.
func (p *progress) unset(region int64) {
	p.done[region/8] &^= 1 << (region % 8)
	p.sums[region] = 0
}

// clone is a copy that does not change.
func (p *progress) clone() *progress {
	c := *p
	c.done, c.sums = slices.Clone(p.done), slices.Clone(p.sums)
	return &c
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// pieceSum tells whether a piece of a volume is where it was written. It guards
// against other programs that write to the target, not against forgery: who
// forges a target can as well do it when it is whole.
func pieceSum(data []byte, off int64) uint32 {
	var at [8]byte
	binary.LittleEndian.PutUint64(at[:], uint64(off))
	return crc32.Update(crc32.Checksum(at[:], castagnoli), castagnoli, data)
}

// encode returns the file: the fields and a SHA-256 of them.
func (p *progress) encode() []byte {
	var e format.Encoder
	e.String(magicResume)
	e.U8(resumeVersion)
	e.Raw(p.repo[:])
	e.Raw(p.group[:])
	e.Raw(p.volume[:])
	e.Raw(p.entry[:])
	e.I64(p.size)
	e.U64(p.inode)
	e.Bytes(p.done)
	for _, sum := range p.sums {
		e.U32(sum)
	}
	sum := sha256.Sum256(e.Buf)
	e.Raw(sum[:])
	return e.Buf
}

// load takes over the progress of an earlier restore to the same target, if it
// was of the same point, and reports whether it did.
func (p *progress) load(name string, inode uint64) bool {
	p.inode = inode
	raw, err := vfs.ReadFile(vfs.OS(), name, maxResumeBytes)
	if err != nil || len(raw) < sha256.Size {
		return false
	}
	body, sum := raw[:len(raw)-sha256.Size], raw[len(raw)-sha256.Size:]
	if have := sha256.Sum256(body); string(have[:]) != string(sum) {
		return false
	}
	d := format.NewDecoder(name, body)
	d.Magic(magicResume, resumeVersion)
	q := progress{repo: d.ID(), group: d.ID(), volume: d.ID(), entry: d.Hash(), size: d.I64(), inode: d.U64(), done: d.Bytes(maxResumeBytes)}
	for range min(len(p.sums), len(body)/4) {
		q.sums = append(q.sums, d.U32())
	}
	if d.Done() != nil || len(q.sums) != len(p.sums) || q.repo != p.repo || q.group != p.group || q.volume != p.volume || q.entry != p.entry ||
		q.size != p.size || q.inode != p.inode || len(q.done) != len(p.done) {
		return false
	}
	copy(p.done, q.done)
	copy(p.sums, q.sums)
	return true
}

// save writes the progress. What it says is done is durable in the target
// already.
func (p *progress) save(name string) error {
	raw := p.encode()
	err := vfs.WriteFileAtomic(vfs.OS(), name, raw)
	if errors.Is(err, syscall.ENOSPC) && overwrite(name, raw) == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("keep the progress of the restore: %w", err)
	}
	return nil
}

// overwrite replaces a file of the same length in place: on a full disk it has
// its room already. What a crash tears, its checksum gives away.
func overwrite(name string, raw []byte) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != int64(len(raw)) {
		return syscall.ENOSPC
	}
	if _, err := f.WriteAt(raw, 0); err != nil {
		return err
	}
	return f.Sync()
}

func removeProgress(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
