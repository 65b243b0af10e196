package vbuf

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

// childDir, in the environment, makes the test binary the process that
// TestKill_WrittenRecordsSurvive kills.
const childDir = "DRC_VBUF_TEST_DIR"

func killOptions(dir string) Options {
	return Options{Repo: testRepo, Host: testHost, FS: vfs.OS(), FileBytes: 256 << 10, MaxUnsyncedBytes: 1 << 20,
		Dirs: []DirOptions{{Path: filepath.Join(dir, "a"), SizeBytes: 8 << 20}, {Path: filepath.Join(dir, "b"), SizeBytes: 8 << 20}}}
}

// TestKill_WrittenRecordsSurvive kills a real process on a real file system while
// it appends, and checks that every record it was told is written is there.
func TestKill_WrittenRecordsSurvive(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		appendUntilKilled(t, dir)
		return
	}
	dir := t.TempDir()
	total := 0
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill_WrittenRecordsSurvive$")
		cmd.Env = append(os.Environ(), childDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acked block.Seq
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			seq, err := strconv.ParseUint(lines.Text(), 10, 64)
			if err != nil {
				t.Fatalf("the child says %q", lines.Text())
			}
			acked = max(acked, block.Seq(seq))
			if n == 700+300*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		b := mustOpen(t, killOptions(dir))
		j := mustJournal(t, b)
		if j.Last() < acked {
			t.Fatalf("the journal ends at %d, %d was written", j.Last(), acked)
		}
		if j.First() > acked || j.First() == 0 {
			t.Fatalf("the journal begins at %d", j.First())
		}
		for next := j.First(); next <= j.Last(); {
			at, err := j.Read(next, 1<<20, func(w block.Write) error {
				if !sameWrite(w, evenWrite(w.Seq)) {
					t.Fatalf("write %d is wrong", w.Seq)
				}
				total++
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			next = at
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d records checked", total)
}

func appendUntilKilled(t *testing.T, dir string) {
	b := mustOpen(t, killOptions(dir))
	j := mustJournal(t, b)
	ctx := context.Background()
	go func() { _ = b.Run(ctx) }()
	var seqMu, outMu sync.Mutex
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := 0; ; i++ {
				if err := j.Reserve(ctx, 4096); err != nil {
					t.Error(err)
					return
				}
				seqMu.Lock()
				w := evenWrite(j.Next())
				j.Enqueue(w)
				seqMu.Unlock()
				if err := j.WaitWritten(ctx, w.Seq); err != nil {
					t.Error(err)
					return
				}
				if i%50 == g {
					if err := j.Flush(ctx); err != nil {
						t.Error(err)
						return
					}
					if d := j.Durable(); d > 200 {
						j.Release(d - 200)
					}
				}
				outMu.Lock()
				_, _ = os.Stdout.WriteString(w.Seq.String() + "\n")
				outMu.Unlock()
			}
		})
	}
	wg.Wait()
}
