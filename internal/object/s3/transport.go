package s3

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// response is what a request's answer said in its header. The S3 library does
// not hand it out for puts.
type response struct {
	status int
	date   time.Time
}

type responseKey struct{}

// noting returns a context whose requests leave their answer's header in the
// response. One request at a time may use it.
func noting(ctx context.Context) (context.Context, *response) {
	noted := new(response)
	return context.WithValue(ctx, responseKey{}, noted), noted
}

// noter is a RoundTripper that fills in the response of noting.
type noter struct{ transport *http.Transport }

func (n noter) RoundTrip(request *http.Request) (*http.Response, error) {
	answer, err := n.transport.RoundTrip(request)
	if noted, ok := request.Context().Value(responseKey{}).(*response); ok && err == nil {
		noted.status = answer.StatusCode
		// No date and a broken one are the same to us: zero.
		noted.date, _ = http.ParseTime(answer.Header.Get("Date"))
	}
	if err == nil && (request.Method != http.MethodGet || request.URL.Query().Has("list-type")) {
		answer.Body = &boundedBody{answer.Body, answerBytesMax}
	}
	return answer, err
}

// answerBytesMax bounds every answer that is not an object: the library takes a
// page of a listing into memory whole. A page of a thousand names of 1024
// escaped bytes is not a quarter of it.
const answerBytesMax = 16 << 20

// boundedBody is a body that fails when it has more than left bytes.
type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("the store's answer has more than %d bytes", int64(answerBytesMax))
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

func newTransport(options Options) *http.Transport {
	dialer := &net.Dialer{Timeout: options.DialTimeout, KeepAlive: 15 * time.Second}
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &stallConn{Conn: conn, timeout: options.StallTimeout}, nil
		},
		TLSHandshakeTimeout:   options.DialTimeout,
		ResponseHeaderTimeout: options.StallTimeout,
		MaxIdleConns:          0,
		MaxIdleConnsPerHost:   options.Concurrency,
		// Below the stall timeout, so that a stall never hits a connection that
		// is about to be used again.
		IdleConnTimeout: options.StallTimeout / 2,
		WriteBufferSize: 128 << 10,
		ReadBufferSize:  64 << 10,
		// Objects come as they are: the sizes must be true.
		DisableCompression: true,
	}
}

// stallConn fails when nothing moved for a while, also in the middle of a body.
type stallConn struct {
	net.Conn
	timeout time.Duration
}

func (c *stallConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

// Write moves the deadline of a Read that is waiting for the answer too.
func (c *stallConn) Write(b []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}
