package state

// These are for the tests of this package.
var (
	Escape   = escape
	Unescape = unescape

	MarshalCode   = marshalCode
	UnmarshalCode = unmarshalCode
)

// These are sizes in a description, in bytes.
const (
	HeaderSize, MemberSize, ValueSize = headerSize, memberSize, valueSize
)

// EntryType is entryType.
var EntryType = entryType
