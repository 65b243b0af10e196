// Package crypttest has keys that are the same in every test run, for golden
// vectors and for tests that need some key. They are public: nothing real may
// ever be sealed to them.
package crypttest

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
)

const (
	ageIdentity = "AGE-SECRET-KEY-1EKVJAF5V8LVTDVRSE5SNACXRLQF8P09AMZMNMZSE4NDJAD3WA2LS64UYK4"
	ageAgent    = "AGE-SECRET-KEY-10FSR76G5DFCFH78UZSVRRPAHT8GTLZLGHEQ3VHQ3Y4HJYMPHWM0QNMG7W4"
)

// Created is the time that fixed things give as theirs, ns since 1970 UTC.
const Created = 1_700_000_000_123_456_789

// IdentityFile is the text of the fixed identity's file.
func IdentityFile(t testing.TB) []byte {
	t.Helper()
	return Identity(t).Encode(time.Unix(0, Created))
}

// Identity is a fixed identity.
func Identity(t testing.TB) *crypt.Identity {
	t.Helper()
	seed := bytes.Repeat([]byte{0x21}, ed25519.SeedSize)
	public := ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)
	text := fmt.Sprintf("DRC-ROOT-1-%x\nDRC-ROOT-SECRET-1-%x\n%s\n", []byte(public), seed, ageIdentity)
	id, err := crypt.ParseIdentity("fixed identity", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Agent is a fixed agent key of the fixed identity's repository.
func Agent(t testing.TB) *crypt.Agent {
	t.Helper()
	agent, _, err := crypt.ParseAgent("fixed agent key", AgentFile(t))
	if err != nil {
		t.Fatal(err)
	}
	return agent
}

// AgentFile is the text of the fixed agent key's file.
func AgentFile(t testing.TB) []byte {
	t.Helper()
	id := Identity(t)
	seed := bytes.Repeat([]byte{0x42}, ed25519.SeedSize)
	own, err := age.ParseX25519Identity(ageAgent)
	if err != nil {
		t.Fatal(err)
	}
	cert := format.Certificate{
		Repo: id.RootPublic.RepoID(), Agent: block.ID{0: 0xa9, 15: 1},
		Public:    [32]byte(ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)),
		Recipient: own.Recipient().String(), Created: Created,
	}
	body := cert.EncodeBody()
	raw := append(body, id.Root.Sign(crypt.ContextCertificate, body)...)
	var b strings.Builder
	fmt.Fprintf(&b, "DRC-ROOT-1-%x\n", id.RootPublic[:])
	fmt.Fprintf(&b, "DRC-AGENT-1-%s\n", hex.EncodeToString(raw))
	fmt.Fprintf(&b, "DRC-AGENT-SECRET-1-%x\n%s\n", seed, ageAgent)
	return []byte(b.String())
}

// Keys are fixed keys of a key set without a sealed form.
func Keys() *crypt.KeySet {
	ks := &crypt.KeySet{ID: block.ID{0: 0x4b, 15: 1}, HasContent: true}
	for i := range ks.Index {
		ks.Index[i], ks.Content[i] = byte(i), byte(0x80+i)
	}
	return ks
}

// Ring opens things under Keys, as the fixed identity.
func Ring(t testing.TB) *crypt.Ring {
	t.Helper()
	ring := crypt.NewRing(Identity(t))
	ring.AddOwn(Keys())
	return ring
}
