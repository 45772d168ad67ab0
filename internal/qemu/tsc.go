package qemu

import (
	"golang.org/x/sys/unix"
)

// KVM's ioctls (Linux, include/uapi/linux/kvm.h).
const (
	kvmCreateVM   = 0xae01
	kvmCreateVCPU = 0xae41
	kvmGetTSCKHz  = 0xaea3
)

// KVMTSCHz returns the TSC frequency that KVM gives its guests on this host, in
// hertz, or 0 where KVM cannot tell. Level 3 guests get it as a fixed value.
func KVMTSCHz() int64 {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(kvm)
	vm, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(kvm), kvmCreateVM, 0)
	if e != 0 {
		return 0
	}
	defer unix.Close(int(vm))
	vcpu, _, e := unix.Syscall(unix.SYS_IOCTL, vm, kvmCreateVCPU, 0)
	if e != 0 {
		return 0
	}
	defer unix.Close(int(vcpu))
	khz, _, e := unix.Syscall(unix.SYS_IOCTL, vcpu, kvmGetTSCKHz, 0)
	if e != 0 {
		return 0
	}
	return int64(khz) * 1000
}
