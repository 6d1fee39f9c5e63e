package scene

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Twin is a second scene that shares all numbers with the first: names, ifindexes, and the bpffs.
func (s *Scene) Twin(t testing.TB) *Scene {
	t.Helper()
	pair := testenv.NewPairOpts(t, testenv.PairOptions{ClientIfindex: s.ClientIfindex, ServerIfindex: s.ServerIfindex})
	return &Scene{Pair: pair, Target: dispatcher.XDP(pair.ServerDev).In(pair.Server.Name), BPFFS: s.BPFFS, Trace: s.Trace}
}

// Jumbo makes the packets longer than what a driver takes in one buffer.
func (s *Scene) Jumbo(t testing.TB) {
	t.Helper()
	s.Client.IP(t, "link", "set", s.ClientDev, "mtu", "9000")
	s.Server.IP(t, "link", "set", s.ServerDev, "mtu", "9000")
}

// ReplaceDevice puts another device of the same name and ifindex in the place of the device.
func (s *Scene) ReplaceDevice(t testing.TB) {
	t.Helper()
	s.Server.IP(t, "link", "delete", s.ServerDev)
	s.Connect(t, testenv.PairOptions{ClientIfindex: s.ClientIfindex, ServerIfindex: s.ServerIfindex})
}

// AttachLegacy attaches a program as "ip link set xdp" does.
func (s *Scene) AttachLegacy(t testing.TB, prog *ebpf.Program) {
	t.Helper()
	qt.Assert(t, qt.IsNil(s.SetXDP(t, prog.FD(), unix.XDP_FLAGS_DRV_MODE, 0)))
}

// SetXDP does by rtnetlink what "ip link set xdp" does, with any flags. No expected program is sent for 0.
func (s *Scene) SetXDP(t testing.TB, fd int, flags uint32, expected int) error {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	ae.Nested(unix.IFLA_XDP, func(nae *netlink.AttributeEncoder) error {
		nae.Int32(unix.IFLA_XDP_FD, int32(fd))
		nae.Uint32(unix.IFLA_XDP_FLAGS, flags)
		if expected != 0 {
			nae.Int32(unix.IFLA_XDP_EXPECTED_FD, int32(expected))
		}
		return nil
	})
	attrs, err := ae.Encode()
	qt.Assert(t, qt.IsNil(err))
	header := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(header[4:], uint32(s.ServerIfindex))
	return s.Server.Run(func() error {
		conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
		qt.Assert(t, qt.IsNil(err))
		defer conn.Close()
		_, err = conn.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_SETLINK, Flags: netlink.Request | netlink.Acknowledge},
			Data:   append(header, attrs...),
		})
		return err
	})
}

// LegacyFlags ask for a mode.
var LegacyFlags = map[hook.Mode]uint32{
	hook.ModeAuto: 0, hook.ModeNative: unix.XDP_FLAGS_DRV_MODE, hook.ModeGeneric: unix.XDP_FLAGS_SKB_MODE,
}

// Occupy puts a program on the device as somebody else would, and returns the link's id, if there is one.
func (s *Scene) Occupy(t testing.TB, prog *ebpf.Program, kind hook.Kind, mode hook.Mode) (id uint32) {
	t.Helper()
	if kind == hook.KindLegacy {
		qt.Assert(t, qt.IsNil(s.SetXDP(t, prog.FD(), LegacyFlags[mode], 0)))
		return 0
	}
	s.Server.Do(t, func() {
		l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: s.ServerIfindex, Flags: link.XDPAttachFlags(LegacyFlags[mode])})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
		info, err := l.Info()
		qt.Assert(t, qt.IsNil(err))
		id = uint32(info.ID)
	})
	return id
}

// ProgramOf is what the library should say about a program.
func ProgramOf(t testing.TB, prog *ebpf.Program) hook.Program {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	return hook.Program{ID: uint32(id), Name: info.Name, Tag: info.Tag}
}

// Free takes a legacy program off the device.
func (s *Scene) Free(t testing.TB) {
	t.Helper()
	for _, flags := range []uint32{unix.XDP_FLAGS_DRV_MODE, unix.XDP_FLAGS_SKB_MODE} {
		_ = s.SetXDP(t, -1, flags, 0)
	}
}

// WantReattached recovers, with nothing that could not be.
func (s *Scene) WantReattached(t testing.TB) {
	t.Helper()
	for _, f := range s.Recover(t, dispatcher.RecoverOptions{Reattach: true}) {
		qt.Assert(t, qt.IsNil(f.Err))
	}
}

// DeleteDevice takes the device away, and waits until its members are seen to be gone.
func (s *Scene) DeleteDevice(t testing.TB) {
	t.Helper()
	s.Server.IP(t, "link", "del", s.ServerDev)
	Soon(t, func() bool { return s.Gone(t, s.Target.Hook) != "" })
}

// Gone is what a list shows of members of a device that is gone.
func (s *Scene) Gone(t testing.TB, h hook.Hook) string {
	t.Helper()
	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.BPFFS, Hooks: []hook.Hook{h}})
	qt.Assert(t, qt.IsNil(err))
	words := ""
	for _, c := range list {
		for _, m := range c.Members {
			if m.State == hook.StateDefunct && m.Kind == hook.KindMember {
				words += fmt.Sprintf("%s(%s) ", m.Name, m.Detail)
			}
		}
	}
	return words
}

// Recover is dispatcher.Recover in the scene's bpffs.
func (s *Scene) Recover(t testing.TB, o dispatcher.RecoverOptions) []hook.Leftover {
	t.Helper()
	o.BPFFS = s.BPFFS
	found, err := dispatcher.Recover(t.Context(), o)
	qt.Assert(t, qt.IsNil(err))
	return found
}

// NewDevice makes the pair of devices anew, as it was, with other numbers.
func (s *Scene) NewDevice(t testing.TB) {
	t.Helper()
	s.Connect(t, testenv.PairOptions{})
}

// Modes are the two ways in which a device runs a chain.
var Modes = []hook.Mode{hook.ModeNative, hook.ModeGeneric}

// EachMode runs a test in a scene of its own for each mode.
func EachMode(t *testing.T, test func(t *testing.T, s *Scene, mode hook.Mode)) {
	for _, mode := range Modes {
		t.Run(mode.String(), func(t *testing.T) { test(t, New(t), mode) })
	}
}

// Hold attaches a program in native mode for the length of the test.
func Hold(t testing.TB, prog *ebpf.Program, index int) link.Link {
	t.Helper()
	l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: index, Flags: link.XDPDriverMode})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	return l
}

// IfindexOf finds a device of the caller's namespace.
func IfindexOf(t testing.TB, name string) int {
	t.Helper()
	dev, err := net.InterfaceByName(name)
	qt.Assert(t, qt.IsNil(err))
	return dev.Index
}
