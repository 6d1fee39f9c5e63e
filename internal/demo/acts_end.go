package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// registry is the pin of the registry, which has the names of members with
// links of their own. It stays when the members leave.
const registry = "$BPFFS/libdispatcher/registry"

func (s *stage) view(ctx context.Context) error {
	const addEgress = "tc -n $NS filter add dev veth1 egress bpf da object-pinned $BPFFS/watch"
	want := kinds{members: 4, legacy: 2} // the ingress filter is not adopted
	if s.tcx() {
		want = kinds{members: 5, legacy: 1, foreign: 1}
		s.say("On egress there are a filter of tc, and a program that another tool attached with its own link.")
		if err := s.attachOther(ctx); err != nil {
			return err
		}
		if err := s.run(ctx, addClsact); err != nil {
			return err
		}
	} else {
		s.say("On egress there is a filter of tc.")
		s.notHere("another tool's link, which needs TCX")
	}
	if err := s.run(ctx, addEgress, cli+"list"); err != nil {
		return err
	}
	got, err := s.all(ctx)
	if err != nil {
		return err
	}
	if err := s.equal(got, want, "members: %d, legacy: %d, foreign: %d", got.members, got.legacy, got.foreign); err != nil {
		return err
	}
	if s.cgroup == "" {
		return nil
	}
	s.say("A cgroup belongs to no namespace. Without -n, list shows the whole machine.")
	return s.run(ctx, cgroupCLI+"list cgroup $CGROUP")
}

// kinds are the numbers of entries by kind.
type kinds struct{ members, legacy, foreign int }

// all reads all hooks in the server's namespace, and enters their objects in
// the ledger.
func (s *stage) all(ctx context.Context) (found kinds, err error) {
	chains, err := dispatcher.List(ctx, dispatcher.ListOptions{NetNS: s.vars["NS"], BPFFS: s.bpffs})
	if err != nil {
		return found, err
	}
	for _, c := range chains {
		s.made.addChain(&c)
		for _, m := range c.Members {
			switch m.Kind {
			case hook.KindMember:
				found.members++
			case hook.KindLegacy:
				found.legacy++
			case hook.KindForeign:
				found.foreign++
			}
		}
	}
	return found, nil
}

func (s *stage) detachAll(ctx context.Context) error {
	s.say("detach removes members of any owner: the processes that hold count and sample are told, and end.")
	lines := []string{cli + "detach xdp veth1 --all", fmt.Sprintf(cli+"detach %s veth1 --all", s.tc)}
	if s.cgroup != "" {
		lines = append(lines, cgroupCLI+"detach cgroup_skb/egress $CGROUP --all")
	}
	if err := s.run(ctx, lines...); err != nil {
		return err
	}
	for _, name := range []string{count, sample} {
		words, err := s.owners[name].words()
		if err != nil {
			return err
		}
		s.answer(words)
	}
	s.say("Programs of others go only with --force.")
	if err := s.detachOthers(ctx); err != nil {
		return err
	}
	if err := s.run(ctx, cli+"list"); err != nil {
		return err
	}
	rest, err := s.all(ctx)
	if err != nil {
		return err
	}
	if err := s.equal(rest, kinds{}, "the device is free"); err != nil {
		return err
	}
	if err := s.arrive(packets, packets); err != nil {
		return err
	}

	// Only this folder is compared: ip and tc, started by others, use any bpffs
	// that they find.
	left := pinned(s.expand("$BPFFS/libdispatcher"))
	left = slices.DeleteFunc(left, func(path string) bool { return path == s.expand(registry) })
	s.show("rm -r $BPFFS/maps $BPFFS/rival $BPFFS/watch $BPFFS/libdispatcher")
	for _, path := range []string{"maps", rival, watch, "libdispatcher"} {
		if err := os.RemoveAll(filepath.Join(s.bpffs, path)); err != nil {
			return err
		}
	}
	if left = append(left, vanishing(s.made.left)...); len(left) > 0 {
		return s.check(false, "still there: %s", strings.Join(left, ", "))
	}
	return s.check(true, "everything that the demo made is gone (%s)", s.made)
}

// detachOthers detaches the programs that are no members, each by its id.
func (s *stage) detachOthers(ctx context.Context) error {
	hooks := []hook.Hook{hook.TCIngress, hook.TCEgress}
	if s.tcx() {
		hooks = append(hooks, hook.TCXEgress)
	}
	for _, h := range hooks {
		c, err := s.chain(ctx, h)
		if err != nil {
			return err
		}
		for _, m := range c.Members {
			if err := s.run(ctx, fmt.Sprintf(cli+"detach %s veth1 %s --force", h, hook.ProgramRef(m.Program.ID))); err != nil {
				return err
			}
		}
	}
	if s.other == nil {
		return nil
	}
	return s.other.Close() // as a tool does when its link is gone
}
