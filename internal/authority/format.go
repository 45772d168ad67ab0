package authority

import (
	"fmt"
	"sort"
	"strings"

	"perdure/internal/model"
)

// FormatRecord returns a record in one line, for logs, traces and golden files.
func FormatRecord(r model.Record) string {
	var b strings.Builder
	fmt.Fprintf(&b, "term %d %s primary %s secondary %s", r.Term, r.Mode, seatWord(r.Primary), seatWord(r.Secondary))
	hosts := make([]string, 0, len(r.Replicas))
	for h := range r.Replicas {
		hosts = append(hosts, h)
	}
	sort.Strings(hosts)
	for i, h := range hosts {
		sep := ","
		if i == 0 {
			sep = " disks"
		}
		rep := r.Replicas[h]
		fmt.Fprintf(&b, "%s %s=%s@%d", sep, h, rep.State, rep.Term)
		if rep.Branch != r.Branch {
			fmt.Fprintf(&b, "(branch %s)", rep.Branch)
		}
	}
	if r.Branch != "" {
		fmt.Fprintf(&b, " branch %s", r.Branch)
	}
	if r.Survivor != "" {
		fmt.Fprintf(&b, " survivor %s", r.Survivor)
	}
	if r.Wanted != model.WantRunning {
		fmt.Fprintf(&b, " wanted %s", r.Wanted)
	}
	return b.String()
}

// FormatEvent returns an event in one line that an operator can read.
func FormatEvent(ev Event) string {
	switch e := ev.(type) {
	case EvStart:
		return "shim starts"
	case EvRecord:
		if !e.Found {
			return "read: no record"
		}
		return fmt.Sprintf("read: revision %d, %s", e.Revision, FormatRecord(e.Record))
	case EvReadFailed:
		return "read failed"
	case EvSwap:
		if e.Outcome == Unknown {
			return fmt.Sprintf("swap %d: unknown", e.ID)
		}
		return fmt.Sprintf("swap %d: %s, revision %d, %s", e.ID, e.Outcome, e.Current.Revision, FormatRecord(e.Current.Record))
	case EvFilled:
		return fmt.Sprintf("memory filled, run %s, epoch %d", e.Run, e.Epoch)
	case EvPeerUp:
		return fmt.Sprintf("peer %s up, run %s, term %d", e.Host, runWord(e.Run), e.Term)
	case EvPeerLost:
		return "peer lost"
	case EvPeerDead:
		if e.Released {
			return fmt.Sprintf("peer run %s is gone for certain, survivor right given up", runWord(e.Run))
		}
		return fmt.Sprintf("peer run %s is gone for certain", runWord(e.Run))
	case EvCaughtUp:
		return "copy caught up"
	case EvSynced:
		return fmt.Sprintf("%s complete as run %s, epoch %d", e.Host, e.Run, e.Epoch)
	case EvGuestEnded:
		return "guest ended: " + e.Reason
	case EvPoweredOff:
		return "guest powered off"
	case EvProtect:
		return "asked: protect on " + e.Host
	case EvUnprotect:
		return "asked: unprotect: " + e.Reason
	case EvSwitchedOver:
		return "final epoch committed, guest stopped for switchover"
	case EvSwitchover:
		return fmt.Sprintf("peer run %s hands over, term %d", e.Run, e.Term)
	case EvForce:
		return fmt.Sprintf("asked: forced takeover of run %s as branch %s", e.Run, e.Branch)
	case EvSurvivor:
		return fmt.Sprintf("agent: survivor %s", onWord(e.On))
	case EvReplicaLost:
		return "own replica lost: " + e.Reason
	case EvReplicaBack:
		return "own replica whole again"
	case EvTimer:
		return fmt.Sprintf("timer %s", e.ID)
	case EvPeerTerm:
		return fmt.Sprintf("peer mentions term %d", e.Term)
	}
	return fmt.Sprintf("%T", ev)
}

// FormatAction returns an action in one line that an operator can read.
func FormatAction(act Action) string {
	switch a := act.(type) {
	case ActRead:
		return "read the record"
	case ActSwap:
		return fmt.Sprintf("swap %d at revision %d: %s (%s)", a.ID, a.Revision, FormatRecord(a.Record), a.Record.Reason)
	case ActOutput:
		return "output " + a.Rule.String()
	case ActAck:
		return "acknowledge " + onWord(a.On)
	case ActBoot:
		return "build the guest, paused, from the local disks"
	case ActStandby:
		return "start the standby"
	case ActRun:
		return "run the guest" + pausedWord(a.Paused)
	case ActDetach:
		return "mark what the secondary has not reported durable"
	case ActTakeOver:
		return fmt.Sprintf("take over from the newest complete epoch, term %d%s", a.Term, pausedWord(a.Paused))
	case ActEnd:
		return "end: " + a.Reason
	case ActTell:
		s := fmt.Sprintf("tell peer %s, term %d, run %s", a.Kind, a.Term, runWord(a.Run))
		if a.Released {
			s += ", survivor right given up"
		}
		return s
	case ActTimer:
		if a.Milliseconds < 0 {
			return fmt.Sprintf("stop timer %s", a.ID)
		}
		return fmt.Sprintf("timer %s in %d ms", a.ID, a.Milliseconds)
	case ActMode:
		s := fmt.Sprintf("be %s, %s, term %d, run %s", a.Role, a.Mode, a.Term, runWord(a.Run))
		if a.PeerHost != "" {
			s += ", peer " + seatWord(model.Seat{Host: a.PeerHost, Run: a.PeerRun})
		}
		return s
	case ActCarry:
		return "carry to the secondary alone " + onWord(a.On)
	case ActAlarm:
		return fmt.Sprintf("alarm %s: %s", a.Code, a.Text)
	case ActRefuse:
		return "refuse: " + a.Text
	}
	return fmt.Sprintf("%T", act)
}

func runWord(r model.RunID) string {
	if r == "" {
		return "none"
	}
	return string(r)
}

func onWord(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func pausedWord(p bool) string {
	if p {
		return ", paused as a person wants it"
	}
	return ""
}
