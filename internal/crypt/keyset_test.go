package crypt_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"filippo.io/age"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/format/formattest"
)

func newSet(t *testing.T, agent *crypt.Agent, recipients ...string) *crypt.KeySet {
	t.Helper()
	ks, err := crypt.NewKeySet(agent, recipients, crypttest.Created)
	if err != nil {
		t.Fatal(err)
	}
	return ks
}

func TestRing_OpensWhatItsKeysMay(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	second, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	made := newSet(t, agent, append(id.Recipients(), second.Recipients()...)...)

	got, err := crypt.NewRing(id).Add(made.Raw)
	if err != nil || got.Content != made.Content || got.Index != made.Index || !got.HasContent {
		t.Errorf("identity: %+v, %v", got, err)
	}
	// The second recipient trusts the same root and has no root secret.
	text := strings.ReplaceAll(string(second.Encode(crypttestTime)), rootLine(second), rootLine(id))
	text = dropLine(text, "DRC-ROOT-SECRET-1-")
	reader, err := crypt.ParseIdentity("second", []byte(text))
	if err != nil || reader.CanSign() {
		t.Fatalf("second recipient: can sign %t, %v", reader != nil && reader.CanSign(), err)
	}
	got, err = crypt.NewRing(reader).Add(made.Raw)
	if err != nil || got.Content != made.Content {
		t.Errorf("second recipient: %v", err)
	}
	// The agent opens the index key only.
	got, err = crypt.NewAgentRing(agent, id.RootPublic).Add(made.Raw)
	if err != nil || got.Index != made.Index || got.HasContent || got.Content != (crypt.Key{}) {
		t.Errorf("agent: %+v, %v", got, err)
	}
	// Another agent of the repository may not open this one's index key: it
	// was not sealed to it.
	other, err := crypt.NewAgent(id.Root, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := crypt.NewAgentRing(other, id.RootPublic).Add(made.Raw); !errors.Is(err, crypt.ErrWrongKey) {
		t.Errorf("another agent: %v", err)
	}
	// An identity of another repository is refused before anything is opened.
	if _, err := crypt.NewRing(second).Add(made.Raw); err == nil {
		t.Error("another repository's identity takes the key set")
	}
}

func TestRing_AddAgainGivesTheSame(t *testing.T) {
	ring := crypt.NewRing(crypttest.Identity(t))
	raw := formattest.Bytes(t, "keyset")
	a, err := ring.Add(raw)
	if err != nil {
		t.Fatal(err)
	}
	b, err := ring.Add(bytes.Clone(raw))
	if err != nil || a != b {
		t.Errorf("%p and %p, %v", a, b, err)
	}
	if got, ok := ring.Set(a.ID); !ok || got != a {
		t.Error("it is not in the ring")
	}
	if _, ok := ring.Set(block.ID{9}); ok {
		t.Error("a key set that nobody added is in the ring")
	}
}

// sealAs is a key set of a given id and keys, as an agent with its own program
// could make it.
func sealAs(t *testing.T, agent *crypt.Agent, ks *crypt.KeySet, recipients ...string) []byte {
	t.Helper()
	seal := func(label string, key crypt.Key, to ...string) []byte {
		var list []age.Recipient
		for _, text := range to {
			r, err := crypt.ParseRecipient(text)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, r)
		}
		var b bytes.Buffer
		w, err := age.Encrypt(&b, list...)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range [][]byte{[]byte(label), ks.ID[:], key[:]} {
			if _, err := w.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	rec := format.KeySet{ID: ks.ID, Repo: agent.Cert.Repo, Created: crypttest.Created, Cert: agent.CertRaw,
		Content: seal("drc content key v1", ks.Content, recipients...),
		Index:   seal("drc index key v1", ks.Index, append(recipients, agent.Cert.Recipient)...)}
	body := rec.EncodeBody()
	return append(body, agent.Sign(crypt.ContextKeySet, body)...)
}

// A second key set of one id is taken for the first if its keys are the same,
// and refused if they are others: the first one stays either way.
func TestRing_OneSetOfAnID(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	made := newSet(t, agent, id.Recipients()...)
	for name, ring := range map[string]*crypt.Ring{"identity": crypt.NewRing(id), "agent": crypt.NewAgentRing(agent, id.RootPublic)} {
		first, err := ring.Add(made.Raw)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ring.Add(sealAs(t, agent, made, id.Recipients()...))
		if err != nil || again != first {
			t.Errorf("%s: sealed anew: %p and %p, %v", name, first, again, err)
		}
		for what, change := range map[string]func(ks *crypt.KeySet){
			"index key":   func(ks *crypt.KeySet) { ks.Index[0] ^= 1 },
			"content key": func(ks *crypt.KeySet) { ks.Content[0] ^= 1 },
		} {
			if name == "agent" && what == "content key" {
				continue // which it cannot open
			}
			other := *made
			change(&other)
			var corrupt *format.CorruptError
			if _, err := ring.Add(sealAs(t, agent, &other, id.Recipients()...)); !errors.As(err, &corrupt) || !strings.Contains(err.Error(), made.ID.String()) {
				t.Errorf("%s: another %s: %v", name, what, err)
			}
			if have, ok := ring.Set(made.ID); !ok || have != first || have.Index != made.Index {
				t.Errorf("%s: another %s: the first set is gone", name, what)
			}
		}
	}
}

func TestKeySet_EveryChangedBitIsFound(t *testing.T) {
	id := crypttest.Identity(t)
	formattest.Flips(formattest.Bytes(t, "keyset"), func(bit int, changed []byte) {
		if _, err := crypt.NewRing(id).Add(changed); err == nil {
			t.Fatalf("bit %d changed and not found", bit)
		}
	})
}

// TestKeySet_MovedKeysAreRefused: an agent that signs honestly encoded key sets
// whose sealed keys come from elsewhere.
func TestKeySet_MovedKeysAreRefused(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	a, _, _, err := format.DecodeKeySet(newSet(t, agent, id.Recipients()...).Raw)
	if err != nil {
		t.Fatal(err)
	}
	b, _, _, err := format.DecodeKeySet(newSet(t, agent, id.Recipients()...).Raw)
	if err != nil {
		t.Fatal(err)
	}
	for name, rec := range map[string]format.KeySet{
		"content key of another set": {ID: a.ID, Repo: a.Repo, Cert: a.Cert, Content: b.Content, Index: a.Index},
		"index key of another set":   {ID: a.ID, Repo: a.Repo, Cert: a.Cert, Content: a.Content, Index: b.Index},
		"index key as content key":   {ID: a.ID, Repo: a.Repo, Cert: a.Cert, Content: a.Index, Index: a.Index},
		"content key as index key":   {ID: a.ID, Repo: a.Repo, Cert: a.Cert, Content: a.Content, Index: a.Content},
		"no keys":                    {ID: a.ID, Repo: a.Repo, Cert: a.Cert},
		"another repository":         {ID: a.ID, Repo: block.ID{1}, Cert: a.Cert, Content: a.Content, Index: a.Index},
	} {
		body := rec.EncodeBody()
		if _, err := crypt.NewRing(id).Add(append(body, agent.Sign(crypt.ContextKeySet, body)...)); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestNewKeySet_RefusesWhatIsNoRecipient(t *testing.T) {
	_, err := crypt.NewKeySet(crypttest.Agent(t), []string{"age1nonsense"}, 0)
	if err == nil || !strings.Contains(err.Error(), "age1nonsense") {
		t.Errorf("%v", err)
	}
}

func TestSealer_OpensOnlyInPlace(t *testing.T) {
	key := crypttest.Keys().Content
	sealed := crypt.NewSealer(key).Seal([]byte("before"), 7, []byte("plain"), []byte("here"))
	if string(sealed[:6]) != "before" || len(sealed) != 6+5+crypt.Overhead {
		t.Fatalf("sealed %q", sealed)
	}
	sealed = sealed[6:]
	if plain, err := crypt.NewSealer(key).Open([]byte("x"), 7, sealed, []byte("here")); err != nil || string(plain) != "xplain" {
		t.Errorf("%q, %v", plain, err)
	}
	other := key
	other[31] ^= 1
	for name, open := range map[string]func() ([]byte, error){
		"another key":   func() ([]byte, error) { return crypt.NewSealer(other).Open(nil, 7, sealed, []byte("here")) },
		"another part":  func() ([]byte, error) { return crypt.NewSealer(key).Open(nil, 8, sealed, []byte("here")) },
		"another place": func() ([]byte, error) { return crypt.NewSealer(key).Open(nil, 7, sealed, []byte("there")) },
		"cut":           func() ([]byte, error) { return crypt.NewSealer(key).Open(nil, 7, sealed[:5], []byte("here")) },
		"nothing":       func() ([]byte, error) { return crypt.NewSealer(key).Open(nil, 7, nil, []byte("here")) },
	} {
		if _, err := open(); !errors.Is(err, crypt.ErrForged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDerive_EachThingAndUseHasItsOwnKey(t *testing.T) {
	seen := map[crypt.Key]string{}
	for _, label := range []string{crypt.LabelSegmentContent, crypt.LabelSegmentIndex, crypt.LabelShardSums, crypt.LabelManifest, crypt.LabelValue} {
		for salt := range byte(3) {
			k := crypttest.Keys().Index.Derive([]byte{salt}, label)
			if old, ok := seen[k]; ok {
				t.Errorf("%s and %s share a key", label, old)
			}
			seen[k] = label
		}
	}
}
