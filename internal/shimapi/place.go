package shimapi

import (
	"encoding/json"
	"fmt"
	"strings"
)

// ReplaceDisk is what the operation "disk-replace" is told where the new replica is
// to lie elsewhere than the old one.
type ReplaceDisk struct {
	Disk string `json:"disk"`
	// Path is the absolute path of a file or block device; model.StatePlace: the state
	// directory; empty: where it was.
	Path   string `json:"path,omitempty"`
	Device bool   `json:"device,omitempty"` // Path is a block device
}

// ParseReplaceDisk reads the value of the operation: ReplaceDisk as JSON, or the disk's id alone.
func ParseReplaceDisk(value string) (r ReplaceDisk, err error) {
	if !strings.HasPrefix(value, "{") {
		return ReplaceDisk{Disk: value}, nil
	}
	if err := json.Unmarshal([]byte(value), &r); err != nil {
		return r, fmt.Errorf("disk to be replaced: %w", err)
	}
	return r, nil
}
