package shim

import (
	"testing"
	"time"

	"perdure/internal/model"
)

// TestFTDiskUnderFaults is the disk of a VM of level ft, whose guest goes back to
// its last checkpoint together with it, while everything below it breaks.
func TestFTDiskUnderFaults(t *testing.T) {
	runDryFaults(t, model.LevelFT, 0, 15*time.Second)
}

// TestFTPairKilledAtPoints plays some cells of the crash matrix of level ft; make
// soak plays all.
func TestFTPairKilledAtPoints(t *testing.T) { playSome(t, model.LevelFT) }
