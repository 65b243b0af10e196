package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// volume reads an image by what its own boot sector says, and by nothing that
// Image knows: as a driver would that has only Microsoft's document.
type volume struct {
	raw          []byte
	label        string
	clusterBytes int
	clusters     int
	fat          []byte
	root, data   []byte
}

func open(raw []byte) (*volume, error) {
	le := binary.LittleEndian
	sector, perCluster := int(le.Uint16(raw[11:])), int(raw[13])
	reserved, copies, entries := int(le.Uint16(raw[14:])), int(raw[16]), int(le.Uint16(raw[17:]))
	sectors, fatSectors := int(le.Uint16(raw[19:])), int(le.Uint16(raw[22:]))
	if sectors == 0 {
		sectors = int(le.Uint32(raw[32:]))
	}
	switch {
	case raw[510] != 0x55 || raw[511] != 0xaa:
		return nil, errors.New("no signature")
	case raw[0] != 0xeb || raw[2] != 0x90:
		return nil, errors.New("it does not begin with a jump")
	case sector != 512 || perCluster&(perCluster-1) != 0 || perCluster == 0:
		return nil, fmt.Errorf("%d bytes a sector, %d sectors a cluster", sector, perCluster)
	case sectors*sector != len(raw):
		return nil, fmt.Errorf("%d sectors in %d bytes", sectors, len(raw))
	case entries*32%sector != 0:
		return nil, fmt.Errorf("%d entries of the root folder do not end with a sector", entries)
	}
	v := &volume{raw: raw, clusterBytes: perCluster * sector}
	at := reserved * sector
	v.fat = raw[at : at+fatSectors*sector]
	for i := range copies {
		if !bytes.Equal(raw[at+i*fatSectors*sector:][:fatSectors*sector], v.fat) {
			return nil, fmt.Errorf("table %d is not like the first", i)
		}
	}
	at += copies * fatSectors * sector
	v.root, v.data = raw[at:at+entries*32], raw[at+entries*32:]
	v.clusters = len(v.data) / v.clusterBytes
	switch {
	case v.clusters < 4085 || v.clusters >= 65525: // this, and nothing else, makes it FAT16
		return nil, fmt.Errorf("%d clusters are not FAT16", v.clusters)
	case (v.clusters+2)*2 > len(v.fat):
		return nil, fmt.Errorf("a table of %d bytes is too small for %d clusters", len(v.fat), v.clusters)
	case le.Uint16(v.fat) != 0xff00|uint16(raw[21]) || le.Uint16(v.fat[2:]) < 0xfff8:
		return nil, errors.New("the first two entries of the table are wrong")
	}
	v.label = string(raw[43:54])
	return v, nil
}

// files returns what the root folder holds, and checks that no cluster is in two
// files or lost.
func (v *volume) files() (map[string][]byte, error) {
	out, used := map[string][]byte{}, map[int]bool{}
	for at := 0; v.root[at] != 0; at += 32 {
		e := v.root[at : at+32]
		if e[11]&0x08 != 0 {
			if string(e[:11]) != v.label {
				return nil, fmt.Errorf("the label is %q here and %q in the boot sector", e[:11], v.label)
			}
			continue
		}
		name := strings.TrimRight(string(e[:8]), " ")
		if ext := strings.TrimRight(string(e[8:11]), " "); ext != "" {
			name += "." + ext
		}
		left, next := int(binary.LittleEndian.Uint32(e[28:])), int(binary.LittleEndian.Uint16(e[26:]))
		content := []byte{}
		if left == 0 && next != 0 {
			return nil, fmt.Errorf("%s is empty and has a cluster", name)
		}
		for left > 0 {
			if next < 2 || next >= v.clusters+2 || used[next] {
				return nil, fmt.Errorf("%s: cluster %d is out of place, or another's", name, next)
			}
			used[next] = true
			n := min(left, v.clusterBytes)
			content = append(content, v.data[(next-2)*v.clusterBytes:][:n]...)
			left -= n
			next = int(binary.LittleEndian.Uint16(v.fat[2*next:]))
			if left == 0 && next < 0xfff8 {
				return nil, fmt.Errorf("%s goes on behind its end", name)
			}
		}
		out[name] = content
	}
	for c := 2; c < v.clusters+2; c++ {
		if binary.LittleEndian.Uint16(v.fat[2*c:]) != 0 && !used[c] {
			return nil, fmt.Errorf("cluster %d belongs to no file", c)
		}
	}
	return out, nil
}

func TestImage_IsReadAsItWasMade(t *testing.T) {
	r := rand.NewChaCha8([32]byte{1})
	noise := func(n int) []byte {
		p := make([]byte, n)
		_, _ = r.Read(p)
		return p
	}
	files := []File{
		{"README.TXT", []byte("hello\n")}, {"EMPTY", nil}, {"ONE.BIN", noise(2048)}, {"MORE.BIN", noise(2049)}, {"BIG.BIN", noise(5 << 20)}, {"A.B", noise(1)},
	}
	for _, size := range []int{16 << 20, 16<<20 + 4096, 33 << 20, 128 << 20} {
		raw, err := Image(size, "DRC DEMO", files)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		v, err := open(raw)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		got, err := v.files()
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if len(got) != len(files) || v.label != "DRC DEMO   " {
			t.Errorf("%d bytes: %d files, label %q", size, len(got), v.label)
		}
		for _, f := range files {
			if !bytes.Equal(got[f.Name], f.Content) {
				t.Errorf("%d bytes: %s is not as it was given", size, f.Name)
			}
		}
	}
}

func TestImage_FullToItsLastCluster(t *testing.T) {
	raw, err := Image(16<<20, "FULL", nil)
	if err != nil {
		t.Fatal(err)
	}
	v, err := open(raw)
	if err != nil {
		t.Fatal(err)
	}
	all := v.clusters * v.clusterBytes
	content := bytes.Repeat([]byte("full"), all/4)
	if raw, err = Image(16<<20, "FULL", []File{{"ALL", content}}); err != nil {
		t.Fatal(err)
	}
	if v, err = open(raw); err != nil {
		t.Fatal(err)
	}
	if got, err := v.files(); err != nil || !bytes.Equal(got["ALL"], content) {
		t.Errorf("%d bytes: %v", len(got["ALL"]), err)
	}
	if _, err := Image(16<<20, "FULL", []File{{"ALL", append(content, 1)}}); err == nil || !strings.Contains(err.Error(), "ALL does not fit") {
		t.Errorf("one byte more: %v", err)
	}
}

func TestImage_Refuses(t *testing.T) {
	for _, size := range []int{0, 16<<20 - 4096, 16<<20 + 512, 128<<20 + 4096} {
		if _, err := Image(size, "X", nil); err == nil {
			t.Errorf("an image of %d bytes was made", size)
		}
	}
	for _, name := range []string{"", ".TXT", "LONGNAME9", "A.LONG", "lower.txt"} {
		if _, err := Image(16<<20, "X", []File{{name, nil}}); err == nil || !strings.Contains(err.Error(), "8.3") {
			t.Errorf("name %q: %v", name, err)
		}
	}
	many := make([]File, rootEntries)
	for i := range many {
		many[i].Name = fmt.Sprint("F", i)
	}
	if _, err := Image(16<<20, "X", many[:rootEntries-1]); err != nil {
		t.Error(err)
	}
	if _, err := Image(16<<20, "X", many); err == nil {
		t.Error("more files than the root folder can have")
	}
}
