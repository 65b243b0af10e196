package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/control"
)

// jsonDoc is what docs/CLI_JSON.md says of one command's output.
type jsonDoc map[string]jsonField

type jsonField struct {
	kind     string // string, number, boolean, list, object
	optional bool
	null     bool
}

var fieldRow = regexp.MustCompile("^\\| `([^`]+)` \\| ([a-z ]+) \\|(.*)\\|$")

// readJSONDoc returns the tables of the document by the heading they are under.
func readJSONDoc(t *testing.T) map[string]jsonDoc {
	t.Helper()
	raw, err := os.ReadFile("../../docs/CLI_JSON.md")
	must(t, err)
	docs := map[string]jsonDoc{}
	heading := ""
	for line := range strings.SplitSeq(string(raw), "\n") {
		if text, ok := strings.CutPrefix(line, "## drc "); ok {
			heading = strings.Fields(text)[0]
			docs[heading] = jsonDoc{}
		}
		m := fieldRow.FindStringSubmatch(line)
		if m == nil || heading == "" {
			continue
		}
		f := jsonField{kind: strings.Fields(m[2])[0], optional: strings.Contains(m[3], "may be absent"), null: strings.HasSuffix(m[2], "or null")}
		docs[heading][m[1]] = f
	}
	return docs
}

// flatten lists the paths in a JSON value with the kinds seen there.
func flatten(path string, v any, seen map[string]map[string]bool) {
	note := func(kind string) {
		if path != "" {
			if seen[path] == nil {
				seen[path] = map[string]bool{}
			}
			seen[path][kind] = true
		}
	}
	switch v := v.(type) {
	case nil:
		note("null")
	case string:
		note("string")
	case float64:
		note("number")
	case bool:
		note("boolean")
	case []any:
		note("list")
		for _, x := range v {
			if _, plain := x.(map[string]any); plain {
				flatten(path+"[]", x, seen)
			}
		}
	case map[string]any:
		if !strings.HasSuffix(path, "[]") {
			note("object")
		}
		for k, x := range v {
			sub := k
			if path != "" {
				sub = path + "." + k
			}
			flatten(sub, x, seen)
		}
	}
}

// checkpointAt are places of a checkpoint object that the document describes
// once, at named[].
var checkpointAt = regexp.MustCompile(`^(branches\[\]\.(first|last)|checkpoints\[\]|\[\]\.last)\.`)

// check compares documents that were printed with what is promised.
func (d jsonDoc) check(t *testing.T, name string, checkpoint jsonDoc, printed ...string) {
	t.Helper()
	union := map[string]map[string]bool{}
	for _, text := range printed {
		var v any
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			t.Fatalf("%s: %v in %s", name, err, text)
		}
		seen := map[string]map[string]bool{}
		flatten("", v, seen)
		for path, f := range d {
			parent := path[:max(0, strings.LastIndexAny(path, "."))]
			_, there := seen[path]
			_, parentThere := seen[strings.TrimSuffix(parent, "[]")]
			listEmpty := strings.HasSuffix(parent, "[]") && !strings.Contains(fmt.Sprint(seen), parent+".")
			if !there && !f.optional && (parent == "" || parentThere) && !listEmpty {
				t.Errorf("%s: %s is documented, and not printed", name, path)
			}
		}
		for path, kinds := range seen {
			if union[path] == nil {
				union[path] = map[string]bool{}
			}
			for k := range kinds {
				union[path][k] = true
			}
		}
	}
	for path, kinds := range union {
		f, ok := d[path]
		if rest := checkpointAt.ReplaceAllString(path, ""); !ok && rest != path {
			f, ok = checkpoint["named[]."+rest]
		}
		if !ok {
			t.Errorf("%s: %s is printed, and not documented", name, path)
			continue
		}
		for k := range kinds {
			if k != f.kind && (k != "null" || !f.null) {
				t.Errorf("%s: %s is a %s, and documented as a %s", name, path, k, f.kind)
			}
		}
	}
}

// fieldPaths lists the fields of a Go type as paths, those that may be left out
// too.
func fieldPaths(path string, t reflect.Type, out map[string]bool) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct {
		fieldPaths(path+"[]", t.Elem(), out)
		return
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if path != "" {
			name = path + "." + name
		}
		out[name] = true
		fieldPaths(name, f.Type, out)
	}
}

// Every field that is printed is documented, and every one that is documented
// is printed, with the kind that the document says.
func TestJSON_IsAsDocumented(t *testing.T) {
	t.Parallel()
	docs := readJSONDoc(t)
	h := newRepo(t, []string{"file://" + t.TempDir(), "file://" + t.TempDir()}, nil)
	dir := t.TempDir()
	status := []string{}
	a := h.start("--volume", "name=data,path="+filepath.Join(dir, "v")+",size=4MiB")
	status = append(status, h.drc("status", "--json"))
	emptyList := h.drc("volume", "list", "--json")
	buffer := []string{h.drc("buffer", "list", "--json")}
	dev := h.device("data")
	must(t, dev.WriteAt(testContext(t), noise(1, 65536), 0, block.WriteOptions{}))
	checkpoints := []string{h.drc("checkpoint", "one", "--wait", "--json"), h.drc("checkpoint", "two", "--json")}
	status = append(status, h.drc("status", "--json"))
	must(t, dev.Close())
	a.stop()
	// A change behind the agent's back makes a gap.
	must(t, os.WriteFile(filepath.Join(dir, "v"), noise(2, 4<<20), 0o600))
	a = h.start("--volume", "name=data,path="+filepath.Join(dir, "v"))
	status = append(status, h.drc("status", "--json"))
	h.await("the resync ends", isContinuous)
	a.stop()
	buffer = append(buffer, h.drc("buffer", "list", "--json")) // without an agent
	history := []string{h.drc("history", "data", "--json"), h.drc("history", "data", "--json", "--all")}
	if !strings.Contains(history[0], "after_seq") {
		t.Errorf("the history shows no gap: %s", history[0])
	}
	list := h.drc("volume", "list", "--json")
	restored := []string{h.other().drc("restore", "data", filepath.Join(dir, "out"), "--json")}
	for name := range storeFiles(t, strings.Fields(strings.TrimPrefix(h.env[0], "DRC_STORE=")), "/segments/") {
		must(t, os.Remove(name)) // one shard, whose loss is worked around
		break
	}
	damaged := h.other().drc("restore", "data", filepath.Join(dir, "out2"), "--json")
	restored = append(restored, damaged, h.other().drc("restore", "data", filepath.Join(dir, "out3"), "--json", "--at", "2999-01-01"))

	standby := h.other()
	s := standby.standby("--into", filepath.Join(dir, "standby"))
	status = append(status, standby.drc("status", "--json"))
	s.stop()

	d := docs["history"]
	docs["status"].check(t, "status", d, status...)
	docs["buffer"].check(t, "buffer list", d, buffer...)
	docs["checkpoint"].check(t, "checkpoint", d, checkpoints...)
	d.check(t, "history", d, history...)
	docs["volume"].check(t, "volume list", d, emptyList, list)
	docs["restore"].check(t, "restore", d, restored...)
	docs["serve"].check(t, "serve", d, h.other().served("data"), h.other().served("data", "--at", "2999-01-01"),
		h.other().served("data", "--writable", filepath.Join(dir, "written")))
	docs["version"].check(t, "version", d, h.drc("version", "--json"))
	docs["inspect"].check(t, "inspect", d, fmt.Sprintf(`{"kind":%q}`, kindOf(t, h.drc("inspect", "repo/0000000000000001"))), h.drc("inspect", h.state, "--json"))

	for name, x := range map[string]struct {
		doc string
		v   any
	}{
		"status": {"status", control.Status{}}, "checkpoint": {"checkpoint", control.CheckpointAnswer{}},
		"buffer list": {"buffer", control.Buffer{}}, "history": {"history", historyJSON{}}, "volume list": {"volume", []volumeJSON{}}, "restore": {"restore", restoreJSON{}},
		"serve":   {"serve", servedJSON{}},
		"inspect": {"inspect", control.Kept{}},
	} {
		paths := map[string]bool{}
		fieldPaths("", reflect.TypeOf(x.v), paths)
		for path := range paths {
			if _, ok := docs[x.doc][path]; !ok && !checkpointAt.MatchString(path) {
				t.Errorf("%s: the program knows %s, and the document does not", name, path)
			}
		}
		for path := range docs[x.doc] {
			if !paths[path] {
				t.Errorf("%s: the document has %s, and the program does not", name, path)
			}
		}
	}
}

func kindOf(t *testing.T, text string) string {
	t.Helper()
	var v struct {
		Kind string `json:"kind"`
	}
	must(t, json.Unmarshal([]byte(text), &v))
	return v.Kind
}
