package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// secondAddr is the address that a client in the cgroup reaches when it connects
// to serverAddr.
var secondAddr = netip.MustParseAddr("10.66.0.3")

// answer is the server's message to each client.
const answer = "you have reached %v\n"

// serve answers TCP on all addresses of the server until the demo ends.
func (s *stage) serve() error {
	ns, err := kernel.OpenNetNS(s.vars["NS"])
	if err != nil {
		return err
	}
	defer ns.Close()
	var l net.Listener
	err = ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(patience))
			at := netip.MustParseAddrPort(c.LocalAddr().String()).Addr()
			fmt.Fprintf(c, answer, at)
			c.Close()
		}
	}()
	s.later(func() error {
		err := l.Close()
		<-done
		return err
	})
	return nil
}

// Connect connects to a TCP address and copies the server's message. The demo
// runs it as a process, because a cgroup contains processes.
func Connect(netns, address string, out io.Writer) error {
	ns, err := kernel.OpenNetNS(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	var c net.Conn
	err = ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp4", address, patience)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = io.Copy(out, c)
	return err
}

// connect lets a client in a cgroup connect to the server, as nc would, and
// returns the address that the client reached. Without a cgroup the client is in
// the demo's cgroup.
func (s *stage) connect(ctx context.Context, cgroup string) (reached netip.Addr, err error) {
	where := cgroup
	if cgroup == "" {
		where = "another cgroup"
	}
	s.show(fmt.Sprintf("ip netns exec $CLIENT nc %v %d    # in %s", serverAddr, port, where))
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := s.command(ctx, fmt.Sprintf("dispatcher -n $CLIENT demo connect %v:%d", serverAddr, port))
	if cgroup != "" {
		folder, err := os.Open(s.expand(cgroup))
		if err != nil {
			return reached, err
		}
		defer folder.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(folder.Fd())
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return reached, fmt.Errorf("connect in %s: %w: %s", where, err, strings.TrimSpace(string(out)))
	}
	s.answer(string(out))
	var text string
	if _, err := fmt.Sscanf(string(out), strings.ReplaceAll(answer, "%v", "%s"), &text); err != nil {
		return reached, err
	}
	return netip.ParseAddr(text)
}
