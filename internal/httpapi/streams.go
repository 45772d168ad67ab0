package httpapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"perdure/api"
	"perdure/internal/model"
)

// registerStreams adds what huma has no form for, and describes it in the
// OpenAPI page all the same.
func (s *Server) registerStreams(h huma.API, mux *http.ServeMux) {
	problem := s.problemResponse(h)
	for _, st := range []struct {
		op        huma.Operation
		mediaType string
		schema    reflect.Type // of the answer; nil: bytes
		handler   func(http.ResponseWriter, *http.Request) error
	}{
		{op(http.MethodGet, "/vms/{name}/events", "streamEvents", "vms",
			"Timeline of a VM as JSON lines (StreamItem); query follow=true goes on, since=TIME leaves out older ones"), api.EventMediaType, reflect.TypeFor[api.StreamItem](), s.events},
		{op(http.MethodGet, "/vms/{name}/console", "console", "vms",
			"Serial console; asks for Upgrade: "+api.ConsoleProtocol+" and is raw bytes in both directions after status 101"), "application/octet-stream", nil, s.console},
		{op(http.MethodPost, "/uploads", "upload", "operations",
			"Store a file (the body) for a later operation; query name=NAME; answers Upload"), "application/json", reflect.TypeFor[api.Upload](), s.upload},
		{op(http.MethodGet, "/blobs/{id}", "getBlob", "operations", "A stored file by its SHA-256 digest"), "application/octet-stream", nil, s.blob},
	} {
		o := st.op
		o.Path = api.Prefix + o.Path
		media := &huma.MediaType{}
		if st.schema != nil {
			media.Schema = huma.SchemaFromType(s.spec.Components.Schemas, st.schema)
		}
		status := "200"
		if strings.HasSuffix(o.Path, "/console") {
			status = "101"
		}
		o.Responses = map[string]*huma.Response{status: {Description: "OK", Content: map[string]*huma.MediaType{st.mediaType: media}}, "default": problem}
		for seg := range strings.SplitSeq(o.Path, "/") {
			if strings.HasPrefix(seg, "{") {
				o.Parameters = append(o.Parameters, &huma.Param{Name: strings.Trim(seg, "{}"), In: "path", Required: true, Schema: &huma.Schema{Type: huma.TypeString}})
			}
		}
		s.spec.AddOperation(&o)
		handler := st.handler
		mux.HandleFunc(o.Method+" "+o.Path, func(w http.ResponseWriter, r *http.Request) {
			if err := handler(w, r); err != nil {
				writeProblem(w, err)
			}
		})
	}
}

// events writes one StreamItem a line. An error before the first line is a
// problem with its status; later ones are the last line of the stream.
func (s *Server) events(w http.ResponseWriter, r *http.Request) error {
	name, q := r.PathValue("name"), api.EventQuery{}
	if err := api.CheckName("VM", name); err != nil {
		return err
	}
	if v := r.URL.Query().Get("follow"); v != "" {
		f, err := strconv.ParseBool(v)
		if err != nil {
			return api.Errorf(api.Invalid, "query follow=%q is neither true nor false", v)
		}
		q.Follow = f
	}
	if v := r.URL.Query().Get("since"); v != "" {
		t, err := time.Parse(time.RFC3339Nano, v)
		if err != nil {
			return api.Errorf(api.Invalid, "query since=%q is no time such as 2006-01-02T15:04:05Z", v)
		}
		q.Since = t
	}
	if _, err := s.svc.VM(r.Context(), name); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	out := &lines{w: w, rc: http.NewResponseController(w), enc: json.NewEncoder(w)}
	w.Header().Set("Content-Type", api.EventMediaType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	var wg sync.WaitGroup
	if q.Follow {
		if err := out.put(api.StreamItem{}); err != nil { // the caller sees at once that it is connected
			return nil
		}
		wg.Go(func() { out.signsOfLife(ctx, cancel) })
	}
	err := s.svc.Events(ctx, name, q, func(e model.Event) error { return out.put(api.StreamItem{Event: &e}) })
	cancel()
	wg.Wait()
	if err != nil && r.Context().Err() == nil {
		out.put(api.StreamItem{Error: api.ProblemOf(err)}) //nolint:errcheck // the caller has gone
	}
	return nil
}

// lines writes JSON lines from two goroutines, each at once.
type lines struct {
	mu  sync.Mutex
	w   io.Writer
	rc  *http.ResponseController
	enc *json.Encoder
}

func (l *lines) put(i api.StreamItem) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rc.SetWriteDeadline(time.Now().Add(30 * time.Second)) //nolint:errcheck // only a bound for a reader that stopped reading
	if err := l.enc.Encode(i); err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	if err := l.rc.Flush(); err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	return nil
}

// signsOfLife lets both sides notice that the other is gone.
func (l *lines) signsOfLife(ctx context.Context, gone context.CancelFunc) {
	t := time.NewTicker(streamInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if l.put(api.StreamItem{}) != nil {
				gone()
				return
			}
		}
	}
}

// console joins the caller with the VM's serial console until one side ends.
func (s *Server) console(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	if err := api.CheckName("VM", name); err != nil {
		return err
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), api.ConsoleProtocol) {
		return api.Errorf(api.Invalid, "the console is a raw stream; ask for it with the header Upgrade: %s", api.ConsoleProtocol)
	}
	vm, err := s.svc.Console(r.Context(), name)
	if err != nil {
		return err
	}
	defer vm.Close()
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return api.Errorf(api.Internal, "take over the connection: %w", err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Time{}) //nolint:errcheck // the copy below fails if the connection does
	if _, err := fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", api.ConsoleProtocol); err != nil {
		return nil
	}
	join(r.Context(), conn, buf.Reader, vm)
	return nil
}

// join copies both ways until either side ends, then closes both and waits.
func join(ctx context.Context, conn net.Conn, fromConn *bufio.Reader, vm io.ReadWriteCloser) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { conn.Close(); vm.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		io.Copy(vm, fromConn) //nolint:errcheck // the end of a stream, whatever its reason
	})
	wg.Go(func() {
		defer cancel()
		io.Copy(conn, vm) //nolint:errcheck // as above
	})
	wg.Wait()
	cancel()
}

func (s *Server) upload(w http.ResponseWriter, r *http.Request) error {
	up, err := s.svc.Upload(r.Context(), r.URL.Query().Get("name"), r.Body)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(up) //nolint:errcheck // the caller has gone
	return nil
}

func (s *Server) blob(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" {
		return api.Errorf(api.Invalid, "digest %q is not 64 hexadecimal digits", id)
	}
	f, size, err := s.svc.Blob(r.Context(), id)
	if err != nil {
		return err
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	if _, err := io.Copy(w, f); err != nil && !errors.Is(err, net.ErrClosed) {
		s.log.Debug("blob not sent whole", "digest", id, "err", err)
		panic(http.ErrAbortHandler) // the caller must not take half a file for a whole one
	}
	return nil
}
