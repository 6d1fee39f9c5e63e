package packet_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/packet"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The kernel's stack accepts built packets and answers them, and Describe reads the answers correctly. The
// kernel does not answer a packet with a wrong checksum.
func TestStackTakes(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	wire := openWire(t, pair)
	clientMAC, serverMAC := net.HardwareAddr{2, 0x77, 0, 0, 0, 1}, net.HardwareAddr{2, 0x77, 0, 0, 0, 2}
	for _, tc := range []struct {
		protocol packet.Protocol
		from, to netip.Addr
		checksum int // its offset
		answer   string
	}{
		{packet.UDP, testenv.ClientIPv4, testenv.ServerIPv4, 14 + 20 + 6, "IPv4 10.77.0.2 > 10.77.0.1 ICMP unreachable"},
		{packet.TCP, testenv.ClientIPv4, testenv.ServerIPv4, 14 + 20 + 16, "IPv4 10.77.0.2:53 > 10.77.0.1:40000 TCP RST,ACK"},
		{packet.ICMP, testenv.ClientIPv4, testenv.ServerIPv4, 14 + 20 + 2, "IPv4 10.77.0.2 > 10.77.0.1 ICMP echo reply"},
		{packet.ICMP, testenv.ClientIPv4, testenv.ServerIPv4, 14 + 10, "IPv4 10.77.0.2 > 10.77.0.1 ICMP echo reply"},
		{packet.UDP, testenv.ClientIPv6, testenv.ServerIPv6, 14 + 40 + 6, "IPv6 fd77::2 > fd77::1 ICMPv6 unreachable"},
		{packet.TCP, testenv.ClientIPv6, testenv.ServerIPv6, 14 + 40 + 16, "IPv6 [fd77::2]:53 > [fd77::1]:40000 TCP RST,ACK"},
		{packet.ICMP, testenv.ClientIPv6, testenv.ServerIPv6, 14 + 40 + 2, "IPv6 fd77::2 > fd77::1 ICMPv6 echo reply"},
	} {
		s := spec(tc.protocol, tc.from.String(), tc.to.String())
		s.FromMAC, s.ToMAC, s.Flags = clientMAC, serverMAC, 2
		s.Size = 201 // an odd payload
		good := build(t, s)
		bad := build(t, s)
		bad[tc.checksum] ^= 1
		const end = 999
		s.Protocol, s.Size = packet.ICMP, end // the answer to the last packet has this length
		wire.send(t, bad, good, build(t, s))
		answers := 0
		for {
			got := wire.next(t)
			if len(got) == end {
				break
			}
			if packet.Describe(got, "") == tc.answer {
				answers++
			}
		}
		qt.Check(t, qt.Equals(answers, 1), qt.Commentf("%s", packet.Describe(good, "")))
	}
}

// wire is a packet socket on the client's side of a pair.
type wire struct{ fd int }

func openWire(t *testing.T, pair *testenv.Pair) wire {
	t.Helper()
	var fd int
	pair.Client.Do(t, func() {
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { unix.Close(fd) })
		qt.Assert(t, qt.IsNil(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)))
		qt.Assert(t, qt.IsNil(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20})))
		qt.Assert(t, qt.IsNil(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: pair.ClientIfindex})))
	})
	return wire{fd}
}

func (w wire) send(t *testing.T, packets ...[]byte) {
	t.Helper()
	for _, p := range packets {
		_, err := unix.Write(w.fd, p)
		qt.Assert(t, qt.IsNil(err))
	}
}

func (w wire) next(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(w.fd, b)
		if err == unix.EINTR {
			continue
		}
		qt.Assert(t, qt.IsNil(err))
		return b[:n]
	}
}
