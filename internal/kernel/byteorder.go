package kernel

import "encoding/binary"

// ByteOrder is the byte order of this machine. It is one of the two values that
// readers and writers of instructions compare with; [binary.NativeEndian] is neither.
var ByteOrder = func() binary.ByteOrder {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return binary.LittleEndian
	}
	return binary.BigEndian
}()
