package guestsvc

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// ServeAgent answers the commands of a QEMU guest agent that Perdure and its
// tests use, on the channel rw, until it ends: guest-sync, guest-sync-delimited,
// guest-ping, guest-info, guest-get-time, guest-set-time and guest-shutdown.
// Input that is no command is answered with an error, as the real agent does.
func (s *Server) ServeAgent(rw io.ReadWriter) {
	lines(rw, func(line []byte) error {
		line = bytes.TrimSpace(bytes.Trim(line, "\xff"))
		if len(line) == 0 {
			return nil
		}
		reply, prefix := s.agentCommand(line)
		b, err := json.Marshal(reply)
		if err != nil {
			return err
		}
		_, err = rw.Write(append(append([]byte(prefix), b...), '\n'))
		return err
	})
}

var agentCommands = []string{"guest-sync", "guest-sync-delimited", "guest-ping", "guest-info", "guest-get-time", "guest-set-time", "guest-shutdown"}

type agentReply map[string]any

func agentError(format string, args ...any) agentReply {
	return agentReply{"error": map[string]string{"class": "GenericError", "desc": fmt.Sprintf(format, args...)}}
}

func (s *Server) agentCommand(line []byte) (reply agentReply, prefix string) {
	var q struct {
		Execute   string `json:"execute"`
		Arguments struct {
			ID   int64  `json:"id"`
			Time int64  `json:"time"`
			Mode string `json:"mode"`
		} `json:"arguments"`
	}
	if err := json.Unmarshal(line, &q); err != nil {
		return agentError("parse command: %v", err), ""
	}
	switch q.Execute {
	case "guest-sync":
		return agentReply{"return": q.Arguments.ID}, ""
	case "guest-sync-delimited":
		return agentReply{"return": q.Arguments.ID}, "\xff"
	case "guest-ping":
		return agentReply{"return": struct{}{}}, ""
	case "guest-info":
		var all []any
		for _, c := range agentCommands {
			all = append(all, map[string]any{"name": c, "enabled": true})
		}
		return agentReply{"return": map[string]any{"version": "perdure-guest", "supported_commands": all}}, ""
	case "guest-get-time":
		return agentReply{"return": time.Now().UnixNano()}, ""
	case "guest-set-time":
		ts := unix.NsecToTimespec(q.Arguments.Time)
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			return agentError("set time: %v", err), ""
		}
		return agentReply{"return": struct{}{}}, ""
	case "guest-shutdown":
		if s.Machine == nil {
			return agentError("%v", errNoMachine), ""
		}
		do := s.Machine.PowerOff
		if q.Arguments.Mode == "reboot" {
			do = s.Machine.Reboot
		}
		if err := do(); err != nil {
			return agentError("shut down: %v", err), ""
		}
		return agentReply{"return": struct{}{}}, ""
	}
	return agentError("The command %s has not been found", q.Execute), ""
}
