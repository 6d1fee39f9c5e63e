package kernel

import "encoding/binary"

// ByteOrder is this machine's, as one of the two that readers of instructions know.
var ByteOrder = func() binary.ByteOrder {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return binary.LittleEndian
	}
	return binary.BigEndian
}()
