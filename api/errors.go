package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Class sorts errors by what the caller can do about them. It decides the HTTP
// status and the exit code of the command line; see Classes.
type Class string

// The error classes.
const (
	Invalid     Class = "invalid"     // the request itself is wrong; repeating it changes nothing
	NotFound    Class = "not_found"   // the named thing does not exist
	Conflict    Class = "conflict"    // the thing exists but its present state does not allow it
	Refused     Class = "refused"     // a safety rule forbids it; the message says which
	Unavailable Class = "unavailable" // something that is needed does not answer; try again later
	Timeout     Class = "timeout"     // the time was up before the outcome was known
	Forbidden   Class = "forbidden"   // the caller has no right to it
	Internal    Class = "internal"    // a defect, or the host failed (disk full, I/O error)
)

// ClassInfo is one row of the table of error classes.
type ClassInfo struct {
	Class   Class
	Status  int // HTTP
	Exit    int // command line
	Meaning string
}

// Classes returns the one table that maps error classes to HTTP statuses and
// exit codes. Exit code 0 is success.
func Classes() []ClassInfo {
	return []ClassInfo{
		{Internal, http.StatusInternalServerError, 1, "failed: a defect, or the host failed"},
		{Invalid, http.StatusBadRequest, 2, "usage: the request itself is wrong"},
		{NotFound, http.StatusNotFound, 3, "the named thing does not exist"},
		{Conflict, http.StatusConflict, 4, "its present state does not allow it"},
		{Refused, http.StatusUnprocessableEntity, 4, "a safety rule forbids it"},
		{Unavailable, http.StatusServiceUnavailable, 5, "something needed does not answer"},
		{Timeout, http.StatusGatewayTimeout, 6, "the time was up before the outcome was known"},
		{Forbidden, http.StatusForbidden, 7, "the caller has no right to it"},
	}
}

// Info returns the row of a class; an unknown class is Internal.
func (c Class) Info() ClassInfo {
	all := Classes()
	for _, i := range all {
		if i.Class == c {
			return i
		}
	}
	return all[0]
}

// Problem is the body of every error answer: RFC 9457 (problem+json) with the
// class and the advice added.
type Problem struct {
	Type   string `json:"type,omitempty" doc:"about:blank"`
	Title  string `json:"title" doc:"Text of the HTTP status"`
	Status int    `json:"status"`
	Detail string `json:"detail" doc:"What is wrong, naming the thing, its value and what is allowed"`
	Class  Class  `json:"class" enum:"invalid,not_found,conflict,refused,unavailable,timeout,forbidden,internal"`
	Action string `json:"action,omitempty" doc:"What to do about it"`
}

// Error is an error with a class. Action, if any, says what to do.
type Error struct {
	Class   Class
	Message string
	Action  string
	err     error
}

// Errorf makes an Error; the format may wrap another error with %w.
func Errorf(c Class, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Class: c, Message: err.Error(), err: errors.Unwrap(err)}
}

// WithAction returns the error with advice added.
func (e *Error) WithAction(format string, args ...any) *Error {
	c := *e
	c.Action = fmt.Sprintf(format, args...)
	return &c
}

// Error returns the message without the advice.
func (e *Error) Error() string { return e.Message }

// Unwrap returns what Errorf wrapped, if anything.
func (e *Error) Unwrap() error { return e.err }

// ClassOf returns the class of an error: its own, Timeout for a deadline that
// passed, Internal for anything else.
func ClassOf(err error) Class {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Class
	case errors.Is(err, context.DeadlineExceeded):
		return Timeout
	}
	return Internal
}

// ProblemOf turns any error into what is sent for it. The whole chain of
// messages is kept, since the outermost says what was being done.
func ProblemOf(err error) *Problem {
	c := ClassOf(err)
	p := &Problem{Title: http.StatusText(c.Info().Status), Status: c.Info().Status, Detail: err.Error(), Class: c}
	var e *Error
	if errors.As(err, &e) {
		p.Action = e.Action
	}
	return p
}

// Err turns a received problem back into an Error.
func (p *Problem) Err() *Error {
	c := p.Class
	if c == "" {
		c = classOfStatus(p.Status)
	}
	msg := p.Detail
	if msg == "" {
		msg = p.Title
	}
	return &Error{Class: c, Message: msg, Action: p.Action}
}

// Error makes a Problem usable as an error by itself.
func (p *Problem) Error() string { return p.Detail }

// GetStatus returns the HTTP status to send it with.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType names the media type of RFC 9457.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

// classOfStatus is for answers that no Perdure handler made (proxies, the
// router, schema validation).
func classOfStatus(status int) Class {
	switch status {
	case http.StatusNotFound, http.StatusGone:
		return NotFound
	case http.StatusConflict:
		return Conflict
	case http.StatusForbidden, http.StatusUnauthorized:
		return Forbidden
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusTooManyRequests:
		return Unavailable
	case http.StatusGatewayTimeout, http.StatusRequestTimeout:
		return Timeout
	}
	if status >= 400 && status < 500 {
		return Invalid
	}
	return Internal
}
