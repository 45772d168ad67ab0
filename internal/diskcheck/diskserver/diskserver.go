// Package diskserver turns a test binary into a process that exports the
// replica of a disk, unreplicated, as a shim does for a VM at level none. Tests
// and benchmarks start themselves again with Env and call Main first thing in
// TestMain; so the server is a process of its own, which can be measured and
// killed, and the product needs no command for it.
//
// Main ends with the process; it guarantees nothing beyond what blockstore and
// nbd do.
package diskserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"

	"perdure/internal/blockstore"
	"perdure/internal/nbd"
	"perdure/internal/vfs"
)

const (
	dirEnv     = "PERDURE_DISKSERVER_DIR"
	sockEnv    = "PERDURE_DISKSERVER_SOCK"
	profileEnv = "PERDURE_DISKSERVER_PROFILE" // file for a CPU profile, for people who tune
)

// Disk is the id of the disk that is exported, and the name of the export.
const Disk = "disk0"

// Env is what a process has to find in its environment to export the replica of
// Disk in dir on the Unix socket sock.
func Env(dir, sock string) []string { return []string{dirEnv + "=" + dir, sockEnv + "=" + sock} }

// Main does nothing where Env is not set. Otherwise it serves until SIGTERM and
// ends the process.
func Main() {
	dir, sock := os.Getenv(dirEnv), os.Getenv(sockEnv)
	if dir == "" || sock == "" {
		return
	}
	if err := run(dir, sock); err != nil {
		fmt.Fprintln(os.Stderr, "disk server:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(dir, sock string) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if p := os.Getenv(profileEnv); p != "" {
		f, err := os.Create(p)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	if told := os.Getenv(targetEnv); told != "" {
		return follow(ctx, dir, told)
	}
	s, err := blockstore.Open(vfs.OS{}, dir, Disk, blockstore.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if _, err := s.Replay(); err != nil {
		return fmt.Errorf("replay journal: %w", err)
	}
	var disk nbd.Backend = blockstore.NewVolume(s, blockstore.VolumeOptions{})
	if other := os.Getenv(peerEnv); other != "" {
		m, stop, err := mirrored(ctx, disk.(*blockstore.Volume), other)
		if err != nil {
			return fmt.Errorf("mirror the disk: %w", err)
		}
		defer stop()
		disk = m
	}
	ln, err := net.Listen("unix", sock)
	if err != nil {
		return err
	}
	return nbd.Serve(ctx, ln, map[string]nbd.Backend{Disk: disk}, nbd.Options{})
}
