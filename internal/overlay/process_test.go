package overlay_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/overlay"
)

const childEnv = "DRC_OVERLAY_CHILD"

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		child(name)
	}
	os.Exit(m.Run())
}

var processGeometry = block.Geometry{SizeBytes: 16 << 20, SectorSize: 512}

func processConfig(name string) overlay.Config {
	b := &testBase{Memory: blocktest.NewMemoryGeometry(processGeometry, nil)}
	c := config(nil, b, "")
	c.File = name
	return c
}

// processSector is what the i-th request of a child writes, and where.
func processSector(i int) (p []byte, off int64) {
	rng := rand.New(rand.NewPCG(uint64(i), 77))
	return filled(512*(1+rng.Int64N(20)), uint64(i)+1), 512 * rng.Int64N(processGeometry.SizeBytes/512-20)
}

// child writes until it is killed, and says what was answered.
func child(name string) {
	d, err := overlay.Open(context.Background(), processConfig(name))
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		p, off := processSector(i)
		if err := d.WriteAt(context.Background(), p, off, block.WriteOptions{}); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(i)
	}
}

// TestProcess_KilledLosesNothing: what a process was answered is there after kill
// -9, and while it lives nobody else gets in.
func TestProcess_KilledLosesNothing(t *testing.T) {
	name := t.TempDir() + "/volume"
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	last := -1
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "error") {
			t.Error(lines.Text())
			break
		}
		if _, err := fmt.Sscan(lines.Text(), &last); err != nil {
			t.Errorf("%q: %v", lines.Text(), err)
			break
		}
		switch last {
		case 50:
			if _, err := openErr(t, processConfig(name)); !errors.Is(err, overlay.ErrInUse) || !strings.Contains(err.Error(), name) {
				t.Errorf("while another process has it: %v", err)
			}
			if _, complete, err := overlay.Peek(osFS, name); err != nil || complete {
				t.Errorf("peek while another process has it: %t, %v", complete, err)
			}
		case 400:
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
		}
	}
	_ = cmd.Wait() // it was killed
	if last < 400 {
		t.Fatalf("%d requests", last)
	}
	want := make([]byte, processGeometry.SizeBytes)
	d := open(t, processConfig(name))
	for i := 0; i <= last; i++ {
		p, off := processSector(i)
		copy(want[off:], p)
	}
	got := read(t, d, 0, processGeometry.SizeBytes)
	// One request may have been carried out that it had no time to tell of.
	p, off := processSector(last + 1)
	for at := off; at < off+int64(len(p)); at += 512 {
		if string(got[at:at+512]) == string(p[at-off:at-off+512]) {
			copy(want[at:], got[at:at+512])
		}
	}
	same(t, got, want, 0)
}
