package testenv

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Resident is a process in a cgroup and a network namespace. It makes sockets and hands them to the test: a
// socket stays in the cgroup of its creator, whichever process uses it. It opens files itself, because there
// the calling process counts.
type Resident struct {
	ns      *NetNS
	proc    *Proc
	pidfd   int
	settler settler
}

// Enter starts a resident, which ends with the test.
func (c *Cgroup) Enter(t testing.TB, ns *NetNS) *Resident {
	t.Helper()
	r := &Resident{ns: ns}
	ns.Do(t, func() {
		r.proc = c.StartHelper(t, residentHelper)
		r.settler.openSocket(t)
	})
	var err error
	if r.pidfd, err = unix.PidfdOpen(r.proc.Pid, 0); err != nil {
		t.Fatalf("open the resident's pidfd: %v", err)
	}
	t.Cleanup(func() { unix.Close(r.pidfd) })
	return r
}

// Socket makes a socket in the cgroup and the namespace. The caller closes it.
func (r *Resident) Socket(t testing.TB, domain, kind, protocol int) (fd int, err error) {
	t.Helper()
	there := r.ask(t, request{Op: "socket", Args: []int{domain, kind, protocol}})
	if there.Errno != 0 {
		return -1, there.Errno
	}
	defer r.ask(t, request{Op: "close", Args: []int{there.FD}})
	if fd, err = unix.PidfdGetfd(r.pidfd, there.FD, 0); err != nil {
		t.Fatalf("take over the resident's socket: %v", err)
	}
	return fd, nil
}

// Open opens a file and closes it again; for the device hook the file is a
// device node.
func (r *Resident) Open(t testing.TB, path string) error {
	t.Helper()
	return r.ask(t, request{Op: "open", Path: path}).err()
}

// Read returns what one read(2) of a file gives, for example of a sysctl of the
// namespace.
func (r *Resident) Read(t testing.TB, path string) (string, error) {
	t.Helper()
	got := r.ask(t, request{Op: "read", Path: path})
	return got.Text, got.err()
}

// Write writes to a file with one write(2).
func (r *Resident) Write(t testing.TB, path, text string) error {
	t.Helper()
	return r.ask(t, request{Op: "write", Path: path, Text: text}).err()
}

// Passed sends n UDP datagrams to an address from a socket in the cgroup. It returns how many of them the
// kernel accepted, and how many arrived in a socket outside the cgroup, in any namespace. As with
// [Pair.Passed] the numbers are certain.
func (r *Resident) Passed(t testing.TB, receiver *NetNS, to netip.AddrPort, n int) (accepted, arrived int) {
	t.Helper()
	in := receiver.receiver(t, to)
	defer unix.Close(in)
	out := r.socket(t, family(to.Addr()), unix.SOCK_DGRAM)
	defer unix.Close(out)
	accepted, arrived, _ = r.settler.sendAndCount(t, out, in, to, n)
	return accepted, arrived
}

// Received sends n UDP datagrams to an address from outside the cgroup, and returns how many of them
// arrive in a socket in the cgroup.
func (r *Resident) Received(t testing.TB, sender *NetNS, at netip.AddrPort, n int) (arrived int) {
	t.Helper()
	in := r.socket(t, family(at.Addr()), unix.SOCK_DGRAM)
	defer unix.Close(in)
	if err := receive(in, at); err != nil {
		t.Fatalf("listen on %s: %v", at, err)
	}
	out := sender.sender(t, at.Addr())
	defer unix.Close(out)
	_, arrived, err := r.settler.sendAndCount(t, out, in, at, n)
	if err != nil {
		t.Fatalf("send to %s: %v", at, err)
	}
	return arrived
}

// Reached tells which listener a client reached.
type Reached struct {
	Peer   netip.AddrPort // from getpeername(2)
	Answer netip.AddrPort // the listener's own answer, see [NetNS.Listen]
}

// Dial connects by "tcp" or "udp" from the cgroup to an address that a [NetNS.Listen] answers.
func (r *Resident) Dial(t testing.TB, network string, to netip.AddrPort) (Reached, error) {
	t.Helper()
	fd := r.socket(t, family(to.Addr()), map[string]int{"tcp": unix.SOCK_STREAM, "udp": unix.SOCK_DGRAM}[network])
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(int64(time.Second))
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &timeout); err != nil {
			t.Fatalf("set timeout: %v", err)
		}
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		return Reached{}, fmt.Errorf("connect: %w", err)
	}
	if _, err := unix.Write(fd, []byte("?")); err != nil {
		return Reached{}, fmt.Errorf("send: %w", err)
	}
	buf := make([]byte, 64)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return Reached{}, fmt.Errorf("receive: %w", err)
	}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		return Reached{}, fmt.Errorf("getpeername: %w", err)
	}
	answer, err := netip.ParseAddrPort(string(buf[:n]))
	return Reached{addrPort(peer), answer}, err
}

// socket is [Resident.Socket] for calls that need a socket but do not test its
// creation.
func (r *Resident) socket(t testing.TB, domain, kind int) int {
	t.Helper()
	fd, err := r.Socket(t, domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("make a socket in the cgroup: %v", err)
	}
	return fd
}

// request is a line to the helper, reply the helper's answer.
type (
	request struct {
		Op   string
		Args []int
		Path string
		Text string
	}
	reply struct {
		Errno syscall.Errno
		FD    int
		Text  string
	}
)

func (r reply) err() error {
	if r.Errno != 0 {
		return r.Errno
	}
	return nil
}

func (r *Resident) ask(t testing.TB, what request) (got reply) {
	t.Helper()
	line, err := json.Marshal(what)
	if err == nil {
		r.proc.Send(string(line))
		err = json.Unmarshal([]byte(r.proc.Expect(t, "reply")), &got)
	}
	if err != nil {
		t.Fatalf("ask the resident to %s: %v", what.Op, err)
	}
	return got
}

const residentHelper = "resident of a cgroup"

func init() {
	RegisterHelper(residentHelper, func([]string) {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			var r request
			if err := json.Unmarshal(in.Bytes(), &r); err != nil {
				panic(err)
			}
			line, _ := json.Marshal(r.do())
			fmt.Printf("reply %s\n", line)
		}
	})
}

// do executes the request with as few system calls as possible.
func (r request) do() (done reply) {
	var err error
	switch r.Op {
	case "socket":
		done.FD, err = unix.Socket(r.Args[0], r.Args[1], r.Args[2])
	case "close":
		err = unix.Close(r.Args[0])
	case "open":
		err = withFile(r.Path, unix.O_RDONLY, func(int) error { return nil })
	case "read":
		err = withFile(r.Path, unix.O_RDONLY, func(fd int) error {
			buf := make([]byte, 4096)
			n, err := unix.Read(fd, buf)
			done.Text = string(buf[:max(n, 0)])
			return err
		})
	case "write":
		err = withFile(r.Path, unix.O_WRONLY, func(fd int) error {
			_, err := unix.Write(fd, []byte(r.Text))
			return err
		})
	default:
		err = unix.ENOSYS
	}
	errors.As(err, &done.Errno)
	return done
}

func withFile(path string, flags int, do func(fd int) error) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}

func addrPort(addr unix.Sockaddr) netip.AddrPort {
	switch addr := addr.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(addr.Addr), uint16(addr.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(addr.Addr), uint16(addr.Port))
	}
	return netip.AddrPort{}
}
