package format

import "drc/internal/block"

const (
	magicLabel = "DRCB"
	// MaxBufferDisks bounds the members of a buffer.
	MaxBufferDisks = 64
	// MaxLabelBytes bounds the file of a label.
	MaxLabelBytes = 1 << 20
	maxPathBytes  = 4096
)

// Label says whose directory of a buffer this is, and which others belong to
// it. See docs/FORMAT-BUFFER.md, "Label".
type Label struct {
	Repo       block.ID
	Host       block.ID // the state directory that owns the buffer
	Disk       block.ID // this directory
	Generation uint64   // of the set of members; grows with each change
	Joining    bool     // not yet known to be in the others' labels; holds no data
	Members    []Member // all directories of this generation, this one included
}

// Member is one directory of a buffer.
type Member struct {
	Disk block.ID
	Path string // where it was last seen, for people
}

// Encode returns the label's file.
func (l *Label) Encode() []byte {
	var e Encoder
	e.Raw(l.Repo[:])
	e.Raw(l.Host[:])
	e.Raw(l.Disk[:])
	e.U64(l.Generation)
	e.U8(flag(l.Joining, 1))
	e.Uvarint(uint64(len(l.Members)))
	for _, m := range l.Members {
		e.Raw(m.Disk[:])
		e.String(m.Path)
	}
	return appendChecked(nil, magicLabel, 1, e.Buf)
}

// DecodeLabel reads a label's file.
func DecodeLabel(name string, raw []byte) (*Label, error) {
	d, err := openChecked(name, magicLabel, 1, raw, nil)
	if err != nil {
		return nil, err
	}
	l := &Label{Repo: d.ID(), Host: d.ID(), Disk: d.ID(), Generation: d.U64()}
	l.Joining = d.flags(1)&1 != 0
	n := d.Len(MaxBufferDisks, 17)
	self := false
	for range n {
		m := Member{Disk: d.ID(), Path: d.String(maxPathBytes)}
		for _, o := range l.Members {
			if o.Disk == m.Disk {
				d.Fail("disk %s is listed twice", m.Disk)
			}
		}
		self = self || m.Disk == l.Disk
		l.Members = append(l.Members, m)
	}
	if d.Err() == nil && !self {
		d.Fail("it does not list its own disk %s", l.Disk)
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	return l, nil
}

func flag(on bool, bit uint8) uint8 {
	if on {
		return bit
	}
	return 0
}

// flags reads a byte in which only the known bits may be set.
func (d *Decoder) flags(known uint8) uint8 {
	v := d.U8()
	if d.err == nil && v&^known != 0 {
		d.Fail("flags %#x are unknown", v&^known)
	}
	return v
}
