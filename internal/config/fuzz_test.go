package config

import "testing"

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"", "0", "1", "64MiB", "1.5GiB", "9223372036854775807", "9223372036854775808", "8EiB", "-1", "1e30", "1_0", " 1 MB", "NaN", "0x10"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := ParseSize(text); err == nil && n < 0 {
			t.Errorf("%q is %d bytes", text, n)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add("state = \"/s\"\nstore = [\"file:///x\"]\n[[volume]]\nname = \"v\"\npath = \"/v\"\nsize = \"1GiB\"\n")
	f.Add("[[volume")
	f.Add("rpo = \"1s\"")
	f.Fuzz(func(t *testing.T, text string) {
		_, _ = Parse("drc.toml", text)
	})
}

func FuzzParsePairs(f *testing.F) {
	for _, s := range []string{"", "a=1,b=2", "a=1,a=2", "a", "=", ",", "a=,b==", "c=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := ParsePairs("--volume", text, "a", "b")
		if err != nil {
			return
		}
		for k := range m {
			if k != "a" && k != "b" {
				t.Errorf("%q has the key %q, which is not allowed", text, k)
			}
		}
	})
}
