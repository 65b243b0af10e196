// Package fat makes small FAT16 file system images, so that drc demo has a
// real file system to protect where no mkfs is installed. The layout is that
// of Microsoft's "FAT: General Overview of On-Disk Format", version 1.03.
package fat

import (
	"encoding/binary"
	"fmt"
	"strings"
)

const (
	sectorBytes       = 512
	sectorsPerCluster = 4
	reservedSectors   = 4
	rootEntries       = 512
	fats              = 2
	entryBytes        = 32
	media             = 0xf8 // fixed disk
	endOfChain        = 0xffff
)

// File is one file of the root directory.
type File struct {
	Name    string // 8.3, upper case
	Content []byte
}

// Image returns a FAT16 image of size bytes, a multiple of 4096 from 16 MiB to
// 128 MiB, with the files given.
func Image(size int, label string, files []File) ([]byte, error) {
	if size < 16<<20 || size > 128<<20 || size%4096 != 0 {
		return nil, fmt.Errorf("a FAT16 image of %d bytes is not supported: 16 to 128 MiB", size)
	}
	im := make([]byte, size)
	sectors := size / sectorBytes
	const rootSectors = rootEntries * entryBytes / sectorBytes
	clusterBytes := sectorsPerCluster * sectorBytes
	// Each FAT entry takes two bytes; a few more than needed do no harm.
	fatSectors := (sectors/sectorsPerCluster*2 + sectorBytes - 1) / sectorBytes
	firstFAT := reservedSectors * sectorBytes
	root := firstFAT + fats*fatSectors*sectorBytes
	data := root + rootSectors*sectorBytes
	clusters := (size - data) / clusterBytes

	boot := im[:sectorBytes]
	copy(boot, []byte{0xeb, 0x3c, 0x90})
	copy(boot[3:], "DRC     ")
	le := binary.LittleEndian
	le.PutUint16(boot[11:], sectorBytes)
	boot[13] = sectorsPerCluster
	le.PutUint16(boot[14:], reservedSectors)
	boot[16] = fats
	le.PutUint16(boot[17:], rootEntries)
	boot[21] = media
	le.PutUint16(boot[22:], uint16(fatSectors))
	le.PutUint16(boot[24:], 63) // sectors a track, for old BIOSes
	le.PutUint16(boot[26:], 16) // heads
	le.PutUint32(boot[32:], uint32(sectors))
	boot[36] = 0x80
	boot[38] = 0x29
	le.PutUint32(boot[39:], 0x44524331) // serial number
	copy(boot[43:54], pad(label, 11))
	copy(boot[54:62], "FAT16   ")
	boot[510], boot[511] = 0x55, 0xaa

	fat := im[firstFAT : firstFAT+fatSectors*sectorBytes]
	le.PutUint16(fat, 0xff00|media)
	le.PutUint16(fat[2:], endOfChain)
	entry := im[root:]
	copy(entry, pad(label, 11))
	entry[11] = 0x08 // volume label
	next := 2        // first data cluster
	for i, f := range files {
		base, ext, _ := strings.Cut(f.Name, ".")
		if len(base) > 8 || len(ext) > 3 || base == "" || strings.ToUpper(f.Name) != f.Name {
			return nil, fmt.Errorf("file name %q is not 8.3 in upper case", f.Name)
		}
		n := (len(f.Content) + clusterBytes - 1) / clusterBytes
		if next-2+n > clusters || i+1 >= rootEntries {
			return nil, fmt.Errorf("file %s does not fit into %d bytes", f.Name, size)
		}
		e := entry[(i+1)*entryBytes:]
		copy(e, pad(base, 8)+pad(ext, 3))
		e[11] = 0x20                 // archive
		le.PutUint16(e[24:], 0x5a21) // 2025-01-01
		if n > 0 {
			le.PutUint16(e[26:], uint16(next))
		}
		le.PutUint32(e[28:], uint32(len(f.Content)))
		copy(im[data+(next-2)*clusterBytes:], f.Content)
		for c := range n {
			link := uint16(next + c + 1)
			if c == n-1 {
				link = endOfChain
			}
			le.PutUint16(fat[2*(next+c):], link)
		}
		next += n
	}
	copy(im[firstFAT+fatSectors*sectorBytes:], fat)
	return im, nil
}

func pad(s string, n int) string { return (s + strings.Repeat(" ", n))[:n] }
