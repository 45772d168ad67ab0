package selftest

import "encoding/binary"

// The pattern guest occupies the first 2 MiB and writes, for ever, into every
// page above: page p of pass n gets n XOR its own address at an offset that moves with n,
// so that each pass dirties each page and no two pages are alike.
const (
	patternLoad  = 0x100000 // where the loader puts it
	patternStart = 2 << 20  // first byte that it writes
)

// patternGuest assembles the guest for a memory of size bytes: a Multiboot 1
// image (GNU Multiboot specification 0.6.96, 3.1.2: header with addresses), 32-bit code.
func patternGuest(size int64) []byte {
	le := binary.LittleEndian
	u32 := func(b []byte, v uint32) []byte { return le.AppendUint32(b, v) }
	const magic, flags = 0x1badb002, 1 << 16
	const header = 32
	code := []byte{0xfa, 0x31, 0xc0} // cli; xor eax,eax
	pass := len(code)
	code = append(code, 0x40)                           // pass: inc eax
	code = u32(append(code, 0xbf), patternStart)        // mov edi, patternStart
	page := len(code)                                   // page:
	code = append(code, 0x89, 0xc3)                     // mov ebx, eax
	code = u32(append(code, 0x81, 0xe3), 0x3fc)         // and ebx, 0x3fc
	code = append(code, 0x89, 0xc1)                     // mov ecx, eax
	code = append(code, 0x31, 0xf9)                     // xor ecx, edi
	code = append(code, 0x89, 0x0c, 0x1f)               // mov [edi+ebx], ecx
	code = u32(append(code, 0x81, 0xc7), 4096)          // add edi, 4096
	code = u32(append(code, 0x81, 0xff), uint32(size))  // cmp edi, size
	code = append(code, 0x72, byte(page-(len(code)+2))) // jb page
	code = append(code, 0xb9, 0x00, 0x00, 0x04, 0x00)   // mov ecx, 262144
	code = append(code, 0xe2, 0xfe)                     // loop: a pause between passes
	code = append(code, 0xeb, byte(pass-(len(code)+2))) // jmp pass
	end := uint32(patternLoad + header + len(code))
	var img []byte
	for _, v := range []uint32{magic, flags, (1<<32 - magic - flags) & 0xffffffff, patternLoad, patternLoad, end, end, patternLoad + header} {
		img = u32(img, v)
	}
	return append(img, code...)
}
