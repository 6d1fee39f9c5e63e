package testenv_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

var (
	loopback4 = netip.MustParseAddrPort("127.0.0.1:7000")
	loopback6 = netip.MustParseAddrPort("[::1]:7000")
)

func attachCgroup(t testing.TB, cg *testenv.Cgroup, h hook.Hook, prog *ebpf.Program) link.Link {
	t.Helper()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cg.Path, Attach: testenv.AttachType(h), Program: prog})
	qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", h))
	t.Cleanup(func() { l.Close() })
	return l
}

// resident makes a cgroup with a process that has a namespace of its own.
func resident(t testing.TB) (*testenv.Cgroup, *testenv.Resident, *testenv.NetNS) {
	t.Helper()
	cg, ns := testenv.NewCgroup(t), testenv.NewNetNS(t)
	return cg, cg.Enter(t, ns), ns
}

// verdict exercises a hook with one program, and closes the program's link so
// that the next program is alone.
func verdict(t *testing.T, cg *testenv.Cgroup, r *testenv.Resident, h hook.Hook, prog *ebpf.Program) error {
	t.Helper()
	defer attachCgroup(t, cg, h, prog).Close()
	return r.Exercise(t, h)
}

func TestExercise(t *testing.T) {
	testenv.CheckLeaks(t)
	cg, r, _ := resident(t)
	for _, h := range hook.CgroupHooks() {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			qt.Assert(t, qt.IsNil(r.Exercise(t, h)))

			allow, runs := testenv.CgroupProgram(t, "ldt_allow", h, testenv.CgroupAllow)
			qt.Assert(t, qt.IsNil(verdict(t, cg, r, h, allow)))
			if h == hook.CgroupSockOps {
				qt.Assert(t, qt.IsTrue(runs() > 1))
			} else {
				qt.Assert(t, qt.Equals(runs(), 1))
			}
			qt.Assert(t, qt.IsNil(r.Exercise(t, h)))

			deny, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_deny", testenv.CgroupDeny, testenv.On(h)))
			if !testenv.CanDeny(h) {
				qt.Assert(t, qt.ErrorIs(err, unix.EINVAL))
				return
			}
			qt.Assert(t, qt.IsNil(err))
			defer deny.Close()
			err = verdict(t, cg, r, h, deny)
			qt.Assert(t, qt.IsTrue(errors.Is(err, testenv.Denied(h))), qt.Commentf("%v", err))
		})
	}
}

func TestCgroupsBelowEachOther(t *testing.T) {
	testenv.CheckLeaks(t)
	cg, parent, ns := resident(t)
	below := cg.Child(t, "below")
	child := below.Enter(t, ns)
	info, err := os.Stat(filepath.Join(cg.Path, "below"))
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsTrue(info.IsDir()))
	qt.Assert(t, qt.Not(qt.Equals(below.ID, cg.ID)))

	const h = hook.CgroupBind4
	above, runsAbove := testenv.CgroupProgram(t, "ldt_above", h, testenv.CgroupAllow)
	here, runsHere := testenv.CgroupProgram(t, "ldt_here", h, testenv.CgroupDeny)
	l := attachCgroup(t, cg, h, above)
	qt.Assert(t, qt.IsNil(child.Exercise(t, h)))
	attachCgroup(t, below, h, here)
	qt.Assert(t, qt.ErrorIs(child.Exercise(t, h), unix.EPERM))
	qt.Assert(t, qt.IsNil(parent.Exercise(t, h)))
	qt.Assert(t, qt.Equals(runsAbove(), 3))
	qt.Assert(t, qt.Equals(runsHere(), 1))

	linkInfo, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(linkInfo.Cgroup().CgroupId, cg.ID))
}

func TestRemoveCgroup(t *testing.T) {
	testenv.CheckLeaks(t)
	cg := testenv.NewCgroup(t)
	below := cg.Child(t, "below")
	helper := below.StartHelper(t, "echo")
	helper.Expect(t, "args")
	procs, err := os.ReadFile(filepath.Join(below.Path, "cgroup.procs"))
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(string(procs), fmt.Sprintln(helper.Pid)))

	// A program that is attached without a link ends with the cgroup, so it does
	// not leak.
	folder, err := os.Open(cg.Path)
	qt.Assert(t, qt.IsNil(err))
	prog, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_legacy", testenv.CgroupAllow, testenv.On(hook.CgroupSockOps)))
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: int(folder.Fd()), Program: prog, Attach: testenv.AttachType(hook.CgroupSockOps),
	})))
	qt.Assert(t, qt.IsNil(prog.Close()))
	qt.Assert(t, qt.IsNil(folder.Close()))

	cg.Remove(t)
	qt.Assert(t, qt.ErrorIs(unix.Kill(helper.Pid, 0), unix.ESRCH))
	_, err = os.Stat(cg.Path)
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	cg.Remove(t)
}

func TestRemoveCgroupOfOthers(t *testing.T) {
	testenv.CheckLeaks(t)
	sub := &recorder{TB: t}
	cg := testenv.NewCgroup(sub)
	stranger := testenv.StartHelper(t, "echo")
	stranger.Expect(t, "args")
	qt.Assert(t, qt.IsNil(os.WriteFile(filepath.Join(cg.Path, "cgroup.procs"), fmt.Append(nil, stranger.Pid), 0)))
	cg.Remove(sub)
	qt.Assert(t, qt.HasLen(sub.errors, 1))
	qt.Assert(t, qt.StringContains(sub.errors[0], fmt.Sprintf("processes in it: [%d]", stranger.Pid)))
	stranger.Kill()
	sub.finish()
	qt.Assert(t, qt.HasLen(sub.errors, 1))
}

func TestResident(t *testing.T) {
	testenv.CheckLeaks(t)
	_, r, ns := resident(t)
	const file = "/proc/sys/net/ipv4/ip_default_ttl"
	qt.Assert(t, qt.IsNil(r.Write(t, file, "77")))
	text, err := r.Read(t, file)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(text, "77\n"))
	ns.Do(t, func() {
		text, err := os.ReadFile(file)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(string(text), "77\n"))
	})
	_, err = r.Read(t, "/nosuchfile")
	qt.Assert(t, qt.Equals(err, error(unix.ENOENT)))
	qt.Assert(t, qt.Equals(r.Write(t, file, "x"), error(unix.EINVAL)))

	fd, err := r.Socket(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
	qt.Assert(t, qt.IsNil(err))
	ttl, err := unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(ttl, 77))
	qt.Assert(t, qt.IsNil(unix.Close(fd)))
	_, err = r.Socket(t, unix.AF_INET, -1, 0)
	qt.Assert(t, qt.Equals(err, error(unix.EINVAL)))
}

func TestPacketsOfACgroup(t *testing.T) {
	testenv.CheckLeaks(t)
	pair, cg := testenv.NewPair(t), testenv.NewCgroup(t)
	r := cg.Enter(t, pair.Client)
	server4 := netip.AddrPortFrom(testenv.ServerIPv4, port)
	client6 := netip.AddrPortFrom(testenv.ClientIPv6, port)
	want := func(accepted, arrived, received int) {
		t.Helper()
		for to, receiver := range map[netip.AddrPort]*testenv.NetNS{server4: pair.Server, loopback4: pair.Client, loopback6: pair.Client} {
			a, b := r.Passed(t, receiver, to, 100)
			qt.Assert(t, qt.Equals([2]int{a, b}, [2]int{accepted, arrived}), qt.Commentf("%s", to))
		}
		qt.Assert(t, qt.Equals(r.Received(t, pair.Server, client6, 100), received))
		qt.Assert(t, qt.Equals(r.Received(t, pair.Client, loopback4, 100), received))
	}
	want(100, 100, 100)
	drop := testenv.DropUDPPort(t, "ldt_drop", port, testenv.On(hook.CgroupSKBEgress))
	l := attachCgroup(t, cg, hook.CgroupSKBEgress, drop)
	want(0, 0, 100)
	a, b := r.Passed(t, pair.Client, netip.AddrPortFrom(loopback4.Addr(), other), 10)
	qt.Assert(t, qt.Equals([2]int{a, b}, [2]int{10, 10}))
	qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 10)) // datagrams of other processes
	qt.Assert(t, qt.IsNil(l.Close()))
	for start, passed := time.Now(), 0; passed == 0 && time.Since(start) < 10*time.Second; { // the kernel frees the link in its own time
		passed, _ = r.Passed(t, pair.Server, server4, 1)
	}

	drop = testenv.DropUDPPort(t, "ldt_drop", port, testenv.On(hook.CgroupSKBIngress))
	attachCgroup(t, cg, hook.CgroupSKBIngress, drop)
	want(100, 100, 0)
}

func TestTraceShowsOrderInACgroup(t *testing.T) {
	testenv.CheckLeaks(t)
	cg, r, ns := resident(t)
	trace := testenv.NewTrace(t, port)
	for _, h := range []hook.Hook{hook.CgroupSKBEgress, hook.CgroupSKBIngress, hook.CgroupConnect4} {
		for number := 1; number <= 3; number++ {
			attachCgroup(t, cg, h, trace.Program(t, number, testenv.CgroupAllow, testenv.On(h)))
		}
		for range 2 {
			trace.Reset(t)
			switch h {
			case hook.CgroupSKBEgress:
				r.Passed(t, ns, loopback6, 5)
			case hook.CgroupSKBIngress:
				r.Received(t, ns, loopback4, 5)
			default:
				qt.Assert(t, qt.IsNil(r.Exercise(t, h)))
			}
			qt.Assert(t, qt.DeepEquals(trace.Last(t), []int{1, 2, 3}), qt.Commentf("%s", h))
		}
	}
	qt.Assert(t, qt.IsNil(r.Exercise(t, hook.CgroupConnect4)))
	qt.Assert(t, qt.DeepEquals(trace.Last(t), []int{1, 2, 3, 1, 2, 3}))
}

func TestConnectTo(t *testing.T) {
	testenv.CheckLeaks(t)
	cg, r, ns := resident(t)
	for h, asked := range map[hook.Hook]netip.AddrPort{hook.CgroupConnect4: loopback4, hook.CgroupConnect6: loopback6} {
		ns.Listen(t, asked)
		real := ns.Listen(t, netip.AddrPortFrom(asked.Addr(), 0))
		reach := func(want netip.AddrPort) {
			t.Helper()
			for _, network := range []string{"tcp", "udp"} {
				got, err := r.Dial(t, network, asked)
				qt.Assert(t, qt.IsNil(err))
				qt.Assert(t, qt.Equals(got, testenv.Reached{Peer: want, Answer: want}))
			}
		}
		reach(asked)
		attachCgroup(t, cg, h, testenv.ConnectTo(t, "ldt_connect", real))
		reach(real)

		// A process outside the cgroup is not redirected, although it is in the
		// same namespace.
		got, err := testenv.NewCgroup(t).Enter(t, ns).Dial(t, "tcp", asked)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(got.Answer, asked))
	}
}

func TestDialOverAPair(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	r := testenv.NewCgroup(t).Enter(t, pair.Client)
	for _, ip := range []netip.Addr{testenv.ServerIPv4, testenv.ServerIPv6} {
		addr := pair.Server.Listen(t, netip.AddrPortFrom(ip, port))
		for _, network := range []string{"tcp", "udp"} {
			got, err := r.Dial(t, network, addr)
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.Equals(got, testenv.Reached{Peer: addr, Answer: addr}))
		}
		_, err := r.Dial(t, "tcp", netip.AddrPortFrom(ip, other))
		qt.Assert(t, qt.ErrorIs(err, unix.ECONNREFUSED))
	}
}
