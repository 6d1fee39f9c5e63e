package scan

import (
	"encoding/binary"
	"testing"

	"github.com/go-quicktest/qt"
	"github.com/mdlayher/netlink"
)

func FuzzNetfilterHook(f *testing.F) {
	encode := func(kind uint32) []byte {
		ae := netlink.NewAttributeEncoder()
		ae.ByteOrder = binary.BigEndian
		ae.Uint32(nfnlaHookPriority, 10)
		ae.Nested(nfnlaHookChainInfo, func(info *netlink.AttributeEncoder) error {
			info.ByteOrder = binary.BigEndian
			info.Uint32(nfnlaHookInfoType, kind)
			info.Nested(nfnlaHookInfoDesc, func(bpf *netlink.AttributeEncoder) error {
				bpf.ByteOrder = binary.BigEndian
				bpf.Uint32(nfnlaHookBPFID, 7)
				return nil
			})
			return nil
		})
		b, err := ae.Encode()
		qt.Assert(f, qt.IsNil(err))
		return append(make([]byte, 4), b...)
	}
	for kind, program := range map[uint32]uint32{nfnlHookTypeBPF: 7, nfnlHookTypeBPF + 1: 0} {
		var h netfilterHook
		qt.Assert(f, qt.IsNil(h.parse(encode(kind))))
		qt.Assert(f, qt.Equals(h.program, program))
		f.Add(encode(kind))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var h netfilterHook
		if err := h.parse(b); err == nil && h.program != 0 && len(b) < 32 {
			t.Errorf("program %d out of %d bytes", h.program, len(b))
		}
	})
}
