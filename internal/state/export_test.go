package state

// For tests of this package.
var (
	Escape   = escape
	Unescape = unescape

	MarshalCode   = marshalCode
	UnmarshalCode = unmarshalCode
)

// Layout of a description, in bytes.
const (
	HeaderSize, MemberSize, ValueSize = headerSize, memberSize, valueSize
)

// EntryType is for which map an XDP program was loaded.
var EntryType = entryType
