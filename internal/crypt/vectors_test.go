package crypt_test

import (
	"encoding/hex"
	"testing"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format/formattest"
)

// TestKeys_GoldenVectors holds key files, certificate and key set, and what is
// derived from keys.
func TestKeys_GoldenVectors(t *testing.T) {
	id, agent := crypttest.Identity(t), crypttest.Agent(t)
	formattest.Exact(t, "identity-file", crypttest.IdentityFile(t), func(raw []byte) (any, error) {
		got, err := crypt.ParseIdentity("identity", raw)
		if err != nil {
			return nil, err
		}
		return map[string]any{
			"repository": got.RootPublic.RepoID(), "root_public": hex.EncodeToString(got.RootPublic[:]),
			"recipients": got.Recipients(), "can_sign": got.CanSign(),
		}, nil
	})
	formattest.Exact(t, "agent-key-file", agent.EncodeFile(id.RootPublic), func(raw []byte) (any, error) {
		got, root, err := crypt.ParseAgent("agent key", raw)
		if err != nil {
			return nil, err
		}
		return map[string]any{"root_public": hex.EncodeToString(root[:]), "certificate": got.Cert}, nil
	})
	formattest.Exact(t, "certificate", agent.CertRaw, func(raw []byte) (any, error) {
		return crypt.VerifyCertificate(id.RootPublic, raw)
	})
	formattest.Frozen(t, "keyset", func() []byte {
		ks, err := crypt.NewKeySet(agent, id.Recipients(), crypttest.Created)
		if err != nil {
			t.Fatal(err)
		}
		return ks.Raw
	}, func(raw []byte) (any, error) {
		ks, err := crypt.NewRing(id).Add(raw)
		if err != nil {
			return nil, err
		}
		return map[string]any{"id": ks.ID, "index_key": hex.EncodeToString(ks.Index[:]), "content_key": hex.EncodeToString(ks.Content[:])}, nil
	})
	key := crypttest.Keys().Index
	salt := block.ID{0: 0x5a, 15: 1}
	derived := map[string]string{}
	for _, label := range []string{crypt.LabelSegmentContent, crypt.LabelSegmentIndex, crypt.LabelShardSums, crypt.LabelManifest, crypt.LabelValue} {
		k := key.Derive(salt[:], label)
		derived[label] = hex.EncodeToString(k[:])
	}
	chunk := []byte("the content of a chunk")
	chunkID := crypt.NewChunkHasher(key).ID(chunk)
	sum := crypt.NewSummer(key).Sum(3, 7, chunk[:4], chunk[4:])
	sealed := crypt.NewSealer(key).Seal(nil, 5, chunk, []byte("associated"))
	formattest.Exact(t, "primitives", append(append(append([]byte(nil), chunkID[:]...), sum[:]...), sealed...), func(raw []byte) (any, error) {
		plain, err := crypt.NewSealer(key).Open(nil, 5, raw[32:], []byte("associated"))
		return map[string]any{
			"key": hex.EncodeToString(key[:]), "salt": salt, "derived": derived,
			"message": string(plain), "chunk_id": hex.EncodeToString(raw[:16]),
			"shard": 3, "part": 7, "sum": hex.EncodeToString(raw[16:32]),
			"seal_part": 5, "seal_associated": "associated", "sealed": hex.EncodeToString(raw[32:]),
		}, err
	})
}

// FuzzRingAdd: whatever is changed in a key set, no ring
// takes it.
func FuzzRingAdd(f *testing.F) {
	raw := formattest.Bytes(f, "keyset")
	f.Add(raw)
	f.Fuzz(func(t *testing.T, fuzzed []byte) {
		ring := crypt.NewRing(crypttest.Identity(t))
		if _, err := ring.Add(fuzzed); err == nil && string(fuzzed) != string(raw) {
			t.Fatalf("%x is taken for a key set", fuzzed)
		}
	})
}

func FuzzKeyFiles(f *testing.F) {
	f.Add(formattest.Bytes(f, "identity-file"))
	f.Add(formattest.Bytes(f, "agent-key-file"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if id, err := crypt.ParseIdentity("fuzzed", text); err == nil && len(id.Recipients()) == 0 {
			t.Fatal("an identity that can read nothing")
		}
		if a, root, err := crypt.ParseAgent("fuzzed", text); err == nil {
			if _, err := crypt.VerifyCertificate(root, a.CertRaw); err != nil {
				t.Fatalf("an agent whose certificate does not hold: %v", err)
			}
		}
	})
}
