package shimapi

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"perdure/internal/model"
)

// VerifyFile is the last report of verify in a VM's directory, written by its shims.
const VerifyFile = "verify.json"

// VerifyOptions is the Value, as JSON, of the operation "verify".
type VerifyOptions struct {
	Disk      string `json:"disk,omitempty"`      // empty: all
	Rate      int64  `json:"rate,omitempty"`      // bytes per second, at most; 0: model.AskedVerifyRate
	Scheduled bool   `json:"scheduled,omitempty"` // goes on where an interrupted one was
}

// ReadVerifyReport reads the last report in a VM's directory; fs.ErrNotExist: there is none.
func ReadVerifyReport(dir string) (model.VerifyReport, error) {
	var r model.VerifyReport
	b, err := os.ReadFile(filepath.Join(dir, VerifyFile))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return r, fmt.Errorf("read report of verify: %w", err)
	}
	if r.Disks == nil {
		r.Disks = []model.VerifiedDisk{}
	}
	return r, nil
}
