package testenv

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// settler knows when packets have arrived. Its socket receives its own
// datagrams.
type settler struct {
	mu     sync.Mutex
	socket int
}

// burst is how many datagrams are sent before waiting: well below the 256 frames of a veth ring,
// and one poll of a NAPI.
const burst = 64

// sendAndCount sends n datagrams from the socket out. It returns how many the kernel accepted, how many
// distinct ones arrived in the socket in, if there is one, and the last error of sending. Each datagram
// ends in 8 bytes of its own, so late datagrams of an earlier call do not count.
func (s *settler) sendAndCount(t testing.TB, out, in int, to netip.AddrPort, n int) (accepted, arrived int, failed error) {
	t.Helper()
	dest := sockaddr(to)
	nonce := rand.Uint32()
	seen := make(map[uint32]bool)
	buf := make([]byte, 2048)
	for sent := 0; sent < n; {
		for range min(burst, n-sent) {
			payload := binary.BigEndian.AppendUint64(nil, uint64(nonce)<<32|uint64(sent))
			if err := unix.Sendto(out, payload, 0, dest); err != nil {
				failed = err
			} else {
				accepted++
			}
			sent++
		}
		s.settle(t)
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
	return accepted, len(seen), failed
}

// settle returns when the kernel has handled every packet that was sent before the call over loopback or
// a veth pair.
//
// Received packets wait in queues of the CPU that sent them, and a CPU handles its queues in order. So a
// packet that is sent through the loopback device on each CPU arrives after all packets before it. It
// must go round several times: the CPU serves the queues of its devices in turn, and a bounced packet
// passes through the queues of two devices.
func (s *settler) settle(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()

	runtime.LockOSThread()
	var home unix.CPUSet
	if err := unix.SchedGetaffinity(0, &home); err != nil {
		runtime.UnlockOSThread()
		t.Fatalf("read affinity: %v", err)
	}
	defer func() {
		// A thread that stays pinned to a CPU stays locked, and ends with this
		// goroutine.
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
			if err := s.roundTrip(); err != nil {
				t.Fatalf("wait for packets on CPU %d: %v", cpu, err)
			}
		}
	}
}

// roundTrip sends a datagram over loopback and waits for it. A flood may cause its loss.
func (s *settler) roundTrip() error {
	var want, got [8]byte
	for range 100 {
		binary.NativeEndian.PutUint64(want[:], rand.Uint64())
		if _, err := unix.Write(s.socket, want[:]); err != nil {
			return err
		}
		for deadline := time.Now().Add(100 * time.Millisecond); time.Now().Before(deadline); {
			if _, err := unix.Read(s.socket, got[:]); err != nil && !again(err) {
				return err
			} else if got == want {
				return nil
			}
		}
	}
	return errors.New("loopback loses everything")
}

// again reports whether to repeat a call on a socket with a timeout.
func again(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
}

// openSocket creates the settler's socket in the namespace of the thread. The socket ends with
// the test.
func (s *settler) openSocket(t testing.TB) {
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
	s.socket = fd
}

// receiver returns a UDP socket that is bound to addr, with room for a burst.
func (ns *NetNS) receiver(t testing.TB, addr netip.AddrPort) (fd int) {
	t.Helper()
	ns.Do(t, func() {
		fd = socket(t, family(addr.Addr()), unix.SOCK_DGRAM, 0)
		if err := receive(fd, addr); err != nil {
			unix.Close(fd)
			t.Fatalf("listen on %s: %v", addr, err)
		}
	})
	return fd
}

// receive binds a socket and makes room for a burst.
func receive(fd int, addr netip.AddrPort) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
		return err
	}
	return unix.Bind(fd, sockaddr(addr))
}

// sender returns a UDP socket. It is not connected, so answers about closed ports are not
// errors.
func (ns *NetNS) sender(t testing.TB, to netip.Addr) (fd int) {
	t.Helper()
	ns.Do(t, func() { fd = socket(t, family(to), unix.SOCK_DGRAM, 0) })
	return fd
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
