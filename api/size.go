package api

import (
	"math"
	"strconv"
	"strings"
)

var sizeUnits = []struct {
	suffix string
	shift  uint
}{{"T", 40}, {"G", 30}, {"M", 20}, {"K", 10}}

// ParseSize reads a size as people write it: 512M, 4G, 1.5GiB, 65536. Units
// are powers of 1024 whether written K, KB or KiB; without a unit it is bytes.
// The result is a whole number of bytes, at least 0.
func ParseSize(s string) (int64, error) {
	bad := func(why string) (int64, error) {
		return 0, Errorf(Invalid, "size %q: %s; write a number with K, M, G or T, such as 512M, 4G or 1.5GiB", s, why)
	}
	t := strings.ToUpper(strings.TrimSpace(s))
	if t == "" {
		return bad("is empty")
	}
	num := strings.TrimRight(t, "ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
	unit := strings.TrimSpace(t[len(num):])
	mult := int64(1)
	if unit != "" && unit != "B" {
		found := false
		for _, u := range sizeUnits {
			if unit == u.suffix || unit == u.suffix+"B" || unit == u.suffix+"IB" {
				mult, found = 1<<u.shift, true
			}
		}
		if !found {
			return bad("the unit " + strconv.Quote(unit) + " is not known")
		}
	}
	if n, err := strconv.ParseInt(num, 10, 64); err == nil {
		switch {
		case n < 0:
			return bad("is negative")
		case n > math.MaxInt64/mult:
			return bad("is too large")
		}
		return n * mult, nil
	}
	f, err := strconv.ParseFloat(num, 64)
	switch {
	case err != nil || strings.ContainsAny(num, "EXP_") || math.IsNaN(f):
		return bad("is not a number")
	case f < 0:
		return bad("is negative")
	}
	f *= float64(mult)
	switch {
	case f >= math.MaxInt64:
		return bad("is too large")
	case f != math.Trunc(f):
		return bad("is not a whole number of bytes")
	}
	return int64(f), nil
}

// FormatSize writes a size exactly where one decimal place allows it, else
// rounded to one: 512MiB, 1.5GiB, 4096 as 4KiB, 1000 as 1000B.
func FormatSize(n int64) string {
	if n < 0 {
		return strconv.FormatInt(n, 10) + "B"
	}
	for _, u := range sizeUnits {
		if n >= 1<<u.shift {
			v := float64(n) / float64(int64(1)<<u.shift)
			return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + u.suffix + "iB"
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}
