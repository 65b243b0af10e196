package vfs

import (
	"math/rand/v2"
	"path"
	"slices"
	"syscall"
)

// Fault is what is wrong with a directory of a Mem and all below. It begins at
// the Skip-th operation that it touches and stays until it is taken back.
type Fault struct {
	// Ops are the operations that it touches; none means all.
	Ops []Op
	// Skip is how many of these still go well.
	Skip int
	// Err is what they fail with; nil means EIO. A sync that fails loses what was
	// not synced, see Mem.SetHook.
	Err error
	// Hang, if not nil, has them wait until it is closed before they fail: a disk
	// that does not answer. Other operations go on meanwhile.
	Hang <-chan struct{}
}

// SetFault puts f on the directory dir, in place of what was wrong there; nil
// ends it. A process that is born again (Kill, Crash) finds the disk as it is:
// without faults.
func (m *Mem) SetFault(dir string, f *Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f == nil {
		delete(m.faults, clean(dir))
		return
	}
	c := *f
	m.faults[clean(dir)] = &c
}

// Vanish takes the directory dir away, with all below, durably. Files in it that
// are open can still be used, as with files that were removed.
func (m *Mem) Vanish(dir string) {
	dir = clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	parent, err := m.find(path.Dir(dir))
	if err != nil {
		return // it is not there
	}
	name := path.Base(dir)
	delete(parent.names, name)
	delete(parent.durable, name)
	parent.pending = slices.DeleteFunc(parent.pending, func(c change) bool { return c.add == name })
}

// Rot changes what is on the disk in the files of the directory dir, with all below:
// one byte in each of so many of them, as rng says, without a word. It returns their
// names.
func (m *Mem) Rot(dir string, files int, rng *rand.Rand) (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	top, err := m.find(clean(dir))
	if err != nil {
		return nil
	}
	var all []*node
	var paths []string
	var walk func(n *node, name string)
	walk = func(n *node, name string) {
		if !n.isDir && len(n.base) > 0 && len(n.data) > 0 {
			all, paths = append(all, n), append(paths, name)
		}
		for _, k := range sortedNames(n.names) {
			walk(n.names[k], name+"/"+k)
		}
	}
	walk(top, clean(dir))
	for range min(files, len(all)) {
		i := rng.IntN(len(all))
		n, at := all[i], rng.IntN(min(len(all[i].base), len(all[i].data)))
		n.base[at] ^= byte(1 + rng.IntN(255))
		if _, dirty := n.dirty[int64(at)/sectorBytes]; !dirty {
			n.data[at] = n.base[at]
		}
		names = append(names, paths[i])
	}
	return names
}

// fault is the error that an operation has to fail with, if any. It is called
// under the lock before the operation has begun, and gives it up while it hangs.
func (m *Mem) fault(op Op, name string) error {
	var hit *Fault
	at := ""
	for dir, f := range m.faults {
		if within(name, dir) && (hit == nil || len(dir) > len(at)) && (len(f.Ops) == 0 || slices.Contains(f.Ops, op)) {
			hit, at = f, dir
		}
	}
	if hit == nil {
		return nil
	}
	if hit.Skip > 0 {
		hit.Skip--
		return nil
	}
	if hit.Hang != nil {
		m.mu.Unlock()
		<-hit.Hang
		m.mu.Lock()
	}
	if hit.Err == nil {
		return pathError(op, name, syscall.EIO)
	}
	return pathError(op, name, hit.Err)
}
