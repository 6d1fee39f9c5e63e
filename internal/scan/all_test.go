package scan

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// One scan finds, each once, what several tools have attached in several ways to
// several targets.
func TestAll(t *testing.T) {
	testenv.CheckLeaks(t)
	// Devices in two namespaces have the same index and program.
	opts := testenv.PairOptions{ClientIfindex: 55, ServerIfindex: 77}
	pairs := []*testenv.Pair{testenv.NewPairOpts(t, opts), testenv.NewPairOpts(t, opts)}
	xdp := testenv.VerdictProgram(t, "ldt_xdp", testenv.XDPPass)
	tcx := program(t, "ldt_tcx", ebpf.SchedCLS, ebpf.AttachNone, -1)
	sysctl := program(t, "ldt_sysctl", ebpf.CGroupSysctl, ebpf.AttachCGroupSysctl, 1)
	hasTCX, want := testenv.Has(t, testenv.FeatureTCX), 3
	if hasTCX {
		want = 5
	}
	var tcxLinks []uint32
	for _, p := range pairs {
		p.Server.Do(t, func() {
			l, err := link.AttachXDP(link.XDPOptions{Program: xdp, Interface: p.ServerIfindex})
			own(t, l, err)
			if hasTCX {
				l, err = link.AttachTCX(link.TCXOptions{Program: tcx, Interface: p.ServerIfindex, Attach: ebpf.AttachTCXEgress})
				tcxLinks = append(tcxLinks, own(t, l, err))
			}
		})
	}
	cg := testenv.NewCgroup(t)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cg.Path, Program: sysctl, Attach: ebpf.AttachCGroupSysctl})
	cgLink := own(t, l, err)

	// Only a descriptor leads to the namespace of the second server.
	fd := open(t, pairs[1].Server.Path())
	qt.Assert(t, qt.IsNil(pairs[1].Server.Delete()))
	places := []string{pairs[0].Server.Name, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)}

	mine := map[string]hook.Chain{}
	chains, err := All(t.Context(), Options{})
	qt.Assert(t, qt.IsNil(err))
	for _, c := range chains {
		for _, m := range c.Members {
			if m.Program.Name == "ldt_xdp" || m.Program.Name == "ldt_tcx" || m.Program.Name == "ldt_sysctl" {
				key := fmt.Sprintf("%s %s %s", c.NetNS.Name, c.Hook, c.Target)
				qt.Check(t, qt.Equals(mine[key].Hook, ""), qt.Commentf("twice: %s", key))
				qt.Check(t, qt.IsNil(c.Err))
				mine[key] = c
			}
		}
	}
	qt.Check(t, qt.HasLen(mine, want))
	for i, ns := range places {
		c := mine[ns+" xdp veth1"]
		qt.Assert(t, qt.HasLen(c.Members, 1), qt.Commentf("%s of %v", ns, mine))
		qt.Check(t, qt.Equals(c.Ifindex, 77))
		if !hasTCX {
			continue
		}
		c = mine[ns+" tcx/egress veth1"]
		qt.Assert(t, qt.HasLen(c.Members, 1))
		qt.Check(t, qt.Equals(c.Members[0].LinkID, tcxLinks[i]))
	}
	c := mine[" cgroup/sysctl "+cg.Path]
	qt.Assert(t, qt.HasLen(c.Members, 1))
	qt.Check(t, qt.Equals(c.CgroupID, cg.ID))
	qt.Check(t, qt.Equals(c.Members[0].LinkID, cgLink))
}

// A link is shown although its namespace cannot be found, since only a socket keeps
// the namespace.
func TestLost(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	ns := pair.Server
	prog := program(t, "ldt_lookup", ebpf.SkLookup, ebpf.AttachSkLookup, 1)
	f, err := os.Open(ns.Path())
	qt.Assert(t, qt.IsNil(err))
	defer f.Close()
	l, err := link.AttachNetNs(int(f.Fd()), prog)
	id := own(t, l, err)
	var st unix.Stat_t
	qt.Assert(t, qt.IsNil(unix.Fstat(int(f.Fd()), &st)))
	xdp := testenv.VerdictProgram(t, "ldt_xdp", testenv.XDPPass)
	socket := -1
	ns.Do(t, func() {
		l, err := link.AttachXDP(link.XDPOptions{Program: xdp, Interface: pair.ServerIfindex})
		own(t, l, err)
		socket, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		qt.Assert(t, qt.IsNil(err))
	})
	defer unix.Close(socket)
	f.Close()
	qt.Assert(t, qt.IsNil(ns.Delete()))

	// A process that looks through all namespaces has this one open for a moment: then it is not lost.
	found := 0
	for start := time.Now(); found == 0 && time.Since(start) < 10*time.Second; {
		for _, c := range all(t, Options{}, hook.SKLookup, hook.XDP) {
			if !errors.Is(c.Err, errNoPlace) {
				continue
			}
			switch m := c.Members[0]; m.Name {
			case "ldt_lookup":
				found++
				qt.Check(t, qt.Equals(c.Hook, hook.SKLookup))
				qt.Check(t, qt.Equals(c.NetNS, hook.NetNS{Inode: st.Ino}))
				wantMember(t, m, prog, hook.KindForeign, id)
			case "ldt_xdp":
				found++
				qt.Check(t, qt.Equals(c.Hook, hook.XDP))
				qt.Check(t, qt.Equals(c.Ifindex, pair.ServerIfindex))
				qt.Check(t, qt.Equals(m.Kind, hook.KindForeign))
				qt.Check(t, qt.Not(qt.Equals(c.LinkID, 0)))
			}
		}
	}
	qt.Check(t, qt.Equals(found, 2))
}
