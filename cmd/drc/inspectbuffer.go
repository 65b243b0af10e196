package main

import (
	"bytes"
	"math/bits"

	"drc/internal/block"
	"drc/internal/format"
)

// What drc inspect says of the files of a buffer's directory.

// describeJournal lists the records of a journal file, as far as they chain.
func describeJournal(name string, raw []byte) (fields, error) {
	f, err := format.DecodeJournalFile(name, raw)
	if err != nil {
		return nil, err
	}
	return fields{"kind": "journal file", "content": f, "bytes": len(raw)}, nil
}

// describeMarks describes the file of a journal's marks.
func describeMarks(name string, raw []byte) (fields, error) {
	m, slot, err := format.DecodeJournalMarks(name, raw)
	if m == nil {
		return nil, err
	}
	return fields{"kind": "journal mark", "content": m, "slot": slot}, err
}

// describeBitmap describes the file of a group's bitmap: its newest header and,
// while that is active, how many regions each volume has in it.
func describeBitmap(name string, raw []byte) (fields, error) {
	const headers = format.BitmapSlots * format.BitmapPageBytes
	if len(raw) < headers || len(raw)%format.BitmapPageBytes != 0 {
		return nil, format.Corrupt(name, "a bitmap has its headers and whole pages, not %d bytes", len(raw))
	}
	var newest *format.BitmapHeader
	var damaged error
	for slot := range format.BitmapSlots {
		p := raw[slot*format.BitmapPageBytes:][:format.BitmapPageBytes]
		if allZero(p) {
			continue
		}
		h, err := format.DecodeBitmapHeader(name, p)
		if err != nil {
			damaged = err
		} else if newest == nil || h.Serial > newest.Serial {
			newest = h
		}
	}
	if newest == nil {
		if damaged == nil {
			damaged = format.Corrupt(name, "no header is in it")
		}
		return nil, damaged
	}
	out := fields{"kind": "bitmap", "content": newest}
	if !newest.Active {
		return out, damaged
	}
	regions := map[block.VolumeIndex]int{}
	pages, number := raw[headers:], uint64(0)
	for _, v := range newest.Volumes {
		for range v.Pages() {
			if len(pages) == 0 {
				return out, format.Corrupt(name, "the page behind the last one of volume %d is missing", v.Index)
			}
			p := pages[:format.BitmapPageBytes]
			counts, err := format.CheckBitmapPage(name, p, newest.Activation, number)
			switch {
			case err != nil: // all of its regions must be read
				damaged = err
				regions[v.Index] += format.BitmapPageRegions
			case counts:
				for _, c := range format.BitmapPageBits(p) {
					regions[v.Index] += bits.OnesCount8(c)
				}
			}
			pages, number = pages[format.BitmapPageBytes:], number+1
		}
	}
	var changed []fields
	for _, v := range newest.Volumes {
		changed = append(changed, fields{"volume": v.Index, "regions": regions[v.Index]})
	}
	out["changed"] = changed
	return out, damaged
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }
