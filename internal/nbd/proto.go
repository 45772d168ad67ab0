package nbd

// The numbers of the protocol, as in the NetworkBlockDevice project's proto.md.

// Block sizes that the server offers, in bytes.
const (
	MinBlock       = 512
	PreferredBlock = 4096
	MaxBlock       = 32 << 20 // of payload in one READ or WRITE
)

const (
	magicInit   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption = 0x49484156454f5054 // "IHAVEOPT"
	magicReply  = 0x0003e889045565a9

	flagFixedNewstyle = 1 << 0 // handshake flags; the client's have the same values
	flagNoZeroes      = 1 << 1
)

// Options and their replies.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10

	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4
	repErrUnsup    = 1<<31 + 1
	repErrInvalid  = 1<<31 + 3
	repErrUnknown  = 1<<31 + 6
	repErrTooBig   = 1<<31 + 9

	infoExport    = 0
	infoName      = 1
	infoBlockSize = 3

	maxOption  = 16 << 10 // bytes of option data that are looked at
	maxSkip    = 1 << 20  // bytes of option data that are skipped; more ends the connection
	maxOptions = 128      // options in one handshake
	maxName    = 4096     // bytes, by the protocol
)

// Transmission flags.
const (
	tfHasFlags        = 1 << 0
	tfSendFlush       = 1 << 2
	tfSendFUA         = 1 << 3
	tfSendTrim        = 1 << 5
	tfSendWriteZeroes = 1 << 6
	tfSendDF          = 1 << 7
	tfCanMultiConn    = 1 << 8
	tfSendCache       = 1 << 10
	tfSendFastZero    = 1 << 11
)

// Requests.
const (
	magicRequest = 0x25609513
	requestSize  = 28

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Replies.
const (
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
	simpleSize      = 16
	chunkSize       = 20 // header of a structured reply chunk

	chunkDone       = 1 << 0 // flag
	typeOffsetData  = 1
	typeBlockStatus = 5
	typeError       = 1<<15 + 1

	stateHole = 1 << 0 // block status
	stateZero = 1 << 1
)

// Error numbers on the wire.
const (
	errPerm     = 1
	errIO       = 5
	errNoMem    = 12
	errInvalid  = 22
	errNoSpace  = 28
	errOverflow = 75
	errNotSup   = 95
	errShutdown = 108
)

// contextAllocation is the one metadata context; allocationID its number on a connection.
const (
	contextAllocation = "base:allocation"
	contextNamespace  = "base:"
	allocationID      = 1
)
