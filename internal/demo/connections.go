package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// secondAddr is the address that a client in the cgroup reaches when it connects
// to serverAddr.
var secondAddr = netip.MustParseAddr("10.66.0.3")

// answer is the server's message to each client.
const answer = "you have reached %v\n"

// serve answers TCP on all addresses of the server until the demo ends.
func (s *stage) serve() {
	var l net.Listener
	must(kernel.InNetNS(s.vars["NS"], func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	}))
	var server sync.WaitGroup
	server.Go(func() {
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
	})
	s.later(func() error {
		defer server.Wait()
		return l.Close()
	})
}

// Connect connects to a TCP address and copies the server's message. The demo
// runs it as a process, because a cgroup contains processes.
func Connect(netns, address string, out io.Writer) error {
	return kernel.InNetNS(netns, func() error {
		c, err := net.DialTimeout("tcp4", address, patience)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = io.Copy(out, c)
		return err
	})
}

// connect lets a client in a cgroup connect to the server, as nc would, and
// returns the address that the client reached. Without a cgroup the client is in
// the demo's cgroup.
func (s *stage) connect(ctx context.Context, cgroup string) netip.Addr {
	where := cgroup
	if cgroup == "" {
		where = "another cgroup"
	}
	s.show(fmt.Sprintf("ip netns exec $CLIENT nc %v %d    # in %s", serverAddr, port, where))
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := s.command(ctx, fmt.Sprintf("dispatcher -n $CLIENT demo connect %v:%d", serverAddr, port))
	if cgroup != "" {
		folder := value(os.Open(s.expand(cgroup)))
		defer folder.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(folder.Fd())
	}
	out, err := output(cmd)
	must(err)
	s.answer(out)
	var text string
	value(fmt.Sscanf(out, strings.ReplaceAll(answer, "%v", "%s"), &text))
	return value(netip.ParseAddr(text))
}
