package demo

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// cgroupCLI begins the commands for cgroups. A cgroup belongs to no network
// namespace.
const cgroupCLI = "dispatcher --bpffs $BPFFS "

func (s *stage) redirectCgroup(ctx context.Context) {
	s.addCgroup()
	s.say("The server answers TCP, and tells a client which of its addresses the client has reached.")
	s.serve()
	s.run(ctx, fmt.Sprintf("ip -n $NS address add %s/24 dev veth1", secondAddr))
	s.reach(ctx, "$CGROUP", serverAddr)
	s.owners[redirect] = s.hold(ctx, fmt.Sprintf(cgroupCLI+"attach cgroup/connect4 $CGROUP builtin:redirect --global from_ip=%s --global to_ip=%s --hold",
		hexAddr(serverAddr), hexAddr(secondAddr)))
	s.run(ctx, cgroupCLI+"attach cgroup_skb/egress $CGROUP builtin:count")
	for _, in := range []string{"$CGROUP", "$CGROUP/child"} {
		s.reach(ctx, in, secondAddr)
	}
	counted := func() uint64 {
		return protocolCount(programID(s.chain(ctx, hook.CgroupSKBEgress), count), unix.IPPROTO_TCP)
	}
	inside := counted()
	s.reach(ctx, "", serverAddr)
	all := counted()
	s.check(inside > 0 && all == inside, "count saw the %d packets of the two clients in the cgroup, and %d of the other client's", inside, all-inside)

	s.run(ctx, cgroupCLI+"list cgroup $CGROUP/child --effective")
	for h, name := range map[hook.Hook]string{hook.CgroupConnect4: redirect, hook.CgroupSKBEgress: count} {
		runs := value(dispatcher.Effective(ctx, dispatcher.On(h, s.cgroup+"/child"), dispatcher.ReadOptions{BPFFS: s.bpffs}))
		if m := runs[0].Member(name); m == nil || m.From != s.cgroup {
			s.check(false, "%s runs for the child too", name)
		}
	}
	s.check(true, "both run for the child too, although nothing was attached to it")
}

// reach lets a client in a cgroup connect to the server's first address, and
// checks which address the client reaches.
func (s *stage) reach(ctx context.Context, cgroup string, want netip.Addr) {
	if got := s.connect(ctx, cgroup); got != want {
		s.check(false, "it reached %v (expected: %v)", got, want)
	}
}

// hexAddr writes an address as --global takes it.
func hexAddr(a netip.Addr) string {
	return strings.ReplaceAll(fmt.Sprintf("0x% x", a.AsSlice()), " ", "_")
}

func (s *stage) killRedirect(ctx context.Context) {
	if s.owners[redirect] == nil {
		must(notHere("the cgroup of the previous act"))
	}
	s.kill(ctx, redirect, hook.CgroupConnect4)
	s.reach(ctx, "$CGROUP", serverAddr)
	s.check(true, "connect() to %v reaches that address again", serverAddr)
}
