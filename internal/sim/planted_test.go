package sim

import (
	"context"

	"drc/capture"
	"drc/internal/object"
	"drc/internal/pipeline"
	"drc/internal/vfs"
)

// plant is a bug put into the world, at one of the seams of the agent. The zero
// plant is none.
type plant struct {
	name   string
	adjust func(*plan)

	onFS      func(vfs.FS) vfs.FS
	onDisk    func(capture.Disk) capture.Disk
	onJournal func(pipeline.Journal) pipeline.Journal
	onIndex   func(pipeline.OpenIndex) pipeline.OpenIndex
	onPut     func(s *store, name string, body []byte) (put bool, what []byte)
	onAnswer  func(s *store, name string, err error) error // of a put
}

// what names the bug, for who tells of a seed.
func (p *plant) what() string {
	if p.name == "" {
		return ""
	}
	return ", with the bug: " + p.name
}

func (p *plant) fs(f vfs.FS) vfs.FS {
	if p.onFS == nil {
		return f
	}
	return p.onFS(f)
}

func (p *plant) disk(d capture.Disk) capture.Disk {
	if p.onDisk == nil {
		return d
	}
	return p.onDisk(d)
}

func (p *plant) journal(j pipeline.Journal) pipeline.Journal {
	if p.onJournal == nil {
		return j
	}
	return p.onJournal(j)
}

func (p *plant) index(o pipeline.OpenIndex) pipeline.OpenIndex {
	if p.onIndex == nil {
		return o
	}
	return p.onIndex(o)
}

// put returns what a put does to the store.
func (p *plant) put(s *store, name string, body []byte) func() (object.Answer, error) {
	if p.onPut != nil {
		put, what := p.onPut(s, name, body)
		if !put {
			return func() (object.Answer, error) { return object.Answer{}, nil }
		}
		body = what
	}
	return func() (object.Answer, error) {
		a, err := s.mem.Put(context.Background(), name, body)
		if p.onAnswer != nil {
			err = p.onAnswer(s, name, err)
		}
		return a, err
	}
}
