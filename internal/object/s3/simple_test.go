package s3

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// simpleS3 is an S3 service that lacks what its fields do not grant.
type simpleS3 struct {
	conditions bool // it heeds If-None-Match
	atomic     bool // it checks the condition and writes in one step
	racy       bool // it lets a second put pass the check before it writes the first
	refuse     bool // it answers conditions with NotImplemented
	keep       bool // it refuses to delete
	noRanges   bool // it ignores Range
	lateList   bool // its listings are empty

	mu      sync.Mutex
	objects map[string][]byte
	arrived int
	second  chan struct{} // closed when two puts of the race arrived
}

func (s *simpleS3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := strings.TrimPrefix(r.URL.Path, "/bucket/")
	fail := func(status int, code string) {
		w.WriteHeader(status)
		fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, code)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects == nil {
		s.objects = map[string][]byte{}
		s.second = make(chan struct{})
	}
	there, exists := s.objects[key]
	switch r.Method {
	case http.MethodPut:
		if s.refuse && r.Header.Get("If-None-Match") != "" {
			fail(http.StatusNotImplemented, "NotImplemented")
			return
		}
		if s.conditions && exists {
			fail(http.StatusPreconditionFailed, "PreconditionFailed")
			return
		}
		if s.racy && strings.HasSuffix(key, "/race") {
			s.meet()
		}
		s.objects[key] = body
		w.Header().Set("ETag", `"x"`)
	case http.MethodDelete:
		if s.keep {
			fail(http.StatusForbidden, "AccessDenied")
			return
		}
		delete(s.objects, key)
		w.WriteHeader(http.StatusNoContent)
	case http.MethodGet, http.MethodHead:
		if r.URL.Query().Get("list-type") != "" {
			s.list(w, r.URL.Query().Get("prefix"))
			return
		}
		if !exists {
			fail(http.StatusNotFound, "NoSuchKey")
			return
		}
		if s.noRanges {
			r.Header.Del("Range")
		}
		w.Header().Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
		w.Header().Set("ETag", `"x"`)
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(there)))
	}
}

// meet lets the first put that comes wait for the second, so that both have
// passed the check. It needs the lock and gives it up while it waits.
func (s *simpleS3) meet() {
	s.arrived++
	switch s.arrived {
	case 1:
		s.mu.Unlock()
		<-s.second
		s.mu.Lock()
	case 2:
		close(s.second)
	}
}

func (s *simpleS3) list(w io.Writer, prefix string) {
	var keys []string
	for key := range s.objects {
		if strings.HasPrefix(key, prefix) && !s.lateList {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	fmt.Fprint(w, "<ListBucketResult><IsTruncated>false</IsTruncated>")
	for _, key := range keys {
		fmt.Fprintf(w, "<Contents><Key>%s</Key><Size>%d</Size></Contents>", key, len(s.objects[key]))
	}
	fmt.Fprint(w, "</ListBucketResult>")
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
