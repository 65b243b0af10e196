package nbd

import (
	"sync"
	"time"
)

// failurePeriod is how often at most one connection's failures are logged. A
// file system on a device that fails may send thousands of requests a second.
const failurePeriod = 10 * time.Second

// failures logs requests that are answered with EIO: a client knows that much of
// them and no more, and may not tell anybody.
type failures struct {
	mu      sync.Mutex
	last    time.Time // when one was logged
	skipped int       // since then
}

func (f *failures) log(c *conn, q *request, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.last.IsZero() && time.Since(f.last) < failurePeriod {
		f.skipped++
		return
	}
	c.server.log.Error("nbd: a request failed, and the client got EIO", "export", c.describe().Export, "remote", c.remote,
		"command", commandName(q.cmd), "offset", q.off, "bytes", q.length, "err", err, "not_logged", f.skipped)
	f.last, f.skipped = time.Now(), 0
}
