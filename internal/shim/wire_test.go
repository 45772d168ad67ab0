package shim

import (
	"bytes"
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

func devHeader(dev, wire []byte, delta bool) endHeader {
	return endHeader{DevLen: uint32(len(dev)), DevWire: uint32(len(wire)), DevCRC: crc32.Checksum(dev, castagnoli), DevDelta: boolByte(delta)}
}

// TestDevices sends a row of changing device states as deltas.
func TestDevices(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	dev := make([]byte, 80000)
	for n := range dev {
		dev[n] = byte(r.Uint32())
	}
	var sent, got []byte
	for n := range 20 {
		wire, delta := packDevices(dev, sent)
		back, err := unpackDevices(devHeader(dev, wire, delta), wire, got)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back, dev) {
			t.Fatalf("state %d comes out changed", n)
		}
		if n > 0 && len(wire) > 8000 {
			t.Errorf("state %d: a small change costs %d bytes", n, len(wire))
		}
		sent, got = bytes.Clone(dev), back
		dev[r.IntN(len(dev))]++
		if n%3 == 0 {
			dev = append(dev, byte(n))
		}
	}
}

func TestDevicesRefused(t *testing.T) {
	dev := bytes.Repeat([]byte{1, 2, 3}, 1000)
	wire, _ := packDevices(dev, nil)
	good := devHeader(dev, wire, false)
	for name, change := range map[string]func(*endHeader, []byte){
		"checksum":             func(h *endHeader, _ []byte) { h.DevCRC++ },
		"length":               func(h *endHeader, _ []byte) { h.DevLen++ },
		"too long":             func(h *endHeader, _ []byte) { h.DevLen = maxDevices + 1 },
		"delta against absent": func(h *endHeader, _ []byte) { h.DevDelta = 1 },
		"garbled":              func(_ *endHeader, w []byte) { w[len(w)-1] ^= 0xff; w[0] ^= 1 },
	} {
		h, w := good, bytes.Clone(wire)
		change(&h, w)
		if _, err := unpackDevices(h, w, nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzHeaders(f *testing.F) {
	f.Add(pack(beat{Term: 1}))
	f.Add(pack(endHeader{Epoch: 3}))
	f.Fuzz(func(t *testing.T, b []byte) {
		decodeBeat(b)
		decodeHello(b)
		var h endHeader
		if unpack(b, &h) == nil && !bytes.Equal(pack(h), b) {
			t.Error("an end header does not encode to what it was decoded from")
		}
	})
}
