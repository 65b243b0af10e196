package crypt

import (
	"testing"

	"drc/internal/format"
)

// A certificate that was verified is known by root and by every byte: another
// root, or any changed bit, is refused all the same, and there is a bound.
func TestVerifyCertificate_RemembersOnlyWhatWasVerified(t *testing.T) {
	root, other := NewRoot(), NewRoot()
	agent, err := NewAgent(root, 1)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		cert, err := VerifyCertificate(root.Public(), agent.CertRaw)
		if err != nil || cert != agent.Cert {
			t.Fatalf("%+v, %v", cert, err)
		}
		if _, err := VerifyCertificate(other.Public(), agent.CertRaw); err == nil {
			t.Fatal("another root's certificate is accepted")
		}
		for i := range agent.CertRaw {
			agent.CertRaw[i] ^= 1
			if _, err := VerifyCertificate(root.Public(), agent.CertRaw); err == nil {
				t.Fatalf("byte %d changed and not found", i)
			}
			agent.CertRaw[i] ^= 1
		}
	}
	if _, ok := verifiedCertificates.get(root.Public(), agent.CertRaw); !ok {
		t.Fatal("a verified certificate is not remembered")
	}
	for i := range byte(2 * certificatesKept) {
		verifiedCertificates.put(root.Public(), []byte{i}, format.Certificate{})
	}
	if n := len(verifiedCertificates.known); n > certificatesKept {
		t.Fatalf("%d certificates are kept", n)
	}
	clear(verifiedCertificates.known) // what was put in here was never verified
}
