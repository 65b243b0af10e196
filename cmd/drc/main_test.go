package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain puts a drc made of this test binary on the PATH, so that tests run
// real processes, with the race detector where the tests have it.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"drc": func() { os.Exit(run()) },
	})
}
