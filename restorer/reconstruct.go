package restorer

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"drc/internal/crypt"
	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/segment"
)

// reconstruct returns the whole payload of a segment, from any k shards that
// pass verification. The objects that do not are noted as damage. Callers that
// want the same segment wait for one of them.
func (im *Image) reconstruct(ctx context.Context, keys *crypt.KeySet, row format.SegmentRow) ([]byte, error) {
	key := im.segmentKey(row)
	for {
		if payload, ok := im.memory.payloads.get(key); ok {
			return payload, nil
		}
		mine, done, err := im.memory.repairs.join(ctx, key)
		if err != nil {
			return nil, err
		}
		if !mine {
			continue
		}
		return func() ([]byte, error) {
			defer done()
			if payload, ok := im.memory.payloads.get(key); ok {
				return payload, nil
			}
			var payload []byte
			err := im.history.stores.patiently(ctx, func() error {
				var err error
				payload, err = im.reconstructOnce(ctx, keys, row)
				return err
			})
			if err == nil {
				im.memory.payloads.put(key, payload)
			}
			return payload, err
		}()
	}
}

// shardRead is the outcome of reading one shard.
type shardRead struct {
	body []byte
	err  error
}

func (im *Image) reconstructOnce(ctx context.Context, keys *crypt.KeySet, row format.SegmentRow) ([]byte, error) {
	k, total := row.Profile.Data, row.Profile.Total()
	reads := make([]shardRead, total)
	for i := range reads {
		reads[i].err = errUnread
	}
	have := func() (n int) {
		for _, r := range reads {
			if r.body != nil {
				n++
			}
		}
		return n
	}
	// Data shards first, then as much parity as is missing, and at last the
	// stores that are left alone for having failed.
	for _, anyway := range []insist{false, true} {
		for next := 0; next < total && have() < k; {
			batch := k - have()
			if next == 0 {
				batch = k
			}
			var wg sync.WaitGroup
			for ; batch > 0 && next < total; next++ {
				i := next
				if reads[i].body != nil || !isUnreachable(reads[i].err) {
					continue
				}
				batch--
				wg.Go(func() { reads[i] = im.readShard(ctx, keys, row, i, anyway) })
			}
			wg.Wait()
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
		}
	}
	shards := make([][]byte, total)
	var bad, silent []error
	for i, r := range reads {
		switch {
		case r.body != nil:
			shards[i] = r.body
		case isUnreachable(r.err):
			silent = append(silent, r.err)
		default:
			bad = append(bad, fmt.Errorf("%s in %s: %s", im.shardName(row, i), im.shardMember(row, i).URL(), reason(r.err)))
		}
	}
	if n := have(); n < k {
		if len(silent) > 0 && n+len(silent) >= k {
			return nil, &fewShardsError{
				text: fmt.Sprintf("segment %s: %d of the %d shards needed can be read: %s: bring the stores back, or name all of them", row.ID, n, k, joinReasons(append(silent, bad...))),
				err:  errors.Join(silent...),
			}
		}
		return nil, format.Corrupt("segment "+row.ID.String(), "%d good shards are left of the %d needed: %s", n, k, joinReasons(append(bad, silent...)))
	}
	if err := erasure.Reconstruct(row.Profile, shards, true); err != nil {
		return nil, fmt.Errorf("segment %s: %w", row.ID, err)
	}
	payload := make([]byte, 0, int64(k)*int64(len(shards[0])))
	for _, s := range shards[:k] {
		payload = append(payload, s...)
	}
	return payload[:row.Payload], nil
}

// fewShardsError says that too few shards of a segment can be read for now; it
// is an *unreachableError.
type fewShardsError struct {
	text string
	err  error
}

func (e *fewShardsError) Error() string { return e.text }
func (e *fewShardsError) Unwrap() error { return e.err }

// readShard fetches a whole shard object and verifies it.
func (im *Image) readShard(ctx context.Context, keys *crypt.KeySet, row format.SegmentRow, i int, anyway insist) shardRead {
	m, name := im.shardMember(row, i), im.shardName(row, i)
	size := format.ShardObjectBytes(format.ShardBytes(row.Payload, row.Profile.Data))
	object, err := im.history.stores.get(ctx, m, anyway, name, size)
	if err != nil {
		if aboutObject(err) {
			im.history.stores.found(m, name, err)
		}
		return shardRead{err: err}
	}
	h, body, err := segment.VerifyShard(keys, m.URL()+" "+name, row.ID, i, object)
	if err == nil && (h.Profile != row.Profile || h.Payload != row.Payload || h.KeySet != row.KeySet) {
		err = format.Corrupt(m.URL()+" "+name, "it is of another form of the segment")
	}
	if err != nil {
		im.history.stores.found(m, name, err)
		return shardRead{err: err}
	}
	return shardRead{body: body}
}
