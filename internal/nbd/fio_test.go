package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/realpart"
)

// BenchmarkFio compares the server with nbdkit's memory plugin, by fio, in turns,
// and reports the medians and their ratio. One iteration says it all:
//
//	go test -run '^$' -bench Fio -benchtime 1x ./internal/nbd
func BenchmarkFio(b *testing.B) {
	const size = 256 << 20
	dir := socketDir(b)
	kit := filepath.Join(dir, "kit")
	cmd := exec.Command(realpart.Path(b, "nbdkit"), "-f", "--unix", kit, "memory", fmt.Sprint(size))
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	awaitSocket(b, kit)

	m := blocktest.NewMemory(size, nil)
	s := serve(b, newShelf("v", m), Limits{})
	ours := s.uriFor("v")
	theirs := "nbd+unix:///?socket=" + kit
	for _, uri := range []string{"unix:" + kit, s.uri} {
		c, err := Dial(b.Context(), uri, "")
		if err != nil {
			b.Fatal(err)
		}
		for off := int64(0); off < size; off += 1 << 20 {
			if err := c.WriteAt(b.Context(), make([]byte, 1<<20), off, block.WriteOptions{}); err != nil {
				b.Fatal(err)
			}
		}
		c.Close()
	}

	for _, job := range []struct{ name, rw, bs, depth string }{
		{"write4k/depth1", "randwrite", "4k", "1"},
		{"write4k/depth32", "randwrite", "4k", "32"},
		{"read4k/depth1", "randread", "4k", "1"},
		{"read4k/depth32", "randread", "4k", "32"},
		{"write1m/depth8", "write", "1m", "8"},
		{"read1m/depth8", "read", "1m", "8"},
	} {
		b.Run(job.name, func(b *testing.B) {
			for b.Loop() {
				var we, they []float64
				for range 5 {
					we = append(we, fioIOPS(b, ours, job.rw, job.bs, job.depth))
					they = append(they, fioIOPS(b, theirs, job.rw, job.bs, job.depth))
				}
				slices.Sort(we)
				slices.Sort(they)
				b.ReportMetric(we[2], "iops")
				b.ReportMetric(they[2], "nbdkit-iops")
				b.ReportMetric(we[2]/they[2], "ratio")
			}
		})
	}
}

func fioIOPS(b *testing.B, uri, rw, bs, depth string) float64 {
	b.Helper()
	out, err := exec.Command(realpart.Path(b, "fio"), "--name=x", "--ioengine=nbd", "--uri="+uri, "--rw="+rw, "--bs="+bs,
		"--iodepth="+depth, "--size=256m", "--time_based", "--runtime=1", "--output-format=json", "--norandommap").Output()
	if err != nil {
		b.Fatal(err)
	}
	var result struct {
		Jobs []struct{ Read, Write struct{ IOPS float64 } }
	}
	out = out[max(bytes.IndexByte(out, '{'), 0):] // the engine says hello first
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 {
		b.Fatalf("fio's report makes no sense: %v", err)
	}
	return result.Jobs[0].Read.IOPS + result.Jobs[0].Write.IOPS
}

// awaitSocket waits until another program answers on a socket that it creates
// after it has started.
func awaitSocket(t testing.TB, path string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		nc, err := net.Dial("unix", path)
		if err == nil {
			nc.Close()
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// BenchmarkSlowDevice shows that a queue of requests keeps a device busy that
// takes about a millisecond for each, as a disk's flush may: the ideal is depth
// times what one at a time achieves.
func BenchmarkSlowDevice(b *testing.B) {
	m := blocktest.NewMemory(256<<20, func(_ context.Context, r blocktest.Request) error {
		time.Sleep(time.Millisecond)
		return nil
	})
	s := serve(b, newShelf("v", m), Limits{})
	for _, depth := range []string{"1", "32"} {
		b.Run("depth"+depth, func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(fioIOPS(b, s.uriFor("v"), "randwrite", "4k", depth), "iops")
			}
		})
	}
}
