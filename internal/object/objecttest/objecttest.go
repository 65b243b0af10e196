// Package objecttest is the conformance suite of object.Store. An implementation
// that passes it can be used wherever DRC uses a store.
package objecttest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"drc/internal/object"
	"drc/internal/object/fault"
)

// multipartSize is above the 16 MiB at which S3 libraries begin multipart
// uploads, which drop the create-only condition.
const multipartSize = 17<<20 + 123

// listedObjects needs more than one page of an S3 listing, which has 1000.
const listedObjects = 1100

// Run runs the suite. Each call of newStore returns an empty store.
func Run(t *testing.T, newStore func(t *testing.T) object.Store) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, object.Store)
	}{
		{"PutGet", testPutGet},
		{"PutTwice", testPutTwice},
		{"PutLarge", testPutLarge},
		{"PutKeepsNoBody", testPutKeepsNoBody},
		{"PutRace", testPutRace},
		{"PutSameRace", testPutSameRace},
		{"PutAnswerLost", testPutAnswerLost},
		{"PutAfterDelete", testPutAfterDelete},
		{"Missing", testMissing},
		{"Limit", testLimit},
		{"Append", testAppend},
		{"Range", testRange},
		{"Names", testNames},
		{"BadNames", testBadNames},
		{"ListOrder", testListOrder},
		{"ListPages", testListPages},
		{"ListEmpty", testListEmpty},
		{"ListDirs", testListDirs},
		{"Canceled", testCanceled},
		{"Close", testClose},
		{"Probe", testProbe},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := newStore(t)
			t.Cleanup(func() {
				if err := store.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test.run(t, store)
		})
	}
}

// Bytes returns size bytes that depend on seed only and do not compress.
func Bytes(seed uint64, size int) []byte {
	body := make([]byte, size)
	_, _ = mathrand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(body)
	return body
}

// RandomName returns a name element that no other call returned.
func RandomName() string {
	var random [10]byte
	rand.Read(random[:])
	return hex.EncodeToString(random[:])
}

func testPutGet(t *testing.T, store object.Store) {
	for _, size := range []int{0, 1, 4095, 4096, 1 << 20, 5<<20 + 1} {
		name, body := fmt.Sprintf("size/%d", size), Bytes(uint64(size), size)
		answer, err := store.Put(t.Context(), name, body)
		if err != nil {
			t.Fatal(err)
		}
		checkDate(t, "put", answer)
		checkObject(t, store, name, body)
		_, answer, err = store.Get(t.Context(), name, math.MaxInt64, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkDate(t, "get", answer)
	}
}

func testPutTwice(t *testing.T, store object.Store) {
	first := Bytes(1, 1000)
	mustPut(t, store, "a", first)
	mustPut(t, store, "a", first)
	for what, other := range map[string][]byte{
		"other bytes": Bytes(2, 1000),
		"fewer bytes": first[:999],
		"more bytes":  append(slices.Clone(first), 0),
		"no bytes":    nil,
		"the last bit changed": func() []byte {
			body := slices.Clone(first)
			body[999] ^= 1
			return body
		}(),
	} {
		if _, err := store.Put(t.Context(), "a", other); !errors.Is(err, object.ErrExists) {
			t.Errorf("put of %s over an object: %v, want ErrExists", what, err)
		}
	}
	checkObject(t, store, "a", first)
	mustPut(t, store, "empty", nil)
	mustPut(t, store, "empty", nil)
	if _, err := store.Put(t.Context(), "empty", first); !errors.Is(err, object.ErrExists) {
		t.Errorf("put over an empty object: %v, want ErrExists", err)
	}
	checkObject(t, store, "empty", nil)
}

func testPutLarge(t *testing.T, store object.Store) {
	first := Bytes(1, multipartSize)
	mustPut(t, store, "large", first)
	second := slices.Clone(first)
	second[multipartSize-1]++
	if _, err := store.Put(t.Context(), "large", second); !errors.Is(err, object.ErrExists) {
		t.Errorf("second put of a large object: %v, want ErrExists", err)
	}
	mustPut(t, store, "large", first)
	checkObject(t, store, "large", first)
}

func testPutKeepsNoBody(t *testing.T, store object.Store) {
	body := Bytes(1, 5000)
	want := slices.Clone(body)
	mustPut(t, store, "a", body)
	clear(body)
	checkObject(t, store, "a", want)
	got, _, err := store.Get(t.Context(), "a", math.MaxInt64, nil)
	if err != nil {
		t.Fatal(err)
	}
	clear(got)
	checkObject(t, store, "a", want)
}

// testPutRace: of concurrent puts of different bytes exactly one wins.
func testPutRace(t *testing.T, store object.Store) {
	const writers, rounds = 8, 10
	for round := range rounds {
		size := 100
		if round == rounds-1 {
			size = multipartSize
		}
		name := fmt.Sprintf("race/%d", round)
		errs := make([]error, writers)
		parallel(writers, func(i int) {
			_, errs[i] = store.Put(t.Context(), name, Bytes(uint64(i), size))
			// A store may ask to put again, and the answer must not change then.
			for attempt := 0; errs[i] != nil && !errors.Is(errs[i], object.ErrExists) && attempt < 20; attempt++ {
				_, errs[i] = store.Put(t.Context(), name, Bytes(uint64(i), size))
			}
		})
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner >= 0:
				t.Fatalf("round %d: writers %d and %d both won", round, winner, i)
			case err == nil:
				winner = i
			case !errors.Is(err, object.ErrExists):
				t.Errorf("round %d: writer %d: %v, want ErrExists", round, i, err)
			}
		}
		if winner < 0 {
			t.Fatalf("round %d: nobody won", round)
		}
		checkObject(t, store, name, Bytes(uint64(winner), size))
	}
}

// testPutSameRace: concurrent puts of the same bytes all succeed.
func testPutSameRace(t *testing.T, store object.Store) {
	const writers = 8
	body := Bytes(1, 100_000)
	parallel(writers, func(i int) {
		_, err := store.Put(t.Context(), "deep/er/same", body)
		for attempt := 0; err != nil && attempt < 20; attempt++ {
			if errors.Is(err, object.ErrExists) {
				break
			}
			_, err = store.Put(t.Context(), "deep/er/same", body)
		}
		if err != nil {
			t.Errorf("writer %d of the same bytes: %v", i, err)
		}
	})
	checkObject(t, store, "deep/er/same", body)
}

// testPutAnswerLost: whoever repeats a put whose answer was lost meets its own
// success, also after the other writer tried in between.
func testPutAnswerLost(t *testing.T, below object.Store) {
	store := fault.New(below)
	lost := errors.New("connection reset")
	store.Add(fault.Rule{Op: fault.Put, Times: 1, After: lost})
	mine, other := Bytes(1, 3000), Bytes(2, 3000)
	if _, err := store.Put(t.Context(), "a", mine); !errors.Is(err, lost) {
		t.Fatalf("put: %v, want the lost answer", err)
	}
	if _, err := store.Put(t.Context(), "a", other); !errors.Is(err, object.ErrExists) {
		t.Fatalf("put by another writer: %v, want ErrExists", err)
	}
	mustPut(t, store, "a", mine)
	checkObject(t, store, "a", mine)
}

func testPutAfterDelete(t *testing.T, store object.Store) {
	mustPut(t, store, "a/b", []byte("one"))
	if err := store.Delete(t.Context(), "a/b"); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), "a/b"); err != nil {
		t.Errorf("delete of an absent object: %v", err)
	}
	checkAbsent(t, store, "a/b")
	checkList(t, store, "", "", nil)
	mustPut(t, store, "a/b", []byte("two"))
	checkObject(t, store, "a/b", []byte("two"))
}

func testMissing(t *testing.T, store object.Store) {
	mustPut(t, store, "a/b", []byte("x"))
	for _, name := range []string{"b", "a", "a/c", "a/b/c", "c/d/e"} {
		checkAbsent(t, store, name)
		if err := store.Delete(t.Context(), "c/d/e"); err != nil {
			t.Errorf("delete %s: %v", name, err)
		}
	}
}

func testLimit(t *testing.T, store object.Store) {
	body := Bytes(1, 1000)
	mustPut(t, store, "a", body)
	got, _, err := store.Get(t.Context(), "a", 1000, nil)
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("get with a limit of the size: %d bytes, %v", len(got), err)
	}
	for _, limit := range []int64{999, 1, 0} {
		if _, _, err := store.Get(t.Context(), "a", limit, nil); !errors.Is(err, object.ErrTooLarge) {
			t.Errorf("get with limit %d: %v, want ErrTooLarge", limit, err)
		}
	}
}

func testAppend(t *testing.T, store object.Store) {
	body := Bytes(1, 1000)
	mustPut(t, store, "a", body)
	for _, capacity := range []int{4, 10_000} {
		dst := append(make([]byte, 0, capacity), "head"...)
		got, _, err := store.Get(t.Context(), "a", 1000, dst)
		if err != nil || !bytes.Equal(got, append([]byte("head"), body...)) {
			t.Errorf("get does not append: %d bytes, %v", len(got), err)
		}
		got, err = store.GetRange(t.Context(), "a", 10, 20, dst)
		if err != nil || !bytes.Equal(got, append([]byte("head"), body[10:30]...)) {
			t.Errorf("get of a range does not append: %d bytes, %v", len(got), err)
		}
	}
}

func testRange(t *testing.T, store object.Store) {
	const size = 100_000
	body := Bytes(1, size)
	mustPut(t, store, "a", body)
	for _, r := range [][2]int64{{0, 1}, {0, size}, {1, size - 1}, {size - 1, 1}, {4096, 4096}, {0, 0}, {size, 0}, {77, 0}} {
		got, err := store.GetRange(t.Context(), "a", r[0], r[1], nil)
		if err != nil || !bytes.Equal(got, body[r[0]:r[0]+r[1]]) {
			t.Errorf("range %v: %d bytes, %v", r, len(got), err)
		}
	}
	for _, r := range [][2]int64{{0, size + 1}, {size - 1, 2}, {size, 1}, {size + 1, 1}, {size + 1, 0}, {1 << 40, 1}, {1, size}} {
		if _, err := store.GetRange(t.Context(), "a", r[0], r[1], nil); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("range %v past the end: %v, want io.ErrUnexpectedEOF", r, err)
		}
	}
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {math.MaxInt64, 2}} {
		if _, err := store.GetRange(t.Context(), "a", r[0], r[1], nil); err == nil {
			t.Errorf("range %v was accepted", r)
		}
	}
	mustPut(t, store, "empty", nil)
	if _, err := store.GetRange(t.Context(), "empty", 0, 1, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("range of an empty object: %v, want io.ErrUnexpectedEOF", err)
	}
	if got, err := store.GetRange(t.Context(), "empty", 0, 0, nil); err != nil || len(got) != 0 {
		t.Errorf("empty range of an empty object: %d bytes, %v", len(got), err)
	}
}

func testNames(t *testing.T, store object.Store) {
	names := []string{
		"a", "0", "-", "_", "...", "a.b", "a-b_c.d", ".hidden", "..a", "tmp/.tmp", ".tmp/x",
		"a0/b1/c2/d3/e4/f5", strings.Repeat("x", 200), strings.Repeat("e/", 50) + "f",
		"z/" + strings.Repeat("y", 200),
	}
	for i, name := range names {
		mustPut(t, store, name, Bytes(uint64(i), 100+i))
	}
	for i, name := range names {
		checkObject(t, store, name, Bytes(uint64(i), 100+i))
	}
	slices.Sort(names)
	checkList(t, store, "", "", names)
}

func testBadNames(t *testing.T, store object.Store) {
	for _, name := range []string{"", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "./a", "A", "a b", "ä", "a\x00", "a\n", "a%2fb", "a+b", "~", "a\\b", strings.Repeat("x", 201), strings.Repeat("abcdefg/", 200) + "x"} {
		calls := map[string]func() error{
			"put":    func() error { _, err := store.Put(t.Context(), name, nil); return err },
			"get":    func() error { _, _, err := store.Get(t.Context(), name, 1, nil); return err },
			"range":  func() error { _, err := store.GetRange(t.Context(), name, 0, 1, nil); return err },
			"stat":   func() error { _, err := store.Stat(t.Context(), name); return err },
			"delete": func() error { return store.Delete(t.Context(), name) },
		}
		for call, do := range calls {
			if err := do(); err == nil || errors.Is(err, object.ErrNotFound) {
				t.Errorf("%s of %q: %v, want an error about the name", call, name, err)
			}
		}
	}
	for _, prefix := range []string{"/", "A", "a//", "../", "a/./"} {
		for _, err := range store.List(t.Context(), prefix, "") {
			if err == nil {
				t.Errorf("list of %q yields objects", prefix)
			}
		}
	}
	checkList(t, store, "", "", nil)
}

func testListOrder(t *testing.T, store object.Store) {
	names := []string{
		"a-1", "a.1", "a/-", "a/.x", "a/0", "a/b/c", "a/b-c", "a/b.c", "a/b0", "a0", "a_", "aa/a", "ab/a", "b/1", "b/10", "b/2", "c",
	}
	for _, name := range names {
		mustPut(t, store, name, []byte(name))
	}
	slices.Sort(names)
	afters := append([]string{"", "a", "a/", "a/b", "a/b/", "a/b/c", "a/c", "a1", "b/1", "zzz", "-", "a/b/c/d"}, names...)
	for _, prefix := range []string{"", "a", "a/", "a/b", "a/b/", "a/b/c", "b/", "b/1", "c", "d", "d/", "a.", "aa/a", "c/", "c/d/"} {
		for _, after := range afters {
			var want []string
			for _, name := range names {
				if strings.HasPrefix(name, prefix) && name > after {
					want = append(want, name)
				}
			}
			checkList(t, store, prefix, after, want)
		}
	}
	for info, err := range store.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		if info.Size != int64(len(info.Name)) {
			t.Errorf("%s is listed with %d bytes, has %d", info.Name, info.Size, len(info.Name))
		}
		if info.Name == "a/b-c" {
			break // a listing may be left early
		}
	}
}

func testListPages(t *testing.T, store object.Store) {
	names := make([]string, listedObjects)
	for i := range names {
		names[i] = fmt.Sprintf("many/%02d/%05d", i%3, i)
	}
	names = append(names, "first", "zlast")
	parallel(16, func(worker int) {
		for i := worker; i < len(names); i += 16 {
			if _, err := store.Put(t.Context(), names[i], []byte("x")); err != nil {
				t.Errorf("put %s: %v", names[i], err)
			}
		}
	})
	slices.Sort(names)
	checkList(t, store, "", "", names)
	checkList(t, store, "many/", "", names[1:len(names)-1])
	checkList(t, store, "many/", names[100], names[101:len(names)-1])
	checkDirs(t, store, "many/", []string{"00", "01", "02"})
}

func testListEmpty(t *testing.T, store object.Store) {
	checkList(t, store, "", "", nil)
	checkList(t, store, "a/", "", nil)
	checkList(t, store, "", "a", nil)
	checkDirs(t, store, "", nil)
	checkDirs(t, store, "a/b/", nil)
}

func testListDirs(t *testing.T, store object.Store) {
	for _, name := range []string{"groups/a/x", "groups/a/y", "groups/b", "groups/a.b/x", "groups/a0/x/y/z", "groups/c/d/e", "top", "gone/away/x"} {
		mustPut(t, store, name, []byte("x"))
	}
	if err := store.Delete(t.Context(), "gone/away/x"); err != nil {
		t.Fatal(err)
	}
	checkDirs(t, store, "", []string{"groups"})
	checkDirs(t, store, "groups/", []string{"a", "a.b", "a0", "c"})
	checkDirs(t, store, "groups/c/", []string{"d"})
	checkDirs(t, store, "groups/a/", nil)
	checkDirs(t, store, "groups/b/", nil)
	checkDirs(t, store, "gone/", nil)
	for element, err := range store.ListDirs(t.Context(), "groups/") {
		if err != nil || element != "a" {
			t.Errorf("first folder is %q, %v", element, err)
		}
		break
	}
	for _, prefix := range []string{"groups", "/", "A/"} {
		for _, err := range store.ListDirs(t.Context(), prefix) {
			if err == nil {
				t.Errorf("folders of %q were listed", prefix)
			}
		}
	}
}

func testCanceled(t *testing.T, store object.Store) {
	mustPut(t, store, "a/a", []byte("x"))
	mustPut(t, store, "b", []byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	listed := 0
	for _, err := range store.List(ctx, "", "") {
		// It may have read ahead, but it must not hang.
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("canceled list: %v", err)
			}
			break
		}
		listed++
		cancel()
	}
	cancel()
	if listed == 0 {
		t.Error("nothing was listed")
	}
	last := func(err error) error { return err }
	calls := map[string]func() error{
		"put":   func() error { _, err := store.Put(ctx, "c", []byte("x")); return err },
		"get":   func() error { _, _, err := store.Get(ctx, "b", 10, nil); return err },
		"range": func() error { _, err := store.GetRange(ctx, "b", 0, 1, nil); return err },
		"stat":  func() error { _, err := store.Stat(ctx, "b"); return err },
		"list": func() (err error) {
			for _, err = range store.List(ctx, "", "") {
				return last(err)
			}
			return nil
		},
		"listdirs": func() (err error) {
			for _, err = range store.ListDirs(ctx, "") {
				return last(err)
			}
			return nil
		},
		"delete": func() error { return store.Delete(ctx, "b") },
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a canceled context: %v, want context.Canceled", name, err)
		}
	}
	checkObject(t, store, "b", []byte("x"))
	checkAbsent(t, store, "c")
}

func testClose(t *testing.T, store object.Store) {
	mustPut(t, store, "a", []byte("x"))
	for range 2 {
		if err := store.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if store.URL() == "" {
		t.Error("the URL is empty")
	}
}

func testProbe(t *testing.T, store object.Store) {
	if err := object.Probe(t.Context(), store); err != nil {
		t.Error(err)
	}
	checkList(t, store, "", "", nil)
}

// checkDate allows a date to be missing, but not to be far off: all stores under
// test have this host's clock.
func checkDate(t *testing.T, call string, answer object.Answer) {
	t.Helper()
	if d := time.Since(answer.Date); !answer.Date.IsZero() && (d > time.Hour || d < -time.Hour) {
		t.Errorf("%s answered with the date %v", call, answer.Date)
	}
}

func mustPut(t *testing.T, store object.Store, name string, body []byte) {
	t.Helper()
	if _, err := store.Put(t.Context(), name, body); err != nil {
		t.Fatal(err)
	}
}

func checkObject(t *testing.T, store object.Store, name string, want []byte) {
	t.Helper()
	got, _, err := store.Get(t.Context(), name, math.MaxInt64, nil)
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes that are not the %d bytes put", name, len(got), len(want))
	}
	info, err := store.Stat(t.Context(), name)
	if err != nil || info != (object.Info{Name: name, Size: int64(len(want))}) {
		t.Errorf("stat of %s: %v, %v, want %d bytes", name, info, err, len(want))
	}
}

func checkAbsent(t *testing.T, store object.Store, name string) {
	t.Helper()
	if _, _, err := store.Get(t.Context(), name, 100, nil); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("get of absent %s: %v, want ErrNotFound", name, err)
	}
	if _, err := store.GetRange(t.Context(), name, 0, 1, nil); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("range of absent %s: %v, want ErrNotFound", name, err)
	}
	if _, err := store.GetRange(t.Context(), name, 0, 0, nil); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("empty range of absent %s: %v, want ErrNotFound", name, err)
	}
	if _, err := store.Stat(t.Context(), name); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("stat of absent %s: %v, want ErrNotFound", name, err)
	}
}

func checkList(t *testing.T, store object.Store, prefix, after string, want []string) {
	t.Helper()
	var got []string
	for info, err := range store.List(t.Context(), prefix, after) {
		if err != nil {
			t.Errorf("list of %q after %q: %v", prefix, after, err)
			return
		}
		got = append(got, info.Name)
	}
	if !slices.Equal(got, want) {
		t.Errorf("list of %q after %q: %.20q, want %.20q", prefix, after, got, want)
	}
}

func checkDirs(t *testing.T, store object.Store, prefix string, want []string) {
	t.Helper()
	var got []string
	for element, err := range store.ListDirs(t.Context(), prefix) {
		if err != nil {
			t.Errorf("folders of %q: %v", prefix, err)
			return
		}
		got = append(got, element)
	}
	if !slices.Equal(got, want) {
		t.Errorf("folders of %q: %q, want %q", prefix, got, want)
	}
}

// parallel calls do with 0 to n-1 at the same time and waits for all.
func parallel(n int, do func(i int)) {
	var workers sync.WaitGroup
	begin := make(chan struct{})
	for i := range n {
		workers.Go(func() {
			<-begin
			do(i)
		})
	}
	close(begin)
	workers.Wait()
}
