package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

const samples = "../../testdata/configs"

// The example gives every key there is, so that none goes unexplained.
func TestExample_HasEveryKey(t *testing.T) {
	f, err := Load(samples + "/example.toml")
	if err != nil {
		t.Fatal(err)
	}
	if f.RPO != Duration(time.Second) || f.Bandwidth != 50<<20 || f.Volumes[0].Size != 10<<30 || len(f.Buffer) != 2 || len(f.Stores) != 2 {
		t.Errorf("the example was read as %+v", f)
	}
	raw, err := os.ReadFile(samples + "/example.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []any{File{}, Volume{}, Buffer{}} {
		for _, field := range reflect.VisibleFields(reflect.TypeOf(part)) {
			key := field.Tag.Get("toml")
			if !regexp.MustCompile(`(?m)^(` + regexp.QuoteMeta(key) + ` = |\[\[` + regexp.QuoteMeta(key) + `\]\])`).Match(raw) {
				t.Errorf("the example lacks %s", key)
			}
		}
	}
}

// The first line of each invalid sample is part of the message it must give.
func TestInvalidSamples(t *testing.T) {
	names, err := filepath.Glob(samples + "/invalid/*.toml")
	if err != nil || len(names) == 0 {
		t.Fatalf("no samples: %v", err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			raw, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			first, _, _ := strings.Cut(string(raw), "\n")
			want := strings.TrimPrefix(first, "# ")
			_, err = Load(name)
			if err == nil {
				t.Fatal("it was taken")
			}
			text := strings.TrimPrefix(err.Error(), samples+"/invalid/")
			if !strings.Contains(text, want) || !strings.HasPrefix(text, filepath.Base(name)) {
				t.Errorf("%q does not name the file and say %q", text, want)
			}
			if bad := regexp.MustCompile(` toml: |^toml: |strconv|type mismatch|\n|reflect|<nil>|config\.`).FindString(text); bad != "" {
				t.Errorf("%q has %q in it", text, bad)
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "4096": 4096, "4096B": 4096, "1K": 1024, "1KiB": 1024, "3 MiB": 3 << 20, "2g": 2 << 30, "8T": 8 << 40, "8388607T": 8388607 << 40,
	} {
		if n, err := ParseSize(text); err != nil || n != want {
			t.Errorf("%q is %d, %v, not %d", text, n, err, want)
		}
	}
	for _, text := range []string{"", "G", "-1", "1.5G", "1X", "1KK", "1GiB1", "8388608T", "99999999999999999999", "1 2", "0x10"} {
		if n, err := ParseSize(text); err == nil {
			t.Errorf("%q was taken for %d", text, n)
		}
	}
}

func TestParsePairs(t *testing.T) {
	m, err := ParsePairs("--volume", "name=a,path=/x=y", "name", "path", "size")
	if err != nil || m["name"] != "a" || m["path"] != "/x=y" || len(m) != 2 {
		t.Errorf("%v, %v", m, err)
	}
	for _, text := range []string{"", "a", "name=a,", "name=a,name=b", "nam=a", "name=a;path=b,x"} {
		if m, err := ParsePairs("--volume", text, "name", "path", "size"); err == nil {
			t.Errorf("%q was taken for %v", text, m)
		}
	}
}
