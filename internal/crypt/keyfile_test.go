package crypt_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
)

var crypttestTime = time.Unix(0, crypttest.Created)

func rootLine(id *crypt.Identity) string { return fmt.Sprintf("DRC-ROOT-1-%x", id.RootPublic[:]) }

func dropLine(text, prefix string) string {
	var out []string
	for line := range strings.SplitSeq(text, "\n") {
		if !strings.HasPrefix(line, prefix) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

func TestIdentity_RoundTrip(t *testing.T) {
	id, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	got, err := crypt.ParseIdentity("file", id.Encode(crypttestTime))
	if err != nil {
		t.Fatal(err)
	}
	if got.RootPublic != id.RootPublic || got.Recipients()[0] != id.Recipients()[0] || !got.CanSign() {
		t.Error("the identity read is another one")
	}
	if string(got.Encode(crypttestTime)) != string(id.Encode(crypttestTime)) {
		t.Error("its file is another one")
	}
	message := []byte("m")
	if !id.RootPublic.Verify(crypt.ContextRepoRecord, message, got.Root.Sign(crypt.ContextRepoRecord, message)) {
		t.Error("its root key does not sign for the repository")
	}
	// Windows line ends, blank lines and spaces do no harm.
	spaced := strings.ReplaceAll(string(id.Encode(crypttestTime)), "\n", "  \r\n\r\n ")
	if _, err := crypt.ParseIdentity("file", []byte(spaced)); err != nil {
		t.Error(err)
	}
}

func TestAgent_RoundTrip(t *testing.T) {
	id := crypttest.Identity(t)
	agent, err := crypt.NewAgent(id.Root, crypttest.Created)
	if err != nil {
		t.Fatal(err)
	}
	got, root, err := crypt.ParseAgent("file", agent.EncodeFile(id.RootPublic))
	if err != nil {
		t.Fatal(err)
	}
	if root != id.RootPublic || got.Cert != agent.Cert {
		t.Error("the agent key read is another one")
	}
	message := []byte("m")
	if !crypt.VerifyAgent(agent.Cert, crypt.ContextValue, message, got.Sign(crypt.ContextValue, message)) {
		t.Error("it does not sign for its certificate")
	}
}

// TestKeyFiles_ErrorsSayWhatToDo: each wrong file gets an answer that names the
// file and tells what is wrong.
func TestKeyFiles_ErrorsSayWhatToDo(t *testing.T) {
	id := crypttest.Identity(t)
	other, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	identity := string(crypttest.IdentityFile(t))
	agent := string(crypttest.AgentFile(t))
	stranger, err := crypt.NewAgent(other.Root, 1)
	if err != nil {
		t.Fatal(err)
	}
	strangerFile := string(stranger.EncodeFile(other.RootPublic))
	line := func(text, prefix string) string {
		for l := range strings.SplitSeq(text, "\n") {
			if strings.HasPrefix(l, prefix) {
				return l
			}
		}
		t.Fatalf("no line %s", prefix)
		return ""
	}
	swap := func(text, prefix, by string) string { return dropLine(text, prefix) + "\n" + by + "\n" }
	for name, c := range map[string]struct{ text, want string }{
		"empty":              {"", "holds no DRC-ROOT-1-"},
		"something else":     {"-----BEGIN CERTIFICATE-----", "line 1: unknown kind of line"},
		"binary":             {strings.Repeat("\x00", 100000), "not a DRC key file"},
		"agent key":          {agent, "is an agent key, not an identity"},
		"no age key":         {dropLine(identity, "AGE-"), "holds no AGE-SECRET-KEY-"},
		"age key cut":        {identity[:len(identity)-10], "not a DRC key file, or it is damaged"},
		"root of another":    {swap(identity, "DRC-ROOT-1-", rootLine(other)), "do not belong together"},
		"root of no meaning": {swap(identity, "DRC-ROOT-1-", "DRC-ROOT-1-zz"), "bad value behind DRC-ROOT-1-"},
		"short root secret":  {swap(identity, "DRC-ROOT-SECRET-1-", "DRC-ROOT-SECRET-1-00"), "bad value behind DRC-ROOT-SECRET-1-"},
	} {
		_, err := crypt.ParseIdentity("the-file", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "the-file") {
			t.Errorf("identity, %s: %v", name, err)
		}
	}
	for name, c := range map[string]struct{ text, want string }{
		"identity":               {identity, "is not an agent key"},
		"no seed":                {dropLine(agent, "DRC-AGENT-SECRET-"), "is not an agent key"},
		"certificate of another": {swap(agent, "DRC-AGENT-1-", line(strangerFile, "DRC-AGENT-1-")), "not signed by this repository's root"},
		"seed of another":        {swap(agent, "DRC-AGENT-SECRET-1-", line(strangerFile, "DRC-AGENT-SECRET-1-")), "do not belong to its certificate"},
		"age key of another":     {swap(agent, "AGE-", line(strangerFile, "AGE-")), "do not belong to its certificate"},
		"certificate cut":        {swap(agent, "DRC-AGENT-1-", line(agent, "DRC-AGENT-1-")[:100]), "damaged"},
	} {
		_, _, err := crypt.ParseAgent("the-file", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("agent key, %s: %v", name, err)
		}
	}
	if id.RootPublic.RepoID() == other.RootPublic.RepoID() {
		t.Error("two roots have one repository id")
	}
}

func TestSignatures_HoldForOneContextOnly(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	contexts := []string{
		crypt.ContextRepoRecord, crypt.ContextCertificate, crypt.ContextKeySet, crypt.ContextValue, crypt.ContextLogObject, crypt.ContextManifest,
	}
	message := []byte("message")
	for _, a := range contexts {
		byRoot, byAgent := id.Root.Sign(a, message), agent.Sign(a, message)
		for _, b := range contexts {
			if id.RootPublic.Verify(b, message, byRoot) != (a == b) || crypt.VerifyAgent(agent.Cert, b, message, byAgent) != (a == b) {
				t.Errorf("signed as %q, verified as %q", a, b)
			}
		}
		if crypt.VerifyAgent(agent.Cert, a, message, byRoot) || id.RootPublic.Verify(a, message, byAgent) {
			t.Errorf("%q: root and agent sign for each other", a)
		}
		if id.RootPublic.Verify(a, message[1:], byRoot) || id.RootPublic.Verify(a, message, byRoot[1:]) || id.RootPublic.Verify(a, message, nil) {
			t.Errorf("%q: a wrong message or signature verifies", a)
		}
	}
}

func TestCertificate_OnlyOfThisRoot(t *testing.T) {
	other, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	agent := crypttest.Agent(t)
	if _, err := crypt.VerifyCertificate(other.RootPublic, agent.CertRaw); err == nil {
		t.Error("another root's certificate verifies")
	}
	// Signed by this root, for another repository.
	cert := agent.Cert
	cert.Repo = other.RootPublic.RepoID()
	body := cert.EncodeBody()
	id := crypttest.Identity(t)
	if _, err := crypt.VerifyCertificate(id.RootPublic, append(body, id.Root.Sign(crypt.ContextCertificate, body)...)); err == nil {
		t.Error("a certificate for another repository verifies")
	}
	for i := range agent.CertRaw {
		if _, err := crypt.VerifyCertificate(id.RootPublic, agent.CertRaw[:i]); err == nil {
			t.Fatalf("a certificate cut to %d bytes verifies", i)
		}
	}
	if errors.Is(crypt.ErrForged, crypt.ErrWrongKey) {
		t.Error("two decisions are one error")
	}
}
