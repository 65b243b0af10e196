package capture

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// sysOf is the system calls of a real backing.
func sysOf(b *Backing) *system { return &b.disk.(*kernelDisk).sys }

// newVolume makes a volume over a journal that has everything durable at once.
func newVolume(t *testing.T, sizeBytes int64) (*Volume, *Backing) {
	t.Helper()
	dir := t.TempDir()
	b, _, err := OpenBacking(filepath.Join(dir, "v"), BackingOptions{CreateBytes: sizeBytes})
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(NewGroup(&instantJournal{}, 0, nil), Options{Name: "v", Backing: b, SectorSize: 512, RecordDir: dir}, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Abandon() })
	return v, b
}

// TestBacking_SignalsChangeNothing has each call interrupted by signals first.
func TestBacking_SignalsChangeNothing(t *testing.T) {
	ctx := context.Background()
	v, b := newVolume(t, 1<<20)
	interrupted := map[string]int{}
	interrupt := func(call string) bool {
		interrupted[call]++
		return interrupted[call] <= 3
	}
	*sysOf(b) = system{
		fallocate: func(fd int, mode uint32, off, n int64) error {
			if interrupt("fallocate") {
				return unix.EINTR
			}
			return unix.Fallocate(fd, mode, off, n)
		},
		fsync: func(fd int) error {
			if interrupt("fsync") {
				return unix.EINTR
			}
			return unix.Fsync(fd)
		},
		pwritev: func(fd int, parts [][]byte, off int64) (int, error) {
			if interrupt("pwritev") {
				return -1, unix.EINTR
			}
			return unix.Pwritev(fd, parts, off)
		},
	}
	want := bytes.Repeat([]byte("data"), 2048)
	if err := v.WriteAt(ctx, want, 4096, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := v.Zero(ctx, block.Extent{Off: 65536, Len: 4096}, block.ZeroOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(b.path)
	if err != nil || !bytes.Equal(raw[4096:4096+len(want)], want) {
		t.Errorf("what was written is not on the backing (%v)", err)
	}
	// An interrupted pwritev is replaced by other calls.
	if interrupted["fallocate"] < 4 || interrupted["fsync"] < 4 || interrupted["pwritev"] < 1 {
		t.Errorf("calls: %v", interrupted)
	}
}

// TestSync_NoErrorIsTriedAgain lets the second sync succeed: the first has told
// that something is lost.
func TestSync_NoErrorIsTriedAgain(t *testing.T) {
	_, b := newVolume(t, 1<<20)
	calls := 0
	sysOf(b).fsync = func(int) error {
		if calls++; calls == 1 {
			return unix.EIO
		}
		return nil
	}
	if err := b.Sync(); !errors.Is(err, unix.EIO) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

// TestZero_ThatReservesMuchLetsWritesPass stops a huge allocating zero in the
// middle. Writes to space that is allocated, reads, and the backing's catching
// up, punches included, must not wait for it.
func TestZero_ThatReservesMuchLetsWritesPass(t *testing.T) {
	ctx := context.Background()
	v, b := newVolume(t, 8*sweepBytes)
	if err := v.WriteAt(ctx, make([]byte, 4096), 0, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := v.Zero(ctx, block.Extent{Off: 2 * sweepBytes, Len: 4096}, block.ZeroOptions{}); err != nil {
		t.Fatal(err)
	}
	reached, goOn := make(chan struct{}, 100), make(chan struct{})
	var largest int64
	sysOf(b).fallocate = func(fd int, mode uint32, off, n int64) error {
		if mode == unix.FALLOC_FL_KEEP_SIZE {
			largest = max(largest, n)
			reached <- struct{}{}
			<-goOn
		}
		return unix.Fallocate(fd, mode, off, n)
	}
	done := make(chan error, 1)
	go func() { done <- v.Zero(ctx, block.Extent{Len: 8 * sweepBytes}, block.ZeroOptions{NoHole: true}) }()
	<-reached
	if err := v.WriteAt(ctx, make([]byte, 4096), 4096, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := v.ReadAt(ctx, make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	// A punch waits for the call under way and for no more.
	stepped := make(chan error, 1)
	go func() {
		_, _, err := v.Step(0)
		stepped <- err
	}()
	goOn <- struct{}{}
	for waiting := true; waiting; {
		select {
		case err := <-stepped:
			if err != nil {
				t.Fatal(err)
			}
			waiting = false
		case <-reached:
			goOn <- struct{}{}
		}
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if largest > sweepBytes {
		t.Errorf("one call reserved %d bytes", largest)
	}
}

// TestReserve_AfterAPunchMeanwhile trims what a long reservation has reserved
// already, before the reservation ends: a write must not be taken without space.
func TestReserve_AfterAPunchMeanwhile(t *testing.T) {
	ctx := context.Background()
	v, b := newVolume(t, 3*sweepBytes)
	punched := false
	var reserved []int64
	sysOf(b).fallocate = func(fd int, mode uint32, off, n int64) error {
		if mode == unix.FALLOC_FL_KEEP_SIZE {
			reserved = append(reserved, off)
			if off == sweepBytes && !punched { // the second part
				punched = true
				b.forgetReserved(block.Extent{Len: sweepBytes}) // as a punch of the first does
			}
		}
		return unix.Fallocate(fd, mode, off, n)
	}
	if err := v.Zero(ctx, block.Extent{Len: 3 * sweepBytes}, block.ZeroOptions{NoHole: true}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(reserved, []int64{0, sweepBytes, 0, 2 * sweepBytes}) && !slices.Equal(reserved, []int64{0, sweepBytes, 2 * sweepBytes, 0}) {
		t.Errorf("reserved at %v; what was punched was not reserved again", reserved)
	}
}

// TestRecord_NamesOnlyATimeThatIsDurable looks at what is synced when the record
// is written. A record that names a time of change which a power cut takes back
// would have an untouched volume compared in full; and what others wrote before
// DRC came must be durable before history is made of it.
func TestRecord_NamesOnlyATimeThatIsDurable(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	path := filepath.Join(dir, "v")
	b, _, err := OpenBacking(path, BackingOptions{CreateBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	var syncs []string // what the record said at each sync
	sysOf(b).fsync = func(fd int) error {
		r, err := ReadRecord(dir, path)
		switch {
		case err != nil:
			t.Error(err)
		case r == nil:
			syncs = append(syncs, "none")
		case r.Clean:
			syncs = append(syncs, "clean")
		default:
			syncs = append(syncs, "in use")
		}
		return unix.Fsync(fd)
	}
	v, err := New(NewGroup(&instantJournal{}, 0, nil), Options{Name: "v", Backing: b, SectorSize: 512, RecordDir: dir}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(syncs, []string{"none"}) {
		t.Errorf("syncs before the first record: %v", syncs)
	}
	if err := v.WriteAt(ctx, make([]byte, 4096), 0, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := v.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	// Something that Settle does not count as a change of the content.
	if err := b.Reserve(block.Extent{Off: 512 << 10, Len: 4096}); err != nil {
		t.Fatal(err)
	}
	before := len(syncs)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(syncs[before:], []string{"in use"}) {
		t.Errorf("syncs before the record says clean: %v", syncs[before:])
	}
}
