package segment

import (
	"fmt"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/erasure"
	"drc/internal/format"
)

// Repair makes shard objects of a segment again from others of it: byte for byte
// what Sealed.Shards made, so that a store may be given either. objects has shard i
// at index i, for at least as many shards as it takes; what is nil there is made if
// wanted has bit i, and set. Each object is verified, and one that is damaged is an
// error that wraps *format.CorruptError; too few are erasure.ErrTooFew.
func Repair(keys *crypt.KeySet, id block.SegmentID, objects [][]byte, wanted uint64) error {
	var h format.ShardHeader
	parts := make([][]byte, len(objects))
	for i, o := range objects {
		if o == nil {
			continue
		}
		own, body, err := VerifyShard(keys, fmt.Sprintf("shard %d of segment %s", i, id), id, i, o)
		if err != nil {
			return err
		}
		if own.Index = 0; h.ShardBytes != 0 && own != h {
			return format.Corrupt(fmt.Sprintf("shard %d of segment %s", i, id), "it is not of the same segment as the others")
		}
		h, parts[i] = own, body
	}
	if h.ShardBytes == 0 {
		return fmt.Errorf("segment %s: %w: none is there", id, erasure.ErrTooFew)
	}
	if h.Profile.Total() != len(objects) {
		return fmt.Errorf("segment %s has %d shards, not %d", id, h.Profile.Total(), len(objects))
	}
	if err := erasure.Reconstruct(h.Profile, parts, false); err != nil {
		return fmt.Errorf("segment %s: %w", id, err)
	}
	sums := crypt.NewSummer(keys.Index.Derive(id[:], crypt.LabelShardSums))
	for i := range objects {
		if objects[i] != nil || wanted&(1<<i) == 0 {
			continue
		}
		own := h
		own.Index = i
		o := append(own.Append(make([]byte, 0, format.ShardObjectBytes(h.ShardBytes))), parts[i]...)
		objects[i] = appendSums(o, sums, i)
	}
	return nil
}
