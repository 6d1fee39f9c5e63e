package testenv

import (
	"strings"
	"testing"

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
