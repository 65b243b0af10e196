package format

import (
	"slices"

	"drc/internal/block"
)

const (
	magicSpool = "DRCP"
	// MaxSpoolRecordBytes bounds the opaque part of a spooled batch.
	MaxSpoolRecordBytes = 64 << 20
	// MaxSpoolFileBytes bounds the file of a spooled batch.
	MaxSpoolFileBytes = MaxSpoolRecordBytes + 16<<20
	maxSpoolShards    = 1 << 16
	maxShardCopies    = 8
)

// SpooledBatch is a sealed batch that is not everywhere yet: where its shards
// are on the disks of the buffer, and what its uploader must know.
type SpooledBatch struct {
	Repo   block.ID
	Group  block.GroupID
	ID     block.ID // of the batch, random
	Serial uint64   // grows with each change; the highest of all disks counts
	From   block.Seq
	To     block.Seq  // From-1 if it has no writes, but a name, say
	Logged bool       // the batch is in the log; Record is of no more use
	Disks  []block.ID // the disks that Copies count
	Record []byte     // opaque
	Shards []SpooledShard
}

// SpooledShard is one shard of a spooled batch. Its file holds its bytes and
// nothing else.
type SpooledShard struct {
	Segment   block.SegmentID
	Index     int
	Parity    int // of its segment
	SizeBytes int64
	Checksum  uint32 // CRC-32C of the file
	Placed    bool   // is on its store; no local copy is needed
	Copies    []int  // indexes into Disks
	// Head and Tail are the first and last bytes of the file, which the erasure code
	// does not cover: with them the shard can be rebuilt from the others of its
	// segment, without a key. Both are empty, or none.
	Head, Tail []byte
}

// maxShardEndBytes bounds Head and Tail: a header, and checksums of a shard.
const maxShardEndBytes = 1 << 16

// Encode returns the batch's file.
func (b *SpooledBatch) Encode() []byte {
	var e Encoder
	e.Raw(b.Repo[:])
	e.Raw(b.Group[:])
	e.Raw(b.ID[:])
	e.U64(b.Serial)
	e.U64(uint64(b.From))
	e.U64(uint64(b.To))
	e.U8(flag(b.Logged, 1))
	e.Uvarint(uint64(len(b.Disks)))
	for _, d := range b.Disks {
		e.Raw(d[:])
	}
	e.Bytes(b.Record)
	e.Uvarint(uint64(len(b.Shards)))
	for _, s := range b.Shards {
		e.Raw(s.Segment[:])
		e.Uvarint(uint64(s.Index))
		e.Uvarint(uint64(s.Parity))
		e.Uvarint(uint64(s.SizeBytes))
		e.U32(s.Checksum)
		ends := len(s.Head) > 0
		e.U8(flag(s.Placed, 1) | flag(ends, 2))
		e.Uvarint(uint64(len(s.Copies)))
		for _, c := range s.Copies {
			e.Uvarint(uint64(c))
		}
		if ends {
			e.Bytes(s.Head)
			e.Bytes(s.Tail)
		}
	}
	return appendChecked(nil, magicSpool, 1, e.Buf)
}

// DecodeSpooledBatch reads a batch's file. Record aliases raw.
func DecodeSpooledBatch(name string, raw []byte) (*SpooledBatch, error) {
	d, err := openChecked(name, magicSpool, 1, raw, nil)
	if err != nil {
		return nil, err
	}
	b := &SpooledBatch{Repo: d.ID(), Group: block.GroupID(d.ID()), ID: d.ID(), Serial: d.U64(),
		From: block.Seq(d.U64()), To: block.Seq(d.U64())}
	b.Logged = d.flags(1)&1 != 0
	if d.Err() == nil && (b.Serial == 0 || b.From > b.To+1) {
		d.Fail("serial %d or range %d to %d makes no sense", b.Serial, b.From, b.To)
	}
	for range d.Len(MaxBufferDisks, 16) {
		b.Disks = append(b.Disks, d.ID())
	}
	b.Record = d.Bytes(MaxSpoolRecordBytes)
	for range d.Len(maxSpoolShards, 25) {
		s := SpooledShard{Segment: block.SegmentID(d.ID()), Index: d.Len(MaxShards, 0), Parity: d.Len(MaxShards, 0),
			SizeBytes: d.Int64(), Checksum: d.U32()}
		flags := d.flags(3)
		s.Placed = flags&1 != 0
		for range d.Len(maxShardCopies, 1) {
			c := d.Len(MaxBufferDisks, 0)
			if d.Err() == nil && c >= len(b.Disks) {
				d.Fail("copy on disk %d of %d", c, len(b.Disks))
			}
			s.Copies = append(s.Copies, c)
		}
		if flags&2 != 0 {
			s.Head, s.Tail = slices.Clone(d.Bytes(maxShardEndBytes)), slices.Clone(d.Bytes(maxShardEndBytes))
			if d.Err() == nil && (len(s.Head) == 0 || len(s.Tail) == 0 || int64(len(s.Head)+len(s.Tail)) > s.SizeBytes) {
				d.Fail("the ends of a shard make no sense")
			}
		}
		if d.Err() != nil {
			break
		}
		b.Shards = append(b.Shards, s)
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return b, nil
}
