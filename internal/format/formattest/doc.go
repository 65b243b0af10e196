// Package formattest checks golden vectors: for each stored structure its
// bytes in testdata/format/v1/<name>.bin and their meaning in <name>.json. What
// was written once must be readable for ever, so a vector that fails is a
// broken promise, not an old test. Only tests import it.
package formattest
