package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (s *stage) view(ctx context.Context) {
	want := kinds{hook.KindMember: 4, hook.KindLegacy: 2} // the ingress filter is not adopted
	if s.tcx() {
		want = kinds{hook.KindMember: 5, hook.KindLegacy: 1, hook.KindForeign: 1}
		s.say("On egress there are a filter of tc, and a program that another tool attached with its own link.")
		s.attachOther()
		s.run(ctx, addClsact)
	} else {
		s.say("On egress there is a filter of tc.")
		s.notHere("another tool's link, which needs TCX")
	}
	s.run(ctx, "tc -n $NS filter add dev veth1 egress bpf da object-pinned $BPFFS/watch", cli+"list")
	got := s.all(ctx)
	s.equal(got, want, "members: %d, legacy: %d, foreign: %d", got[hook.KindMember], got[hook.KindLegacy], got[hook.KindForeign])
	if s.cgroup != "" {
		s.say("A cgroup belongs to no namespace. Without -n, list shows the whole machine.")
		s.run(ctx, cgroupCLI+"list cgroup $CGROUP")
	}
}

// kinds are the numbers of entries by kind.
type kinds map[hook.Kind]int

// all reads all hooks in the server's namespace, and enters their objects in
// the ledger.
func (s *stage) all(ctx context.Context) kinds {
	found := kinds{}
	for _, c := range value(dispatcher.List(ctx, dispatcher.ListOptions{NetNS: s.vars["NS"], BPFFS: s.bpffs})) {
		s.made.addChain(&c)
		for _, m := range c.Members {
			found[m.Kind]++
		}
	}
	return found
}

func (s *stage) detachAll(ctx context.Context) {
	s.say("detach removes members of any owner: the processes that hold count and sample are told, and end.")
	s.run(ctx, cli+"detach xdp veth1 --all", fmt.Sprintf(cli+"detach %s veth1 --all", s.tc))
	if s.cgroup != "" {
		s.run(ctx, cgroupCLI+"detach cgroup_skb/egress $CGROUP --all")
	}
	s.answer(s.owners[count].words())
	s.answer(s.owners[sample].words())
	s.say("Programs of others go only with --force.")
	s.detachOthers(ctx)
	s.run(ctx, cli+"list")
	s.equal(s.all(ctx), kinds{}, "the device is free")
	s.arrive(s.net, packets, packets)

	// Only this folder is compared: ip and tc, started by others, use any bpffs
	// that they find.
	left := pinned(s.expand("$BPFFS/libdispatcher"))
	s.show("rm -r $BPFFS/maps $BPFFS/rival $BPFFS/watch $BPFFS/libdispatcher")
	for _, path := range []string{"maps", rival, watch, "libdispatcher"} {
		must(os.RemoveAll(filepath.Join(s.bpffs, path)))
	}
	s.gone(append(left, vanishing(s.made.left)...), fmt.Sprintf("everything that the demo made is gone (%s)", s.made))
}

// detachOthers detaches the programs that are no members, each by its id.
func (s *stage) detachOthers(ctx context.Context) {
	hooks := []hook.Hook{hook.TCIngress, hook.TCEgress}
	if s.tcx() {
		hooks = append(hooks, hook.TCXEgress)
	}
	for _, h := range hooks {
		for _, m := range s.chain(ctx, h).Members {
			s.run(ctx, fmt.Sprintf(cli+"detach %s veth1 %s --force", h, hook.ProgramRef(m.Program.ID)))
		}
	}
	if s.other != nil {
		must(s.other.Close()) // as a tool does when its link is gone
	}
}
