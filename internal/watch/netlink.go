package watch

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// A listener hears rtnetlink of all network namespaces. A socket in each namespace would
// keep the namespaces alive, so the listener has one socket, in a namespace of its own.
// It gives the other namespaces numbers there: the socket hears each namespace that has
// a number (NETLINK_LISTEN_ALL_NSID, do_one_broadcast in net/netlink/af_netlink.c). The
// numbers end with the listener's namespace, and the namespace ends with the socket.
type listener struct {
	fd    int
	ask   *netlink.Conn // in the same namespace
	netns string        // the only one to listen to; empty for all
	known map[uint64]bool
	next  int32
	last  time.Time // when new namespaces were last looked for
	buf   []byte
}

// newNamespaces is how often new namespaces are looked for.
const newNamespaces = time.Second

// From linux/net_namespace.h.
const (
	netnsaNSID = 1
	netnsaFD   = 3
)

func newListener(netns string) (*listener, error) {
	l := &listener{fd: -1, netns: netns, known: map[uint64]bool{}, buf: make([]byte, 1<<16)}
	errs := make(chan error)
	go func() {
		// The thread stays in the new namespace, and ends with the goroutine.
		runtime.LockOSThread()
		errs <- l.open()
	}()
	if err := <-errs; err != nil {
		l.close()
		return nil, fmt.Errorf("rtnetlink: %w", kernel.Explain(err))
	}
	l.follow()
	return l, nil
}

func (l *listener) open() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	var err error
	if l.ask, err = netlink.Dial(unix.NETLINK_ROUTE, nil); err != nil {
		return err
	}
	l.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	if err := unix.Bind(l.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for _, group := range []int{unix.RTNLGRP_LINK, unix.RTNLGRP_TC} {
		if err := unix.SetsockoptInt(l.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return err
		}
	}
	_ = unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20)
	return unix.SetsockoptInt(l.fd, unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1)
}

// follow gives numbers to namespaces that have none yet. After a failure it tries again.
func (l *listener) follow() {
	if time.Since(l.last) < newNamespaces {
		return
	}
	l.last = time.Now()
	var all []*kernel.NetNS
	if l.netns == "" {
		all, _ = kernel.NetNamespaces()
	} else if ns, err := kernel.OpenNetNS(l.netns); err == nil {
		all = append(all, ns)
	}
	for _, ns := range all {
		if id := netnsOf(ns.ID()); !l.known[id] {
			l.known[id] = l.number(ns.FD())
		}
		ns.Close()
	}
}

// number gives a namespace a number if it has none.
func (l *listener) number(fd int) bool {
	ae := netlink.NewAttributeEncoder()
	ae.Int32(netnsaNSID, l.next)
	ae.Uint32(netnsaFD, uint32(fd))
	_, err := rtnl.Request(l.ask, unix.RTM_NEWNSID, netlink.Acknowledge, make([]byte, 4), ae) // struct rtgenmsg
	if err == nil {
		l.next++
	}
	return err == nil || errors.Is(err, unix.EEXIST)
}

func (l *listener) read() (sign bool, lost string) {
	for {
		_, _, err := unix.Recvfrom(l.fd, l.buf, 0)
		switch {
		case err == nil:
			sign = true
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS):
			return true, "rtnetlink said more than could be read"
		default:
			return sign, ""
		}
	}
}

func (l *listener) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
	if l.ask != nil {
		l.ask.Close()
	}
}
