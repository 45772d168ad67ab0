package cli

import (
	"fmt"
	"sort"
	"strings"

	"perdure/api"
)

// placeFlag is --path [HOST:]PATH, once for each host.
type placeFlag struct{ paths *map[string]string }

func (p *placeFlag) String() string     { return "" }
func (p *placeFlag) Type() string       { return "[HOST:]PATH" }
func (p *placeFlag) Set(s string) error { return addPlace(p.paths, s) }

// addPlace takes in [HOST:]PATH; without a host it is the one that makes the disk.
func addPlace(paths *map[string]string, s string) error {
	host, path, ok := strings.Cut(s, ":")
	if !ok || strings.HasPrefix(s, "/") {
		host, path = "", s
	} else if host == "" {
		return fmt.Errorf("path %q: the host before the colon is empty; allowed are PATH and HOST:PATH", s)
	}
	if err := api.CheckPlaces("disk", map[string]string{host: path}); err != nil {
		return err
	}
	if _, twice := (*paths)[host]; twice {
		if host == "" {
			return fmt.Errorf("path %q: two paths are given without a host; give the host of the others, HOST:PATH", s)
		}
		return fmt.Errorf("path %q: two paths are given for host %s", s, host)
	}
	if *paths == nil {
		*paths = map[string]string{}
	}
	(*paths)[host] = path
	return nil
}

// placesText lists where the replicas of a disk lie that are not in the state directory.
func placesText(paths map[string]string) string {
	var out []string
	for h, p := range paths {
		out = append(out, h+":"+p)
	}
	sort.Strings(out)
	return strings.Join(out, ", ")
}
