package testenv_test

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) {
	testenv.RegisterHelper("echo", func(args []string) {
		fmt.Println("args", strings.Join(args, " "))
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			fmt.Println("noise")
			fmt.Println("said", in.Text())
		}
	})
	testenv.RegisterHelper("fail", func([]string) {
		fmt.Fprintln(os.Stderr, "it went wrong")
		os.Exit(3)
	})
	testenv.RegisterHelper("devices", func([]string) {
		_, err := net.InterfaceByName("veth1")
		fmt.Println("veth1", err)
	})
	testenv.RegisterHelper("attach", func(args []string) {
		// The helper's own program and link, held until the helper dies.
		prog, err := ebpf.NewProgram(testenv.DropUDPPortSpec("ldt_held", port))
		if err == nil {
			var dev *net.Interface
			if dev, err = net.InterfaceByName(args[0]); err == nil {
				_, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: dev.Index})
			}
		}
		fmt.Println("attached", err)
		select {}
	})
	testenv.Main(m)
}

const (
	port  = 7000
	other = 7001
)

// modes are the two ways in which a device runs XDP programs.
var modes = map[string]link.XDPAttachFlags{
	"native":  link.XDPDriverMode,
	"generic": link.XDPGenericMode,
}

func attach(t testing.TB, pair *testenv.Pair, prog *ebpf.Program, mode link.XDPAttachFlags) link.Link {
	t.Helper()
	var l link.Link
	pair.Server.Do(t, func() {
		var err error
		l, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: pair.ServerIfindex, Flags: mode})
		qt.Assert(t, qt.IsNil(err))
	})
	t.Cleanup(func() { l.Close() })
	return l
}

func TestPairCarriesPackets(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	for _, n := range []int{0, 1, 10, 1000} {
		qt.Assert(t, qt.Equals(pair.Passed(t, port, n), n))
		qt.Assert(t, qt.Equals(pair.Passed6(t, port, n), n))
	}
	// Returned does not count the answers about the closed port, which quote the datagrams.
	qt.Assert(t, qt.Equals(pair.Returned(t, port, 10), 0))
	qt.Assert(t, qt.Equals(pair.Returned6(t, port, 10), 0))
}

func TestPairIsSilent(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	time.Sleep(50 * time.Millisecond)
	before := pair.Server.IP(t, "-s", "link", "show", pair.ServerDev)
	time.Sleep(150 * time.Millisecond)
	qt.Assert(t, qt.Equals(pair.Server.IP(t, "-s", "link", "show", pair.ServerDev), before))
}

func TestPairsWithTheSameIfindex(t *testing.T) {
	testenv.CheckLeaks(t)
	for range 2 {
		pair := testenv.NewPairOpts(t, testenv.PairOptions{ClientIfindex: 55, ServerIfindex: 77})
		qt.Assert(t, qt.Equals(pair.ClientIfindex, 55))
		qt.Assert(t, qt.Equals(pair.ServerIfindex, 77))
		qt.Assert(t, qt.StringContains(pair.Server.IP(t, "link"), "77: veth1"))
		qt.Assert(t, qt.Equals(pair.Passed(t, port, 3), 3))
	}
}

func TestNetNS(t *testing.T) {
	testenv.CheckLeaks(t)
	home, err := os.Readlink("/proc/thread-self/ns/net")
	qt.Assert(t, qt.IsNil(err))

	ns := testenv.NewNetNS(t)
	inside := func() (name string) {
		ns.Do(t, func() { name, _ = os.Readlink("/proc/thread-self/ns/net") })
		return name
	}
	qt.Assert(t, qt.Not(qt.Equals(inside(), home)))
	qt.Assert(t, qt.StringContains(ns.IP(t, "link", "show", "lo"), "UP"))

	back, err := os.Readlink("/proc/thread-self/ns/net")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(back, home))

	boom := errors.New("boom")
	qt.Assert(t, qt.ErrorIs(ns.Run(func() error { return boom }), boom))
	_, err = ns.TryIP("link", "show", "nosuchdev")
	qt.Assert(t, qt.ErrorMatches(err, `.*"nosuchdev" does not exist.*`))

	qt.Assert(t, qt.IsNil(ns.Delete()))
	qt.Assert(t, qt.IsNil(ns.Delete()))
	qt.Assert(t, qt.ErrorIs(ns.Run(func() error { return nil }), fs.ErrNotExist))
}

func TestRequireRemovesWhatIsLeftBehind(t *testing.T) {
	testenv.CheckLeaks(t)
	gone := exec.Command("true")
	qt.Assert(t, qt.IsNil(gone.Run()))
	ns := &testenv.NetNS{Name: fmt.Sprintf("ldt-%d-1", gone.Process.Pid)}
	qt.Assert(t, qt.IsNil(exec.Command("ip", "netns", "add", ns.Name).Run()))
	dir := filepath.Join(os.TempDir(), ns.Name+"-1")
	qt.Assert(t, qt.IsNil(os.Mkdir(dir, 0o700)))
	qt.Assert(t, qt.IsNil(unix.Mount("bpf", dir, "bpf", 0, "")))
	mine := testenv.NewNetNS(t)
	myCgroup := testenv.NewCgroup(t)
	cgroup := filepath.Join(filepath.Dir(myCgroup.Path), ns.Name)
	qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Join(cgroup, "a", "b"), 0o755)))

	qt.Assert(t, qt.IsNil(testenv.Sweep()))
	for _, path := range []string{ns.Path(), dir, cgroup} {
		_, err := os.Stat(path)
		qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	}
	mine.Do(t, func() {})
	_, err := os.Stat(myCgroup.Path)
	qt.Assert(t, qt.IsNil(err))
}

func TestDropUDPPort(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			pair := testenv.NewPair(t)
			drop := attach(t, pair, testenv.DropUDPPort(t, "ldt_drop", port), mode)
			qt.Assert(t, qt.Equals(pair.Passed(t, port, 100), 0))
			qt.Assert(t, qt.Equals(pair.Passed6(t, port, 100), 0))
			qt.Assert(t, qt.Equals(pair.Passed(t, other, 100), 100))
			qt.Assert(t, qt.Equals(pair.Passed6(t, other, 100), 100))
			qt.Assert(t, qt.IsNil(drop.Close()))
			qt.Assert(t, qt.Equals(pair.Passed(t, port, 100), 100))
		})
	}
}

func TestReturned(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			pair := testenv.NewPair(t)
			attach(t, pair, testenv.VerdictProgram(t, "ldt_tx", testenv.XDPTX), mode)
			qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 0))
			for _, n := range []int{1, 1000} {
				qt.Assert(t, qt.Equals(pair.Returned(t, port, n), n))
				qt.Assert(t, qt.Equals(pair.Returned6(t, port, n), n))
			}
		})
	}
}

// Passed and Returned must count exactly, however busy the CPUs are.
func TestCountsAreCertain(t *testing.T) {
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			busy := testenv.NewPair(t)
			busy.Flood(t, port)
			pair := testenv.NewPair(t)
			prog, counted := testenv.CountProgram(t, "ldt_count", port, testenv.XDPPass)
			l := attach(t, pair, prog, mode)
			for i := range 10 {
				qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 10))
				qt.Assert(t, qt.Equals(counted(), (i+1)*10))
			}
			qt.Assert(t, qt.IsNil(l.Close()))
			attach(t, pair, testenv.VerdictProgram(t, "ldt_tx", testenv.XDPTX), mode)
			for range 5 {
				qt.Assert(t, qt.Equals(pair.Returned(t, port, 10), 10))
			}
		})
	}
}

func TestCountProgram(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	prog, counted := testenv.CountProgram(t, "ldt_count", port, testenv.XDPDrop)
	attach(t, pair, prog, link.XDPDriverMode)
	pair.Send(t, port, 200)
	pair.Send6(t, port, 100)
	pair.Send(t, other, 50)
	qt.Assert(t, qt.Equals(counted(), 300))
	qt.Assert(t, qt.Equals(pair.Passed(t, other, 10), 0))
}

func TestTraceShowsOrder(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	trace := testenv.NewTrace(t, port)
	qt.Assert(t, qt.HasLen(trace.Last(t), 0))

	// A bounced packet meets the program of the server's device, then the program of the
	// client's device.
	attach(t, pair, trace.Program(t, 1, testenv.XDPTX), link.XDPDriverMode)
	second := trace.Program(t, 2, testenv.XDPPass)
	pair.Client.Do(t, func() {
		l, err := link.AttachXDP(link.XDPOptions{Program: second, Interface: pair.ClientIfindex, Flags: link.XDPDriverMode})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
	})
	pair.Send(t, port, 3)
	qt.Assert(t, qt.DeepEquals(trace.Last(t), []int{1, 2}))
	qt.Assert(t, qt.Equals(pair.Returned(t, port, 3), 3))
	trace.Reset(t)
	pair.Send(t, other, 3)
	qt.Assert(t, qt.HasLen(trace.Last(t), 0))
	pair.Send6(t, port, 3)
	qt.Assert(t, qt.DeepEquals(trace.Last(t), []int{1, 2}))
}

func TestProgramOptions(t *testing.T) {
	testenv.CheckLeaks(t)
	slots, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_slots", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer slots.Close()

	// The first program decides what a prog array accepts.
	fits := func(opts ...testenv.ProgramOption) bool {
		prog := testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass, opts...)
		return slots.Put(uint32(0), prog) == nil
	}
	qt.Assert(t, qt.IsTrue(fits()))
	qt.Assert(t, qt.IsTrue(fits(testenv.ExpectedAttachType(ebpf.AttachXDP))))
	if testenv.Has(t, testenv.FeatureFrags) {
		qt.Assert(t, qt.IsFalse(fits(testenv.Frags())))
	}
}

func TestFlood(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	attach(t, pair, testenv.DropUDPPort(t, "ldt_drop", port), link.XDPDriverMode)

	flood := pair.Flood(t, port, other)
	time.Sleep(200 * time.Millisecond)
	sent, received := flood.Stop()
	markers, arrived := flood.Marker()
	t.Logf("%d dropped, %d of %d markers arrived", sent, arrived, markers)
	qt.Assert(t, qt.Equals(received, 0))
	qt.Assert(t, qt.IsTrue(sent > 1000))
	qt.Assert(t, qt.IsTrue(arrived > 0 && arrived <= markers))
	qt.Assert(t, qt.Equals(markers, (sent+markers+15)/16))
}

func TestFloodSeesWhatPasses(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	flood := pair.Flood(t, port)
	for start := time.Now(); flood.Received() < 100; time.Sleep(time.Millisecond) {
		qt.Assert(t, qt.IsTrue(time.Since(start) < 5*time.Second))
	}
	sent, received := flood.Stop()
	qt.Assert(t, qt.IsTrue(received >= 100 && received <= sent))
}

func TestBPFFS(t *testing.T) {
	testenv.CheckLeaks(t)
	dir := testenv.BPFFS(t)
	prog := testenv.VerdictProgram(t, "ldt_pinned", testenv.XDPPass)
	qt.Assert(t, qt.IsNil(prog.Pin(filepath.Join(dir, "prog")))) // the pin ends with the mount
	qt.Assert(t, qt.Not(qt.Equals(testenv.BPFFS(t), dir)))
}

// Tests of this project attach programs without links by ip.
func TestIPAttachesPinned(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	pin := filepath.Join(testenv.BPFFS(t), "prog")
	qt.Assert(t, qt.IsNil(testenv.DropUDPPort(t, "ldt_drop", port).Pin(pin)))
	for _, how := range []string{"xdp", "xdpgeneric", "xdpdrv"} {
		pair.Server.IP(t, "link", "set", "dev", pair.ServerDev, how, "pinned", pin)
		qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 0))
		pair.Server.IP(t, "link", "set", "dev", pair.ServerDev, how, "off")
		qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 10))
	}
}

func TestBPFFSInUse(t *testing.T) {
	testenv.CheckLeaks(t)
	sub := &recorder{TB: t}
	busy, err := os.Open(testenv.BPFFS(sub))
	qt.Assert(t, qt.IsNil(err))
	sub.finish()
	qt.Assert(t, qt.HasLen(sub.errors, 1))
	qt.Assert(t, qt.StringContains(sub.errors[0], "still in use"))
	busy.Close()
	_, err = os.Stat(busy.Name())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
}

func TestHelper(t *testing.T) {
	testenv.CheckLeaks(t)
	echo := testenv.StartHelper(t, "echo", "one", "-two")
	qt.Assert(t, qt.Equals(echo.Expect(t, "args"), "one -two"))
	echo.Send("hello")
	echo.Send("again")
	qt.Assert(t, qt.Equals(echo.Expect(t, "said"), "hello"))
	qt.Assert(t, qt.Equals(echo.Expect(t, "said"), "again"))
	qt.Assert(t, qt.IsNil(echo.Stop()))
	qt.Assert(t, qt.IsNil(echo.Wait()))

	fail := testenv.StartHelper(t, "fail")
	err := fail.Wait()
	qt.Assert(t, qt.ErrorMatches(err, `(?s)helper fail: exit status 3.*it went wrong.*`))
	var exit *exec.ExitError
	qt.Assert(t, qt.ErrorAs(err, &exit))

	killed := testenv.StartHelper(t, "echo")
	killed.Kill()
	qt.Assert(t, qt.ErrorIs(unix.Kill(killed.Pid, 0), unix.ESRCH))
	qt.Assert(t, qt.ErrorMatches(killed.Wait(), `(?s).*signal: killed.*`))

	// Expect fails at once when the helper ends.
	sub := &recorder{TB: t}
	sub.run(func() { testenv.StartHelper(sub, "fail").Expect(sub, "never") })
	sub.finish()
	qt.Assert(t, qt.HasLen(sub.errors, 1))
	qt.Assert(t, qt.StringContains(sub.errors[0], "it went wrong"))
}

func TestHelperInNetNS(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	var inside, holder *testenv.Proc
	pair.Server.Do(t, func() {
		inside = testenv.StartHelper(t, "devices")
		holder = testenv.StartHelper(t, "attach", pair.ServerDev)
	})
	qt.Assert(t, qt.Equals(inside.Expect(t, "veth1"), "<nil>"))
	qt.Assert(t, qt.Equals(holder.Expect(t, "attached"), "<nil>"))
	qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 0))
	holder.Kill()
	// The kernel frees the link of a killed process some time later.
	for start := time.Now(); pair.Passed(t, port, 10) != 10; {
		qt.Assert(t, qt.IsTrue(time.Since(start) < time.Second))
	}
}

func TestCheckLeaksFindsLeaks(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	dir := testenv.BPFFS(t)
	drop := testenv.DropUDPPort(t, "ldt_drop", port)

	sub := &recorder{TB: t}
	testenv.CheckLeaks(sub)
	undo := &recorder{TB: t} // repairs what sub does not

	prog, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_leak", testenv.XDPPass))
	qt.Assert(t, qt.IsNil(err))
	undo.Cleanup(func() { prog.Close() })

	pinned, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ld_leak", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(pinned.Pin(filepath.Join(dir, "map"))))
	qt.Assert(t, qt.IsNil(pinned.Close()))
	undo.Cleanup(func() { os.Remove(filepath.Join(dir, "map")) })

	file, err := os.Open("/dev/zero")
	qt.Assert(t, qt.IsNil(err))
	undo.Cleanup(func() { file.Close() })

	attach(undo, pair, drop, link.XDPGenericMode)
	testenv.NewNetNS(undo)
	foreign, err := ebpf.NewProgram(testenv.VerdictSpec("foreign", testenv.CgroupAllow, testenv.On(hook.CgroupConnect4)))
	qt.Assert(t, qt.IsNil(err))
	undo.Cleanup(func() { foreign.Close() })
	group, err := link.AttachCgroup(link.CgroupOptions{Path: testenv.NewCgroup(undo).Path, Program: foreign, Attach: ebpf.AttachCGroupInet4Connect})
	qt.Assert(t, qt.IsNil(err))
	undo.Cleanup(func() { group.Close() })
	helper := testenv.StartHelper(undo, "echo")

	held := prog.FD()
	sub.finish()
	undo.finish()
	qt.Assert(t, qt.HasLen(sub.errors, 1))
	for _, want := range []string{
		fmt.Sprintf(`program \d+ "ldt_leak", held by pid %d, fd %d`, os.Getpid(), held),
		`map \d+ "ld_leak"`,
		`link \d+ \(type 6, program \d+ "ldt_drop"\), held by .*`,
		`link \d+ \(type 3, program \d+ "foreign"\), held by .*`,
		`cgroup /.*/ldt-.*`,
		`fd \d+ -> /dev/zero`,
		`netns /run/netns/ldt-.*`,
		fmt.Sprintf(`child process %d \(.*`, helper.Pid),
		`created by .*/testenv\.startHelper in .*`,
	} {
		qt.Check(t, qt.IsTrue(regexp.MustCompile(`(?m)^\s*`+want+`$`).MatchString(sub.errors[0])), qt.Commentf("%s", want))
	}
}

// What others do on the machine during a test is no leak of the test: here what is pinned in a bpffs that is not the test's, and what
// that holds.
func TestCheckLeaksLeavesOthers(t *testing.T) {
	testenv.CheckLeaks(t)
	dir := t.TempDir()
	qt.Assert(t, qt.IsNil(unix.Mount("bpf", dir, "bpf", 0, "mode=0700")))
	defer func() { qt.Check(t, qt.IsNil(unix.Unmount(dir, unix.MNT_DETACH))) }()
	sub := &recorder{TB: t}
	testenv.CheckLeaks(sub)
	prog := testenv.VerdictProgram(sub, "ldt_theirs", testenv.XDPPass)
	array, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ld_theirs", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(array.Put(uint32(0), prog)))
	clone, err := array.Clone()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(clone.Pin(filepath.Join(dir, "array"))))
	qt.Assert(t, qt.IsNil(clone.Close()))
	qt.Assert(t, qt.IsNil(array.Close()))
	sub.finish()
	qt.Check(t, qt.HasLen(sub.errors, 0))
}

// recorder is a test inside a test: it keeps the errors, and its caller chooses
// when it ends.
type recorder struct {
	testing.TB
	errors   []string
	cleanups []func()
}

func (r *recorder) Helper()           {}
func (r *recorder) Cleanup(fn func()) { r.cleanups = append(r.cleanups, fn) }
func (r *recorder) Error(args ...any) { r.errors = append(r.errors, fmt.Sprint(args...)) }
func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}
func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	panic(r)
}

// run calls fn up to its Fatalf.
func (r *recorder) run(fn func()) {
	defer func() {
		if got := recover(); got != nil && got != any(r) {
			panic(got)
		}
	}()
	fn()
}

func (r *recorder) finish() {
	for len(r.cleanups) > 0 {
		last := r.cleanups[len(r.cleanups)-1]
		r.cleanups = r.cleanups[:len(r.cleanups)-1]
		last()
	}
}
