package block

import (
	"fmt"
	"strconv"
)

// Seq is the position of a write in its group's history: 1, 2, 3, … on a
// branch. Zero means "before the first write". All volumes of a group share
// one Seq line, so one Seq is one consistent state of all of them.
type Seq uint64

// String formats s in decimal, as status and history print it.
func (s Seq) String() string { return strconv.FormatUint(uint64(s), 10) }

// ParseSeq reads a decimal Seq.
func ParseSeq(text string) (Seq, error) {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a sequence number: use decimal digits", text)
	}
	return Seq(n), nil
}

// Progress holds the five watermarks of one group. Each is a Seq, and they are
// ordered Captured >= Durable >= Sealed >= Logged >= Committed at all times.
// Each of them only grows while its agent lives.
type Progress struct {
	Captured  Seq // taken from a client and numbered
	Durable   Seq // safe in the journal: survives a power cut
	Sealed    Seq // in sealed segments
	Logged    Seq // in a decided entry of the log on the stores
	Committed Seq // the newest checkpoint on the stores
}

// Valid reports whether the watermarks keep their order. A false answer is a
// bug in DRC, never a state that a fault may cause.
func (p Progress) Valid() bool {
	return p.Captured >= p.Durable && p.Durable >= p.Sealed &&
		p.Sealed >= p.Logged && p.Logged >= p.Committed
}
