package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"perdure/internal/shimapi"
)

// control serves the shim's Unix socket: status, operations, console.
type control struct {
	shim *Shim
	srv  *http.Server
	path string
}

func newControl(s *Shim) *control {
	c := &control{shim: s, path: filepath.Join(s.cfg.Dir, shimapi.SocketFile)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", c.status)
	mux.HandleFunc("POST /v1/op", c.op)
	mux.HandleFunc("GET /v1/console", c.console)
	mux.HandleFunc("GET /v1/agent", c.agent)
	c.srv = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	return c
}

// serve listens until ctx ends. The caller holds the VM's run lock, so that a
// socket found in the way is a dead shim's.
func (c *control) serve(ctx context.Context) error {
	if err := os.Remove(c.path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("remove old socket: %w", err)
	}
	ln, err := net.Listen("unix", c.path)
	if err != nil {
		return fmt.Errorf("listen for the agent: %w", err)
	}
	if err := os.Chmod(c.path, 0o600); err != nil {
		ln.Close()
		return fmt.Errorf("restrict socket: %w", err)
	}
	go func() {
		<-ctx.Done()
		c.srv.Close()
	}()
	go func() { _ = c.srv.Serve(ln) }() // until it is closed
	return nil
}

func (c *control) status(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(c.shim.Status()) // the caller has gone
}

func (c *control) op(w http.ResponseWriter, r *http.Request) {
	var op shimapi.Op
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&op); err != nil {
		http.Error(w, "operation: "+err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	text, err := c.shim.do(ctx, op)
	res := shimapi.OpResult{Text: text}
	if err != nil {
		res.Error = err.Error()
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(res) // the caller has gone
}

// agent connects to the guest-agent port. All who do share it.
func (c *control) agent(w http.ResponseWriter, r *http.Request) {
	conn, err := shimapi.AcceptUpgrade(w, r)
	if err != nil {
		return
	}
	defer conn.Close()
	c.shim.attachAgent(conn)
}

func (c *control) console(w http.ResponseWriter, r *http.Request) {
	conn, err := shimapi.AcceptUpgrade(w, r)
	if err != nil {
		return
	}
	defer conn.Close()
	c.shim.attachConsole(conn)
}
