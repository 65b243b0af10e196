package realpart

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// failing is a test that notes why it failed.
type failing struct {
	testing.TB
	text string
}

func (f *failing) Helper() {}

func (f *failing) Fatalf(format string, args ...any) {
	f.text = fmt.Sprintf(format, args...)
	panic(f)
}

func failure(run func(testing.TB)) (text string) {
	f := &failing{}
	defer func() {
		if r := recover(); r != nil && r != any(f) {
			panic(r)
		}
		text = f.text
	}()
	run(f)
	return ""
}

func TestPath_MissingProgramNamesItsPackage(t *testing.T) {
	debianPackage["no-such-program"] = "no-such-package"
	defer delete(debianPackage, "no-such-program")
	if text := failure(func(t testing.TB) { Path(t, "no-such-program") }); !strings.Contains(text, "apt-get install no-such-package") {
		t.Errorf("%q", text)
	}
	if text := failure(func(t testing.TB) { Path(t, "another-one") }); !strings.Contains(text, "add it to the table") {
		t.Errorf("%q", text)
	}
	if text := failure(func(t testing.TB) { Python(t, "no_such_module", "python3-none") }); !strings.Contains(text, "apt-get install python3-none") {
		t.Errorf("%q", text)
	}
}

func TestPath_FindsAdministratorsPrograms(t *testing.T) {
	t.Setenv("PATH", "/nowhere")
	path := Path(t, "nbd-client")
	if info, err := os.Stat(path); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf("%s: %v", path, err)
	}
}
