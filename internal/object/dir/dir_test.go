package dir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"drc/internal/object"
	"drc/internal/object/objecttest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if writer, root, ok := strings.Cut(os.Getenv(writerVariable), ":"); ok {
		number, err := strconv.Atoi(writer)
		if err == nil {
			err = write(root, number)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func newStore(t *testing.T) *Store {
	t.Helper()
	store, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return store
}

func TestConformance(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return newStore(t) })
}

func TestOpen_MissingRootIsNoBucketAndStaysMissing(t *testing.T) {
	root := filepath.Join(t.TempDir(), "not", "mounted")
	store, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	checkNoBucket(t, store)
	if _, err := os.Lstat(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the root was made: %v", err)
	}
	// The directory appears: it is mounted.
	if _, err := Open(root, Options{Create: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), "a/b", []byte("x")); err != nil {
		t.Fatal(err)
	}
	// It goes away.
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	checkNoBucket(t, store)
}

// TestPut_NotBelowAMountThatIsGone: when the file system of a store is gone,
// there is an empty directory in its place, which looks like an empty store.
func TestPut_NotBelowAMountThatIsGone(t *testing.T) {
	folder := t.TempDir()
	root, aside, below := filepath.Join(folder, "root"), filepath.Join(folder, "aside"), filepath.Join(folder, "below")
	for _, dir := range []string{root, below} {
		if err := os.Mkdir(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	first, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Put(t.Context(), "a/b", []byte("x")); err != nil {
		t.Fatal(err)
	}
	second, err := Open(root, Options{}) // which has used it for nothing yet
	if err != nil {
		t.Fatal(err)
	}
	move(root, aside) // the mount is gone
	move(below, root)
	for _, store := range []*Store{first, second} {
		_, putErr := store.Put(t.Context(), "a/c", []byte("y"))
		_, _, getErr := store.Get(t.Context(), "a/b", 10, nil)
		_, statErr := store.Stat(t.Context(), "a/b")
		var listErr error
		for _, listErr = range store.List(t.Context(), "a/", "") {
		}
		for i, err := range []error{putErr, getErr, statErr, listErr} {
			if !errors.Is(err, object.ErrNoBucket) || !strings.Contains(err.Error(), "mounted") {
				t.Errorf("call %d: %v, want ErrNoBucket", i, err)
			}
		}
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) != 0 {
		t.Errorf("%v was made in the directory below, %v", entries, err)
	}
	move(root, below)
	move(aside, root) // it is back
	for i, store := range []*Store{first, second} {
		if _, err := store.Put(t.Context(), fmt.Sprintf("a/%d", i), []byte("y")); err != nil {
			t.Error(err)
		}
		if _, err := store.Stat(t.Context(), "a/b"); err != nil {
			t.Error(err)
		}
	}
	// A copy of the store, on another disk maybe, is the store, too.
	if err := os.CopyFS(aside, os.DirFS(root)); err != nil {
		t.Fatal(err)
	}
	move(root, root+"-old")
	move(aside, root)
	if _, err := first.Put(t.Context(), "a/d", []byte("z")); err != nil {
		t.Error(err)
	}
}

// TestDelete_ForgetsWhichFoldersAreSynced: a folder that was taken away and
// made again by another process, which may not have synced it, is synced before
// something in it counts as put.
func TestDelete_ForgetsWhichFoldersAreSynced(t *testing.T) {
	store := newStore(t)
	if _, err := store.Put(t.Context(), "a/b/1", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), "a/b/1"); err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{"a", "a/b"} {
		if _, synced := store.durable.Load(folder); synced {
			t.Errorf("%s is gone, and counts as synced for whoever makes it again", folder)
		}
	}
}

func TestOpen_RootIsAFile(t *testing.T) {
	root := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(root, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	store, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	checkNoBucket(t, store)
	if _, err := Open(root, Options{Create: true}); err == nil || !strings.Contains(err.Error(), root) {
		t.Errorf("create over a file: %v", err)
	}
	if _, err := Open("relative", Options{}); err == nil {
		t.Error("a relative root was accepted")
	}
}

func checkNoBucket(t *testing.T, store *Store) {
	t.Helper()
	_, putErr := store.Put(t.Context(), "a/b", []byte("x"))
	_, _, getErr := store.Get(t.Context(), "a/b", 10, nil)
	_, rangeErr := store.GetRange(t.Context(), "a/b", 0, 1, nil)
	_, statErr := store.Stat(t.Context(), "a/b")
	deleteErr := store.Delete(t.Context(), "a/b")
	errs := []error{putErr, getErr, rangeErr, statErr, deleteErr}
	for _, prefix := range []string{"", "a/"} {
		listed, listedDirs := error(nil), error(nil)
		for _, listed = range store.List(t.Context(), prefix, "") {
		}
		for _, listedDirs = range store.ListDirs(t.Context(), prefix) {
		}
		errs = append(errs, listed, listedDirs)
	}
	for i, err := range errs {
		if !errors.Is(err, object.ErrNoBucket) {
			t.Errorf("call %d without a root: %v, want ErrNoBucket", i, err)
		}
	}
}

// TestPut_ManyStoresOneDirectory: the promise holds between processes, which
// share nothing but the directory.
func TestPut_ManyStoresOneDirectory(t *testing.T) {
	root := t.TempDir()
	for round := range 20 {
		const writers = 8
		name := "deep/" + objecttest.RandomName() + "/x"
		errs := make([]error, writers)
		var group sync.WaitGroup
		for i := range writers {
			store, err := Open(root, Options{})
			if err != nil {
				t.Fatal(err)
			}
			group.Go(func() { _, errs[i] = store.Put(t.Context(), name, objecttest.Bytes(uint64(i), 10_000)) })
		}
		group.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else if !errors.Is(err, object.ErrExists) {
				t.Error(err)
			}
		}
		if won != 1 {
			t.Fatalf("round %d: %d writers won", round, won)
		}
	}
	checkNoTemporary(t, root)
}

func TestPut_FailuresLeaveNoTemporaryFile(t *testing.T) {
	store := newStore(t)
	if _, err := store.Put(t.Context(), "a", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), "a", []byte("y")); !errors.Is(err, object.ErrExists) {
		t.Error(err)
	}
	// An object cannot be a folder, nor a folder an object.
	if _, err := store.Put(t.Context(), "a/b", []byte("y")); err == nil {
		t.Error("an object became a folder")
	}
	if _, err := store.Put(t.Context(), "b/c", []byte("y")); err != nil {
		t.Error(err)
	}
	if _, err := store.Put(t.Context(), "b", []byte("y")); !errors.Is(err, object.ErrExists) {
		t.Error(err)
	}
	checkNoTemporary(t, store.root)
}

// cancelledLater is a context that is cancelled after it was asked a few times.
type cancelledLater struct {
	context.Context
	asked, after int
}

func (c *cancelledLater) Err() error {
	if c.asked++; c.asked > c.after {
		return context.Canceled
	}
	return nil
}

// TestPut_StoppedInTheMiddleLeavesNoTemporaryFile: what a full disk or a stop
// cuts short must not take the space that is left; puts are tried for ever.
func TestPut_StoppedInTheMiddleLeavesNoTemporaryFile(t *testing.T) {
	store := newStore(t)
	if _, err := store.Put(t.Context(), "whole", []byte("x")); err != nil {
		t.Fatal(err)
	}
	stopped := 0
	for after := range 6 {
		ctx := &cancelledLater{Context: t.Context(), after: after}
		if _, err := store.Put(ctx, fmt.Sprint("a", after), make([]byte, 3*pieceSize)); errors.Is(err, context.Canceled) {
			stopped++
		}
		checkNoTemporary(t, store.root)
	}
	if stopped < 4 {
		t.Errorf("only %d puts were stopped: the test shows nothing", stopped)
	}
}

func TestDelete_TakesEmptyFoldersAway(t *testing.T) {
	store := newStore(t)
	for _, name := range []string{"a/b/c/1", "a/2"} {
		if _, err := store.Put(t.Context(), name, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Delete(t.Context(), "a/b/c/1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(store.path("a/b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty folder stays: %v", err)
	}
	if _, err := os.Lstat(store.path("a/2")); err != nil {
		t.Error(err)
	}
	if _, err := store.Put(t.Context(), "a/b/c/3", []byte("x")); err != nil {
		t.Errorf("the folders are not made again: %v", err)
	}
	for _, name := range []string{"a/b/c/3", "a/2"} {
		if err := store.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(store.root); err != nil {
		t.Errorf("the root is gone: %v", err)
	}
}

// TestPut_AfterCrash: a writer died at each of its steps, and another repeats
// the put.
func TestPut_AfterCrash(t *testing.T) {
	body := objecttest.Bytes(1, 10_000)
	for crash, prepare := range map[string]func(t *testing.T, s *Store){
		"while writing the temporary file": func(t *testing.T, s *Store) {
			writeFile(t, filepath.Join(s.root, temporaryDir, "dead"), body[:5000])
		},
		"before the link": func(t *testing.T, s *Store) {
			writeFile(t, filepath.Join(s.root, temporaryDir, "dead"), body)
			if err := os.Mkdir(s.path("a"), 0o777); err != nil {
				t.Fatal(err)
			}
		},
		"after the link": func(t *testing.T, s *Store) {
			writeFile(t, filepath.Join(s.root, temporaryDir, "dead"), body)
			if err := os.Mkdir(s.path("a"), 0o777); err != nil {
				t.Fatal(err)
			}
			if err := os.Link(filepath.Join(s.root, temporaryDir, "dead"), s.path("a/b")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(crash, func(t *testing.T) {
			store := newStore(t)
			prepare(t, store)
			if _, err := store.Put(t.Context(), "a/b", body); err != nil {
				t.Fatal(err)
			}
			got, _, err := store.Get(t.Context(), "a/b", 10_000, nil)
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestPut_FolderRemovedBySomeone(t *testing.T) {
	store := newStore(t)
	for _, name := range []string{"a/b/1", "a/b/2"} {
		if _, err := store.Put(t.Context(), name, []byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(store.path("a")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpen_RemovesOldTemporaryFilesOnly(t *testing.T) {
	store := newStore(t)
	old, young := filepath.Join(store.root, temporaryDir, "old"), filepath.Join(store.root, temporaryDir, "young")
	writeFile(t, old, nil)
	writeFile(t, young, nil)
	before := time.Now().Add(-temporaryAge - time.Minute)
	if err := os.Chtimes(old, before, before); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(store.root, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old file is still there: %v", err)
	}
	if _, err := os.Lstat(young); err != nil {
		t.Errorf("the young file is gone: %v", err)
	}
}

func TestList_LeavesForeignFilesOut(t *testing.T) {
	store := newStore(t)
	if _, err := store.Put(t.Context(), "a/b", []byte("x")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(store.root, "lost+found", "x"), nil)
	writeFile(t, filepath.Join(store.root, "a", "UPPER"), nil)
	if err := os.Chmod(filepath.Join(store.root, "lost+found"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(store.root, "a", "dangling")); err != nil {
		t.Fatal(err)
	}
	var names []string
	for info, err := range store.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, info.Name)
	}
	if !slices.Equal(names, []string{"a/b"}) {
		t.Errorf("listed %q", names)
	}
}

func TestLink_WithoutHardLinks(t *testing.T) {
	// The fallback itself: renames never replace.
	folder := t.TempDir()
	a, b := filepath.Join(folder, "a"), filepath.Join(folder, "b")
	writeFile(t, a, []byte("a"))
	writeFile(t, b, []byte("b"))
	if err := renameNoReplace(a, b); !errors.Is(err, os.ErrExist) {
		t.Errorf("rename over a file: %v", err)
	}
	if err := renameNoReplace(a, filepath.Join(folder, "c")); err != nil {
		t.Error(err)
	}
}

func checkNoTemporary(t *testing.T, root string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, temporaryDir))
	if err != nil || len(entries) > 0 {
		t.Errorf("temporary files were left: %v, %v", entries, err)
	}
}

func writeFile(t *testing.T, path string, body []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, body, 0o666); err != nil {
		t.Fatal(err)
	}
}
