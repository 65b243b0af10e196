package s3

import (
	"fmt"
	"net/url"
	"os"
	"regexp"
	"sort"
	"strings"

	"drc/internal/object"
)

const (
	example         = "s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1"
	endpointDefault = "https://s3.amazonaws.com"
	regionDefault   = "us-east-1"
)

// Location says where a store is. ParseURL makes it from a store's URL.
type Location struct {
	Bucket   string
	Prefix   string // slash-separated, without slashes around it; may be empty
	Endpoint string // scheme and host; empty is AWS
	Region   string // empty is AWS_REGION, AWS_DEFAULT_REGION or us-east-1
}

var (
	bucketPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	regionPattern = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
	prefixPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$`)
)

// ParseURL reads a store's URL, s3://bucket/prefix?endpoint=...&region=... Its
// errors name the part that is wrong and hold nothing that may be secret.
func ParseURL(raw string) (Location, error) {
	parsed, err := url.Parse(raw)
	if err != nil {
		// The error of url.Parse quotes the URL.
		return Location{}, wrong("it cannot be parsed")
	}
	switch {
	case parsed.Scheme != "s3":
		return Location{}, wrong("the scheme is not s3")
	case parsed.User != nil:
		return Location{}, wrong("it holds credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or into ~/.aws/credentials")
	case parsed.Fragment != "":
		return Location{}, wrong("it has a fragment (#)")
	case parsed.Host == "":
		return Location{}, wrong("the bucket is missing")
	case !bucketPattern.MatchString(parsed.Host):
		return Location{}, wrong("the bucket %q is not 3 to 63 of a-z, 0-9, '.' and '-'", parsed.Host)
	}
	location := Location{Bucket: parsed.Host, Prefix: strings.Trim(parsed.Path, "/")}
	if err := checkPrefix(location.Prefix); err != nil {
		return Location{}, err
	}
	query, err := url.ParseQuery(parsed.RawQuery)
	if err != nil {
		return Location{}, wrong("the part after ? cannot be parsed")
	}
	keys := make([]string, 0, len(query))
	for key := range query {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		if len(query[key]) != 1 {
			return Location{}, wrong("%s appears more than once", key)
		}
		value := query.Get(key)
		switch key {
		case "endpoint":
			if location.Endpoint, err = parseEndpoint(value); err != nil {
				return Location{}, err
			}
		case "region":
			if !regionPattern.MatchString(value) {
				return Location{}, wrong("the region %q is not of a-z, 0-9 and '-'", value)
			}
			location.Region = value
		default:
			return Location{}, wrong("%q is unknown; there are endpoint and region", key)
		}
	}
	return location, nil
}

// URL returns the location's URL in its shortest form.
func (l Location) URL() string {
	u := url.URL{Scheme: "s3", Host: l.Bucket}
	if l.Prefix != "" {
		u.Path = "/" + l.Prefix
	}
	// Written by hand: escaped slashes and colons would make it hard to read.
	var query []string
	if l.Endpoint != "" {
		query = append(query, "endpoint="+l.Endpoint)
	}
	if l.Region != "" {
		query = append(query, "region="+l.Region)
	}
	u.RawQuery = strings.Join(query, "&")
	return u.String()
}

// endpoint returns the host and whether it speaks TLS.
func (l Location) endpoint() (host string, secure bool) {
	endpoint := l.Endpoint
	if endpoint == "" {
		endpoint = endpointDefault
	}
	scheme, host, _ := strings.Cut(endpoint, "://")
	return host, scheme == "https"
}

// region returns the region to sign for.
func (l Location) region() string {
	for _, region := range []string{l.Region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION")} {
		if region != "" {
			return region
		}
	}
	return regionDefault
}

// aws says whether the endpoint is Amazon's: only there can the host's own
// identity be of use.
func (l Location) aws() bool {
	host, _ := l.endpoint()
	host, _, _ = strings.Cut(host, ":")
	for _, domain := range []string{".amazonaws.com", ".amazonaws.com.cn", ".api.aws"} {
		if strings.HasSuffix(host, domain) {
			return true
		}
	}
	return false
}

func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	if !prefixPattern.MatchString(prefix) || len(prefix) > 200 {
		return wrong("the prefix %q is not of A-Z, a-z, 0-9, '.', '_' and '-' between single slashes, or longer than 200", prefix)
	}
	for element := range strings.SplitSeq(prefix, "/") {
		if element == "." || element == ".." {
			return wrong("the prefix %q has an element %q", prefix, element)
		}
	}
	return nil
}

// parseEndpoint returns scheme and host. The scheme defaults to https.
func parseEndpoint(value string) (string, error) {
	if !strings.Contains(value, "://") {
		value = "https://" + value
	}
	endpoint, err := url.Parse(value)
	switch {
	case err != nil:
		return "", wrong("the endpoint cannot be parsed")
	case endpoint.User != nil:
		return "", wrong("the endpoint holds credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or into ~/.aws/credentials")
	case endpoint.Scheme != "http" && endpoint.Scheme != "https":
		return "", wrong("the endpoint's scheme %q is neither http nor https", endpoint.Scheme)
	case endpoint.Hostname() == "":
		return "", wrong("the endpoint names no host")
	case strings.Trim(endpoint.Path, "/") != "" || endpoint.RawQuery != "" || endpoint.Fragment != "":
		return "", wrong("the endpoint has more than a scheme and a host")
	}
	return endpoint.Scheme + "://" + endpoint.Host, nil
}

func wrong(format string, args ...any) error {
	return fmt.Errorf("the store's URL is wrong: %s; an example: %s", fmt.Sprintf(format, args...), example)
}

// key returns the name of an object in the bucket.
func (l Location) key(name string) string {
	if l.Prefix == "" {
		return name
	}
	return l.Prefix + "/" + name
}

// name undoes key; it returns false for a key that is not the store's.
func (l Location) name(key string) (string, bool) {
	if l.Prefix != "" {
		rest, ok := strings.CutPrefix(key, l.Prefix+"/")
		if !ok {
			return "", false
		}
		key = rest
	}
	return key, object.CheckName(key) == nil
}
