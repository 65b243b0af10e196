package restorer_test

import (
	"strings"
	"testing"

	"drc/internal/format"
	"drc/internal/object/fault"
	"drc/restorer"
)

// Who reads an image from its beginning to its end gets what follows with what
// is asked for: few requests, and still each byte once. Reads here and there
// fetch nothing that was not asked for, and damage behind a read does not
// concern it.
func TestReadAhead_Sequential(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{stores: 1, volumes: []int64{16 << 20}})
	x := w.start()
	for i := range int64(4) {
		w.write(0, i*4<<20, fill(w.rng, make([]byte, 4<<20)))
		w.cut()
	}
	x.stop()
	want := w.model(0, w.journal.Captured())
	f := w.faults[0]
	fetched := func() (requests, bytes int64) {
		for _, c := range f.Calls() {
			if c.Op == fault.GetRange && strings.Contains(c.Name, "/segments/") {
				requests++
				bytes += c.Size
			}
		}
		f.Forget()
		return requests, bytes
	}
	const piece = 64 << 10
	read := func(im *restorer.Image, off int64) error {
		got := make([]byte, piece)
		if err := im.ReadAt(w.ctx, got, off); err != nil {
			return err
		}
		w.same("read", got, want[off:off+piece])
		return nil
	}
	im := w.image()
	fetched()
	for off := int64(0); off < int64(len(want)); off += piece {
		w.must(read(im, off))
	}
	n, bytes := fetched()
	if reads := int64(len(want) / piece); n > reads/8 || bytes > int64(len(want))*9/8 {
		t.Errorf("%d requests for %d bytes in %d reads of %d", n, bytes, reads, len(want))
	}
	im = w.image()
	fetched()
	for off := int64(len(want)) - piece; off >= 0; off -= 1 << 20 { // backwards
		w.must(read(im, off))
	}
	if _, bytes = fetched(); bytes > int64(len(want))/2 {
		t.Errorf("%d bytes for 16 reads of %d", bytes, piece)
	}
	// Two streams at once are two streams.
	im = w.image()
	fetched()
	for off := int64(0); off < 8<<20; off += piece {
		w.must(read(im, off))
		w.must(read(im, 8<<20+off))
	}
	if n, bytes = fetched(); n > int64(len(want)/piece/8) || bytes > int64(len(want))*9/8 {
		t.Errorf("two streams: %d requests for %d bytes", n, bytes)
	}
	// The last segment is lost whole; what is before it can be read.
	all := names(t, w.stores[0], format.GroupPrefix(w.groupID)+"segments/")
	im = w.image()
	extents, err := im.Extents(w.ctx, lastMiB(len(want)))
	w.must(err)
	for _, name := range all {
		if strings.Contains(name, extents[0].Segment.ID.String()) {
			w.must(w.stores[0].Delete(w.ctx, name))
		}
	}
	for off := int64(8 << 20); off < 12<<20; off += piece {
		w.must(read(im, off))
	}
	if err := read(im, 12<<20); err == nil {
		t.Error("what is lost was read")
	}
}
