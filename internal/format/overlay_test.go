package format_test

import (
	"errors"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

const vectorOverlay = 0x0123456789abcdef

func vectorOverlayHeader() *format.OverlayHeader {
	return &format.OverlayHeader{
		Repo: block.ID{0: 0x11, 15: 0x01}, Group: vectorGroup, Volume: block.VolumeID{0: 0x71}, Branch: vectorBranch,
		Entry: 41, Hash: format.HashOf([]byte("entry")), Seq: 1234, SizeBytes: 1<<40 + 512, SectorSize: 512,
		Name: "wal-ä", Overlay: vectorOverlay,
	}
}

func vectorOverlayState() *format.OverlayState {
	return &format.OverlayState{Phase: format.OverlayPartial, Boot: "7e0f9a52-3c51-4a3e-9d0a-0c7d3b8f1e21", Activation: 0xfedcba9876543210}
}

func vectorOverlayPage() *format.OverlayPage {
	p := &format.OverlayPage{Activation: 0xfedcba9876543210}
	p.Written[0], p.Written[29], p.Durable[0] = 0b1011, 1<<63, 0b0011
	return p
}

func vectorOverlayDirectory() *format.OverlayDirectory {
	p := &format.OverlayDirectory{}
	p.Made[0], p.Made[59] = 0b101, 1<<63
	return p
}

func putPage(p interface {
	Put(raw []byte, overlay, number uint64)
}, number uint64) []byte {
	raw := make([]byte, format.OverlaySectorBytes)
	p.Put(raw, vectorOverlay, number)
	return raw
}

func decodeOverlayPage(raw []byte) (any, error) {
	p, made, err := format.ParseOverlayPage("page", raw, vectorOverlay, 7)
	if err == nil && !made {
		err = errors.New("it was never written")
	}
	return p, err
}

// overlayVectors are the structures of the file beside an overlay.
func overlayVectors() []bufferVector {
	return []bufferVector{
		{"overlay-header", vectorOverlayHeader().Encode(), func(raw []byte) (any, error) { return format.DecodeOverlayHeader("header", raw) }},
		{"overlay-state", vectorOverlayState().Encode(), func(raw []byte) (any, error) { return format.DecodeOverlayState("state", raw) }},
		{"overlay-page", putPage(vectorOverlayPage(), 7), decodeOverlayPage},
		{"overlay-directory", putPage(vectorOverlayDirectory(), 3), func(raw []byte) (any, error) {
			return format.ParseOverlayDirectory("directory", raw, vectorOverlay, 3)
		}},
	}
}

// TestOverlay_GoldenVectors holds the bytes of what is beside an overlay.
func TestOverlay_GoldenVectors(t *testing.T) {
	for _, v := range overlayVectors() {
		t.Run(v.name, func(t *testing.T) { formattest.Exact(t, v.name, v.raw, v.decode) })
	}
}

// TestOverlay_EveryChangedBitIsFound: no rot is taken for something else.
func TestOverlay_EveryChangedBitIsFound(t *testing.T) {
	for _, v := range overlayVectors() {
		formattest.Flips(v.raw, func(bit int, changed []byte) {
			if _, err := v.decode(changed); err == nil {
				t.Fatalf("%s: bit %d changed and not found", v.name, bit)
			}
		})
		for n := range len(v.raw) {
			if _, err := v.decode(v.raw[:n:n]); err == nil {
				t.Fatalf("%s: cut to %d bytes and not found", v.name, n)
			}
		}
		if _, err := v.decode(make([]byte, len(v.raw))); err == nil {
			t.Fatalf("%s: zeroes are accepted", v.name)
		}
	}
}

func TestOverlay_UnknownVersionIsCalledThat(t *testing.T) {
	for _, v := range overlayVectors()[:2] {
		v.raw[4] = 9
		_, err := v.decode(v.raw)
		if err == nil || !strings.Contains(err.Error(), "version 9") || !strings.Contains(err.Error(), "newer") {
			t.Errorf("%s: %v", v.name, err)
		}
	}
}

func TestOverlay_PageElsewhereIsFound(t *testing.T) {
	raw := putPage(vectorOverlayPage(), 7)
	if _, _, err := format.ParseOverlayPage("page", raw, vectorOverlay, 8); err == nil {
		t.Error("a page in another's place is accepted")
	}
	if _, _, err := format.ParseOverlayPage("page", raw, vectorOverlay+1, 7); err == nil {
		t.Error("a page of another overlay is accepted")
	}
	p := vectorOverlayPage()
	p.Durable[3] = 1
	if _, _, err := format.ParseOverlayPage("page", putPage(p, 7), vectorOverlay, 7); err == nil {
		t.Error("a block that is durable and not written is accepted")
	}
}

func TestOverlay_Layout(t *testing.T) {
	for _, c := range []struct{ size, blocks, pages, directory, bytes int64 }{
		{512, 1, 1, 1, 12288 + 512},
		{4096 * 1920, 1920, 1, 1, 12288 + 512},
		{4096*1920 + 512, 1921, 2, 1, 12288 + 1024},
		{1 << 40, 1 << 28, 139811, 37, 8192 + 20480 + 139811*512},
	} {
		l := format.LayOutOverlay(c.size)
		if l.Blocks != c.blocks || l.Pages != c.pages || l.DirectoryPages != c.directory || l.SizeBytes() != c.bytes {
			t.Errorf("%d bytes: %+v, a file of %d", c.size, l, l.SizeBytes())
		}
		sum := int64(0)
		for n := range l.Pages {
			sum += int64(l.PageBlocks(n))
		}
		if sum != l.Blocks {
			t.Errorf("%d bytes: the pages are about %d of %d blocks", c.size, sum, l.Blocks)
		}
	}
}

func FuzzOverlayHeader(f *testing.F) {
	f.Add(vectorOverlayHeader().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, ok := formattest.Stable(t, raw, func(p []byte) (*format.OverlayHeader, error) { return format.DecodeOverlayHeader("header", p) }, (*format.OverlayHeader).Encode)
		if ok && h.Validate() != nil {
			t.Fatalf("numbers do not fit: %+v", h)
		}
	})
}

func FuzzOverlayState(f *testing.F) {
	f.Add(vectorOverlayState().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		formattest.Stable(t, raw, func(p []byte) (*format.OverlayState, error) { return format.DecodeOverlayState("state", p) }, (*format.OverlayState).Encode)
	})
}

func FuzzOverlayPage(f *testing.F) {
	f.Add(putPage(vectorOverlayPage(), 7))
	f.Add(putPage(vectorOverlayDirectory(), 7))
	f.Fuzz(func(t *testing.T, raw []byte) {
		formattest.Stable(t, raw, func(p []byte) (format.OverlayPage, error) {
			page, made, err := format.ParseOverlayPage("page", p, vectorOverlay, 7)
			if err == nil && !made && page != (format.OverlayPage{}) {
				t.Fatal("a page that was never written has bits")
			}
			return page, err
		}, func(p format.OverlayPage) []byte { return putPage(&p, 7) })
		formattest.Stable(t, raw, func(p []byte) (format.OverlayDirectory, error) {
			return format.ParseOverlayDirectory("directory", p, vectorOverlay, 7)
		}, func(p format.OverlayDirectory) []byte { return putPage(&p, 7) })
	})
}
