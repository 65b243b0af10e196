package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drc/internal/block"
	"drc/internal/control"
)

// smallFileSystem mounts one of a few MiB. It needs root.
func smallFileSystem(t testing.TB, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("drc-test", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount a small file system (this test needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves no room in a file system; the file that it returns takes it.
func fill(t testing.TB, dir string) string {
	t.Helper()
	junk := filepath.Join(dir, "junk")
	f, err := os.Create(junk)
	must(t, err)
	for n := 1 << 20; n >= 4096; {
		if _, err := f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	must(t, f.Close())
	return junk
}

// begin starts an agent without waiting until it serves, and returns its status
// once it answers as wanted.
func (h *host) begin(ok func(control.Status) bool, args ...string) *agent {
	h.t.Helper()
	cmd := h.command(append([]string{"agent"}, args...)...)
	cmd.Stdout, cmd.Stderr = h, h
	must(h.t, cmd.Start())
	a := &agent{h: h, cmd: cmd, done: make(chan error, 1)}
	go func() { a.done <- cmd.Wait() }()
	h.t.Cleanup(func() {
		if a.cmd.ProcessState == nil {
			a.kill()
		}
	})
	for deadline := time.Now().Add(90 * time.Second); ; {
		var s control.Status
		raw, err := h.command("status", "--json").Output()
		if err == nil && json.Unmarshal(raw, &s) == nil && ok(s) {
			return a
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the status is never as wanted; at last (%v)\n%s\n%s", err, raw, h.said())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestStart_WithTheBuffersFileSystemFull starts an agent that needs room in the
// buffer before it can serve: for the journal's tail, or to begin a resync. It
// must say so, and go on when there is room.
func TestStart_WithTheBuffersFileSystemFull(t *testing.T) {
	t.Parallel()
	for _, why := range []string{"the tail", "a resync"} {
		t.Run(why, func(t *testing.T) {
			h := onFolders(t, 1)
			buffer := filepath.Join(smallFileSystem(t, "8m"), "buffer")
			path := filepath.Join(t.TempDir(), "v.img")
			args := []string{"--volume", "name=v,path=" + path + ",size=4MiB,when-full=hold", "--buffer", "path=" + buffer + ",size=6MiB", "--rpo", "50ms"}
			a := h.start(args...)
			c := h.device("v")
			want := make([]byte, 4<<20)
			put(t, c, want, 1, 0, 64<<10, atOnce)
			h.await("all is committed", isContinuous)
			var spare []byte // of a file that can be used at once
			if why == "the tail" {
				put(t, c, want, 2, 1<<20, 4096, block.WriteOptions{})
				a.kill()
				spare = make([]byte, 4096)
			} else {
				must(t, c.Close())
				a.stop()
				putBehind(t, path, want, 3, 2<<20, 8192)
			}
			files, err := filepath.Glob(filepath.Join(buffer, "journal", "*.jrn"))
			must(t, err)
			for _, name := range files {
				raw, err := os.ReadFile(name)
				must(t, err)
				if spare == nil || bytes.HasPrefix(raw, spare) {
					must(t, os.Remove(name))
				}
			}
			junk := fill(t, filepath.Dir(buffer))
			a = h.begin(isStalled("the buffer is full"), args...)
			if !strings.Contains(h.said(), "file system is full") {
				t.Errorf("the log does not say that the buffer is full:\n%s", h.said())
			}
			if strings.Contains(h.said(), "volume v: nbd") {
				t.Error("the agent serves what it could not make durable")
			}
			if cmd := h.command("checkpoint", "early"); cmd.Run() == nil {
				t.Error("a checkpoint was taken of a volume that is not served yet")
			}
			// Who is stopped while he waits ends at once, and well.
			a.stopEarly()
			way := "bring the stores back"
			if why == "the tail" {
				way = "copy the buffer's directory" // stores that are back cannot help yet
			}
			a = h.begin(isStalled(way), args...)
			if why == "the tail" {
				a.stopEarly()
				elsewhere := filepath.Join(t.TempDir(), "buffer")
				must(t, os.CopyFS(elsewhere, os.DirFS(buffer)))
				args[3] = "path=" + elsewhere + ",size=6MiB"
				a = h.start(args...)
			} else {
				must(t, os.Remove(junk))
			}
			h.await("all is committed", isContinuous)
			h.sameAs("v", want)
			a.stop()
		})
	}
}

// stopEarly ends an agent that waits with its start.
func (a *agent) stopEarly() {
	a.h.t.Helper()
	a.stop()
	if said := a.h.said(); !strings.HasSuffix(said, "\nstopped before the volumes were served: nothing is lost, and the next start goes on\n") {
		a.h.t.Errorf("a start that is stopped says:\n%s", said)
	}
}

// isStalled is the status of an agent that waits with its start.
func isStalled(why string) func(control.Status) bool {
	return func(s control.Status) bool {
		return s.State == "stalled" && len(s.Groups) == 1 && s.Groups[0].State == "stalled" && strings.Contains(s.Groups[0].Message, why)
	}
}

// applied is the newest write that the host's only volume is known to have.
func (h *host) applied() block.Seq {
	h.t.Helper()
	found, err := filepath.Glob(filepath.Join(h.state, "backings", "*.json"))
	must(h.t, err)
	var record struct{ Applied block.Seq }
	raw, err := os.ReadFile(found[0])
	must(h.t, err)
	must(h.t, json.Unmarshal(raw, &record))
	return record.Applied
}

// loseBlocks takes blocks from a volume's file as a power cut does: without a
// trace that anybody has changed it.
func (h *host) loseBlocks(path string, off, n int64) {
	h.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(h.t, err)
	must(h.t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n))
	must(h.t, f.Close())
	signs, err := filepath.Glob(filepath.Join(h.state, "backings", "*.life"))
	must(h.t, err)
	raw := binary.LittleEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
	raw = binary.LittleEndian.AppendUint32(raw, crc32.Checksum(raw, crc32.MakeTable(crc32.Castagnoli)))
	must(h.t, os.WriteFile(signs[0], raw, 0o600))
}

// TestStart_WithoutRoom starts an agent that was killed while the file system of
// its volume or of its state folder is full. It must say which, and go on when
// there is room; stopped before that it must end well, with nothing lost.
func TestStart_WithoutRoom(t *testing.T) {
	t.Parallel()
	for _, full := range []string{"volume", "state folder", "state folder with its buffer"} {
		t.Run(full, func(t *testing.T) {
			h := onFolders(t, 1)
			buffer := "path=" + filepath.Join(t.TempDir(), "buffer") + ",size=64MiB"
			small := smallFileSystem(t, "16m")
			path := filepath.Join(small, "v.img")
			if full != "volume" {
				h.state, path = filepath.Join(small, "state"), filepath.Join(t.TempDir(), "v.img")
			}
			args := []string{"--volume", "name=v,path=" + path + ",size=8MiB", "--rpo", "50ms"}
			if full != "state folder with its buffer" {
				args = append(args, "--buffer", buffer)
			}
			a := h.start(args...)
			c := h.device("v")
			want := make([]byte, 8<<20)
			put(t, c, want, 1, 0, 64<<10, atOnce)
			h.await("all is committed", isContinuous)
			for seed := uint64(2); ; seed++ {
				before := h.status().Groups[0].Captured
				put(t, c, want, seed, 1<<20, 1<<20, block.WriteOptions{})
				a.kill()
				if h.applied() <= before {
					break // only the journal is sure to have it
				}
				if seed == 40 {
					t.Fatalf("what was written is on the volume each time before the agent can be killed: %s", h.said())
				}
				a = h.start(args...)
				c = h.device("v")
			}
			if full == "volume" {
				h.loseBlocks(path, 1<<20, 1<<20)
			}
			junk := fill(t, small)
			a = h.begin(isStalled("is full"), args...)
			s := h.status()
			if msg := s.Groups[0].Message; (!strings.Contains(msg, small) || !strings.Contains(msg, "make room there")) && !strings.Contains(msg, "make room on the buffer's file system") {
				t.Errorf("the status does not say where: %s", msg)
			}
			a.stopEarly()
			a = h.begin(isStalled("is full"), args...)
			must(t, os.Remove(junk))
			h.await("all is committed", isContinuous)
			h.sameAs("v", want)
			if gaps := h.history("v").Gaps; len(gaps) != 0 {
				t.Errorf("gaps: %+v", gaps)
			}
			a.stop()
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the volume's file is not what its clients saw (%v)", err)
			}
		})
	}
}
