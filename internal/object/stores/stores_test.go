package stores

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drc/internal/object"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestOpen_URLs(t *testing.T) {
	for raw, want := range map[string]string{
		"s3://bucket": "s3://bucket",
		"s3://bucket/a/b/?endpoint=http://127.0.0.1:9000/&region=eu-west-1": "s3://bucket/a/b?endpoint=http://127.0.0.1:9000&region=eu-west-1",
		"s3://bucket/?endpoint=s3.example.org":                              "s3://bucket?endpoint=https://s3.example.org",
		"s3://bucket/?endpoint=http%3A%2F%2F[::1]:9000":                     "s3://bucket?endpoint=http://[::1]:9000",
		"file:///some/where/":                                               "file:///some/where",
		"file:///some%20where":                                              "file:///some%20where",
	} {
		store, err := Open(t.Context(), raw, Options{})
		if err != nil {
			t.Error(err)
			continue
		}
		if store.URL() != want {
			t.Errorf("%s became %s, want %s", raw, store.URL(), want)
		}
		again, err := Open(t.Context(), store.URL(), Options{})
		if err != nil || again.URL() != want {
			t.Errorf("%s does not open again: %v", store.URL(), err)
		}
		store.Close()
	}
}

func TestOpen_WrongURLs(t *testing.T) {
	for raw, part := range map[string]string{
		"":                                 "empty",
		"bucket":                           "no scheme",
		"/some/where":                      "no scheme",
		"http://example.org/bucket":        `"http" is neither`,
		"s3:///prefix":                     "bucket is missing",
		"s3://Bucket":                      `bucket "Bucket"`,
		"s3://b":                           `bucket "b"`,
		"s3://key:secret@bucket":           "credentials",
		"s3://bucket/a//b":                 "prefix",
		"s3://bucket/a/../b":               "prefix",
		"s3://bucket#x":                    "fragment",
		"s3://bucket?secret=secret":        `"secret" is unknown`,
		"s3://bucket?region=a&region=b":    "more than once",
		"s3://bucket?region=a%20b":         "region",
		"s3://bucket?endpoint=ftp://x":     "endpoint's scheme",
		"s3://bucket?endpoint=http://":     "no host",
		"s3://bucket?endpoint=http://x/y":  "more than a scheme and a host",
		"s3://bucket?endpoint=k:secret@h":  "credentials",
		"s3://bu\x7fcket?x=secret":         "parsed",
		"file://some/where":                "three slashes",
		"file:///":                         "directory is missing",
		"file:///a?b=secret":               "more than a path",
		"file://user:secret@/some/where":   "credentials",
		"file:///some/where#fragmentthere": "more than a path",
	} {
		_, err := Open(t.Context(), raw, Options{})
		if err == nil || !strings.Contains(err.Error(), part) || !strings.Contains(err.Error(), "example") {
			t.Errorf("open %q: %v, want an example and %q", raw, err, part)
		}
		if err != nil && strings.Contains(strings.ReplaceAll(err.Error(), `"secret"`, ""), "secret@") {
			t.Errorf("open %q: the error tells the secret: %v", raw, err)
		}
	}
}

func TestRedact(t *testing.T) {
	for raw, want := range map[string]string{
		"s3://bucket/p?endpoint=http://h:9000&region=r": "s3://bucket/p?endpoint=http://h:9000&region=r",
		"s3://key:secret@bucket/p":                      "s3://redacted@bucket/p",
		"s3://bucket?secret_key=secret&region=r":        "s3://bucket?secret_key=redacted&region=r",
		"s3://bucket?endpoint=http://k:secret@h":        "s3://bucket?endpoint=redacted",
		"s3://bucket?endpoint=http://k:secret%40h":      "s3://bucket?endpoint=redacted",
		"s3://bucket?%zz=secret":                        "s3://bucket?redacted",
		"s3://bucket#secret":                            "s3://bucket",
		"s3://bu\x7fcket?x=secret":                      "s3://(not a URL)",
		"secret\x7f":                                    "(not a URL)",
		"file:///some/where":                            "file:///some/where",
	} {
		if got := Redact(raw); got != want {
			t.Errorf("redact %q: %q, want %q", raw, got, want)
		}
	}
}

func TestOpen_CreatesADirectoryOnlyWhenAsked(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "b")
	store, err := Open(t.Context(), "file://"+root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), "x", nil); !errors.Is(err, object.ErrNoBucket) {
		t.Errorf("put: %v, want ErrNoBucket", err)
	}
	if _, err := os.Stat(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory was made: %v", err)
	}
	if store, err = Open(t.Context(), "file://"+root, Options{Create: true}); err != nil {
		t.Fatal(err)
	}
	if err := object.Probe(t.Context(), store); err != nil {
		t.Error(err)
	}
}
