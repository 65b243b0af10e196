package replay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path"
	"slices"
	"sync"
	"syscall"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/vfs"
	"drc/restorer"
)

const (
	// stepBytesDefault is about how much one step fetches at most.
	stepBytesDefault = 256 << 20
	// groupsEvery is how often it is looked whether the repository has new groups.
	groupsEvery = time.Minute
)

// Options of Open.
type Options struct {
	// Restorer is how histories are read. Its key can read content.
	Restorer restorer.Config
	Dir      string // of the copies; made if it is not there
	// Volumes are the names of those that are followed; none: all that the repository
	// has, and those that join later.
	Volumes []string
	// Files are files to be used as the copies of volumes, by the volumes' names; the
	// others have theirs in Dir.
	Files map[string]string
	// Adopt allows files that are there and that the standby has not made to become
	// copies: what they hold is compared, and overwritten where it differs.
	Adopt bool
	// Delay is how old a checkpoint must be before the copies move to it.
	Delay time.Duration
	// StepBytes is about how much is fetched in one step; 0 means 256 MiB.
	StepBytes int64
	Logger    *slog.Logger

	FS    vfs.FS                           // nil: the machine's
	Stamp func(name string) (Stamp, error) // nil: the machine's
	Now   func() time.Time                 // nil: time.Now
}

// Standby keeps copies of volumes. Status, List, Open and FindAt may be called while
// it runs; Step must not be called from two goroutines at once.
type Standby struct {
	o      Options
	fs     vfs.FS
	logger *slog.Logger
	lock   io.Closer

	mu      sync.Mutex
	groups  map[block.GroupID]*group
	claimed map[string]string // files of copies, and whose they are
	looked  time.Time         // when groups were listed
	closed  bool
}

// InUseError says that another process works with the folder, or with a copy.
type InUseError struct{ What string }

func (e *InUseError) Error() string {
	return fmt.Sprintf("%s is in use by another process: stop that one first, or choose another folder", e.What)
}

// Unwrap makes it a vfs.ErrLocked.
func (e *InUseError) Unwrap() error { return vfs.ErrLocked }

// Open opens a standby's folder, or begins one, and finds the volumes. If one of those
// that were named is not there the error is restorer.ErrNoSuchVolume. Copies that a
// crash has left in the middle of a step are brought to its end.
func Open(ctx context.Context, o Options) (_ *Standby, err error) {
	if o.FS == nil {
		o.FS = vfs.OS()
	}
	if o.Stamp == nil {
		o.Stamp = stampOf
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.StepBytes <= 0 {
		o.StepBytes = stepBytesDefault
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Restorer.Memory == nil {
		o.Restorer.Memory = restorer.NewMemory() // one for all groups
	}
	if !o.Restorer.Ring.CanReadContent() {
		return nil, fmt.Errorf("a standby reads content, and this key cannot: %w", crypt.ErrWrongKey)
	}
	s := &Standby{o: o, fs: o.FS, logger: o.Logger, groups: map[block.GroupID]*group{}, claimed: map[string]string{}}
	if err := s.fs.MkdirAll(o.Dir); err != nil {
		return nil, fmt.Errorf("make the standby's folder: %w", err)
	}
	if s.lock, err = s.fs.Lock(path.Join(o.Dir, lockName)); errors.Is(err, vfs.ErrLocked) {
		return nil, &InUseError{"the standby's folder " + o.Dir}
	}
	if err != nil {
		return nil, fmt.Errorf("lock the standby's folder: %w", err)
	}
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	// An earlier process may have died between the renaming of a state file and the
	// sync of the folder. What is found now must not be taken back by a power cut when
	// other things rest on it.
	if err := s.fs.SyncDir(o.Dir); err != nil {
		return nil, fmt.Errorf("make the names in the standby's folder durable: %w", err)
	}
	if err := s.checkFolder(); err != nil {
		return nil, err
	}
	if err := s.findGroups(ctx); err != nil {
		return nil, err
	}
	return s, s.checkVolumes()
}

// checkFolder sees to it that the folder is of this repository.
func (s *Standby) checkFolder() error {
	var f folderState
	found, err := s.load(folderName, &f)
	if err != nil {
		return err
	}
	id := s.o.Restorer.Repo.ID
	switch {
	case !found:
		return s.save(folderName, folderState{stateVersion, id})
	case f.Version != stateVersion:
		return fmt.Errorf("the folder %s was made by another version of drc (format %d): use that one, or another folder", s.o.Dir, f.Version)
	case f.Repository != id:
		return fmt.Errorf("the folder %s is a standby of repository %s, and the stores given hold repository %s: give it a folder of its own", s.o.Dir, f.Repository, id)
	}
	return nil
}

// findGroups opens the groups that are not followed yet.
func (s *Standby) findGroups(ctx context.Context) error {
	ids, err := restorer.Groups(ctx, s.o.Restorer)
	if err != nil {
		return err
	}
	s.looked = s.o.Now()
	for _, id := range ids {
		if s.group(id) != nil {
			continue
		}
		f, err := restorer.Follow(ctx, s.o.Restorer, id)
		if errors.Is(err, restorer.ErrNoEntries) {
			continue
		}
		if err != nil {
			return err
		}
		g := newGroup(s, id, f)
		if err := g.load(); err != nil {
			return err
		}
		if err := g.recover(); err != nil {
			return err
		}
		if err := g.join(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		s.groups[id] = g
		s.mu.Unlock()
	}
	return nil
}

func (s *Standby) group(id block.GroupID) *group {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.groups[id]
}

// all are the groups, in a fixed order.
func (s *Standby) all() []*group {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Collect(maps.Values(s.groups))
	slices.SortFunc(out, func(a, b *group) int { return block.ID(a.id).Compare(block.ID(b.id)) })
	return out
}

// wanted reports whether a volume is to be followed.
func (s *Standby) wanted(name string) bool {
	return len(s.o.Volumes) == 0 || slices.Contains(s.o.Volumes, name)
}

// checkVolumes refuses names that no group has.
func (s *Standby) checkVolumes() error {
	var names []string
	for _, g := range s.all() {
		for _, v := range g.history().Volumes() {
			names = append(names, v.Name)
		}
	}
	for _, name := range s.o.Volumes {
		if !slices.Contains(names, name) {
			return fmt.Errorf("%w as %q: the repository has %q", restorer.ErrNoSuchVolume, name, names)
		}
	}
	for name := range s.o.Files {
		if !slices.Contains(names, name) || !s.wanted(name) {
			return fmt.Errorf("a file is given for volume %q, which is not followed: %w", name, restorer.ErrNoSuchVolume)
		}
	}
	return nil
}

// claim notes whose file that is.
func (s *Standby) claim(file, volume string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other, ok := s.claimed[file]; ok {
		return fmt.Errorf("two volumes, %q and %q, would have their copies in %s: give one of them another file, or follow it in another folder", other, volume, file)
	}
	s.claimed[file] = volume
	return nil
}

// Step does a bounded part of the work of each group, and reports whether there was
// any. What went wrong with one group does not stop others; it is in the error and in
// Status.
func (s *Standby) Step(ctx context.Context) (worked bool, err error) {
	if s.o.Now().Sub(s.looked) >= groupsEvery && len(s.o.Volumes) == 0 {
		err = s.findGroups(ctx)
	}
	for _, g := range s.all() {
		did, gerr := g.step(ctx)
		worked = worked || did
		err = errors.Join(err, gerr)
	}
	return worked, err
}

// CatchUp works until all copies are at the newest checkpoint that they may be at, of
// those that there were when it began: a busy volume has a new one every second.
func (s *Standby) CatchUp(ctx context.Context) error {
	goal := map[block.GroupID]uint64{}
	for {
		worked, err := s.Step(ctx)
		if err != nil || !worked {
			return err
		}
		reached := true
		for _, g := range s.all() {
			if goal[g.id] == 0 {
				goal[g.id] = g.history().N() // the step has looked what there is
			}
			ok, err := g.isAt(ctx, goal[g.id])
			if err != nil {
				return err
			}
			reached = reached && ok
		}
		if reached {
			return nil
		}
	}
}

// Run follows until ctx ends. What fails is tried again, and shown in Status.
func (s *Standby) Run(ctx context.Context) error {
	running := map[block.GroupID]bool{}
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		for _, g := range s.all() {
			if !running[g.id] {
				running[g.id] = true
				wg.Go(func() { g.run(ctx) })
			}
		}
		if err := pause(ctx, groupsEvery); err != nil {
			return nil
		}
		if len(s.o.Volumes) == 0 {
			if err := s.findGroups(ctx); err != nil && ctx.Err() == nil {
				s.logger.Warn("look for new groups; trying again", "error", err)
			}
		}
	}
}

// Close lets go of the folder. Run and Step must have ended, and views be released.
func (s *Standby) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	var err error
	for _, g := range s.all() {
		err = errors.Join(err, g.close())
	}
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func timeOf(ns int64) time.Time { return time.Unix(0, ns) }

// noRoom makes an error of writing plain.
func noRoom(what string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("there is no room for %s: free some space; it goes on by itself then: %w", what, err)
	}
	return fmt.Errorf("write %s: %w", what, err)
}
