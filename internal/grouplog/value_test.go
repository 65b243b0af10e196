package grouplog_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/format/formattest"
	"drc/internal/grouplog"
)

var (
	theGroup = block.GroupID{0: 0x6a, 15: 1}
	theStore = block.ID{0: 0x57, 15: 1}
	theEpoch = format.Epoch{Number: 3, Random: block.ID{0: 0xe0, 15: 1}}
)

func draft(n uint64) grouplog.Draft {
	d := grouplog.Draft{
		Group: theGroup, N: n, Epoch: theEpoch, Keys: crypttest.Keys(),
		Items: &format.Items{
			Range:       &format.Range{Branch: block.BranchID{0: 0xb0}, From: 1, To: 7, Time: crypttest.Created},
			Checkpoints: []format.NamedCheckpoint{{Name: "seven", Seq: 7, Time: crypttest.Created}},
		},
	}
	if n > 1 {
		d.Parent = format.HashOf([]byte("parent"))
	}
	return d
}

func object(t testing.TB, kind format.LogKind, value []byte) format.LogObject {
	return format.LogObject{
		Kind: kind, Repo: crypttest.Identity(t).RootPublic.RepoID(), Group: theGroup, Store: theStore, Index: 12,
		Previous: format.HashOf([]byte("the object before")), Epoch: theEpoch, Decided: 4,
		Tails: []format.Tail{{Store: theStore, Next: 12, Last: format.HashOf([]byte("the object before"))}},
		Time:  crypttest.Created, Value: value,
	}
}

func place(t testing.TB) grouplog.Place {
	return grouplog.Place{Repo: crypttest.Identity(t).RootPublic.RepoID(), Group: theGroup, Store: theStore, Index: 12}
}

func TestLog_GoldenVectors(t *testing.T) {
	agent, root := crypttest.Agent(t), crypttest.Identity(t).RootPublic
	value := formattest.Frozen(t, "value", func() []byte {
		d := draft(5)
		d.KeySets = [][]byte{formattest.Bytes(t, "keyset")}
		return d.Make(agent)
	}, func(raw []byte) (any, error) {
		e, err := grouplog.OpenValue(crypttest.Ring(t), "value", raw)
		if err != nil {
			return nil, err
		}
		return map[string]any{
			"group": e.Group, "n": e.N, "parent": e.Parent, "epoch": e.Epoch, "key_set": e.KeySet, "salt": e.Salt,
			"key_sets": len(e.KeySets), "hash": e.Hash, "items": e.Items,
		}, nil
	})
	verify := func(raw []byte) (any, error) { return grouplog.VerifyObject(root, "object", place(t), raw) }
	formattest.Exact(t, "log-promise", grouplog.SignObject(agent, object(t, format.LogPromise, nil)), verify)
	formattest.Exact(t, "log-commit", grouplog.SignObject(agent, object(t, format.LogCommit, value)), verify)
}

func TestOpenValue_RoundTrip(t *testing.T) {
	agent := crypttest.Agent(t)
	for n := uint64(1); n <= 2; n++ {
		raw := draft(n).Make(agent)
		e, err := grouplog.OpenValue(crypttest.Ring(t), "value", raw)
		if err != nil {
			t.Fatal(err)
		}
		if e.N != n || e.Hash != format.HashOf(raw) || e.Items.Range.To != 7 || e.Items.Checkpoints[0].Name != "seven" {
			t.Errorf("%+v", e)
		}
		if a, b := draft(n).Make(agent), draft(n).Make(agent); bytes.Equal(a, b) {
			t.Error("two values have one salt, and so one key and nonce")
		}
	}
}

func TestOpenValue_EveryChangedByteIsFound(t *testing.T) {
	raw := draft(2).Make(crypttest.Agent(t))
	ring := crypttest.Ring(t)
	formattest.Spots(raw, func(at int, changed []byte) {
		if _, err := grouplog.OpenValue(ring, "value", changed); err == nil {
			t.Fatalf("byte %d changed and not found", at)
		}
	})
}

func TestOpenValue_NotWithoutItsKeys(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	var corrupt *format.CorruptError
	if _, err := grouplog.OpenValue(crypt.NewRing(id), "value", draft(1).Make(agent)); !errors.As(err, &corrupt) || !strings.Contains(err.Error(), "key set") {
		t.Errorf("no key set: %v", err)
	}
	other, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grouplog.OpenValue(crypt.NewRing(other), "value", draft(1).Make(agent)); !errors.As(err, &corrupt) {
		t.Errorf("another root: %v", err)
	}
	wrong := crypttest.Keys()
	wrong.Index[5] ^= 1
	ring := crypt.NewRing(id)
	ring.AddOwn(wrong)
	if _, err := grouplog.OpenValue(ring, "value", draft(1).Make(agent)); err == nil || !strings.Contains(err.Error(), "authentication") {
		t.Errorf("another index key: %v", err)
	}
}

// TestOpenValue_AHeadMovedFromAnotherValue: an agent signs the head of one value
// over the body of another one.
func TestOpenValue_AHeadMovedFromAnotherValue(t *testing.T) {
	agent := crypttest.Agent(t)
	v, _, _, _, err := format.DecodeValue("value", draft(2).Make(agent))
	if err != nil {
		t.Fatal(err)
	}
	v.N = 3
	body := v.EncodeBody()
	if _, err := grouplog.OpenValue(crypttest.Ring(t), "value", append(body, agent.Sign(crypt.ContextValue, body)...)); err == nil {
		t.Error("the body of entry 2 opens as that of entry 3")
	}
}

func TestVerifyObject_OnlyInItsPlace(t *testing.T) {
	agent, root := crypttest.Agent(t), crypttest.Identity(t).RootPublic
	raw := grouplog.SignObject(agent, object(t, format.LogPromise, nil))
	if _, err := grouplog.VerifyObject(root, "object", place(t), raw); err != nil {
		t.Fatal(err)
	}
	for name, move := range map[string]func(*grouplog.Place){
		"repository": func(p *grouplog.Place) { p.Repo[3] ^= 1 },
		"group":      func(p *grouplog.Place) { p.Group[3] ^= 1 },
		"store":      func(p *grouplog.Place) { p.Store[3] ^= 1 },
		"index":      func(p *grouplog.Place) { p.Index++ },
	} {
		at := place(t)
		move(&at)
		if _, err := grouplog.VerifyObject(root, "object", at, raw); err == nil {
			t.Errorf("it is accepted at another %s", name)
		}
	}
	formattest.Spots(raw, func(at int, changed []byte) {
		if _, err := grouplog.VerifyObject(root, "object", place(t), changed); err == nil {
			t.Fatalf("byte %d changed and not found", at)
		}
	})
	// A value's signature is none of an object.
	o := object(t, format.LogPromise, nil)
	o.Cert = agent.CertRaw
	body := o.EncodeBody()
	if _, err := grouplog.VerifyObject(root, "object", place(t), append(body, agent.Sign(crypt.ContextValue, body)...)); err == nil {
		t.Error("a signature of another context is accepted")
	}
}

// FuzzOpenValue signs what is fuzzed, so that it gets behind the signature.
func FuzzOpenValue(f *testing.F) {
	agent := crypttest.Agent(f)
	f.Add(formattest.Bytes(f, "value"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ring := crypttest.Ring(t)
		_, _ = grouplog.OpenValue(ring, "value", raw)
		if n := len(raw) - crypt.SignatureSize; n > 0 {
			signed := append(bytes.Clone(raw[:n]), agent.Sign(crypt.ContextValue, raw[:n])...)
			_, _ = grouplog.OpenValue(ring, "value", signed)
		}
	})
}

// FuzzOpenItems seals what is fuzzed as the body of a value.
func FuzzOpenItems(f *testing.F) {
	agent := crypttest.Agent(f)
	f.Add(draft(1).Items.Encode())
	f.Fuzz(func(t *testing.T, items []byte) {
		v := format.Value{Group: theGroup, N: 1, Epoch: theEpoch, Cert: agent.CertRaw, KeySet: crypttest.Keys().ID, Salt: block.ID{1}}
		head := v.EncodeHead()
		v.Body = crypt.NewSealer(crypttest.Keys().Index.Derive(v.Salt[:], crypt.LabelValue)).Seal(nil, 0, items, head)
		body := v.EncodeBody()
		_, openErr := grouplog.OpenValue(crypttest.Ring(t), "value", append(body, agent.Sign(crypt.ContextValue, body)...))
		if _, err := format.DecodeItems("items", items); (err == nil) != (openErr == nil) && len(v.Body) <= format.MaxValueBytes {
			t.Fatalf("decoded alone: %v, as a value: %v", err, openErr)
		}
	})
}
