package shim

import (
	"perdure/internal/blockstore"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// storageOf tells where an instance keeps its replicas, and how. Tests put file
// systems that fail and crash in its place, and end the process at named points
// (blockstore.Options.At); it is set before any shim is opened.
var storageOf = func(shimapi.Config) (vfs.FS, blockstore.Options) { return vfs.OS{}, blockstore.Options{} }

// point is where a test may end the process, between two durable steps.
func (i *instance) point(name string) {
	if i.at != nil {
		i.at(name)
	}
}
