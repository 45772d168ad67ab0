package model

import "slices"

// StatePlace, in place of a path, stands for the state directory of the host,
// where a replica lies unless somebody says otherwise.
const StatePlace = "default"

// DiskPlace says where the replica of one disk on one host is to be made: somewhere
// else than in the state directory. A replica that is there already stays where its own
// metadata say it is until it is made anew.
type DiskPlace struct {
	Disk string `json:"disk"`
	Host string `json:"host"`
	Path string `json:"path"` // absolute, of a file or block device on that host
	// Overwrite: a person has agreed that what is at the path is lost.
	Overwrite bool `json:"overwrite,omitempty"`
}

// Place is where the replica of a disk on a host is to be; false: in the state directory.
func (s VMSpec) Place(disk, host string) (DiskPlace, bool) {
	n := slices.IndexFunc(s.Places, func(p DiskPlace) bool { return p.Disk == disk && p.Host == host })
	if n < 0 {
		return DiskPlace{}, false
	}
	return s.Places[n], true
}

// WithPlaces returns the places of s with some put in place of what was said before of
// the same disk and host; StatePlace as a path takes an entry out. Places of disks that s does
// not have are left out. What s holds is not changed.
func (s VMSpec) WithPlaces(more ...DiskPlace) []DiskPlace {
	var out []DiskPlace
	for _, p := range append(slices.Clone(s.Places), more...) {
		out = slices.DeleteFunc(out, func(o DiskPlace) bool { return o.Disk == p.Disk && o.Host == p.Host })
		if p.Path != StatePlace && slices.ContainsFunc(s.Disks, func(d DiskSpec) bool { return d.ID == p.Disk }) {
			out = append(out, p)
		}
	}
	return out
}
