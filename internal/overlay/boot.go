package overlay

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// bootID is the random id of the machine's present boot.
func bootID() (string, error) {
	const name = "/proc/sys/kernel/random/boot_id"
	raw, err := os.ReadFile(name)
	id := strings.TrimSpace(string(raw))
	if err == nil && id == "" {
		err = errors.New("it is empty")
	}
	if err != nil {
		return "", fmt.Errorf("find out which boot of the machine this is, which tells whether unflushed writes are still there: read %s: %w", name, err)
	}
	return id, nil
}
