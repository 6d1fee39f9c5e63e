package testenv

import (
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// Exercise makes the system call that a cgroup hook checks, and returns the call's error; see [Denied].
// Each program on the hook runs once, but programs of [hook.CgroupSockOps] run several times. For
// [hook.CgroupSKBIngress] the call receives a datagram.
func (r *Resident) Exercise(t testing.TB, h hook.Hook) error {
	t.Helper()
	switch h {
	case hook.CgroupSysctl:
		_, err := r.Read(t, "/proc/sys/net/ipv4/ip_forward")
		return err
	case hook.CgroupDev:
		return r.Open(t, "/dev/null")
	case hook.CgroupSockCreate:
		fd, err := r.Socket(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	case hook.CgroupSockRelease:
		return unix.Close(r.socket(t, unix.AF_INET, unix.SOCK_DGRAM))
	case hook.CgroupSockOps:
		return r.exerciseTCP(t)
	case hook.CgroupConnectUnix, hook.CgroupSendmsgUnix, hook.CgroupRecvmsgUnix, hook.CgroupGetpeernameUnix, hook.CgroupGetsocknameUnix:
		return r.exerciseUnix(t, h)
	case hook.CgroupPostBind6, hook.CgroupBind6, hook.CgroupConnect6, hook.CgroupSendmsg6, hook.CgroupRecvmsg6,
		hook.CgroupGetpeername6, hook.CgroupGetsockname6:
		return r.exerciseUDP(t, h, loopback6)
	}
	return r.exerciseUDP(t, h, loopback4)
}

func (r *Resident) exerciseUDP(t testing.TB, h hook.Hook, ip netip.Addr) error {
	t.Helper()
	fd := r.socket(t, family(ip), unix.SOCK_DGRAM)
	defer unix.Close(fd)
	somewhere := sockaddr(netip.AddrPortFrom(ip, discardPort))
	switch h {
	case hook.CgroupPostBind4, hook.CgroupPostBind6, hook.CgroupBind4, hook.CgroupBind6:
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(ip, 0)))
	case hook.CgroupConnect4, hook.CgroupConnect6:
		return unix.Connect(fd, somewhere)
	case hook.CgroupSendmsg4, hook.CgroupSendmsg6, hook.CgroupSKBEgress:
		return unix.Sendto(fd, []byte("12345678"), 0, somewhere)
	case hook.CgroupGetpeername4, hook.CgroupGetpeername6:
		must(t, "connect", unix.Connect(fd, somewhere))
		_, err := unix.Getpeername(fd)
		return err
	case hook.CgroupGetsockname4, hook.CgroupGetsockname6:
		_, err := unix.Getsockname(fd)
		return err
	case hook.CgroupGetsockopt:
		_, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PRIORITY)
		return err
	case hook.CgroupSetsockopt:
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PRIORITY, 1)
	case hook.CgroupRecvmsg4, hook.CgroupRecvmsg6, hook.CgroupSKBIngress:
		must(t, "bind", unix.Bind(fd, somewhere))
		out := r.ns.sender(t, ip)
		defer unix.Close(out)
		must(t, "send", unix.Sendto(out, []byte("12345678"), 0, somewhere))
		r.settler.settle(t)
		_, _, err := unix.Recvfrom(fd, make([]byte, 8), unix.MSG_DONTWAIT)
		return err
	}
	t.Fatalf("no way to exercise %s", h)
	return nil
}

func (r *Resident) exerciseUnix(t testing.TB, h hook.Hook) error {
	t.Helper()
	inside := r.socket(t, unix.AF_UNIX, unix.SOCK_DGRAM)
	defer unix.Close(inside)
	// The other end is in the cgroup too: getpeername(2) runs the peer's programs (unix_getname,
	// net/unix/af_unix.c).
	other := r.socket(t, unix.AF_UNIX, unix.SOCK_DGRAM)
	defer unix.Close(other)
	// The names belong to the namespace and end with the sockets.
	here, there := &unix.SockaddrUnix{Name: "@" + uniqueName()}, &unix.SockaddrUnix{Name: "@" + uniqueName()}
	must(t, "bind", unix.Bind(inside, here))
	must(t, "bind", unix.Bind(other, there))

	var err error
	switch h {
	case hook.CgroupConnectUnix:
		err = unix.Connect(inside, there)
	case hook.CgroupSendmsgUnix:
		err = unix.Sendto(inside, []byte("x"), 0, there)
	case hook.CgroupRecvmsgUnix:
		must(t, "send", unix.Sendto(other, []byte("x"), 0, here))
		_, _, err = unix.Recvfrom(inside, make([]byte, 1), unix.MSG_DONTWAIT)
	case hook.CgroupGetpeernameUnix:
		must(t, "connect", unix.Connect(inside, there))
		_, err = unix.Getpeername(inside)
	case hook.CgroupGetsocknameUnix:
		_, err = unix.Getsockname(inside)
	}
	return err
}

func (r *Resident) exerciseTCP(t testing.TB) error {
	t.Helper()
	var listener int
	r.ns.Do(t, func() { listener = socket(t, unix.AF_INET, unix.SOCK_STREAM, 0) })
	defer unix.Close(listener)
	must(t, "bind", unix.Bind(listener, sockaddr(netip.AddrPortFrom(loopback4, 0))))
	must(t, "listen", unix.Listen(listener, 1))
	addr, err := unix.Getsockname(listener)
	must(t, "getsockname", err)
	fd := r.socket(t, unix.AF_INET, unix.SOCK_STREAM)
	defer unix.Close(fd)
	return unix.Connect(fd, addr)
}

func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(fmt.Errorf("%s: %w", what, err))
	}
}
