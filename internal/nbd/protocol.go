package nbd

// Numbers of the NBD protocol, named as in its document and in its order.

// Handshake.
const (
	magicServer uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption uint64 = 0x49484156454f5054 // "IHAVEOPT"
	magicReply  uint64 = 0x0003e889045565a9 // starts every option reply

	handshakeFixedNewstyle uint16 = 1 << 0
	handshakeNoZeroes      uint16 = 1 << 1

	clientFixedNewstyle uint32 = 1 << 0
	clientNoZeroes      uint32 = 1 << 1

	greetingBytes     = 8 + 8 + 2
	optionHeaderBytes = 8 + 4 + 4
	replyHeaderBytes  = 8 + 4 + 4 + 4
	exportZeroesBytes = 124 // behind the answer to EXPORT_NAME, unless NO_ZEROES
	nameBytesMax      = 4096
)

// Options.
const (
	optExportName      uint32 = 1
	optAbort           uint32 = 2
	optList            uint32 = 3
	optStartTLS        uint32 = 5
	optInfo            uint32 = 6
	optGo              uint32 = 7
	optStructuredReply uint32 = 8
	optListMetaContext uint32 = 9
	optSetMetaContext  uint32 = 10
)

// Option replies. Errors have bit 31 set.
const (
	repAck         uint32 = 1
	repServer      uint32 = 2
	repInfo        uint32 = 3
	repMetaContext uint32 = 4

	repErrorBit    uint32 = 1 << 31
	repErrUnsup           = repErrorBit + 1
	repErrPolicy          = repErrorBit + 2
	repErrInvalid         = repErrorBit + 3
	repErrUnknown         = repErrorBit + 6
	repErrShutdown        = repErrorBit + 7
	repErrTooBig          = repErrorBit + 9
)

// Information about an export, inside repInfo.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// Transmission flags.
const (
	flagHasFlags        uint16 = 1 << 0
	flagReadOnly        uint16 = 1 << 1
	flagSendFlush       uint16 = 1 << 2
	flagSendFUA         uint16 = 1 << 3
	flagSendTrim        uint16 = 1 << 5
	flagSendWriteZeroes uint16 = 1 << 6
	flagSendDF          uint16 = 1 << 7
	flagCanMultiConn    uint16 = 1 << 8
	flagSendCache       uint16 = 1 << 10
	flagSendFastZero    uint16 = 1 << 11
)

// Transmission.
const (
	magicRequest    uint32 = 0x25609513
	magicSimple     uint32 = 0x67446698
	magicStructured uint32 = 0x668e33ef

	requestHeaderBytes    = 4 + 2 + 2 + 8 + 8 + 4
	simpleHeaderBytes     = 4 + 4 + 8
	structuredHeaderBytes = 4 + 2 + 2 + 8 + 4

	// requestBytesMax bounds the data of one READ or WRITE; it is announced as
	// the maximum block size and is what clients may assume unasked.
	requestBytesMax = 32 << 20
	// preferredBlockBytes is announced as the preferred block size.
	preferredBlockBytes = 4096
)

// Commands.
const (
	cmdRead        uint16 = 0
	cmdWrite       uint16 = 1
	cmdDisc        uint16 = 2
	cmdFlush       uint16 = 3
	cmdTrim        uint16 = 4
	cmdCache       uint16 = 5
	cmdWriteZeroes uint16 = 6
	cmdBlockStatus uint16 = 7
)

// Command flags.
const (
	cmdFlagFUA      uint16 = 1 << 0
	cmdFlagNoHole   uint16 = 1 << 1
	cmdFlagDF       uint16 = 1 << 2
	cmdFlagReqOne   uint16 = 1 << 3
	cmdFlagFastZero uint16 = 1 << 4
)

// Structured reply chunks.
const (
	chunkFlagDone uint16 = 1 << 0

	chunkNone        uint16 = 0
	chunkOffsetData  uint16 = 1
	chunkOffsetHole  uint16 = 2
	chunkBlockStatus uint16 = 5
	chunkErrorBit    uint16 = 1 << 15
	chunkError              = chunkErrorBit + 1
)

// The one metadata context that is served.
const (
	contextAllocation          = "base:allocation"
	contextAllocationID uint32 = 1

	stateHole uint32 = 1 << 0
	stateZero uint32 = 1 << 1
)

// Error numbers on the wire; they are the protocol's, not this system's.
const (
	wireEPERM     uint32 = 1
	wireEIO       uint32 = 5
	wireEINVAL    uint32 = 22
	wireENOSPC    uint32 = 28
	wireENOTSUP   uint32 = 95
	wireESHUTDOWN uint32 = 108
)

func commandName(cmd uint16) string {
	switch cmd {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdDisc:
		return "disconnect"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdCache:
		return "cache"
	case cmdWriteZeroes:
		return "write zeroes"
	case cmdBlockStatus:
		return "block status"
	}
	return "unknown command"
}
