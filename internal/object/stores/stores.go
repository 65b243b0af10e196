// Package stores opens an object.Store from its URL: s3:// for a bucket of an S3
// service, file:// for a directory.
package stores

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"drc/internal/object"
	"drc/internal/object/dir"
	"drc/internal/object/s3"
)

const (
	exampleS3   = "s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1"
	exampleFile = "file:///backup/volume1"
)

// Options of Open. The zero value is fit for use.
type Options struct {
	// Create makes the directory of a file:// store if it is missing. Only
	// drc init does that: later, a missing directory may be one that is not
	// mounted. Buckets are never made.
	Create bool
	// S3 is for s3:// stores.
	S3 s3.Options
}

// Open opens the store that a URL names. It makes no request: a missing bucket
// or wrong credentials show when the store is used. Errors name the part of the
// URL that is wrong and hold nothing that may be secret.
func Open(ctx context.Context, raw string, options Options) (object.Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	scheme, _, ok := strings.Cut(raw, ":")
	switch {
	case raw == "":
		return nil, fmt.Errorf("the store's URL is empty; examples: %s and %s", exampleS3, exampleFile)
	case !ok || !strings.Contains(raw, "://"):
		return nil, fmt.Errorf("the store's URL has no scheme; examples: %s and %s", exampleS3, exampleFile)
	case scheme == "s3":
		location, err := s3.ParseURL(raw)
		if err != nil {
			return nil, err
		}
		// Not returned at once: a nil *s3.Store is no nil object.Store.
		store, err := s3.Open(location, options.S3)
		if err != nil {
			return nil, err
		}
		return store, nil
	case scheme == "file":
		root, err := parseFile(raw)
		if err != nil {
			return nil, err
		}
		store, err := dir.Open(root, dir.Options{Create: options.Create})
		if err != nil {
			return nil, err
		}
		return store, nil
	}
	return nil, fmt.Errorf("the store's URL is wrong: the scheme %q is neither s3 nor file; examples: %s and %s", scheme, exampleS3, exampleFile)
}

// Redact returns the URL without anything that may be secret, for messages about
// URLs that Open refused.
func Redact(raw string) string {
	parsed, err := url.Parse(raw)
	if err != nil {
		scheme, _, ok := strings.Cut(raw, "://")
		if !ok {
			return "(not a URL)"
		}
		return scheme + "://(not a URL)"
	}
	if parsed.User != nil {
		parsed.User = url.User("redacted")
	}
	parsed.Fragment = ""
	query, err := url.ParseQuery(parsed.RawQuery)
	if err != nil {
		parsed.RawQuery = "redacted"
		return parsed.String()
	}
	if len(query) > 0 {
		var kept []string
		for pair := range strings.SplitSeq(parsed.RawQuery, "&") {
			key, value, _ := strings.Cut(pair, "=")
			switch {
			case key == "region" || key == "endpoint" && !strings.Contains(query.Get(key), "@"):
				kept = append(kept, key+"="+value)
			default:
				kept = append(kept, key+"=redacted")
			}
		}
		parsed.RawQuery = strings.Join(kept, "&")
	}
	return parsed.String()
}

func parseFile(raw string) (string, error) {
	wrong := func(what string) error {
		return fmt.Errorf("the store's URL is wrong: %s; an example: %s", what, exampleFile)
	}
	parsed, err := url.Parse(raw)
	switch {
	case err != nil:
		return "", wrong("it cannot be parsed")
	case parsed.User != nil:
		return "", wrong("a directory takes no credentials")
	case parsed.Host != "":
		return "", wrong(fmt.Sprintf("%q is in the place of a host; an absolute path has three slashes in front", parsed.Host))
	case parsed.Path == "" || parsed.Path == "/":
		return "", wrong("the directory is missing")
	case parsed.RawQuery != "" || parsed.Fragment != "":
		return "", wrong("it has more than a path; write ? as %3F and # as %23")
	case strings.ContainsRune(parsed.Path, 0):
		return "", wrong("the path holds a zero byte")
	}
	return parsed.Path, nil
}
