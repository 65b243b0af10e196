// Package realpart gives tests the real programs that DRC works with. A missing
// one fails the test with a message that says how to get it; no test is skipped.
// Processes are ended by their own id, and also when the test process dies.
package realpart
