package testenv

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Passed sends n IPv4 UDP datagrams from the client to port of the server and returns how many of them
// arrive in a socket there. The answer is certain when it returns; nothing is waited out.
func (p *Pair) Passed(t testing.TB, port, n int) int {
	t.Helper()
	return p.exchange(t, p.serverSocket(t, netip.AddrPortFrom(ServerIPv4, uint16(port))), ServerIPv4, port, n)
}

// Passed6 is [Pair.Passed] with IPv6.
func (p *Pair) Passed6(t testing.TB, port, n int) int {
	t.Helper()
	return p.exchange(t, p.serverSocket(t, netip.AddrPortFrom(ServerIPv6, uint16(port))), ServerIPv6, port, n)
}

// Returned sends n IPv4 UDP datagrams from the client to port of the server and returns how many of them
// come back to the client's device as frames, as they do after XDP_TX. While it runs, a native
// program that passes everything is attached to that device, unless the test attached one of its own.
func (p *Pair) Returned(t testing.TB, port, n int) int {
	t.Helper()
	defer p.openClientRing(t)()
	return p.exchange(t, p.clientTap(t, 14+9), ServerIPv4, port, n)
}

// Returned6 is [Pair.Returned] with IPv6.
func (p *Pair) Returned6(t testing.TB, port, n int) int {
	t.Helper()
	defer p.openClientRing(t)()
	return p.exchange(t, p.clientTap(t, 14+6), ServerIPv6, port, n)
}

// Send sends n IPv4 UDP datagrams from the client to port of the server. When it returns, programs on
// the way have seen them all.
func (p *Pair) Send(t testing.TB, port, n int) {
	t.Helper()
	p.exchange(t, -1, ServerIPv4, port, n)
}

// Send6 is [Pair.Send] with IPv6.
func (p *Pair) Send6(t testing.TB, port, n int) {
	t.Helper()
	p.exchange(t, -1, ServerIPv6, port, n)
}

// burst is how many datagrams are on the way at once: well below the 256 frames of a veth ring, and
// one poll of a NAPI.
const burst = 64

// exchange sends n datagrams and counts the distinct ones that the socket in sees; it closes in.
// Each datagram ends in 8 bytes that are its own: late ones of an earlier exchange do not count.
func (p *Pair) exchange(t testing.TB, in int, to netip.Addr, port, n int) int {
	t.Helper()
	if in >= 0 {
		defer unix.Close(in)
	}
	out := p.clientSocket(t, to)
	defer unix.Close(out)

	dest := sockaddr(netip.AddrPortFrom(to, uint16(port)))
	nonce := rand.Uint32()
	seen := make(map[uint32]bool)
	buf := make([]byte, 2048)
	for sent := 0; sent < n; {
		for range min(burst, n-sent) {
			payload := binary.BigEndian.AppendUint64(nil, uint64(nonce)<<32|uint64(sent))
			if err := unix.Sendto(out, payload, 0, dest); err != nil {
				t.Fatalf("send to %s port %d: %v", to, port, err)
			}
			sent++
		}
		p.Settle(t)
		for in >= 0 {
			size, _, err := unix.Recvfrom(in, buf, unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				break
			} else if err != nil {
				t.Fatalf("receive: %v", err)
			} else if size < 8 {
				continue
			}
			id := binary.BigEndian.Uint64(buf[size-8 : size])
			if uint32(id>>32) == nonce {
				seen[uint32(id)] = true
			}
		}
	}
	return len(seen)
}

// Settle returns when the kernel has dealt with every packet that was sent between the namespaces of
// the pair before the call: delivered, dropped or bounced.
//
// Received packets wait in queues of the CPU that sent them, and a CPU works through its queues in
// order. So a packet sent through the loopback device on each CPU comes out after all those before
// it. It has to go round several times: the queue of a device is as good as its own turn, and a bounced
// packet passes through the queues of two devices.
func (p *Pair) Settle(t testing.TB) {
	t.Helper()
	p.settle.Lock()
	defer p.settle.Unlock()

	runtime.LockOSThread()
	var home unix.CPUSet
	if err := unix.SchedGetaffinity(0, &home); err != nil {
		runtime.UnlockOSThread()
		t.Fatalf("read affinity: %v", err)
	}
	defer func() {
		// A thread that stays pinned stays locked, and ends with this goroutine.
		if err := unix.SchedSetaffinity(0, &home); err != nil {
			t.Fatalf("restore affinity: %v", err)
		}
		runtime.UnlockOSThread()
	}()
	for cpu, left := 0, home.Count(); left > 0; cpu++ {
		if !home.IsSet(cpu) {
			continue
		}
		left--
		var only unix.CPUSet
		only.Set(cpu)
		if err := unix.SchedSetaffinity(0, &only); err != nil {
			t.Fatalf("pin to CPU %d: %v", cpu, err)
		}
		for range 4 {
			if err := p.roundTrip(); err != nil {
				t.Fatalf("wait for packets on CPU %d: %v", cpu, err)
			}
		}
	}
}

// roundTrip sends a datagram over loopback and waits for it. Under a flood it may be lost.
func (p *Pair) roundTrip() error {
	var want, got [8]byte
	for range 100 {
		binary.NativeEndian.PutUint64(want[:], rand.Uint64())
		if _, err := unix.Write(p.settle.socket, want[:]); err != nil {
			return err
		}
		for deadline := time.Now().Add(100 * time.Millisecond); time.Now().Before(deadline); {
			if _, err := unix.Read(p.settle.socket, got[:]); err != nil && !again(err) {
				return err
			} else if got == want {
				return nil
			}
		}
	}
	return errors.New("loopback loses everything")
}

// again reports whether a call on a socket with a timeout only has to be repeated.
func again(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
}

// selfConnected returns a UDP socket that receives what it sends, in the namespace of the thread.
func selfConnected(t testing.TB) int {
	t.Helper()
	fd := socket(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
	t.Cleanup(func() { unix.Close(fd) })
	addr := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	err := unix.Bind(fd, addr)
	if err == nil {
		var self unix.Sockaddr
		if self, err = unix.Getsockname(fd); err == nil {
			err = unix.Connect(fd, self)
		}
	}
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000})
	}
	if err != nil {
		t.Fatalf("prepare a loopback socket: %v", err)
	}
	return fd
}

// serverSocket returns a UDP socket in the server, bound to addr, with room for a burst.
func (p *Pair) serverSocket(t testing.TB, addr netip.AddrPort) (fd int) {
	t.Helper()
	p.Server.Do(t, func() {
		fd = socket(t, family(addr.Addr()), unix.SOCK_DGRAM, 0)
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
		if err == nil {
			err = unix.Bind(fd, sockaddr(addr))
		}
		if err != nil {
			unix.Close(fd)
			t.Fatalf("listen on %s: %v", addr, err)
		}
	})
	return fd
}

// clientSocket returns a UDP socket in the client. It is not connected: the server's answers about
// closed ports are not errors.
func (p *Pair) clientSocket(t testing.TB, to netip.Addr) (fd int) {
	t.Helper()
	p.Client.Do(t, func() { fd = socket(t, family(to), unix.SOCK_DGRAM, 0) })
	return fd
}

// clientTap returns a packet socket that sees the UDP frames which arrive at the client's device, those
// addressed to others included. The protocol of a frame is at the given offset. It is looked at because
// the server's answers about closed ports, which are ICMP, quote the datagrams.
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

// openClientRing attaches a native program to the client's device unless it has one, and returns what
// detaches it. Frames that a native program of the server bounces go to a ring of the client's device,
// and veth looks into that only with a native program there. (NAPI by GRO is not enough, to Linux 6.18
// at least: the frames stay in the ring.)
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

func socket(t testing.TB, domain, kind, protocol int) int {
	t.Helper()
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		t.Fatalf("open socket: %v", err)
	}
	return fd
}

func family(addr netip.Addr) int {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
}
