// Package hostnet makes the taps of VMs and guards them: the Gate is a rule
// in the kernel that lets a tap's frames pass only for as long as somebody
// keeps saying so.
//
// Concurrency: all methods may be called from any goroutine. Everything
// happens in the network namespace of the thread that calls Open or Ensure.
//
// Not guaranteed: an administrator who flushes the host's whole nftables rule
// set takes the Gate away with it. Gate.Open notices, puts it back and says so
// (ErrReinstalled); until then nothing holds back a process that runs wild.
package hostnet

import (
	"errors"
	"time"
)

// TapName returns the name of a VM's tap: "pd", eleven hexadecimal digits that
// depend on the VM's UUID, two of the NIC's index (0–255).
func TapName(uuid string, nic int) string { panic("not yet") }

// EnsureBridge makes a bridge if it is missing and sets it up. made says that it was missing.
func EnsureBridge(name string) (made bool, err error) { panic("not yet") }

// CheckBridge returns an error unless a bridge of this name exists.
func CheckBridge(name string) error { panic("not yet") }

// CreateTap makes a persistent tap, or takes over the one that is there, joins it to the bridge and sets
// it up; alias is for people. On failure nothing is left of what it made.
func CreateTap(name, bridge, alias string) error { panic("not yet") }

// DeleteTap removes a tap; a missing one is no error.
func DeleteTap(name string) error { panic("not yet") }

// ErrReinstalled is wrapped by the error of an Open that found the gate's rule
// gone and put it back: frames of all VMs of this host were unguarded for a while.
var ErrReinstalled = errors.New("tap gate was missing and has been put back")

// Gate is the kernel's gate of this host's taps. Shut is its natural state.
type Gate struct{}

// OpenGate connects to the kernel, in the network namespace of the calling thread. It installs nothing.
func OpenGate() (*Gate, error) { panic("not yet") }

// Install puts table, set, chain and rule in place; it may be called at any
// time, by several processes, and leaves open what is open.
func (g *Gate) Install() error { panic("not yet") }

// Open lets the taps' frames pass for d from now (1 ms to 1 h; the kernel
// counts in ticks of up to 10 ms, and never rounds up by more than one), whatever
// was said before: a shorter d shortens.
func (g *Gate) Open(taps []string, d time.Duration) error { panic("not yet") }

// Shut closes the gate for the taps at once. Frames already past the rule are not called back.
func (g *Gate) Shut(taps []string) error { panic("not yet") }

// State returns for each open tap how much longer it is open.
func (g *Gate) State() (map[string]time.Duration, error) { panic("not yet") }

// Check returns an error unless the rule is in force.
func (g *Gate) Check() error { panic("not yet") }

// Uninstall takes the whole gate away; every tap is open then. For tests and the removal of the product.
func (g *Gate) Uninstall() error { panic("not yet") }

// Close ends the connection to the kernel; what is open closes in its time.
func (g *Gate) Close() error { panic("not yet") }
