package xdploader_test

import (
	"encoding/binary"
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// otherOrder is bpf2go's name for the byte order that this machine does not
// have.
var otherOrder = map[uint16]string{1: "bpfeb", 256: "bpfel"}[binary.NativeEndian.Uint16([]byte{1, 0})]
