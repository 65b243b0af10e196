package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drc/internal/block"
	"drc/internal/fat"
	"drc/internal/nbd"
)

// demoVolumeBytes is the size of the demonstration's volume.
const demoVolumeBytes = 64 << 20

func demoCommand(g *global) *cobra.Command {
	var keep bool
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole way of a write and back, with nothing set up",
		Long: `Make a repository (in a temporary folder, or on the stores that DRC_STORE
names), start an agent with an empty volume, write a file system to it over NBD,
name a checkpoint, overwrite part of it, restore both states as another host
would, and compare them byte for byte. Nothing is left running.`,
		Example: `  drc demo
  DRC_STORE='s3://drc/demo?endpoint=http://127.0.0.1:9000' drc demo`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			// Who reads may stop reading; the folder is removed all the same.
			signal.Ignore(syscall.SIGPIPE)
			dir, err := os.MkdirTemp("", "drc-demo-")
			if err != nil {
				return fmt.Errorf("make a folder for the demonstration in %s: %w: set TMPDIR to a folder that can be written", os.TempDir(), cause(err))
			}
			if keep {
				g.talk("kept: %s", dir)
			} else {
				defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
			}
			return g.demo(cmd.Context(), dir)
		},
	}
	c.Flags().BoolVar(&keep, "keep", false, "keep the folder with repository, volume and restored images")
	return c
}

// demonstration is one run of drc demo.
type demonstration struct {
	g        *global
	dir      string
	program  string
	stores   []string
	started  time.Time
	lastStep time.Time
}

func (d *demonstration) step(format string, args ...any) {
	fmt.Fprintf(d.g.out, "%-62s %5.2fs\n", fmt.Sprintf(format, args...), time.Since(d.lastStep).Seconds())
	d.lastStep = time.Now()
}

func (g *global) demo(ctx context.Context, dir string) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	d := &demonstration{g: g, dir: dir, program: program, stores: g.storeURLs(), started: time.Now(), lastStep: time.Now()}
	if len(d.stores) == 0 {
		d.stores = []string{"file://" + filepath.Join(dir, "store")}
	} else { // a fresh place on the store, so that the demonstration can be repeated
		for i, s := range d.stores {
			d.stores[i] = addPath(s, "drc-demo-"+block.NewID().String()[:8])
		}
	}
	if err := d.drc(ctx, "host-a", "init", "--identity-is-safe"); err != nil {
		return err
	}
	d.step("made a repository on %s", plainList(d.stores))

	uri, stop, err := d.startAgent(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = stop() }() // a stop that matters is checked below
	d.step("started an agent with an empty volume of %s", humanize.IBytes(demoVolumeBytes))

	first, err := fat.Image(demoVolumeBytes, "DRC DEMO", demoFiles(0))
	if err != nil {
		return err
	}
	second, err := fat.Image(demoVolumeBytes, "DRC DEMO", demoFiles(1))
	if err != nil {
		return err
	}
	if err := d.write(ctx, uri, nil, first); err != nil {
		return err
	}
	d.step("wrote a FAT file system to it over NBD, and flushed")
	if err := d.drc(ctx, "host-a", "checkpoint", "before", "--wait"); err != nil {
		return err
	}
	d.step("named the checkpoint %q; it is on the store", "before")
	if err := d.write(ctx, uri, first, second); err != nil {
		return err
	}
	if err := d.drc(ctx, "host-a", "checkpoint", "after", "--wait"); err != nil {
		return err
	}
	d.step("overwrote part of it and named the checkpoint %q", "after")
	if err := stop(); err != nil {
		return err
	}
	d.step("stopped the agent")
	for _, p := range []struct {
		name string
		want []byte
	}{{"before", first}, {"after", second}} {
		target := filepath.Join(d.dir, "restored-"+p.name+".img")
		if err := d.drc(ctx, "host-b", "restore", "demo", target, "--at", p.name); err != nil {
			return err
		}
		got, err := os.ReadFile(target)
		if err != nil {
			return fmt.Errorf("read what was restored: %w", err)
		}
		if !bytes.Equal(got, p.want) {
			return fmt.Errorf("what was restored at %q differs from what was written: this is a bug in drc", p.name)
		}
		d.step("restored %q on another host: equal, byte for byte", p.name)
	}
	fmt.Fprintf(g.out, "done in %.1fs; nothing is left running\n", time.Since(d.started).Seconds())
	return nil
}

// addPath appends a folder to the path of a store URL.
func addPath(url, folder string) string {
	base, query, found := strings.Cut(url, "?")
	base = strings.TrimRight(base, "/") + "/" + folder
	if found {
		return base + "?" + query
	}
	return base
}

func plainList(urls []string) string {
	if len(urls) == 1 && strings.HasPrefix(urls[0], "file://") {
		return "a local folder"
	}
	return fmt.Sprintf("%d %s", len(urls), plural(len(urls), "store", "stores"))
}

// args are the flags by which each run of drc finds its repository.
func (d *demonstration) args(host string, args ...string) []string {
	args = append(args, "--state", filepath.Join(d.dir, host), "--identity", filepath.Join(d.dir, "identity"))
	for _, s := range d.stores {
		args = append(args, "--store", s)
	}
	return args
}

// drc runs one command as a process of its own, on a "host" that is a state
// folder.
func (d *demonstration) drc(ctx context.Context, host string, args ...string) error {
	cmd := exec.CommandContext(ctx, d.program, d.args(host, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("drc %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// startAgent starts an agent with one empty volume, waits until it serves, and
// returns the URI of its socket.
func (d *demonstration) startAgent(ctx context.Context) (uri string, stop func() error, err error) {
	socket := filepath.Join(d.dir, "nbd.sock")
	volume := fmt.Sprintf("name=demo,path=%s,size=%d,listen=unix:%s", filepath.Join(d.dir, "volume.img"), demoVolumeBytes, socket)
	buffer := fmt.Sprintf("path=%s,size=256MiB", filepath.Join(d.dir, "buffer"))
	cmd := exec.Command(d.program, d.args("host-a", "agent", "--volume", volume, "--buffer", buffer, "--log-level", "warn")...)
	var talk bytes.Buffer
	cmd.Stderr = &talk
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, fmt.Errorf("start the agent: %w", err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return "", nil, fmt.Errorf("start the agent: %w", err)
	}
	ended := false
	stop = func() error {
		if ended {
			return nil
		}
		ended = true
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("the agent ended badly: %w\n%s", err, talk.String())
		}
		return nil
	}
	ready := make(chan bool, 1)
	go func() {
		lines := bufio.NewScanner(out)
		ok := false
		for !ok && lines.Scan() {
			ok = lines.Text() == "ready"
		}
		ready <- ok
		_, _ = io.Copy(io.Discard, out)
	}()
	select {
	case ok := <-ready:
		if !ok {
			ended = true
			err := cmd.Wait()
			return "", nil, fmt.Errorf("the agent did not start: %w\n%s", err, talk.String())
		}
	case <-ctx.Done():
		return "", nil, errors.Join(ctx.Err(), stop())
	}
	return "unix:" + socket, stop, nil
}

// write brings the volume from one content to another over NBD, sending only
// the blocks that differ, and flushes.
func (d *demonstration) write(ctx context.Context, uri string, from, to []byte) (err error) {
	c, err := nbd.Dial(ctx, uri, "demo")
	if err != nil {
		return fmt.Errorf("connect to the agent: %w", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	const unit = 128 << 10
	zero := make([]byte, unit)
	for off := 0; off < len(to); off += unit {
		old := zero
		if from != nil {
			old = from[off : off+unit]
		}
		if bytes.Equal(old, to[off:off+unit]) {
			continue
		}
		if err := c.WriteAt(ctx, to[off:off+unit], int64(off), block.WriteOptions{}); err != nil {
			return fmt.Errorf("write to the volume: %w", err)
		}
	}
	if err := c.Flush(ctx); err != nil {
		return fmt.Errorf("flush the volume: %w", err)
	}
	return nil
}

// demoFiles are the files of the demonstration's two states: text, and bytes
// that do not compress.
func demoFiles(state int) []fat.File {
	text := strings.Repeat("The quick brown fox jumps over the lazy dog.\n", 40000)
	noise := make([]byte, 6<<20)
	x := uint64(88172645463325252)
	for i := range noise { // xorshift64, G. Marsaglia, Journal of Statistical Software 8 (2003)
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		noise[i] = byte(x)
	}
	if state == 1 {
		text = strings.Replace(text, "lazy dog", "busy cat", 1000)
		copy(noise[1<<20:2<<20], noise[3<<20:])
	}
	return []fat.File{
		{Name: "README.TXT", Content: []byte("This file system lives on a volume that DRC protects.\n")},
		{Name: "FOX.TXT", Content: []byte(text)},
		{Name: "NOISE.BIN", Content: noise},
	}
}
