package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"drc/internal/crypt"
	"drc/internal/repo"
	"drc/internal/vfs"
)

// pendingIdentity is the identity of a repository that is being made, in a file
// beside its final name. It is durable before anything is sealed to it or signed
// with it, and gets its name when the repository is whole: so an init that was
// interrupted goes on where it was, and a file of the final name always belongs
// to a whole repository.
type pendingIdentity struct {
	identity *crypt.Identity
	name     string // final
	file     *os.File
	made     bool // by this init
}

const (
	pendingSuffix   = ".init"
	maxIdentityFile = 64 << 10
)

// openPending makes a new identity for name, or takes the one that an
// interrupted init has left, and locks it.
func openPending(name string) (*pendingIdentity, error) {
	p := &pendingIdentity{name: name}
	path := name + pendingSuffix
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		if p.identity, err = crypt.NewIdentity(); err != nil {
			return nil, err
		}
		if err := writeSecret(path, p.identity.Encode(time.Now())); err != nil {
			return nil, err
		}
		p.made = true
	}
	if p.file, err = os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0); err != nil {
		return nil, fmt.Errorf("open the identity of the interrupted init, %s: %w: move it away, or choose another name for the identity", path, cause(err))
	}
	if err := unix.Flock(int(p.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		p.close()
		return nil, fmt.Errorf("%s: another drc init is at work with it: wait for that one", path)
	}
	if p.made {
		return p, nil
	}
	raw, err := io.ReadAll(io.LimitReader(p.file, maxIdentityFile))
	if err == nil {
		p.identity, err = crypt.ParseIdentity(path, raw)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("%w: an init was interrupted before it was written; nothing was made with it: remove %s and try again", err, path)
	}
	return p, nil
}

// giveUp removes the identity unless something may have been made with it.
func (p *pendingIdentity) giveUp(failed error) error {
	if !p.made || errors.Is(failed, repo.ErrLeftover) {
		return fmt.Errorf("%s%s is kept: repeat this init as it was to go on", p.name, pendingSuffix)
	}
	return os.Remove(p.name + pendingSuffix)
}

// finish gives the identity its name, durably.
func (p *pendingIdentity) finish() error {
	path := p.name + pendingSuffix
	err := unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, p.name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not every file system has it
		err = os.Rename(path, p.name)
	}
	if err == nil {
		err = vfs.OS().SyncDir(filepath.Dir(p.name))
	}
	if err != nil {
		return fmt.Errorf("the repository is made, and its identity is in %s: give it the name %s: %w", path, p.name, cause(err))
	}
	return nil
}

// close gives up the lock.
func (p *pendingIdentity) close() { _ = p.file.Close() }
