package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"perdure/internal/model"
)

// Wait returns when the condition holds (Met) or after at most timeout, in
// one or more requests. Trouble in reaching the agent is waited out, since a
// takeover of the agent's own host is one of the things waited for.
func (c *Client) Wait(ctx context.Context, name string, cond Condition, timeout time.Duration) (WaitResult, error) {
	if err := CheckName("VM", name); err != nil {
		return WaitResult{}, err
	}
	var last WaitResult
	for end := time.Now().Add(timeout); ; {
		left := time.Until(end)
		if left <= 0 {
			return last, nil
		}
		q := url.Values{"for": {cond.String()}, "timeout_ms": {strconv.FormatInt(max(1, min(left, 20*time.Second).Milliseconds()), 10)}}
		r, err := get[WaitResult](ctx, c, vmPath(name, "wait")+"?"+q.Encode())
		switch {
		case err == nil && r.Met:
			return r, nil
		case err == nil:
			last = r
			continue
		case ctx.Err() != nil:
			return last, err
		case ClassOf(err) != Unavailable && ClassOf(err) != Timeout:
			return last, err
		case time.Until(end) <= time.Second:
			return last, err
		}
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// Events calls emit for each event, oldest first. With q.Follow it goes on
// until the context ends or the stream breaks (Unavailable); the caller may
// then ask again with Since of the last event.
func (c *Client) Events(ctx context.Context, name string, q EventQuery, emit func(model.Event) error) error {
	if err := CheckName("VM", name); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	v := url.Values{}
	if q.Follow {
		v.Set("follow", "true")
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	req, err := c.request(ctx, http.MethodGet, vmPath(name, "events")+"?"+v.Encode(), nil)
	if err != nil {
		return err
	}
	silent := time.AfterFunc(streamSilence, func() { cancel(errSilent) })
	defer silent.Stop()
	resp, err := c.http.Do(req)
	if err != nil {
		return c.streamError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return readProblem(resp)
	}
	dec := json.NewDecoder(resp.Body)
	for {
		var i StreamItem
		err := dec.Decode(&i)
		switch {
		case err == io.EOF && !q.Follow:
			return nil
		case err != nil:
			return c.streamError(ctx, err)
		case i.Error != nil:
			return i.Error.Err()
		}
		silent.Reset(streamSilence)
		if i.Event == nil {
			continue
		}
		if err := emit(*i.Event); err != nil {
			return err
		}
	}
}

var errSilent = errors.New("no sign of life")

func (c *Client) streamError(ctx context.Context, err error) error {
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), errSilent) {
		return ctx.Err()
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if _, ok := err.(*url.Error); ok { //nolint:errorlint // the outermost only: nothing was answered at all
		return c.transportError(ctx, err)
	}
	return Errorf(Unavailable, "event stream of %s broke: %w", c.where, err)
}

// Console opens the serial console of a VM: raw bytes in both directions. It
// ends when the instance ends or moves; open it again then. The caller closes it.
func (c *Client) Console(ctx context.Context, name string) (net.Conn, error) {
	if err := CheckName("VM", name); err != nil {
		return nil, err
	}
	req, err := c.request(ctx, http.MethodGet, vmPath(name, "console"), nil)
	if err != nil {
		return nil, err
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	conn.SetDeadline(time.Now().Add(30 * time.Second)) //nolint:errcheck // the calls below fail then
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", ConsoleProtocol)
	br := bufio.NewReader(conn)
	resp, err := roundTrip(conn, br, req)
	if err != nil {
		conn.Close()
		return nil, c.transportError(ctx, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		err := readProblem(resp)
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{}) //nolint:errcheck // reads fail if the connection does
	return &bufferedConn{Conn: conn, r: br}, nil
}

func roundTrip(w io.Writer, br *bufio.Reader, req *http.Request) (*http.Response, error) {
	if err := req.Write(w); err != nil {
		return nil, fmt.Errorf("send request: %w", err)
	}
	resp, err := http.ReadResponse(br, req)
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	return resp, nil
}

// bufferedConn reads first what came together with the answer's header.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (b *bufferedConn) Read(p []byte) (int, error) { return b.r.Read(p) }

// Upload sends a file. progress, if given, is called with the bytes sent so far.
func (c *Client) Upload(ctx context.Context, name string, r io.Reader, progress func(int64)) (Upload, error) {
	req, err := c.request(ctx, http.MethodPost, "/uploads?name="+url.QueryEscape(name), &countingReader{r: r, f: progress})
	if err != nil {
		return Upload{}, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	var u Upload
	return u, c.finish(ctx, req, &u)
}

type countingReader struct {
	r io.Reader
	n int64
	f func(int64)
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.f != nil {
		c.f(c.n)
	}
	return n, err
}

// Blob opens a stored file by digest and returns its size. The caller closes
// it, and checks the digest of what it read.
func (c *Client) Blob(ctx context.Context, sha256 string) (io.ReadCloser, int64, error) {
	req, err := c.request(ctx, http.MethodGet, "/blobs/"+url.PathEscape(sha256), nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, 0, c.transportError(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, 0, readProblem(resp)
	}
	return resp.Body, resp.ContentLength, nil
}

// OpenAPI returns the description that the agent serves.
func (c *Client) OpenAPI(ctx context.Context) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://perdure/openapi.json", nil)
	if err != nil {
		return nil, Errorf(Internal, "make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, readProblem(resp)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		return nil, Errorf(Unavailable, "read answer of %s: %w", c.where, err)
	}
	return b.Bytes(), nil
}

// Send makes every file of a request usable by the agent: by its path where
// both sides see the same files, else by uploading it. Paths are made
// absolute; a missing or unreadable file is reported before anything is sent.
func (c *Client) Send(ctx context.Context, req *CreateVM, progress func(file string, done, total int64)) error {
	type source struct {
		f    *File
		size int64
	}
	var todo []source
	for _, f := range req.files() {
		if f.Path == "" {
			continue
		}
		st, err := os.Stat(f.Path)
		switch {
		case err != nil:
			return Errorf(Invalid, "%s: %w", f.what, err)
		case !st.Mode().IsRegular():
			return Errorf(Invalid, "%s: %s is not a regular file", f.what, f.Path)
		}
		if f.Name == "" {
			f.Name = filepath.Base(f.Path)
		}
		if f.Path, err = filepath.Abs(f.Path); err != nil {
			return Errorf(Invalid, "%s: %w", f.what, err)
		}
		todo = append(todo, source{f.File, st.Size()})
	}
	if c.Local() {
		return nil
	}
	for _, s := range todo {
		if err := c.send(ctx, s.f, s.size, progress); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) send(ctx context.Context, f *File, size int64, progress func(string, int64, int64)) error {
	r, err := os.Open(f.Path)
	if err != nil {
		return Errorf(Invalid, "open file: %w", err)
	}
	defer r.Close()
	up, err := c.Upload(ctx, f.Name, r, func(n int64) {
		if progress != nil {
			progress(f.Name, n, size)
		}
	})
	if err != nil {
		return fmt.Errorf("upload %s: %w", f.Path, err)
	}
	f.Upload, f.Path = up.ID, ""
	return nil
}
