package testenv

import (
	"encoding/binary"
	"errors"
	"math"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Passed sends n IPv4 UDP datagrams from the client to port of the server and returns how many of them
// arrive in a socket there. The number is certain, and Passed does not wait for a fixed time.
func (p *Pair) Passed(t testing.TB, port, n int) int {
	t.Helper()
	return p.passed(t, p.Client, p.Server, netip.AddrPortFrom(ServerIPv4, uint16(port)), n)
}

// PassedTo is [Pair.Passed] to another address of the server.
func (p *Pair) PassedTo(t testing.TB, to netip.AddrPort, n int) int {
	t.Helper()
	return p.passed(t, p.Client, p.Server, to, n)
}

// Passed6 is [Pair.Passed] with IPv6.
func (p *Pair) Passed6(t testing.TB, port, n int) int {
	t.Helper()
	return p.passed(t, p.Client, p.Server, netip.AddrPortFrom(ServerIPv6, uint16(port)), n)
}

// Replied is [Pair.Passed] in the other direction: from the server to port of the client.
func (p *Pair) Replied(t testing.TB, port, n int) int {
	t.Helper()
	return p.passed(t, p.Server, p.Client, netip.AddrPortFrom(ClientIPv4, uint16(port)), n)
}

// Replied6 is [Pair.Replied] with IPv6.
func (p *Pair) Replied6(t testing.TB, port, n int) int {
	t.Helper()
	return p.passed(t, p.Server, p.Client, netip.AddrPortFrom(ClientIPv6, uint16(port)), n)
}

// Returned sends n IPv4 UDP datagrams from the client to port of the server and returns how many of them
// come back to the client's device as frames, as they do after XDP_TX. Meanwhile a native program that
// passes everything is attached to that device, unless the test attached one.
func (p *Pair) Returned(t testing.TB, port, n int) int {
	t.Helper()
	defer p.openClientRing(t)()
	return p.sendAndCount(t, p.Client, p.clientTap(t, 14+9), netip.AddrPortFrom(ServerIPv4, uint16(port)), n)
}

// Returned6 is [Pair.Returned] with IPv6.
func (p *Pair) Returned6(t testing.TB, port, n int) int {
	t.Helper()
	defer p.openClientRing(t)()
	return p.sendAndCount(t, p.Client, p.clientTap(t, 14+6), netip.AddrPortFrom(ServerIPv6, uint16(port)), n)
}

// Send sends n IPv4 UDP datagrams from the client to port of the server. When it returns, programs on
// the way have seen them all.
func (p *Pair) Send(t testing.TB, port, n int) {
	t.Helper()
	p.sendAndCount(t, p.Client, -1, netip.AddrPortFrom(ServerIPv4, uint16(port)), n)
}

// Send6 is [Pair.Send] with IPv6.
func (p *Pair) Send6(t testing.TB, port, n int) {
	t.Helper()
	p.sendAndCount(t, p.Client, -1, netip.AddrPortFrom(ServerIPv6, uint16(port)), n)
}

// passed sends n datagrams and returns how many arrive in a socket that is bound to their destination.
func (p *Pair) passed(t testing.TB, from, in *NetNS, to netip.AddrPort, n int) int {
	t.Helper()
	return p.sendAndCount(t, from, in.receiver(t, to), to, n)
}

// sendAndCount sends n datagrams and counts the arrivals in the socket in; it closes
// in.
func (p *Pair) sendAndCount(t testing.TB, from *NetNS, in int, to netip.AddrPort, n int) int {
	t.Helper()
	if in >= 0 {
		defer unix.Close(in)
	}
	out := from.sender(t, to.Addr())
	defer unix.Close(out)
	_, arrived, err := p.settler.sendAndCount(t, out, in, to, n)
	if err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
	return arrived
}

// Settle returns when the kernel has dealt with every packet that was sent between the namespaces of
// the pair before the call: delivered, dropped or bounced.
func (p *Pair) Settle(t testing.TB) {
	t.Helper()
	p.settler.settle(t)
}

// clientTap returns a packet socket that sees the UDP frames that arrive at the client's device, frames
// for other addresses included. The protocol of a frame is at the given offset. The filter checks it
// because the server's answers about closed ports, which are ICMP, quote the datagrams.
func (p *Pair) clientTap(t testing.TB, protocolOffset uint32) (fd int) {
	t.Helper()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: protocolOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: math.MaxUint32},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	p.Client.Do(t, func() {
		// Protocol 0 receives nothing until the socket is bound to the device.
		fd = socket(t, unix.AF_PACKET, unix.SOCK_RAW, 0)
		err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
		if err == nil {
			err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
				&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
		}
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
		}
		if err == nil {
			all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: p.ClientIfindex})
		}
		if err != nil {
			unix.Close(fd)
			t.Fatalf("listen on %s: %v", p.ClientDev, err)
		}
	})
	return fd
}

// openClientRing attaches a native program to the client's device unless it has one, and returns a
// function that detaches it. Frames that a native program of the server bounces go to a ring of the
// client's device, and veth reads that ring only while a native program is attached. (NAPI by GRO is
// not enough, up to Linux 6.18 at least: the frames stay in the ring.)
func (p *Pair) openClientRing(t testing.TB) (undo func()) {
	t.Helper()
	pass, err := ebpf.NewProgram(VerdictSpec("ldt_peer", XDPPass))
	if err != nil {
		t.Fatalf("load ldt_peer: %v", err)
	}
	defer pass.Close()
	var peer link.Link
	err = p.Client.Run(func() (err error) {
		peer, err = link.AttachXDP(link.XDPOptions{Program: pass, Interface: p.ClientIfindex, Flags: link.XDPDriverMode})
		return err
	})
	if errors.Is(err, unix.EBUSY) {
		return func() {}
	} else if err != nil {
		t.Fatalf("attach to %s: %v", p.ClientDev, err)
	}
	return func() { peer.Close() }
}
