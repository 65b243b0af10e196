package formattest

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
)

func init() {
	if flag.Lookup("update") == nil {
		flag.Bool("update", false, "write the golden vectors anew")
	}
}

// Update reports whether vectors are to be written anew.
func Update() bool { return flag.Lookup("update").Value.String() == "true" }

// Path is where a file below the repository's testdata folder lies. Tests run
// in their package's folder.
func Path(t testing.TB, elements ...string) string {
	t.Helper()
	at, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(at, "go.mod")); err == nil {
			return filepath.Join(append([]string{at, "testdata"}, elements...)...)
		}
		up := filepath.Dir(at)
		if up == at {
			t.Fatal("no go.mod in any folder above")
		}
		at = up
	}
}

// Decode says what the bytes of a structure mean, as something that JSON shows.
type Decode func(raw []byte) (any, error)

// Exact checks the vector of a structure whose bytes follow from its fields:
// raw, encoded just now, must be the vector's bytes, and decode must find its
// meaning in them.
func Exact(t *testing.T, name string, raw []byte, decode Decode) {
	t.Helper()
	want := Frozen(t, name, func() []byte { return raw }, decode)
	if !bytes.Equal(raw, want) {
		t.Errorf("%s encodes to\n%x, the vector is\n%x", name, raw, want)
	}
}

// Frozen checks the vector of a structure with randomness in it: made once, and
// decoded in every run. It returns the vector's bytes.
func Frozen(t *testing.T, name string, create func() []byte, decode Decode) []byte {
	t.Helper()
	path := Path(t, "format", "v1", name)
	if Update() {
		raw := create()
		write(t, path+".bin", raw)
		write(t, path+".json", meaning(t, name, raw, decode))
	}
	raw := Bytes(t, name)
	want, err := os.ReadFile(path + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if have := meaning(t, name, raw, decode); !bytes.Equal(have, want) {
		t.Errorf("%s decodes to\n%s\nthe vector means\n%s", name, have, want)
	}
	return raw
}

// Bytes returns a vector's bytes.
func Bytes(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(Path(t, "format", "v1", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func meaning(t *testing.T, name string, raw []byte, decode Decode) []byte {
	t.Helper()
	v, err := decode(raw)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(text, '\n')
}

func write(t *testing.T, path string, raw []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		t.Fatal(err)
	}
}
