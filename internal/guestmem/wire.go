package guestmem

// The part of the kernel's FUSE protocol that one file of fixed size needs, as
// in include/uapi/linux/fuse.h (7.31; later kernels speak it too). The structs
// lie in the byte order of the machine, so they are read in place.

const (
	fuseMajor = 7
	fuseMinor = 31

	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opAccess      = 34
	opInterrupt   = 36
	opDestroy     = 38
	opNotifyReply = 41
	opBatchForget = 42

	capAsyncRead         = 1 << 0
	capBigWrites         = 1 << 5
	capMaxPages          = 1 << 22
	capExplicitInvalData = 1 << 25

	openKeepCache = 1 << 1 // a second open must not throw the guest's memory away
	openNoFlush   = 1 << 5 // no FLUSH request at each close

	writeCache = 1 << 0 // WRITE comes from the page cache

	notifyStore = 4

	attrSize = 1 << 3 // SETATTR sets the size

	inHeaderSize  = 40
	writeInSize   = 40
	outHeaderSize = 16
)

type inHeader struct {
	Len, Opcode           uint32
	Unique, NodeID        uint64
	UID, GID, PID, Extent uint32
}

type outHeader struct {
	Len    uint32
	Error  int32
	Unique uint64
}

type initIn struct {
	Major, Minor, MaxReadahead, Flags uint32
}

type initOut struct {
	Major, Minor, MaxReadahead, Flags  uint32
	MaxBackground, CongestionThreshold uint16
	MaxWrite, TimeGran                 uint32
	MaxPages, MapAlignment             uint16
	_                                  [8]uint32
}

type attr struct {
	Ino, Size, Blocks               uint64
	Atime, Mtime, Ctime             uint64
	AtimeNS, MtimeNS, CtimeNS, Mode uint32
	Nlink, UID, GID, Rdev           uint32
	Blksize, Flags                  uint32
}

type attrOut struct {
	Valid          uint64
	ValidNS, Dummy uint32
	Attr           attr
}

type entryOut struct {
	NodeID, Generation        uint64
	EntryValid, AttrValid     uint64
	EntryValidNS, AttrValidNS uint32
	Attr                      attr
}

type setattrIn struct {
	Valid, Padding uint32
	FH, Size       uint64
}

type openOut struct {
	FH             uint64
	OpenFlags, Pad uint32
}

type readIn struct {
	FH, Offset uint64
	Size       uint32
}

type writeIn struct {
	FH, Offset       uint64
	Size, WriteFlags uint32
	LockOwner        uint64
	Flags, Padding   uint32
}

type writeOut struct {
	Size, Padding uint32
}

type statfsOut struct {
	Blocks, Bfree, Bavail, Files, Ffree uint64
	Bsize, Namelen, Frsize, Padding     uint32
	_                                   [6]uint32
}

type notifyStoreOut struct {
	NodeID, Offset uint64
	Size, Padding  uint32
}

type direntHead struct {
	Ino, Off      uint64
	Namelen, Type uint32
}
