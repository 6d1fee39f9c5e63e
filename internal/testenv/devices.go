package testenv

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Tun creates a tun device, which has no Ethernet header, and sets it up. What is written to the
// descriptor arrives at the device. Both end with the test.
func (ns *NetNS) Tun(t testing.TB, name string) (fd, ifindex int) {
	t.Helper()
	ns.Do(t, func() {
		var err error
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			t.Fatalf("tun: %v", err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			t.Fatal(err)
		}
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			t.Fatalf("tun: %v", err)
		}
	})
	ns.IP(t, "link", "set", name, "addrgenmode", "none", "up")
	return fd, ns.Ifindex(t, name)
}

// AddPPP creates a PPP device on both sides of the pair, the ends of one PPPoE session. What `pppd` and its plugin
// negotiate before, the kernel does not ask for.
func (p *Pair) AddPPP(t testing.TB, name string) {
	t.Helper()
	p.Server.addPPP(t, name, p.ServerDev, clientMAC)
	p.Client.addPPP(t, name, p.ClientDev, serverMAC)
}

// addPPP creates a PPP device that ends with the test. It skips the test where the kernel has none.
func (ns *NetNS) addPPP(t testing.TB, name, over, remote string) {
	t.Helper()
	mac, err := net.ParseMAC(remote)
	if err != nil {
		t.Fatal(err)
	}
	const protocolPPPoE = 0 // PX_PROTO_OE, linux/if_pppox.h
	missing := []error{unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.ENOENT, unix.ENODEV, unix.ENXIO}
	var unit int32
	ns.Do(t, func() { // a unit belongs to the namespace of who opens /dev/ppp
		do := func(what string, err error) {
			t.Helper()
			for _, no := range missing {
				if errors.Is(err, no) {
					t.Skipf("this kernel has no such devices: ppp: %s: %v", what, err)
				}
			}
			if err != nil {
				t.Fatalf("ppp: %s: %v", what, err)
			}
		}
		opened := func(what string, fd int, err error) int {
			t.Helper()
			do(what, err)
			t.Cleanup(func() { unix.Close(fd) })
			return fd
		}
		open := func() int {
			fd, err := unix.Open("/dev/ppp", unix.O_RDWR|unix.O_CLOEXEC, 0)
			return opened("/dev/ppp", fd, err)
		}
		fd, err := unix.Socket(unix.AF_PPPOX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocolPPPoE)
		session := opened("socket", fd, err)
		do("connect", unix.Connect(session, &unix.SockaddrPPPoE{SID: 1, Remote: mac, Dev: over}))
		number, err := unix.IoctlGetInt(session, unix.PPPIOCGCHAN)
		do("channel", err)
		channel, device := open(), open()
		do("attach the channel", unix.IoctlSetPointerInt(channel, unix.PPPIOCATTCHAN, number))
		unit = -1 // the next free one
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(device), unix.PPPIOCNEWUNIT, uintptr(unsafe.Pointer(&unit)))
		if errno != 0 {
			do("new unit", errno)
		}
		do("connect the channel", unix.IoctlSetPointerInt(channel, unix.PPPIOCCONNECT, int(unit)))
	})
	ns.IP(t, "link", "set", fmt.Sprintf("ppp%d", unit), "name", name)
	ns.IP(t, "link", "set", name, "up")
}

// AddDevice creates a device of a kind that not every kernel has: `ip link add NAME type ...`. It skips
// the test where the kernel has no such kind.
func (ns *NetNS) AddDevice(t testing.TB, name string, words ...string) (ifindex int) {
	t.Helper()
	if _, err := ip("", append([]string{"-n", ns.Name, "link", "add", name}, words...)...); err != nil {
		if s := err.Error(); strings.Contains(s, "Unknown device type") || strings.Contains(s, "Operation not supported") {
			t.Skipf("this kernel has no such devices: %s", strings.Join(words, " "))
		}
		t.Fatal(err)
	}
	ns.IP(t, "link", "set", name, "up")
	return ns.Ifindex(t, name)
}

// Ifindex returns the index of a device.
func (ns *NetNS) Ifindex(t testing.TB, name string) (index int) {
	t.Helper()
	ns.Do(t, func() { index = ifindex(t, name) })
	return index
}
