package s3

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"drc/internal/object/objecttest"
	"drc/internal/realpart"

	"go.uber.org/goleak"
)

// minioServer is the server of all tests that do not break theirs.
var minioServer *realpart.Instance

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	instances, stop, err := realpart.StartMinIO(1)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	minioServer = instances[0]
	for _, line := range minioServer.Env() {
		key, value, _ := strings.Cut(line, "=")
		os.Setenv(key, value)
	}
	code := m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// open opens the store at a URL and closes it at the end of the test.
func open(t testing.TB, raw string, options Options) *Store {
	t.Helper()
	location, err := ParseURL(raw)
	if err != nil {
		t.Fatal(err)
	}
	store, err := Open(location, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// newStore returns an empty store on the shared server.
func newStore(t testing.TB) *Store {
	return open(t, minioServer.URL("conformance", "run/"+objecttest.RandomName()), Options{})
}
