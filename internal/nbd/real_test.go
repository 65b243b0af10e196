package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/realpart"
)

// uriFor is the address of an export as other programs write it.
func (s *serving) uriFor(export string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", url.PathEscape(export), s.path)
}

// run runs a program to its end and returns its standard output.
func run(t *testing.T, program string, args ...string) string {
	t.Helper()
	return runPath(t, realpart.Path(t, program), args...)
}

func runPath(t *testing.T, path string, args ...string) string {
	t.Helper()
	out, errText, err := try(t, path, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", filepath.Base(path), strings.Join(args, " "), err, out, errText)
	}
	return out
}

func try(t *testing.T, path string, args ...string) (out, errText string, err error) {
	t.Helper()
	var o, e bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.Dir = t.TempDir()
	err = cmd.Run()
	return o.String(), e.String(), err
}

// fill writes n random bytes at off, as in a file system full of files.
func fill(t testing.TB, d block.Device, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(off >> 12)}).Read(p)
	if err := d.WriteAt(context.Background(), p, off, block.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	return p
}

func content(t testing.TB, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Geometry().SizeBytes)
	if err := d.ReadAt(context.Background(), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestReal_NbdinfoListsAllExports(t *testing.T) {
	ro := blocktest.NewMemoryGeometry(block.Geometry{SizeBytes: 3 << 20, SectorSize: 4096, ReadOnly: true}, nil)
	s := serve(t, newShelf("alpha", blocktest.NewMemory(2<<20, nil), "beta", ro, "gruß 3/x", blocktest.NewMemory(512, nil)), Limits{})
	var info struct {
		Exports []struct {
			Name        string   `json:"export-name"`
			Description string   `json:"description"`
			Size        int64    `json:"export-size"`
			ReadOnly    bool     `json:"is_read_only"`
			Flush       bool     `json:"can_flush"`
			FUA         bool     `json:"can_fua"`
			Multi       bool     `json:"can_multi_conn"`
			Trim        bool     `json:"can_trim"`
			Zero        bool     `json:"can_zero"`
			Fast        bool     `json:"can_fast_zero"`
			Cache       bool     `json:"can_cache"`
			DF          bool     `json:"can_df"`
			Min         int      `json:"block_size_minimum"`
			Max         int      `json:"block_size_maximum"`
			Contexts    []string `json:"contexts"`
		} `json:"exports"`
	}
	out := run(t, "nbdinfo", "--json", "--list", "nbd+unix://?socket="+s.path)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(info.Exports) != 3 {
		t.Fatalf("%d exports:\n%s", len(info.Exports), out)
	}
	for i, want := range []struct {
		name string
		size int64
		min  int
		ro   bool
	}{{"alpha", 2 << 20, 512, false}, {"beta", 3 << 20, 4096, true}, {"gruß 3/x", 512, 512, false}} {
		e := info.Exports[i]
		if e.Name != want.name || e.Size != want.size || e.ReadOnly != want.ro || e.Min != want.min || e.Max != 32<<20 || e.Description != "volume "+want.name {
			t.Errorf("export %d: %+v", i, e)
		}
		if !e.Flush || !e.FUA || !e.Multi || !e.Cache || !e.DF || len(e.Contexts) != 1 || e.Contexts[0] != contextAllocation {
			t.Errorf("export %d lacks something: %+v", i, e)
		}
		if !e.ReadOnly && (!e.Trim || !e.Zero || !e.Fast) {
			t.Errorf("export %d lacks something: %+v", i, e)
		}
	}
}

func TestReal_NbdinfoMapsHoles(t *testing.T) {
	m := blocktest.NewMemory(16<<20, nil)
	fill(t, m, 1<<20, 2<<20)
	fill(t, m, 8<<20, 4096)
	s := serve(t, newShelf("v", m), Limits{})
	var extents []struct{ Offset, Length, Type int64 }
	out := run(t, "nbdinfo", "--json", "--map", s.uriFor("v"))
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got := fmt.Sprint(extents)
	want := fmt.Sprint([]struct{ Offset, Length, Type int64 }{
		{0, 1 << 20, 3}, {1 << 20, 2 << 20, 0}, {3 << 20, 5 << 20, 3}, {8 << 20, 4096, 0}, {8<<20 + 4096, 8<<20 - 4096, 3}})
	if got != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
}

func TestReal_NbdcopyBothWays(t *testing.T) {
	m, n := blocktest.NewMemory(24<<20, nil), blocktest.NewMemory(24<<20, nil)
	fill(t, m, 0, 4<<20)
	fill(t, m, 10<<20, 5<<20+512)
	s := serve(t, newShelf("m", m, "n", n), Limits{})
	run(t, "nbdcopy", "--flush", "--connections=4", s.uriFor("m"), s.uriFor("n"))
	if !bytes.Equal(content(t, m), content(t, n)) {
		t.Fatal("the copy differs")
	}
	if n.Pages() > m.Pages() {
		t.Errorf("the copy holds %d pages, the source %d: holes were filled", n.Pages(), m.Pages())
	}
	file := filepath.Join(t.TempDir(), "image")
	run(t, "nbdcopy", s.uriFor("n"), file)
	image, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(image, content(t, m)) {
		t.Fatalf("the image differs (%v)", err)
	}
}

func TestReal_QemuIO(t *testing.T) {
	var fua, fast, flushes, discards atomic.Int32
	m := blocktest.NewMemory(8<<20, func(_ context.Context, r blocktest.Request) error {
		switch {
		case r.Kind == blocktest.Flush:
			flushes.Add(1)
		case r.Kind == blocktest.Write && r.FUA:
			fua.Add(1)
		case r.Kind == blocktest.Zero && r.Fast:
			fast.Add(1)
		case r.Kind == blocktest.Zero && !r.NoHole:
			discards.Add(1)
		}
		return nil
	})
	s := serve(t, newShelf("v", m), Limits{})
	out := run(t, "qemu-io", "-f", "raw", "-d", "unmap", s.uriFor("v"),
		"-c", "write -P 0x11 0 1M",
		"-c", "write -f -P 0x22 64k 64k",
		"-c", "discard 0 64k",
		"-c", "write -z 128k 64k",
		"-c", "write -z -u 192k 64k",
		"-c", "flush",
		"-c", "read -P 0 0 64k",
		"-c", "read -P 0x22 64k 64k",
		"-c", "read -P 0 128k 128k",
		"-c", "read -P 0x11 256k 768k",
		"-c", "read -P 0 1M 7M",
		"-c", "aio_write -P 0x33 2M 1M", "-c", "aio_write -P 0x44 4M 1M", "-c", "aio_flush",
		"-c", "read -P 0x33 2M 1M", "-c", "read -P 0x44 4M 1M")
	if strings.Contains(out, "failed") {
		t.Fatal(out)
	}
	if fua.Load() == 0 || flushes.Load() == 0 || discards.Load() < 2 {
		t.Fatalf("%d fua writes, %d flushes, %d discards reached the device\n%s", fua.Load(), flushes.Load(), discards.Load(), out)
	}
}

func TestReal_QemuIMG(t *testing.T) {
	m, n := blocktest.NewMemory(16<<20, nil), blocktest.NewMemory(16<<20, nil)
	fill(t, m, 3<<20, 2<<20)
	fill(t, m, 15<<20, 1<<20)
	s := serve(t, newShelf("m", m, "n", n), Limits{})
	if out := run(t, "qemu-img", "info", "--output=json", "-f", "raw", s.uriFor("m")); false {
		t.Log(out)
	} else if !strings.Contains(strings.ReplaceAll(out, " ", ""), `"virtual-size":16777216`) {
		t.Fatal(out)
	}
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
	}
	out := run(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uriFor("m"))
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(extents) != 4 || !extents[0].Zero || extents[1].Start != 3<<20 || extents[1].Length != 2<<20 || !extents[1].Data {
		t.Fatal(out)
	}
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", s.uriFor("m"), s.uriFor("n"))
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.uriFor("m"), s.uriFor("n"))
	if !bytes.Equal(content(t, m), content(t, n)) {
		t.Fatal("the copy differs")
	}
}

func TestReal_FioVerifies(t *testing.T) {
	fio := realpart.Path(t, "fio")
	m := blocktest.NewMemory(32<<20, nil)
	s := serve(t, newShelf("v", m), Limits{})
	args := []string{"--name=verify", "--ioengine=nbd", "--uri=" + s.uriFor("v"), "--rw=randwrite",
		"--bsrange=4k-128k", "--size=32m", "--iodepth=32", "--verify=crc32c", "--fsync=64", "--randseed=7", "--output-format=terse"}
	runPath(t, fio, append(args, "--do_verify=1")...)
	runPath(t, fio, append(args, "--verify_only")...)
}

func TestReal_NbdClientLists(t *testing.T) {
	l, err := Listen("tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serveOn(t, l, "", newShelf("alpha", blocktest.NewMemory(1<<20, nil), "beta", blocktest.NewMemory(1<<20, nil)), Limits{})
	_, port, _ := strings.Cut(s.path, ":")
	out := run(t, "nbd-client", "-l", "127.0.0.1", port)
	if !strings.Contains(out, "alpha") || !strings.Contains(out, "beta") {
		t.Fatal(out)
	}
}

// pythonScript uses what the other programs do not: options one by one, DF,
// extents with REQ_ONE, cache, errors, and clients without structured replies.
const pythonScript = `
import errno, nbd, sys
path = sys.argv[1]

def fails(want, f, *a, **k):
    try:
        f(*a, **k)
    except nbd.Error as e:
        assert e.errnum == want, (want, e.errnum, e.string)
        return
    raise AssertionError("no error, want %s" % errno.errorcode[want])

def connect(export, structured=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_export_name(export)
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(path)
    assert h.get_structured_replies_negotiated() == structured
    return h

for structured in (True, False):
    h = connect("v", structured)
    size = h.get_size()
    data = bytes(range(256)) * 256
    h.pwrite(data, 65536, nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), 65536) == data
    assert h.pread(1 << 20, 0) == bytes(65536) + data + bytes((1 << 20) - 131072)
    fails(errno.EINVAL, h.pread, 512, size)
    fails(errno.ENOSPC, h.pwrite, bytes(512), size)
    fails(errno.ENOSPC, h.trim, 1024, size - 512)
    fails(errno.EINVAL, h.pread, 512, 1)
    fails(errno.EINVAL, h.pwrite, bytes(100), 0)
    fails(errno.EINVAL, h.pwrite, bytes(512), 0, nbd.CMD_FLAG_DF)
    h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), 65536) == bytes(65536)
    h.zero(65536, 65536, nbd.CMD_FLAG_FAST_ZERO)
    h.cache(1 << 20, 0)
    h.flush()
    h.trim(1 << 20, 0)
    fails(errno.EPERM, connect("ro", structured).pwrite, bytes(4096), 0)
    h.shutdown()

h = connect("v")
h.pwrite(data, 131072)
got = []
h.pread_structured(1 << 20, 0, lambda buf, off, status, err: got.append((off, len(buf), status)))
assert sorted(got) == [(0, 131072, nbd.READ_HOLE), (131072, 65536, nbd.READ_DATA), (196608, (1 << 20) - 196608, nbd.READ_HOLE)], got
got = []
h.pread_structured(1 << 20, 0, lambda buf, off, status, err: got.append((off, len(buf), status)), nbd.CMD_FLAG_DF)
assert got == [(0, 1 << 20, nbd.READ_DATA)], got
runs = []
h.block_status(1 << 20, 0, lambda ctx, off, entries, err: runs.append((ctx, off, list(entries))), nbd.CMD_FLAG_REQ_ONE)
assert runs == [("base:allocation", 0, [131072, 3])], runs
h.shutdown()

# Options one by one; a wrong export first.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
names = []
h.opt_list(lambda name, text: names.append((name, text)))
assert names == [("v", "volume v"), ("ro", "volume ro")], names
h.set_export_name("none")
fails(errno.ENOENT, h.opt_info)
fails(errno.ENOENT, h.opt_go)
h.set_export_name("ro")
h.set_full_info(True)
h.opt_info()
assert h.is_read_only() and h.get_canonical_export_name() == "ro" and h.get_export_description() == "volume ro"
h.opt_go()
assert h.pread(4096, 0) == bytes(4096)
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
h.opt_abort()

# Many requests in flight, disconnecting behind them.
h = connect("v")
bufs = []
for i in range(200):
    b = nbd.Buffer.from_bytearray(bytearray([i]) * 4096)
    bufs.append(b)
    h.aio_pwrite(b, i * 4096)
while h.aio_in_flight() > 0:
    h.poll(-1)
h.shutdown()
assert connect("v").pread(200 * 4096, 0) == b"".join(bytes([i]) * 4096 for i in range(200))
print("done")
`

func TestReal_PythonLibnbd(t *testing.T) {
	python := realpart.Python(t, "nbd", "python3-libnbd")
	ro := blocktest.NewMemoryGeometry(block.Geometry{SizeBytes: 1 << 20, SectorSize: 4096, ReadOnly: true}, nil)
	s := serve(t, newShelf("v", blocktest.NewMemory(8<<20, nil), "ro", ro), Limits{})
	if out := runPath(t, python, "-c", pythonScript, s.path); out != "done\n" {
		t.Fatal(out)
	}
}
