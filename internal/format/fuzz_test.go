package format_test

import (
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

// The fuzz tests give hostile bytes to each decoder: it must not panic, make
// no more things than there are bytes for them, and what it accepts must
// encode to something that means the same.

func FuzzItems(f *testing.F) {
	f.Add(vectorItems(true).Encode())
	f.Add(vectorItems(false).Encode())
	f.Add(vectorBranchItems().Encode())
	f.Add(vectorHandoverItems().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		it, ok := formattest.Stable(t, raw, func(p []byte) (*format.Items, error) { return format.DecodeItems("items", p) }, (*format.Items).Encode)
		if !ok {
			return
		}
		formattest.Bounded(t, raw, "volumes", len(it.Volumes), 34)
		formattest.Bounded(t, raw, "degraded segments", len(it.Degraded), 26)
		for _, p := range it.Partials {
			formattest.Bounded(t, raw, "regions", len(p.Remaining), 16)
		}
		if it.Branch != nil {
			formattest.Bounded(t, raw, "volumes of a branch", len(it.Branch.Volumes), 3)
		}
	})
}

func FuzzSegmentIndex(f *testing.F) {
	f.Add(vectorIndex().Encode(), int64(70016+4112))
	f.Fuzz(func(t *testing.T, raw []byte, frames int64) {
		x, ok := formattest.Stable(t, raw, func(p []byte) (*format.SegmentIndex, error) { return format.DecodeSegmentIndex("index", p, frames) }, (*format.SegmentIndex).Encode)
		if !ok {
			return
		}
		formattest.Bounded(t, raw, "frames", len(x.Frames), 4)
		for _, frame := range x.Frames {
			formattest.Bounded(t, raw, "chunks", len(frame.Chunks), 1)
			if frame.Plain() > format.MaxFrameBytes {
				t.Fatalf("a frame of %d bytes", frame.Plain())
			}
		}
	})
}

func FuzzShardHeader(f *testing.F) {
	f.Add(vectorShard().Append(nil))
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, ok := formattest.Stable(t, raw, func(p []byte) (format.ShardHeader, error) { return format.DecodeShardHeader("shard", p) },
			func(h format.ShardHeader) []byte { return h.Append(nil) })
		if ok && (h.ShardBytes*int64(h.Profile.Data) < h.Payload || h.ShardBytes > format.MaxSegmentBytes+64) {
			t.Fatalf("numbers do not fit: %+v", h)
		}
	})
}

func FuzzManifestHeader(f *testing.F) {
	f.Add(vectorManifestHeader().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		formattest.Stable(t, raw, func(p []byte) (format.ManifestHeader, error) {
			h, n, err := format.DecodeManifestHeader("header", p)
			if n > len(p) {
				t.Fatalf("%d bytes read of %d", n, len(p))
			}
			return h, err
		}, func(h format.ManifestHeader) []byte { return h.Encode() })
	})
}

func FuzzManifestTail(f *testing.F) {
	f.Add(vectorTail().Append(nil), int64(1000))
	f.Fuzz(func(t *testing.T, raw []byte, total int64) {
		tail, ok := formattest.Stable(t, raw, func(p []byte) (format.ManifestTail, error) { return format.DecodeManifestTail("tail", p, total) },
			func(x format.ManifestTail) []byte { return x.Append(nil) })
		if ok && int64(tail.HeaderBytes)+int64(tail.DirectoryBytes)+format.ManifestTailSize > total {
			t.Fatalf("parts of %d and %d bytes in %d", tail.HeaderBytes, tail.DirectoryBytes, total)
		}
	})
}

func FuzzDirectory(f *testing.F) {
	f.Add(vectorDirectory().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, ok := formattest.Stable(t, raw, func(p []byte) (*format.Directory, error) { return format.DecodeDirectory("directory", p) }, (*format.Directory).Encode)
		if !ok {
			return
		}
		formattest.Bounded(t, raw, "pages", len(d.Pages), 10)
		formattest.Bounded(t, raw, "key sets", len(d.KeySets), 1)
		for i, p := range d.Pages {
			if p.End <= p.First || p.PlainBytes > format.MaxPageBytes ||
				(i > 0 && d.Pages[i-1].Volume == p.Volume && d.Pages[i-1].End > p.First) {
				t.Fatalf("page %d is %+v", i, p)
			}
		}
	})
}

func FuzzPage(f *testing.F) {
	f.Add(vectorPage().Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, ok := formattest.Stable(t, raw, func(b []byte) (*format.Page, error) { return format.DecodePage("page", b) }, (*format.Page).Encode)
		if !ok {
			return
		}
		formattest.Bounded(t, raw, "segments", len(p.Segments), 23)
		formattest.Bounded(t, raw, "extents", len(p.Extents), 3)
		at := int64(0)
		for i, x := range p.Extents {
			if x.Off < at || x.Len <= 0 || (!x.Zero && x.Segment >= len(p.Segments)) {
				t.Fatalf("extent %d is %+v", i, x)
			}
			at = x.End()
		}
	})
}

func FuzzCertificate(f *testing.F) {
	f.Add(formattest.Bytes(f, "certificate"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var end []byte
		formattest.Stable(t, raw, func(p []byte) (format.Certificate, error) {
			c, _, signature, err := format.DecodeCertificate(p)
			end = signature
			return c, err
		}, func(c format.Certificate) []byte { return append(c.EncodeBody(), end...) })
	})
}

func FuzzKeySet(f *testing.F) {
	f.Add(formattest.Bytes(f, "keyset"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var end []byte
		formattest.Stable(t, raw, func(p []byte) (format.KeySet, error) {
			k, _, signature, err := format.DecodeKeySet(p)
			end = signature
			return k, err
		}, func(k format.KeySet) []byte { return append(k.EncodeBody(), end...) })
	})
}

func FuzzRepoRecord(f *testing.F) {
	f.Add(formattest.Bytes(f, "repo-record"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var end []byte
		r, ok := formattest.Stable(t, raw, func(p []byte) (format.RepoRecord, error) {
			r, _, signature, err := format.DecodeRepoRecord("record", p)
			end = signature
			return r, err
		}, func(r format.RepoRecord) []byte { return append(r.EncodeBody(), end...) })
		if ok {
			formattest.Bounded(t, raw, "stores", len(r.Stores), 17)
			formattest.Bounded(t, raw, "recipients", len(r.Recipients), 1)
		}
	})
}

func FuzzLogObject(f *testing.F) {
	f.Add(formattest.Bytes(f, "log-promise"))
	f.Add(formattest.Bytes(f, "log-commit"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var end []byte
		o, ok := formattest.Stable(t, raw, func(p []byte) (format.LogObject, error) {
			o, _, signature, err := format.DecodeLogObject("object", p)
			end = signature
			return o, err
		}, func(o format.LogObject) []byte { return append(o.EncodeBody(), end...) })
		if ok {
			formattest.Bounded(t, raw, "tails", len(o.Tails), 56)
		}
	})
}

func FuzzValue(f *testing.F) {
	f.Add(formattest.Bytes(f, "value"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var end []byte
		v, ok := formattest.Stable(t, raw, func(p []byte) (format.Value, error) {
			v, head, body, signature, err := format.DecodeValue("value", p)
			if err == nil && (len(head) > len(body) || len(body)+len(signature) != len(p)) {
				t.Fatalf("head of %d, body of %d, signature of %d in %d bytes", len(head), len(body), len(signature), len(p))
			}
			end = signature
			return v, err
		}, func(v format.Value) []byte { return append(v.EncodeBody(), end...) })
		if ok {
			formattest.Bounded(t, raw, "key sets", len(v.KeySets), 1)
		}
	})
}

func FuzzNames(f *testing.F) {
	for name := range strings.SplitSeq(string(vectorNames()), "\n") {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if index, ok := format.ParseLogName(vectorGroup, name); ok && format.LogName(vectorGroup, index) != name {
			t.Fatalf("%q is read as log object %d", name, index)
		}
		if m, ok := format.ParseManifestName(vectorGroup, name); ok && m.Name(vectorGroup) != name {
			t.Fatalf("%q is read as manifest %+v", name, m)
		}
		if id, err := block.ParseID(name); err == nil && id.String() != name {
			t.Fatalf("%q is read as id %s", name, id)
		}
	})
}
