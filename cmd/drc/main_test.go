package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain puts a drc made of this test binary on the PATH, so that tests run
// real processes, with the race detector where the tests have it.
func TestMain(m *testing.M) {
	// A program with the race detector sleeps for a second before it ends well,
	// in case that another goroutine still races. A test that runs twenty
	// commands would sleep for most of its time.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")); err != nil {
		panic(err)
	}
	testscript.Main(m, map[string]func(){
		"drc": func() { os.Exit(run()) },
	})
}
