package vbuf

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

// BenchmarkAppend appends 4 KiB writes to a journal on the real file system.
func BenchmarkAppend(b *testing.B) {
	for _, dirs := range []int{1, 2} {
		for _, writers := range []int{1, 32} {
			for _, flush := range []bool{false, true} {
				name := fmt.Sprintf("dirs=%d/writers=%d/flush=%v", dirs, writers, flush)
				b.Run(name, func(b *testing.B) { benchmarkAppend(b, dirs, writers, flush) })
			}
		}
	}
}

func benchmarkAppend(b *testing.B, dirs, writers int, flushEach bool) {
	o := Options{Repo: testRepo, Host: testHost, FS: vfs.OS(), FileBytes: 64 << 20}
	for range dirs {
		o.Dirs = append(o.Dirs, DirOptions{Path: b.TempDir(), SizeBytes: 2 << 30})
	}
	buf := mustOpen(b, o)
	defer buf.Close()
	j := mustJournal(b, buf)
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { _ = buf.Run(ctx) })
	defer run.Wait()
	defer cancel()
	data := make([]byte, 4096)
	for i := range data {
		data[i] = byte(i * 7)
	}
	var seqMu sync.Mutex
	next := j.Next()
	one := func() error {
		if err := j.Reserve(ctx, int64(len(data))); err != nil {
			return err
		}
		seqMu.Lock()
		seq := next
		next++
		j.Enqueue(block.Write{Seq: seq, Kind: block.KindData, Extent: block.Extent{Len: int64(len(data))}, Data: data})
		seqMu.Unlock()
		if flushEach {
			if err := j.Flush(ctx); err != nil {
				return err
			}
		} else if err := j.WaitWritten(ctx, seq); err != nil {
			return err
		}
		if seq%1024 == 0 {
			j.Release(j.Durable())
		}
		return nil
	}
	// Once round the files, so that they are recycled ones.
	warm := 3 * int(o.FileBytes) / 4160
	if flushEach {
		warm /= 8
	}
	for i := range warm {
		if err := one(); err != nil {
			b.Fatal(err)
		}
		if i%256 == 0 {
			if err := j.Flush(ctx); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	b.ResetTimer()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := one(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "writes/s")
}

// BenchmarkRead reads a durable journal back.
func BenchmarkRead(b *testing.B) {
	o := Options{Repo: testRepo, Host: testHost, FS: vfs.OS(), FileBytes: 64 << 20,
		Dirs: []DirOptions{{Path: b.TempDir(), SizeBytes: 2 << 30}}}
	buf := mustOpen(b, o)
	defer buf.Close()
	j := mustJournal(b, buf)
	const n = 20000
	data := make([]byte, 4096)
	for seq := block.Seq(1); seq <= n; seq++ {
		j.Enqueue(block.Write{Seq: seq, Kind: block.KindData, Extent: block.Extent{Len: 4096}, Data: data})
		if seq%1000 == 0 {
			flush(b, j)
		}
	}
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	next := block.Seq(1)
	for done := 0; done < b.N; {
		if next > n {
			next = 1
		}
		at, err := j.Read(next, 1<<20, func(block.Write) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
		done += int(at - next)
		next = at
	}
}
