package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/realpart"
)

func TestClient_KeepsTheDeviceContract(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				m := blocktest.NewMemoryGeometry(block.Geometry{SizeBytes: 64 << 20, SectorSize: sector}, nil)
				return serve(t, newShelf("v", m), Limits{}).dial(t, "v")
			})
		})
	}
}

func TestClient_SeesTheExportAsItIs(t *testing.T) {
	g := block.Geometry{SizeBytes: 8 << 20, SectorSize: 4096, ReadOnly: true}
	m := blocktest.NewMemoryGeometry(g, nil)
	s := serve(t, newShelf("v", m), Limits{})
	c := s.dial(t, "")
	if c.Geometry() != g {
		t.Errorf("%+v", c.Geometry())
	}
	if err := c.WriteAt(t.Context(), make([]byte, 4096), 0, block.WriteOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Error(err)
	}
	if err := c.Zero(t.Context(), block.Extent{Len: 4096}, block.ZeroOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Error(err)
	}
	if _, err := Dial(t.Context(), s.uri, "none"); !errors.Is(err, ErrUnknownExport) {
		t.Error(err)
	}
	if _, err := Dial(t.Context(), "unix:"+filepath.Join(socketDir(t), "none"), ""); err == nil {
		t.Error("dialled nobody")
	}
}

func TestClient_SeesHoles(t *testing.T) {
	s, m := oneExport(t, nil)
	fill(t, m, 4096, 8192)
	c := s.dial(t, "v")
	var got []string
	err := c.Allocation(t.Context(), block.Extent{Len: 1 << 20}, func(e block.Extent, hole bool) bool {
		got = append(got, fmt.Sprint(e, hole))
		return true
	})
	if text := fmt.Sprint(got); err != nil || text != "[0+4096 true 4096+8192 false 12288+1036288 true]" {
		t.Fatal(text, err)
	}
}

func TestClient_SplitsWhatIsTooLarge(t *testing.T) {
	m := blocktest.NewMemory(80<<20, nil)
	c := serve(t, newShelf("v", m), Limits{}).dial(t, "v")
	want := make([]byte, 70<<20)
	for i := 0; i < len(want); i += 1000 {
		want[i] = byte(i)
	}
	if err := c.WriteAt(t.Context(), want, 512, block.WriteOptions{FUA: true}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if err := c.ReadAt(t.Context(), got, 512); err != nil || !bytes.Equal(got, want) {
		t.Fatal("wrong data", err)
	}
}

func TestClient_ErrorsKeepTheirMeaning(t *testing.T) {
	var fail atomic.Pointer[error]
	s, _ := oneExport(t, func(context.Context, blocktest.Request) error { return *fail.Load() })
	c := s.dial(t, "v")
	for _, want := range []error{block.ErrNoSpace, block.ErrReadOnly, block.ErrStopping, block.ErrUnsupported} {
		told := fmt.Errorf("disk 7: %w", want)
		fail.Store(&told)
		err := c.WriteAt(t.Context(), make([]byte, 512), 0, block.WriteOptions{})
		if !errors.Is(err, want) || !bytes.Contains([]byte(err.Error()), []byte("disk 7")) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

func TestClient_CancelledRequestReturnsAndLeavesTheRest(t *testing.T) {
	g := newGate(func(r blocktest.Request) bool { return r.Extent.Off == 0 && r.Kind != blocktest.Flush })
	s, _ := oneExport(t, g.hook)
	c := s.dial(t, "v")
	for _, do := range []func(context.Context) error{
		func(ctx context.Context) error { return c.ReadAt(ctx, make([]byte, 4096), 0) },
		func(ctx context.Context) error {
			return c.WriteAt(ctx, make([]byte, 4096), 0, block.WriteOptions{})
		},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- do(ctx) }()
		<-g.held
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	close(g.release) // the late replies find nobody
	for range 10 {
		if err := c.ReadAt(t.Context(), make([]byte, 4096), 4096); err != nil {
			t.Fatal(err)
		}
	}
}

func TestClient_EndOfTheConnectionFailsEveryRequest(t *testing.T) {
	for _, how := range []string{"server", "client"} {
		t.Run(how, func(t *testing.T) {
			g := newGate(writes)
			m := blocktest.NewMemory(1<<20, g.hook)
			s := serve(t, newShelf("v", m), Limits{GraceTime: 1})
			c := s.dial(t, "v")
			errs := make(chan error)
			for i := range int64(5) {
				go func() { errs <- c.WriteAt(t.Context(), make([]byte, 512), i*512, block.WriteOptions{}) }()
			}
			for range 5 {
				<-g.held
			}
			if how == "server" {
				s.stop()
			} else {
				go c.Close()
			}
			for range 5 {
				if err := <-errs; !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
			}
			if err := c.Flush(t.Context()); !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
		})
	}
}

func TestClient_ManyAtOnce(t *testing.T) {
	s, _ := oneExport(t, nil)
	c := s.dial(t, "v")
	var wg sync.WaitGroup
	for w := range int64(32) {
		wg.Go(func() {
			want, got := bytes.Repeat([]byte{byte(w + 1)}, 4096), make([]byte, 4096)
			for range 50 {
				if err := c.WriteAt(t.Context(), want, w*4096, block.WriteOptions{}); err != nil {
					t.Error(err)
					return
				}
				if err := c.ReadAt(t.Context(), got, w*4096); err != nil || !bytes.Equal(got, want) {
					t.Error("wrong data", err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// Another server, with fewer features each time: the client makes up for them.
func TestReal_ClientOfNbdkit(t *testing.T) {
	for _, filters := range [][]string{nil, {"--filter=nozero"}, {"--filter=noextents"}, {"--filter=fua"}, {"--no-sr"}, {"--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-maximum=64k", "blocksize-error-policy=error"}} {
		t.Run(fmt.Sprint(filters), func(t *testing.T) {
			path := filepath.Join(socketDir(t), "kit")
			args := []string{"-f", "--unix", path}
			var params []string
			for _, f := range filters {
				if f[0] == '-' {
					args = append(args, f)
				} else {
					params = append(params, f)
				}
			}
			cmd := exec.Command(realpart.Path(t, "nbdkit"), append(append(args, "memory", "8M"), params...)...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				cmd.Process.Kill()
				cmd.Wait()
			}()
			awaitSocket(t, path)
			c, err := Dial(t.Context(), "unix:"+path, "")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			model := make([]byte, 8<<20)
			check := func(what string, err error) {
				t.Helper()
				got := make([]byte, len(model))
				if err == nil {
					err = c.ReadAt(t.Context(), got, 0)
				}
				if err != nil || !bytes.Equal(got, model) {
					t.Fatal(what, err)
				}
			}
			p := bytes.Repeat([]byte("nbdkit.."), 64<<10)
			copy(model[1<<20:], p)
			check("write", c.WriteAt(t.Context(), p, 1<<20, block.WriteOptions{FUA: true}))
			clear(model[1<<20 : 1<<20+65536])
			check("zero", c.Zero(t.Context(), block.Extent{Off: 1 << 20, Len: 65536}, block.ZeroOptions{FUA: true, NoHole: true}))
			check("flush", c.Flush(t.Context()))
			end := int64(0)
			check("allocation", c.Allocation(t.Context(), block.Extent{Len: 8 << 20}, func(e block.Extent, hole bool) bool {
				if e.Off != end || hole && e.Overlaps(block.Extent{Off: 1<<20 + 65536, Len: 65536}) {
					t.Errorf("%s hole=%t follows %d", e, hole, end)
				}
				end = e.End()
				return true
			}))
			if end != 8<<20 {
				t.Errorf("allocation ends at %d", end)
			}
		})
	}
}
