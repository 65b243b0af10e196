package vbuf

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/vfs"
)

// TestFull_TakenOutWhereOthersHaveRoom: a disk whose file system stays full does not
// hold the writers up for ever where another one has room. It is no loss: what it
// alone holds is read from it. Where there is room again in time it stays.
func TestFull_TakenOutWhereOthersHaveRoom(t *testing.T) {
	for _, kind := range []string{"for new files", "for writes too", "only for a while", "on the same device"} {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/running=%v", kind, running), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := vfs.NewMem()
					o := testOptions(m, 2)
					o.RetryEvery = time.Second
					if kind == "on the same device" {
						m.SetDevice("/disk1", "/disk0")
					}
					b := mustOpen(t, o)
					j := mustJournal(t, b)
					ctx, stop := context.WithCancel(t.Context())
					ran := make(chan struct{})
					go func() {
						if running {
							_ = b.Run(ctx)
						}
						close(ran)
					}()
					defer stop()
					for range 20 {
						put(t, j, 1)
					}
					flush(t, j)
					full := &vfs.Fault{Ops: []vfs.Op{vfs.OpCreate, vfs.OpPreallocate}, Err: syscall.ENOSPC}
					if kind == "for writes too" {
						full.Ops = append(full.Ops, vfs.OpWrite)
					}
					m.SetFault("/disk1", full)
					done := make(chan error, 1)
					began := time.Now()
					go func() {
						for range 40 {
							if err := j.WaitWritten(context.Background(), put(t, j, 1)); err != nil {
								done <- err
								return
							}
						}
						done <- j.Flush(context.Background())
					}()
					switch kind {
					case "only for a while":
						time.Sleep(20 * time.Second)
						m.SetFault("/disk1", nil)
					case "on the same device":
						time.Sleep(time.Hour)
						m.SetFault("/disk1", nil)
					}
					if err := <-done; err != nil {
						t.Fatal(err)
					}
					took := time.Since(began)
					time.Sleep(time.Minute)
					state := b.Stats().Disks[1]
					switch kind {
					case "only for a while", "on the same device":
						if state.State != "ok" {
							t.Errorf("%+v after %s", state, took)
						}
					default:
						if (state.State != "failed" && state.State != "suspect") || took > time.Minute {
							t.Errorf("%+v after %s", state, took)
						}
					}
					checkRead(t, j, 1, 60, salted(1))
					stop()
					<-ran
					m.SetFault("/disk1", nil)
					if err := b.Close(); err != nil {
						t.Fatal(err)
					}
				})
			})
		}
	}
}
