package restorer

import (
	"bytes"
	"context"
	"crypto/sha256"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/vfs"
)

const (
	magicScan = "DRCH"
	// maxScanBytes bounds the file.
	maxScanBytes = 1 << 30
	maxScanItems = 1 << 24
)

// scan is how far logs were read and verified by earlier runs, and what values
// were in them. It lets the next run read on from there. It is believed for a
// store only if the last object that was read is still there, unchanged; a
// store that was rolled back is so read again from its beginning.

// saveScan keeps what was read. It is a cache: failures are none of the
// reader's business.
func (h *History) saveScan(logs []*storeLog) {
	if h.values.disk == nil {
		return
	}
	var e format.Encoder
	e.String(magicScan)
	e.U8(1)
	e.Raw(h.cfg.Repo.ID[:])
	e.Raw(h.GroupID[:])
	var sound []*storeLog
	for _, l := range logs {
		if l.err == nil && l.acc.Next > 0 {
			sound = append(sound, l)
		}
	}
	number := map[*member]uint64{}
	e.Uvarint(uint64(len(sound)))
	for i, l := range sound {
		number[l.m] = uint64(i)
		e.Raw(l.acc.Store[:])
		e.U64(l.acc.Next)
		e.Raw(l.acc.Last[:])
		encodeEpoch(&e, l.acc.Promised)
		e.U64(l.acc.Decided)
		e.U64(l.acc.Latest.N)
		encodeEpoch(&e, l.acc.Latest.Epoch)
		e.Raw(l.acc.Latest.Hash[:])
		e.U64(l.acc.Latest.Index)
		e.Uvarint(uint64(len(l.decided)))
		for _, c := range l.decided {
			encodeEpoch(&e, c.epoch)
			e.U64(c.n)
		}
		e.Uvarint(uint64(len(l.tails)))
		for _, t := range l.tails {
			e.Raw(t.Store[:])
			e.U64(t.Next)
			e.Raw(t.Last[:])
		}
	}
	v := h.values
	v.mu.Lock()
	count := 0
	for _, nodes := range v.nodes {
		count += len(nodes)
	}
	e.Uvarint(uint64(count))
	for n, nodes := range v.nodes {
		for _, x := range nodes {
			e.U64(n)
			e.Raw(x.hash[:])
			e.Raw(x.parent[:])
			if x.keySets {
				e.U8(1)
			} else {
				e.U8(0)
			}
			var places []place
			for _, p := range x.places {
				if _, ok := number[p.m]; ok {
					places = append(places, p)
				}
			}
			e.Uvarint(uint64(len(places)))
			for _, p := range places {
				e.Uvarint(number[p.m])
				e.U64(p.index)
			}
		}
	}
	v.mu.Unlock()
	sum := sha256.Sum256(e.Buf)
	e.Raw(sum[:])
	if err := vfs.WriteFileAtomic(vfs.OS(), h.values.disk.scanName(), e.Buf); err != nil {
		h.cfg.Logger.Warn("cannot keep how far the logs were read", "error", err)
	}
}

func encodeEpoch(e *format.Encoder, p format.Epoch) {
	e.U64(p.Number)
	e.Raw(p.Random[:])
}

func decodeEpoch(d *format.Decoder) format.Epoch {
	return format.Epoch{Number: d.U64(), Random: d.ID()}
}

// loadScan takes up logs where an earlier run has left them.
func (h *History) loadScan(ctx context.Context, logs []*storeLog) {
	if h.values.disk == nil {
		return
	}
	raw, err := vfs.ReadFile(vfs.OS(), h.values.disk.scanName(), maxScanBytes)
	if err != nil || len(raw) < sha256.Size {
		return
	}
	body := raw[:len(raw)-sha256.Size]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], raw[len(body):]) {
		return
	}
	d := format.NewDecoder("cache", body)
	d.Magic(magicScan, 1)
	if d.ID() != h.cfg.Repo.ID || block.GroupID(d.ID()) != h.GroupID {
		return
	}
	var known []*storeLog // by number in the file; nil if not to be believed
	for range d.Len(format.MaxStores, 1) {
		read := &storeLog{acc: grouplog.Acceptor{Store: d.ID(), Next: d.U64(), Last: d.Hash(), Promised: decodeEpoch(d), Decided: d.U64()}}
		read.acc.Latest = grouplog.Accepted{N: d.U64(), Epoch: decodeEpoch(d), Hash: d.Hash(), Index: d.U64()}
		for range d.Len(maxScanItems, 32) {
			read.decided = append(read.decided, claim{decodeEpoch(d), d.U64()})
		}
		for range d.Len(format.MaxStores, 56) {
			read.tails = append(read.tails, format.Tail{Store: d.ID(), Next: d.U64(), Last: d.Hash()})
		}
		if d.Err() != nil {
			return
		}
		var of *storeLog
		for _, l := range logs {
			if l.m.ID == read.acc.Store && l.m.Store != nil && h.stillThere(ctx, l.m, read.acc) {
				of = l
				l.acc, l.decided, l.tails, l.base = read.acc, read.decided, read.tails, read.acc.Next
			}
		}
		known = append(known, of)
	}
	v := h.values
	v.mu.Lock()
	defer v.mu.Unlock()
	for range d.Len(maxScanItems, 74) {
		n := d.U64()
		x := &node{hash: d.Hash(), parent: d.Hash(), keySets: d.U8() == 1}
		for range d.Len(1<<16, 9) {
			i, index := d.Len(len(known), 0), d.U64()
			if i < len(known) && known[i] != nil {
				x.places = append(x.places, place{known[i].m, index})
			}
		}
		if d.Err() != nil {
			return
		}
		if len(x.places) > 0 { // its log is believed, and it was verified when it was read
			v.nodes[n] = append(v.nodes[n], x)
			v.known[x.hash] = true
		}
	}
}

// stillThere reports whether a log still has the object that was its last.
func (h *History) stillThere(ctx context.Context, m *member, acc grouplog.Acceptor) bool {
	if acc.Next == 0 {
		return false
	}
	raw, err := h.stores.get(ctx, m, true, format.LogName(h.GroupID, acc.Next-1), format.MaxLogObjectBytes)
	return err == nil && format.HashOf(raw) == acc.Last
}
