package realpart

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// Wire is a toxiproxy before a server on a loopback port: what goes over it can
// be slow, hang, be cut or reset. It is safe for use by several goroutines.
type Wire struct {
	mu    sync.Mutex
	proxy *toxiproxy.Proxy
}

// NewWire returns a wire to a server's address, host:port, which works until
// something else is asked for. It is taken down when the test ends.
func NewWire(t testing.TB, upstream string) *Wire {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	w := &Wire{proxy: toxiproxy.NewProxy(server, upstream, "127.0.0.1:0", upstream)}
	if err := w.proxy.Start(); err != nil {
		t.Fatalf("start a toxiproxy before %s: %v", upstream, err)
	}
	t.Cleanup(w.proxy.Stop)
	return w
}

// Address is where clients find the server: host:port, the same after a cut.
func (w *Wire) Address() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.proxy.Listen
}

// Cut ends all connections, and refuses new ones until Mend.
func (w *Wire) Cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.proxy.Stop()
}

// Toxic adds one of toxiproxy's toxics to what the server answers, or to what
// it is asked if upstream is true; attributes are JSON. It stays until Mend.
func (w *Wire) Toxic(kind, attributes string, upstream bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	stream := "downstream"
	if upstream {
		stream = "upstream"
	}
	_, err := w.proxy.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(`{"type":%q,"stream":%q,"attributes":{%s}}`, kind, stream, attributes)))
	if err != nil {
		return fmt.Errorf("add the toxic %s to the wire to %s: %w", kind, w.proxy.Upstream, err)
	}
	return nil
}

// Mend lets everything pass again.
func (w *Wire) Mend() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.proxy.Toxics.ResetToxics(context.Background())
	if w.proxy.Enabled {
		return nil
	}
	if err := w.proxy.Start(); err != nil {
		return fmt.Errorf("let the wire to %s pass again: %w", w.proxy.Upstream, err)
	}
	return nil
}
