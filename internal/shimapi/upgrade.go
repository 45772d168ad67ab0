package shimapi

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"time"
)

// UpgradeProtocol is the name of the raw stream in HTTP's Upgrade header.
const UpgradeProtocol = "perdure-stream"

// Upgrade dials and turns one HTTP request into a raw stream (RFC 9110, 7.8).
func Upgrade(ctx context.Context, network, addr, path string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	s, err := UpgradeConn(c, path)
	if err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

// UpgradeConn does the same on a connection that exists already. The caller
// closes c when this fails.
func UpgradeConn(c net.Conn, path string) (net.Conn, error) {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, fmt.Errorf("ask for stream %s: %w", path, err)
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: unix\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", path, UpgradeProtocol); err != nil {
		return nil, fmt.Errorf("ask for stream %s: %w", path, err)
	}
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return nil, fmt.Errorf("open stream %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, fmt.Errorf("open stream %s: %s", path, resp.Status)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("open stream %s: %w", path, err)
	}
	return &stream{Conn: c, r: br}, nil
}

// AcceptUpgrade answers a request for a raw stream and takes the connection over.
func AcceptUpgrade(w http.ResponseWriter, r *http.Request) (net.Conn, error) {
	if r.Header.Get("Upgrade") != UpgradeProtocol {
		http.Error(w, "want Upgrade: "+UpgradeProtocol, http.StatusUpgradeRequired)
		return nil, fmt.Errorf("accept stream: no upgrade asked for")
	}
	h, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "connection cannot be taken over", http.StatusInternalServerError)
		return nil, fmt.Errorf("accept stream: connection cannot be taken over")
	}
	c, rw, err := h.Hijack()
	if err != nil {
		return nil, fmt.Errorf("accept stream: %w", err)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		c.Close()
		return nil, fmt.Errorf("accept stream: %w", err)
	}
	if _, err := fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", UpgradeProtocol); err != nil {
		c.Close()
		return nil, fmt.Errorf("accept stream: %w", err)
	}
	return &stream{Conn: c, r: rw.Reader}, nil
}

// stream reads first what the HTTP parser had already buffered.
type stream struct {
	net.Conn
	r *bufio.Reader
}

func (s *stream) Read(p []byte) (int, error) { return s.r.Read(p) }

// CloseWrite closes the sending side where the connection can.
func (s *stream) CloseWrite() error {
	if c, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}
