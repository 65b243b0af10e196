package block

import "fmt"

// Kind says what a write does. The values are stored in the journal.
type Kind uint8

const (
	// KindData means: the extent now holds the bytes given.
	KindData Kind = 1
	// KindZero means: the extent now reads as zeroes (TRIM and WRITE_ZEROES alike).
	KindZero Kind = 2
)

func (k Kind) String() string {
	switch k {
	case KindData:
		return "data"
	case KindZero:
		return "zero"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// VolumeIndex is a volume's small number inside its group. It is given once,
// when the volume joins the group, and never used again for another one.
type VolumeIndex uint16

// Write is one captured change of one volume.
type Write struct {
	Seq    Seq
	Time   int64 // wall clock when it was captured, nanoseconds since 1970 UTC
	Volume VolumeIndex
	Kind   Kind
	Extent Extent
	Data   []byte // exactly Extent.Len bytes for KindData, else nil
}
