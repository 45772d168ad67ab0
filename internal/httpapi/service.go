package httpapi

import (
	"context"
	"io"

	"perdure/api"
	"perdure/internal/model"
)

// Service is what the REST interface needs of an agent. All methods may be
// called by many goroutines at once, end early when the context does, and
// return errors made with api.Errorf (others count as internal). Lists are
// sorted by name. Names come from outside and have to be checked (the server
// has checked only that they look like names).
//
// A request that api.Forwarded reports as passed on must be answered from what
// this host holds itself.
type Service interface {
	ClusterService
	VMService
	RepairService
	DiskService
	TransferService
}

// ClusterService is the part about hosts.
type ClusterService interface {
	// Cluster tells who is asked, who votes and who leads, also without quorum.
	Cluster(ctx context.Context) (api.Cluster, error)
	// Hosts lists all members, the witness included.
	Hosts(ctx context.Context) ([]api.Host, error)
	// Host returns one member; api.NotFound otherwise.
	Host(ctx context.Context, name string) (api.Host, error)
	// RemoveHost takes a host that does not come back out of the cluster;
	// api.Refused says what it is still needed for.
	RemoveHost(ctx context.Context, name string) error
	// CreateToken makes a join token.
	CreateToken(ctx context.Context, req api.CreateToken) (api.Token, error)
	// Join lets a machine in that shows a valid token; api.Forbidden otherwise.
	// It is the only method that an unauthenticated caller reaches.
	Join(ctx context.Context, req api.JoinRequest) (api.JoinReply, error)
}

// VMService is the part about VMs. Methods that change something return when
// the change was accepted (the record was swapped, the shim said yes); the
// outcome is seen in VM and Events.
type VMService interface {
	// VMs lists all VMs. State is "unknown" where the host that should know
	// does not answer; it never fails because of one VM.
	VMs(ctx context.Context) ([]api.VM, error)
	// VM returns one VM; api.NotFound otherwise. It is called every 100 ms
	// while somebody waits for a condition, so it should answer from what is
	// cached for about that long.
	VM(ctx context.Context, name string) (api.VM, error)
	// CreateVM checks everything it can at once (api.Invalid, api.Conflict),
	// then copies images in the background. The server has called
	// req.Validate, which also filled in the defaults.
	CreateVM(ctx context.Context, req api.CreateVM) (api.Operation, error)
	// StartVM: api.Conflict unless stopped.
	StartVM(ctx context.Context, name string, req api.StartVM) error
	// StopVM presses the guest's power button. The guest may take its time, or ignore it.
	StopVM(ctx context.Context, name string) error
	// KillVM ends the instance at once; the record says stopped afterwards.
	KillVM(ctx context.Context, name string) error
	// DeleteVM: api.Conflict unless stopped.
	DeleteVM(ctx context.Context, name string, req api.DeleteVM) error
	// PauseVM lets the guest stand still until ResumeVM, whatever happens in between.
	PauseVM(ctx context.Context, name string) error
	// ResumeVM lets a paused guest go on.
	ResumeVM(ctx context.Context, name string) error
	// ProtectVM starts filling a secondary; api.Refused says why not.
	ProtectVM(ctx context.Context, name string, req api.ProtectVM) error
	// SetLevel changes the level of protection; of a running VM the change has
	// only begun when it returns. api.Refused says what stands against it. The server has called req.Validate.
	SetLevel(ctx context.Context, name string, req api.SetLevel) error
	// SwitchoverVM: api.Conflict unless duplex.
	SwitchoverVM(ctx context.Context, name string, req api.SwitchoverVM) error
	// TakeoverRisk says what TakeoverVM on that host could lose; it changes nothing.
	TakeoverRisk(ctx context.Context, name, host string) (api.TakeoverRisk, error)
	// TakeoverVM: api.Refused without Force where something could be lost. The
	// server has checked that Confirm is the name where Force is set.
	TakeoverVM(ctx context.Context, name string, req api.TakeoverVM) error
	// Events calls emit for each event known of the VM, oldest first, and with
	// q.Follow goes on until the context ends, through takeovers. An error of
	// emit ends it and is returned. emit is never called concurrently.
	Events(ctx context.Context, name string, q api.EventQuery, emit func(model.Event) error) error
	// Console connects to the serial console. The stream ends (io.EOF) when the
	// instance behind it ends or moves; the caller then asks again.
	Console(ctx context.Context, name string) (io.ReadWriteCloser, error)
}

// TransferService is the part about long operations and files.
type TransferService interface {
	// Operations lists what runs on this host and what ended lately, newest first.
	Operations(ctx context.Context) ([]api.Operation, error)
	// Operation returns one; api.NotFound otherwise.
	Operation(ctx context.Context, id string) (api.Operation, error)
	// CancelOperation ends a running one and undoes what it has made; nothing
	// happens to one that ended.
	CancelOperation(ctx context.Context, id string) error
	// Upload stores a file under a new identity; name is for people. It must
	// bound what it takes by the space there is (api.Refused).
	Upload(ctx context.Context, name string, r io.Reader) (api.Upload, error)
	// Blob opens a stored file by its digest (64 hexadecimal digits) and
	// returns its size; api.NotFound otherwise. Other agents fetch kernels this way.
	Blob(ctx context.Context, sha256 string) (io.ReadCloser, int64, error)
}
