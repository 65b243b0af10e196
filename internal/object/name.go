package object

import (
	"fmt"
	"strings"
)

// Limits of names. A store's own prefix comes on top, and S3 ends at 1024 bytes,
// file systems at 255 an element.
const (
	nameLengthMax    = 768
	elementLengthMax = 200
)

// CheckName returns an error that says what is wrong with an object's name, or
// nil. Every Store refuses other names, and leaves foreign objects or files with
// other names out of its listings.
func CheckName(name string) error {
	if name == "" {
		return fmt.Errorf("object name is empty")
	}
	if len(name) > nameLengthMax {
		return fmt.Errorf("object name %.40q... has %d bytes, more than %d", name, len(name), nameLengthMax)
	}
	for element := range strings.SplitSeq(name, "/") {
		if err := CheckElement(element); err != nil {
			return fmt.Errorf("object name %q: %w", name, err)
		}
	}
	return nil
}

// CheckElement does what CheckName does for one element of a name.
func CheckElement(element string) error {
	switch {
	case element == "" || element == "." || element == "..":
		return fmt.Errorf("element %q is not allowed", element)
	case len(element) > elementLengthMax:
		return fmt.Errorf("element %.40q... has %d bytes, more than %d", element, len(element), elementLengthMax)
	}
	for i := range len(element) {
		if !nameByte(element[i]) {
			return fmt.Errorf("element %q has a character outside of a-z, 0-9, '.', '_' and '-'", element)
		}
	}
	return nil
}

// CheckPrefix returns an error if no name can begin with prefix.
func CheckPrefix(prefix string) error {
	elements := strings.Split(prefix, "/")
	for i, element := range elements {
		// The last element is a beginning only: it may be empty, "." or "..".
		last := i == len(elements)-1
		if last && (element == "" || element == "." || element == "..") {
			continue
		}
		if err := CheckElement(element); err != nil {
			return fmt.Errorf("name prefix %q: %w", prefix, err)
		}
	}
	return nil
}

// CheckDirPrefix does what CheckPrefix does for ListDirs, which takes whole
// elements only.
func CheckDirPrefix(prefix string) error {
	if prefix != "" && !strings.HasSuffix(prefix, "/") {
		return fmt.Errorf("folder prefix %q does not end in /", prefix)
	}
	return CheckPrefix(prefix)
}

// CheckRange returns an error if off and n are no range of bytes.
func CheckRange(name string, off, n int64) error {
	if off < 0 || n < 0 || off+n < off {
		return fmt.Errorf("range of %d bytes from %d of object %s is no range", n, off, name)
	}
	return nil
}

func nameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}
