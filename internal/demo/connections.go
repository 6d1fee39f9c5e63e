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

// secondAddr is where a client in the cgroup goes when it connects to serverAddr.
var secondAddr = netip.MustParseAddr("10.66.0.3")

// answer is what the server says to whoever connects.
const answer = "you have reached %v\n"

// serve answers TCP on all addresses of the server, until the end.
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

// Connect connects to an address of TCP and copies what it says. The demo runs
// it as a process of its own, since a cgroup is a matter of processes.
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

// connect has a client in a cgroup connect to the server, as nc would, and returns
// which address it has reached. Without a cgroup it is where the demo is.
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
