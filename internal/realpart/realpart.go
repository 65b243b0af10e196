// Package realpart finds the real programs that tests run DRC against: NBD
// clients, servers and load generators. A program that is not installed fails
// the test with the package to install; it never skips it, for a test that did
// not run looks just like one that passed.
package realpart

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// debianPackage says where each program comes from.
var debianPackage = map[string]string{
	"fio":         "fio",
	"mkfs.ext4":   "e2fsprogs",
	"mkfs.xfs":    "xfsprogs",
	"fusermount3": "fuse3",
	"nbd-client":  "nbd-client",
	"nbdcopy":     "libnbd-bin",
	"nbdfuse":     "libnbd-bin",
	"nbdinfo":     "libnbd-bin",
	"nbdkit":      "nbdkit",
	"python3":     "python3",
	"qemu-img":    "qemu-utils",
	"qemu-io":     "qemu-utils",
	"qemu-nbd":    "qemu-utils",
}

// Path returns the path of a program, or fails the test. Programs for the
// administrator are found even if PATH lacks their directory.
func Path(t testing.TB, program string) string {
	t.Helper()
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, program)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path
		}
	}
	pkg, ok := debianPackage[program]
	if !ok {
		t.Fatalf("%s is not installed, and realpart does not know its Debian package: add it to the table", program)
	}
	t.Fatalf("%s is not installed: apt-get install %s", program, pkg)
	return ""
}

// Python returns the path of the system's Python, which has the given module
// from the given Debian package, or fails the test. Another Python that comes
// first in PATH does not have the system's modules.
func Python(t testing.TB, module, pkg string) string {
	t.Helper()
	const python = "/usr/bin/python3"
	if _, err := os.Stat(python); err != nil {
		t.Fatalf("%s is not installed: apt-get install python3", python)
	}
	if out, err := exec.Command(python, "-c", "import "+module).CombinedOutput(); err != nil {
		t.Fatalf("%s lacks the module %s: apt-get install %s\n%s", python, module, pkg, out)
	}
	return python
}
