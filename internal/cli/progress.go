package cli

import (
	"fmt"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// progress shows how far something is: a bar that is drawn anew on a terminal,
// else a line every few seconds. It is used by one goroutine.
type progress struct {
	a     *app
	drawn bool
	last  time.Time
	text  string
}

const plainInterval = 5 * time.Second

func (a *app) newProgress() *progress { return &progress{a: a} }

// show draws the given state; what is empty shows nothing.
func (p *progress) show(what string, parts []model.Progress) {
	if p.a.machine() && !p.a.errTTY {
		return
	}
	t := overall(parts)
	names := make([]string, 0, len(parts))
	for _, q := range parts {
		if q.Total == 0 || q.Done < q.Total {
			names = append(names, q.What)
		}
	}
	label := strings.TrimSpace(what + " " + strings.Join(names, ", "))
	left := ""
	if t.ETASeconds >= 0 && t.Done < t.Total && len(parts) > 0 {
		left = eta(t.ETASeconds) + " left"
	}
	if !p.a.errTTY {
		p.plain(label, t, left)
		return
	}
	if t.Total <= 0 {
		fmt.Fprintf(p.a.err, "\r\x1b[K%s", label)
		p.drawn = true
		return
	}
	const width = 30
	done := min(t.Done, t.Total)
	n := int(done * width / t.Total)
	fmt.Fprintf(p.a.err, "\r\x1b[K%s [%s%s] %3d %% %s of %s  %s", label, strings.Repeat("#", n), strings.Repeat("-", width-n),
		done*100/t.Total, api.FormatSize(done), api.FormatSize(t.Total), left)
	p.drawn = true
}

func (p *progress) plain(label string, t model.Progress, left string) {
	now := p.a.now()
	if label == p.text && now.Sub(p.last) < plainInterval {
		return
	}
	p.text, p.last = label, now
	if t.Total > 0 {
		label += fmt.Sprintf(": %d %% (%s of %s)", t.Done*100/t.Total, api.FormatSize(t.Done), api.FormatSize(t.Total))
	}
	if left != "" {
		label += ", " + left
	}
	if label != "" {
		fmt.Fprintln(p.a.err, label)
	}
}

// clear takes the bar away.
func (p *progress) clear() {
	if p.drawn {
		fmt.Fprint(p.a.err, "\r\x1b[K")
		p.drawn = false
	}
}
