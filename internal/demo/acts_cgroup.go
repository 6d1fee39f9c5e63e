package demo

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// cgroupCLI begins the commands for cgroups. A cgroup belongs to no network
// namespace.
const cgroupCLI = "dispatcher --bpffs $BPFFS "

func (s *stage) redirectCgroup(ctx context.Context) error {
	if err := s.addCgroup(); err != nil {
		return err
	}
	s.say("The server answers TCP, and tells a client which of its addresses the client has reached.")
	if err := s.serve(); err != nil {
		return err
	}
	if err := s.run(ctx, fmt.Sprintf("ip -n $NS address add %s/24 dev veth1", secondAddr)); err != nil {
		return err
	}
	if err := s.reach(ctx, "$CGROUP", serverAddr); err != nil {
		return err
	}
	var err error
	s.owners[redirect], err = s.hold(ctx, fmt.Sprintf(cgroupCLI+"attach cgroup/connect4 $CGROUP builtin:redirect --global from_ip=%s --global to_ip=%s --hold",
		hexAddr(serverAddr), hexAddr(secondAddr)))
	if err != nil {
		return err
	}
	if err := s.run(ctx, cgroupCLI+"attach cgroup_skb/egress $CGROUP builtin:count"); err != nil {
		return err
	}
	for _, in := range []string{"$CGROUP", "$CGROUP/child"} {
		if err := s.reach(ctx, in, secondAddr); err != nil {
			return err
		}
	}
	inside, err := s.counted(ctx, hook.CgroupSKBEgress, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	if err := s.reach(ctx, "", serverAddr); err != nil {
		return err
	}
	all, err := s.counted(ctx, hook.CgroupSKBEgress, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	if err := s.check(inside > 0 && all == inside, "count saw the %d packets of the two clients in the cgroup, and %d of the other client's", inside, all-inside); err != nil {
		return err
	}

	if err := s.run(ctx, cgroupCLI+"list cgroup $CGROUP/child --effective"); err != nil {
		return err
	}
	for h, name := range map[hook.Hook]string{hook.CgroupConnect4: redirect, hook.CgroupSKBEgress: count} {
		runs, err := dispatcher.Effective(ctx, dispatcher.On(h, s.cgroup+"/child"), dispatcher.ReadOptions{BPFFS: s.bpffs})
		if err != nil {
			return err
		}
		if m := runs[0].Member(name); m == nil || m.From != s.cgroup {
			return s.check(false, "%s runs for the child too", name)
		}
	}
	return s.check(true, "both run for the child too, although nothing was attached to it")
}

// reach lets a client in a cgroup connect to the server's first address, and
// checks which address the client reaches.
func (s *stage) reach(ctx context.Context, cgroup string, want netip.Addr) error {
	got, err := s.connect(ctx, cgroup)
	if err != nil || got == want {
		return err
	}
	return s.check(false, "it reached %v (expected: %v)", got, want)
}

// hexAddr writes an address as --global takes it.
func hexAddr(a netip.Addr) string {
	return strings.ReplaceAll(fmt.Sprintf("0x% x", a.AsSlice()), " ", "_")
}

func (s *stage) killRedirect(ctx context.Context) error {
	o := s.owners[redirect]
	if o == nil {
		return notHere("the cgroup of the previous act")
	}
	s.show(fmt.Sprintf("kill -9 %d", o.cmd.Process.Pid))
	_ = o.kill()
	for start := time.Now(); time.Since(start) < patience; time.Sleep(10 * time.Millisecond) {
		c, err := s.chain(ctx, hook.CgroupConnect4)
		if err != nil {
			return err
		}
		if c.Member(redirect) == nil {
			break
		}
	}
	if err := s.reach(ctx, "$CGROUP", serverAddr); err != nil {
		return err
	}
	return s.check(true, "connect() to %v reaches that address again", serverAddr)
}
