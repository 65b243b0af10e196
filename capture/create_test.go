package capture

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOpenBacking_FailedCreationLeavesNothing: an empty file that stayed would
// be refused by the next, correct call.
func TestOpenBacking_FailedCreationLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	if _, _, err := OpenBacking(path, BackingOptions{CreateBytes: 1<<63 - 512}); err == nil {
		t.Fatal("a file of 8 EiB was created")
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("a failed creation left a file (%v)", err)
	}
	b, created, err := OpenBacking(path, BackingOptions{CreateBytes: 1 << 20})
	if err != nil || !created {
		t.Fatalf("the right call: created %v, %v", created, err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenBacking_LinkToNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("nothing", path); err != nil {
		t.Fatal(err)
	}
	_, _, err := OpenBacking(path, BackingOptions{CreateBytes: 1 << 20})
	if err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("a link to nothing: %v", err)
	}
}
