package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNoAgent means: no agent answers on the control socket.
var ErrNoAgent = errors.New("no agent is running")

// Client talks to the agent of a state folder.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client for a control socket. It connects at each call.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	return c
}

// Status asks for the agent's state.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Kept asks what the buffer holds that is not on the stores.
func (c *Client) Kept(ctx context.Context) (k Kept, err error) {
	return k, c.call(ctx, http.MethodGet, "/v1/kept", nil, &k)
}

// Checkpoint asks for a named checkpoint.
func (c *Client) Checkpoint(ctx context.Context, r CheckpointRequest) (a CheckpointAnswer, err error) {
	return a, c.call(ctx, http.MethodPost, "/v1/checkpoints", r, &a)
}

// AddVolume has the agent protect one more volume.
func (c *Client) AddVolume(ctx context.Context, r VolumeRequest) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, "/v1/volumes", r, &v)
}

// Buffer has the agent change the directories of its buffer, and returns them as
// they are then.
func (c *Client) Buffer(ctx context.Context, r BufferRequest) (b Buffer, err error) {
	return b, c.call(ctx, http.MethodPost, "/v1/buffer", r, &b)
}

// Demote has the agent hand over the group of a volume.
func (c *Client) Demote(ctx context.Context, r DemoteRequest) (a DemoteAnswer, err error) {
	return a, c.call(ctx, http.MethodPost, "/v1/demote", r, &a)
}

// End has a standby end in order. It may still be ending when End returns.
func (c *Client) End(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "/v1/end", struct{}{}, &struct{}{})
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("%w on %s: start it with drc agent, or pass the --state DIR that it was started with", ErrNoAgent, c.socket)
		}
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("the agent's socket %s may not be used by this user: become the user that runs the agent, or pass --state DIR of your own agent", c.socket)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) {
			return errors.New("the agent ended before it answered: look at its log, start it again, and ask again")
		}
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var f Failure
		if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&f); err != nil || f.Error == "" {
			return fmt.Errorf("the agent answered %s", resp.Status)
		}
		return &CodedError{f.Code, errors.New(f.Error)}
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	return nil
}
