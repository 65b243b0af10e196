package uploader_test

import (
	"bytes"
	"flag"
	"testing"

	"go.uber.org/goleak"

	"drc/internal/segment"
)

func TestMain(m *testing.M) {
	// A check is a whole history here. -rapid.checks and -count make more.
	if err := flag.Set("rapid.checks", "40"); err != nil {
		panic(err)
	}
	// The compressor makes its channels when it is first used. That must not be
	// in a test's bubble, or other tests could not use it.
	plain := bytes.Repeat([]byte("once "), 1000)
	packed, compression := segment.Compress(nil, plain)
	if _, err := segment.Decompress(nil, packed, compression, len(plain)); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}
