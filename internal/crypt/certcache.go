package crypt

import (
	"sync"

	"drc/internal/format"
)

// certificatesKept bounds the verified certificates that are remembered. A
// repository has one for each agent key.
const certificatesKept = 64

// certificates remembers certificates that were verified: each object of a
// log carries one, and a long history is made with few. A certificate is found
// again only by the root key and all of its bytes, the signature among them,
// and one that failed is never remembered.
type certificates struct {
	mu    sync.Mutex
	known map[certificateKey]format.Certificate
}

type certificateKey struct {
	root RootPublic
	raw  string
}

var verifiedCertificates = certificates{known: map[certificateKey]format.Certificate{}}

func (c *certificates) get(root RootPublic, raw []byte) (format.Certificate, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cert, ok := c.known[certificateKey{root, string(raw)}]
	return cert, ok
}

func (c *certificates) put(root RootPublic, raw []byte, cert format.Certificate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.known) >= certificatesKept {
		clear(c.known) // so many agents at once are rare: to begin again is cheap
	}
	c.known[certificateKey{root, string(raw)}] = cert
}
