package api

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"perdure/internal/model"
)

// VMDisk is everything known of one virtual disk of a VM.
type VMDisk struct {
	VM       string        `json:"vm"`
	ID       string        `json:"id"`
	Size     int64         `json:"size" doc:"Bytes"`
	Slot     int           `json:"slot" doc:"PCI slot at which the guest sees it"`
	Level    model.Level   `json:"level" enum:"none,ha,ca,ft"`
	Mode     model.Mode    `json:"mode" doc:"Mode of the VM's record"`
	Primary  string        `json:"primary" doc:"Host whose replica the guest runs from, or ran from last"`
	Replicas []DiskReplica `json:"replicas" doc:"By host"`

	Places map[string]string `json:"places,omitempty" doc:"Path of the replica by host, where somebody chose one, also where none is yet; else it is in the state directory"`

	Behind int64            `json:"behind" doc:"Bytes that the other replica may lack, as the running instance tells; negative: not known"`
	Sync   []model.Progress `json:"sync" doc:"Copying of this VM that goes on now"`

	Verified *model.VerifiedDisk `json:"verified,omitempty" doc:"What the last verify found, as the running instance tells"`

	Problems []model.Problem `json:"problems" doc:"Of this disk, and of the VM as far as they concern disks"`
}

// DiskReplica is one host's copy of a disk: what the record says of it, and what
// its own files say. The files of a replica in use may lag behind.
type DiskReplica struct {
	Host       string             `json:"host"`
	Role       string             `json:"role" enum:"primary,secondary,spare"`
	State      model.ReplicaState `json:"state" doc:"By the record; empty: the record has none"`
	Answers    bool               `json:"answers" doc:"Whether the host answered; else only the record speaks"`
	Exists     bool               `json:"exists" doc:"Whether there are files of it"`
	Path       string             `json:"path,omitempty" doc:"File or block device that holds the data"`
	Device     bool               `json:"device,omitempty" doc:"The path is a block device"`
	Place      string             `json:"place,omitempty" doc:"Path that somebody chose for it; empty: the state directory. It differs from path until the replica is made anew"`
	Size       int64              `json:"size,omitempty" doc:"By its metadata, bytes"`
	Allocated  int64              `json:"allocated,omitempty" doc:"Bytes that it occupies"`
	OwnState   model.ReplicaState `json:"own_state,omitempty" doc:"By its metadata"`
	Term       model.Term         `json:"term,omitempty"`
	Branch     model.BranchID     `json:"branch,omitempty"`
	Line       string             `json:"line,omitempty" doc:"Line of data"`
	Clean      bool               `json:"clean,omitempty" doc:"Its last user closed it in order"`
	Checksums  string             `json:"checksums,omitempty" enum:"off,partly,complete" doc:"Block checksums"`
	ActiveLog  int64              `json:"active_log,omitempty" doc:"Bytes in the activity log: compared after a crash"`
	Missing    int64              `json:"missing,omitempty" doc:"Bytes marked as lacking on the peer"`
	JournalLen int64              `json:"journal,omitempty" doc:"Bytes of the epoch journal that the next start applies"`
	Error      string             `json:"error,omitempty" doc:"Why nothing more is known of it"`
	Damage     []string           `json:"damage,omitempty" doc:"What of its files is missing or damaged"`
}

// DiskList answers GET /disks and GET /vms/NAME/disks.
type DiskList struct {
	Disks []VMDisk `json:"disks"`
}

// AttachDisk asks for another disk of a VM.
type AttachDisk struct {
	ID     string `json:"id,omitempty" doc:"Name of the disk, which is its serial number too; default: the first free of disk0, disk1, …"`
	Size   int64  `json:"size,omitempty" doc:"Bytes; default: that of the image"`
	Image  *File  `json:"image,omitempty" doc:"Image that it is filled from"`
	Format string `json:"format,omitempty" enum:"raw,qcow2,vmdk" doc:"Format of the image; default: found out"`
	From   string `json:"from,omitempty" doc:"Detached disk that is taken up again"`

	Paths     map[string]string `json:"paths,omitempty" doc:"Where its replicas shall lie, by host (empty name: the host that makes it): absolute path of a file or block device there; default: the state directory"`
	Overwrite bool              `json:"overwrite,omitempty" doc:"What is at these paths may be lost"`
}

// DetachDisk asks for a disk to be taken away.
type DetachDisk struct {
	Delete bool `json:"delete,omitempty" doc:"Remove its data; else the data are kept aside on the host"`
}

// ResizeDisk asks for a larger disk.
type ResizeDisk struct {
	Size int64 `json:"size" doc:"Bytes, not below the present size"`
}

// ReplaceDisk asks for a new replica in place of one host's.
type ReplaceDisk struct {
	Host      string `json:"host,omitempty" doc:"Whose replica; default: that of the host that does not run the VM"`
	Path      string `json:"path,omitempty" doc:"Where the new one shall lie: absolute path of a file or block device on that host, or the word default for the state directory; default: where the old one was to be"`
	Overwrite bool   `json:"overwrite,omitempty" doc:"What is at that path may be lost"`
}

// Bounds of a disk's name.
var diskIDRE = regexp.MustCompile(`^[a-z][a-z0-9-]{0,14}$`)

// CheckDiskID says what is wrong with the name of a disk.
func CheckDiskID(id string) error {
	if !diskIDRE.MatchString(id) {
		return Errorf(Invalid, "disk name %q is not allowed; allowed are 1 to 15 of a to z, 0 to 9 and -, beginning with a letter", id)
	}
	return nil
}

func checkDiskSize(what string, size int64) error {
	if size < MinDisk || size > MaxDisk {
		return Errorf(Invalid, "%s: size %s is out of range; allowed are %s to %s", what, FormatSize(size), FormatSize(MinDisk), FormatSize(MaxDisk))
	}
	if size%DiskGrain != 0 {
		return Errorf(Invalid, "%s: size %d is not a multiple of %d bytes", what, size, DiskGrain)
	}
	return nil
}

// Validate refuses what is wrong in itself.
func (r *AttachDisk) Validate() error {
	what := "the new disk"
	if r.ID != "" {
		if err := CheckDiskID(r.ID); err != nil {
			return err
		}
		what = "disk " + r.ID
	}
	if err := CheckPlaces(what, r.Paths); err != nil {
		return err
	}
	if r.From != "" {
		if r.Image != nil || r.Size != 0 || r.Format != "" {
			return Errorf(Invalid, "%s: a detached disk (%q) is taken up as it is; neither size, image nor format goes with it", what, r.From)
		}
		return CheckDiskID(r.From)
	}
	switch r.Format {
	case "", "raw", "qcow2", "vmdk":
	default:
		return Errorf(Invalid, "%s: image format %q is not known; allowed are raw, qcow2 and vmdk", what, r.Format)
	}
	if r.Image != nil {
		if err := checkFile("image of "+what, r.Image); err != nil {
			return err
		}
	} else if r.Format != "" {
		return Errorf(Invalid, "%s: a format is given but no image", what)
	}
	if r.Size == 0 && r.Image != nil {
		return nil
	}
	return checkDiskSize(what, r.Size)
}

// Validate refuses what is wrong in itself.
func (r *ResizeDisk) Validate() error { return checkDiskSize("the disk", r.Size) }

// Validate refuses what is wrong in itself.
func (r *ReplaceDisk) Validate() error {
	if r.Host != "" {
		if err := CheckName("host", r.Host); err != nil {
			return err
		}
	}
	if r.Path == "" || r.Path == model.StatePlace {
		return nil
	}
	return CheckPlace(r.Path)
}

// MaxPlace is the longest path of a replica, bytes.
const MaxPlace = 1000

// CheckPlace says what is wrong with the path of a replica in itself. What is at the
// path is seen by its host.
func CheckPlace(path string) error {
	switch {
	case !strings.HasPrefix(path, "/"):
		return Errorf(Invalid, "path %q of a replica is not absolute; allowed are paths that begin with /, of a file or a block device", path)
	case len(path) > MaxPlace:
		return Errorf(Invalid, "path %.60q… of a replica has %d bytes; allowed are %d", path, len(path), MaxPlace)
	case strings.ContainsFunc(path, unicode.IsControl) || !utf8.ValidString(path):
		return Errorf(Invalid, "path %q of a replica has a control character in it", path)
	case strings.HasSuffix(path, "/"):
		return Errorf(Invalid, "path %q of a replica is a directory's; allowed are a file and a block device", path)
	}
	return nil
}

// CheckPlaces is CheckPlace for paths by host; the empty name is the host that makes the disk.
func CheckPlaces(what string, paths map[string]string) error {
	for host, path := range paths {
		if host != "" {
			if err := CheckName("host", host); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
		}
		if err := CheckPlace(path); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

// SendImage makes the image of a request ready for the agent: a local one finds
// the file itself, to another it is uploaded.
func (c *Client) SendImage(ctx context.Context, req *AttachDisk, progress func(file string, done, total int64)) error {
	if req.Image == nil {
		return nil
	}
	as := CreateVM{Disks: []CreateDisk{{Image: req.Image}}}
	return c.Send(ctx, &as, progress)
}

func diskPath(vm, disk string, more ...string) string {
	return vmPath(vm, append([]string{"disks", url.PathEscape(disk)}, more...)...)
}

// AllDisks lists the disks of all VMs.
func (c *Client) AllDisks(ctx context.Context) ([]VMDisk, error) {
	l, err := get[DiskList](ctx, c, "/disks")
	return l.Disks, err
}

// Disks lists the disks of one VM.
func (c *Client) Disks(ctx context.Context, vm string) ([]VMDisk, error) {
	if err := CheckName("VM", vm); err != nil {
		return nil, err
	}
	l, err := get[DiskList](ctx, c, vmPath(vm, "disks"))
	return l.Disks, err
}

// Disk returns one disk.
func (c *Client) Disk(ctx context.Context, vm, disk string) (VMDisk, error) {
	if err := checkDiskOf(vm, disk); err != nil {
		return VMDisk{}, err
	}
	return get[VMDisk](ctx, c, diskPath(vm, disk))
}

func checkDiskOf(vm, disk string) error {
	if err := CheckName("VM", vm); err != nil {
		return err
	}
	return CheckDiskID(disk)
}

// AttachDisk gives a VM another disk; follow the operation with Operation.
func (c *Client) AttachDisk(ctx context.Context, vm string, req AttachDisk) (Operation, error) {
	var o Operation
	if err := CheckName("VM", vm); err != nil {
		return o, err
	}
	err := c.do(ctx, http.MethodPost, vmPath(vm, "disks"), req, &o)
	return o, err
}

// DetachDisk takes a disk away from a VM; follow the operation with Operation.
func (c *Client) DetachDisk(ctx context.Context, vm, disk string, req DetachDisk) (Operation, error) {
	var o Operation
	if err := checkDiskOf(vm, disk); err != nil {
		return o, err
	}
	err := c.do(ctx, http.MethodDelete, diskPath(vm, disk)+"?delete="+strconv.FormatBool(req.Delete), nil, &o)
	return o, err
}

// ResizeDisk makes a disk larger; follow the operation with Operation.
func (c *Client) ResizeDisk(ctx context.Context, vm, disk string, req ResizeDisk) (Operation, error) {
	var o Operation
	if err := checkDiskOf(vm, disk); err != nil {
		return o, err
	}
	err := c.do(ctx, http.MethodPost, diskPath(vm, disk, "resize"), req, &o)
	return o, err
}

// ReplaceDisk gives one host's replica up for a new one; follow the operation with Operation.
func (c *Client) ReplaceDisk(ctx context.Context, vm, disk string, req ReplaceDisk) (Operation, error) {
	var o Operation
	if err := checkDiskOf(vm, disk); err != nil {
		return o, err
	}
	err := c.do(ctx, http.MethodPost, diskPath(vm, disk, "replace"), req, &o)
	return o, err
}
