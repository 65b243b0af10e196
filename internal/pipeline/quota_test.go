package pipeline

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/control"
	"drc/internal/vfs"
	"drc/vbuf"
)

func TestQuotas_ThatNoBufferCouldHave(t *testing.T) {
	dir := t.TempDir()
	total, _, err := room(vfs.OS(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for size, text := range map[int64]string{1: "is too small: give it at least 1048576 bytes", quotaMinBytes - 1: "too small", total + 1: "more than its whole file system has"} {
		path := filepath.Join(dir, "not", "made", "yet")
		_, err := withQuotas(vfs.OS(), []vbuf.DirOptions{{Path: dir}, {Path: path, SizeBytes: size}})
		var coded *control.CodedError
		if !errors.As(err, &coded) || coded.Code != 2 || !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), path) {
			t.Errorf("a quota of %d bytes: %v", size, err)
		}
	}
	got, err := withQuotas(vfs.OS(), []vbuf.DirOptions{{Path: dir, SizeBytes: quotaMinBytes}, {Path: dir, SizeBytes: total}})
	if err != nil || got[0].SizeBytes != quotaMinBytes || got[1].SizeBytes != total {
		t.Errorf("%+v, %v", got, err)
	}
}

// What the buffer holds already is not what others have taken from it.
func TestQuota_CountsWhatTheBufferHolds(t *testing.T) {
	dir := t.TempDir()
	const held = 3 << 20
	if err := os.MkdirAll(filepath.Join(dir, "journal"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "journal", "1.jrn"), make([]byte, held), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := usedBytes(dir); err != nil || n < held || n > held+1<<20 {
		t.Errorf("%d bytes are used: %v", n, err)
	}
	if n, err := usedBytes(filepath.Join(dir, "nothing")); err != nil || n != 0 {
		t.Errorf("%d bytes are used by nothing: %v", n, err)
	}
	got, err := withQuotas(vfs.OS(), []vbuf.DirOptions{{Path: dir}})
	if err != nil || got[0].SizeBytes < defaultQuotaMinBytes || got[0].SizeBytes > defaultQuotaBytes {
		t.Errorf("%+v, %v", got, err)
	}
}
