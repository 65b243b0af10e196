package object

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// probeRacers is how many puts of one name a probe starts at once.
	probeRacers = 8
	// probeAttempts bounds how often a racer repeats a put that failed for a
	// passing reason: a store may answer that another put is under way.
	probeAttempts = 20
	// probeCleanPatience bounds how long an interrupted probe still cleans up.
	probeCleanPatience = 5 * time.Second
)

// Probe checks by trying that a store keeps what Store requires of it, and
// returns an error that wraps ErrUnsupported and names the first broken promise.
// Other errors mean that the check could not be made. It writes a few small
// objects below probe/ under random names and deletes them; a store that does
// not allow deleting keeps them, which is no failure.
//
// A store that passes may still break its promises; one that fails does.
func Probe(ctx context.Context, store Store) error {
	var random [8]byte
	rand.Read(random[:])
	p := &prober{store: store, folder: "probe/" + hex.EncodeToString(random[:]) + "/"}
	defer p.clean(ctx)
	for _, step := range []func(context.Context) error{p.createOnly, p.reads, p.race} {
		if err := step(ctx); err != nil {
			return fmt.Errorf("probe of %s: %w", store.URL(), err)
		}
	}
	return nil
}

type prober struct {
	store  Store
	folder string
}

const (
	probeFirst = "the first content of a probe"
	// probeOther has the same length, so that comparing sizes is not enough.
	probeOther = "an other content of a probe!"
)

const hintCreateOnly = "two hosts could both believe that they own a volume; use a store with conditional puts (If-None-Match: *), such as AWS S3, MinIO, Ceph or R2, or a directory"

func (p *prober) createOnly(ctx context.Context) error {
	name := p.folder + "object"
	if _, err := p.store.Put(ctx, name, []byte(probeFirst)); err != nil {
		return fmt.Errorf("the first put failed: %w", err)
	}
	_, err := p.store.Put(ctx, name, []byte(probeOther))
	switch {
	case err == nil:
		return broken("a second put with other content replaced an object", hintCreateOnly)
	case !errors.Is(err, ErrExists):
		return fmt.Errorf("a second put with other content failed: %w", err)
	}
	if _, err := p.store.Put(ctx, name, []byte(probeFirst)); errors.Is(err, ErrExists) {
		return broken("a put of the same content did not find its own object", "the store changes what it is given; use another one")
	} else if err != nil {
		return fmt.Errorf("a second put with the same content failed: %w", err)
	}
	return nil
}

func (p *prober) reads(ctx context.Context) error {
	name := p.folder + "object"
	const hintRead = "recovery would miss data that was protected; use a store that shows an object from the moment it was put"
	body, _, err := p.store.Get(ctx, name, int64(len(probeFirst)), nil)
	switch {
	case errors.Is(err, ErrNotFound):
		return broken("an object cannot be read after it was put", hintRead)
	case err != nil:
		return fmt.Errorf("reading failed: %w", err)
	case string(body) != probeFirst:
		return broken("an object has other content than was put", "use a store that keeps what it is given")
	}
	if info, err := p.store.Stat(ctx, name); err != nil {
		return fmt.Errorf("looking up an object failed: %w", err)
	} else if info.Size != int64(len(probeFirst)) {
		return broken(fmt.Sprintf("an object of %d bytes is said to have %d", len(probeFirst), info.Size), "use another store")
	}
	const hintRange = "use a store that answers range requests"
	part, err := p.store.GetRange(ctx, name, 4, 5, nil)
	if err != nil {
		return fmt.Errorf("reading a range failed: %w", err)
	} else if !bytes.Equal(part, []byte(probeFirst[4:9])) {
		return broken("a range has other content than the object", hintRange)
	}
	if _, err := p.store.GetRange(ctx, name, 4, 100, nil); err == nil {
		return broken("a range past the end of an object was answered", hintRange)
	} else if !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("reading a range past the end: %w", err)
	}
	var listed []string
	for info, err := range p.store.List(ctx, p.folder, "") {
		if err != nil {
			return fmt.Errorf("listing failed: %w", err)
		}
		listed = append(listed, info.Name)
	}
	if len(listed) != 1 || listed[0] != name {
		return broken(fmt.Sprintf("the list of an object that was put is %q", listed), hintRead)
	}
	return nil
}

// race lets several puts of one name run at once: only one may win, and its
// content must be what is there.
func (p *prober) race(ctx context.Context) error {
	name := p.folder + "race"
	body := func(i int) []byte { return fmt.Appendf(nil, "the content of racer %d", i) }
	var racers sync.WaitGroup
	errs := make([]error, probeRacers)
	for i := range probeRacers {
		racers.Go(func() {
			for range probeAttempts {
				_, errs[i] = p.store.Put(ctx, name, body(i))
				if errs[i] == nil || errors.Is(errs[i], ErrExists) || ctx.Err() != nil {
					return
				}
			}
		})
	}
	racers.Wait()
	var winners []int
	for i, err := range errs {
		switch {
		case err == nil:
			winners = append(winners, i)
		case !errors.Is(err, ErrExists):
			return fmt.Errorf("one of %d puts at once failed: %w", probeRacers, err)
		}
	}
	if len(winners) != 1 {
		return broken(fmt.Sprintf("of %d puts of one name at once %d succeeded", probeRacers, len(winners)), hintCreateOnly)
	}
	there, _, err := p.store.Get(ctx, name, 100, nil)
	if err != nil {
		return fmt.Errorf("reading failed: %w", err)
	}
	if !bytes.Equal(there, body(winners[0])) {
		return broken("the object has not the content of the put that succeeded", hintCreateOnly)
	}
	return nil
}

// clean deletes the probe's objects if the store allows it, also when the probe
// was interrupted.
func (p *prober) clean(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeCleanPatience)
	defer cancel()
	for _, name := range []string{"object", "race"} {
		_ = p.store.Delete(ctx, p.folder+name)
	}
}

func broken(what, hint string) error {
	return fmt.Errorf("%w: %s: %s", ErrUnsupported, what, hint)
}
