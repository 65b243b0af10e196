// Package config reads the agent's configuration file and the values in it.
// The file is TOML, and strict: a key that is not known is an error, so that a
// misspelt one cannot go unnoticed. testdata/configs/example.toml shows and
// explains every key.
package config

import (
	"errors"
	"fmt"
	"math"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// File is the content of a configuration file. The zero value of a field
// means that it was not given.
type File struct {
	Stores    []string `toml:"stores"`
	Identity  string   `toml:"identity"`
	AgentKey  string   `toml:"agent-key"`
	State     string   `toml:"state"`
	RPO       Duration `toml:"rpo"`
	Bandwidth Size     `toml:"bandwidth"`
	HTTP      string   `toml:"http"`
	Volumes   []Volume `toml:"volume"`
	Buffer    []Buffer `toml:"buffer"`
}

// Volume is one [[volume]].
type Volume struct {
	Name     string `toml:"name"`
	Path     string `toml:"path"`
	Size     Size   `toml:"size"`
	Listen   string `toml:"listen"`
	Group    string `toml:"group"`
	Ack      string `toml:"ack"`
	WhenFull string `toml:"when-full"`
}

// Buffer is one [[buffer]].
type Buffer struct {
	Path string `toml:"path"`
	Size Size   `toml:"size"`
}

// Size is a number of bytes, written as 4096, "10GiB", "500M" (binary units).
type Size int64

// UnmarshalTOML implements toml.Unmarshaler.
func (s *Size) UnmarshalTOML(v any) error {
	switch v := v.(type) {
	case int64:
		if v < 0 {
			return fmt.Errorf("size %d is negative", v)
		}
		*s = Size(v)
		return nil
	case string:
		n, err := ParseSize(v)
		*s = Size(n)
		return err
	}
	return fmt.Errorf("%v is not a size: write 4096 or \"10GiB\"", v)
}

// Duration is a time.Duration written as "1s", "500ms".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v <= 0 {
		return fmt.Errorf("%q is not a duration: write 1s, 500ms, 5m", text)
	}
	*d = Duration(v)
	return nil
}

// ParseSize reads a number of bytes with an optional binary unit: K, KiB, M,
// MiB, G, GiB, T, TiB.
func ParseSize(text string) (int64, error) {
	digits := strings.TrimRight(text, "KMGTPiBkmgtpb")
	unit := strings.ToUpper(strings.TrimSpace(text[len(digits):]))
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
	factor := map[string]int64{
		"": 1, "B": 1, "K": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MIB": 1 << 20,
		"G": 1 << 30, "GIB": 1 << 30, "T": 1 << 40, "TIB": 1 << 40,
	}[unit]
	if err != nil || n < 0 || factor == 0 || n > math.MaxInt64/factor {
		return 0, fmt.Errorf("%q is not a size: write 4096, 512K, 10GiB", text)
	}
	return n * factor, nil
}

// Load reads a configuration file.
func Load(path string) (*File, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the configuration %s does not exist: correct --config", path)
	}
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return Parse(path, string(raw))
}

// Parse reads a configuration; name is what errors call it.
func Parse(name, text string) (*File, error) {
	f := &File{}
	meta, err := toml.Decode(text, f)
	var syntax toml.ParseError
	if errors.As(err, &syntax) {
		return nil, fmt.Errorf("%s, line %d: %s", name, syntax.Position.Line, syntax.Message)
	}
	if err != nil {
		return nil, wrongType(name, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return nil, fmt.Errorf("%s: unknown key %q: see drc agent --help, or the example configuration, for the keys there are", name, unknown[0].String())
	}
	return f, nil
}

// mismatch is how the TOML library says that a value is of another type than
// its key takes; it has no type of error for that.
var mismatch = regexp.MustCompile(`^toml: line (\d+) \(last key "(.*?)"\): incompatible types: .* destination has type (\w+)`)

func wrongType(name string, err error) error {
	m := mismatch.FindStringSubmatch(err.Error())
	if m == nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	line, key, wanted := m[1], m[2], "a text: put it between quotes"
	switch {
	case key == "volume" || key == "buffer":
		wanted = "a list of tables: write [[" + key + "]]"
	case m[3] == "slice":
		wanted = `a list: write ["…"]`
	}
	return fmt.Errorf("%s, line %s: %s must be %s", name, line, key, wanted)
}

// ParsePairs reads "key=value,key=value" with the keys allowed.
func ParsePairs(what, text string, allowed ...string) (map[string]string, error) {
	out := map[string]string{}
	for _, part := range strings.Split(text, ",") {
		k, v, ok := strings.Cut(part, "=")
		known := false
		for _, a := range allowed {
			known = known || a == k
		}
		switch {
		case !ok || !known:
			return nil, fmt.Errorf("%s %q: %q is not one of %s=…", what, text, part, strings.Join(allowed, "=…, "))
		case out[k] != "":
			return nil, fmt.Errorf("%s %q: %s is given twice", what, text, k)
		}
		out[k] = v
	}
	return out, nil
}
