package xdploader_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// bench is a device on which tests run xdp-loader commands.
type bench struct {
	*testenv.Pair
	bpffs string
}

func newBench(t *testing.T) *bench {
	testenv.CheckLeaks(t)
	return &bench{testenv.NewPair(t), testenv.BPFFS(t)}
}

// run runs a command line on the device. The command must end with that exit
// code.
func (b *bench) run(t *testing.T, exit int, args ...string) (stdout, stderr string) {
	t.Helper()
	b.Server.Do(t, func() {
		var got int
		stdout, stderr, got = packageLoader(t, map[string]string{"LIBXDP_BPFFS": b.bpffs}, args...)
		qt.Assert(t, qt.Equals(got, exit), qt.Commentf("%q: %s%s", args, stdout, stderr))
	})
	return stdout, stderr
}

// own attaches members to an owned chain.
func (b *bench) own(t *testing.T, names ...string) {
	b.Server.Do(t, func() {
		for i, name := range names {
			prog := testenv.VerdictProgram(t, "ldt_"+name, testenv.XDPPass)
			l, err := dispatcher.Attach(t.Context(), dispatcher.XDP(b.ServerDev), dispatcher.Program(prog), dispatcher.Options{
				Name: name, BPFFS: b.bpffs,
				Priority: 10 * (i + 1), ContinueOn: hook.SetOf(hook.Pass, hook.TX),
			})
			qt.Assert(t, qt.IsNil(err))
			t.Cleanup(func() { l.Close() })
		}
	})
}

func (b *bench) read(t *testing.T) (c *hook.Chain) {
	b.Server.Do(t, func() {
		var err error
		c, err = dispatcher.Read(t.Context(), dispatcher.XDP(b.ServerDev), dispatcher.ReadOptions{BPFFS: b.bpffs})
		qt.Assert(t, qt.IsNil(err))
	})
	return c
}

// An owned chain is shown with its members, and is neither joined nor detached.
// The messages are xdp-loader's, and one more line says what to do instead.
func TestOwnedChain(t *testing.T) {
	b := newBench(t)
	b.own(t, "first", "second")
	before := b.read(t)

	status, _ := b.run(t, 0, "status", b.ServerDev)
	rows := strings.Split(strings.TrimSpace(status), "\n")[4:]
	qt.Assert(t, qt.HasLen(rows, 3))
	qt.Check(t, qt.Matches(rows[0], fmt.Sprintf(`veth1                  libdispatcher     native   %-4d [0-9a-f]{16} `, before.DispatcherID)))
	for i, m := range before.Members {
		qt.Check(t, qt.Equals(rows[i+1], fmt.Sprintf(" =>              %-5d  %-16s          %-4d %-17s XDP_PASS,XDP_TX",
			10*(i+1), m.Program.Name, m.Program.ID, m.Program.Tag)))
	}

	object, err := os.Getwd()
	qt.Assert(t, qt.IsNil(err))
	object += "/" + objects + "/filter.o"
	holds := fmt.Sprintf(`libdispatcher: a chain of libdispatcher \(first, second\) holds veth1 by link %d; `, before.LinkID)
	attach := holds + `"dispatcher attach xdp veth1 \S+" adds .*\n`
	detach := holds + `"dispatcher detach xdp veth1 %s" detaches .*\n`
	const busy = 240
	for _, test := range []struct {
		skip   bool
		exit   int
		stderr string
		args   []string
	}{
		{false, busy, ` libxdp: Existing program is not using a dispatcher, can't replace; unload first
Couldn't attach XDP program on iface 'veth1': Device or resource busy\(-16\)
` + attach, []string{"load", "veth1", object}},
		{false, busy, ` libxdp: Existing program is not using a dispatcher, can't replace; unload first
Couldn't attach XDP program on iface 'veth1': Device or resource busy\(-16\)
` + attach, []string{"load", "veth1", object, object}},
		{true, busy, `Couldn't attach XDP program on iface 'veth1': Device or resource busy\(-16\)
` + attach, []string{"load", "veth1", object}},
		{true, 239, `Couldn't attach XDP program on iface 'veth1': File exists\(-17\)
` + attach, []string{"load", "veth1", object, "-m", "skb"}},
		{false, 1, "Unable to detach XDP program: Device or resource busy\n" + fmt.Sprintf(detach, "--all"),
			[]string{"unload", "veth1", "--all"}},
		{false, 1, "Unable to detach XDP program: Device or resource busy\n" + fmt.Sprintf(detach, "--all"),
			[]string{"unload", "veth1", "-i", strconv.Itoa(int(before.DispatcherID))}},
		{false, 1, "Unable to detach XDP program: Device or resource busy\n" + fmt.Sprintf(detach, "second"),
			[]string{"unload", "veth1", "-i", strconv.Itoa(int(before.Members[1].Program.ID))}},
		{false, 1, "Program with ID 4294967295 not loaded on veth1\n", []string{"unload", "veth1", "-i", "4294967295"}},
	} {
		env := map[string]string{"LIBXDP_BPFFS": b.bpffs}
		if test.skip {
			env["LIBXDP_SKIP_DISPATCHER"] = "1"
		}
		b.Server.Do(t, func() {
			stdout, stderr, exit := packageLoader(t, env, test.args...)
			qt.Check(t, qt.Equals(stdout, ""))
			qt.Check(t, qt.Matches(stderr, test.stderr))
			qt.Check(t, qt.Equals(exit, test.exit), qt.Commentf("%q", test.args))
		})
	}
	qt.Assert(t, qt.DeepEquals(b.read(t), before))
}

// A foreign link is detached, as xdp-loader does.
func TestForeignLink(t *testing.T) {
	for _, how := range []string{"all", "id"} {
		t.Run(how, func(t *testing.T) {
			b := newBench(t)
			var foreign link.Link
			prog := testenv.VerdictProgram(t, "ldt_foreign", testenv.XDPPass)
			b.Server.Do(t, func() {
				var err error
				foreign, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: b.ServerIfindex})
				qt.Assert(t, qt.IsNil(err))
			})
			defer foreign.Close()
			args := []string{"unload", "veth1", "--all"}
			if how == "id" {
				args = []string{"unload", "veth1", "-i", id(t, prog)}
			}
			stdout, stderr := b.run(t, 0, args...)
			qt.Check(t, qt.Equals(stdout+stderr, ""))
			info, err := foreign.Info()
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(info.XDP().Ifindex, 0))
			qt.Check(t, qt.HasLen(b.read(t).Members, 0))
		})
	}
}

func id(t *testing.T, prog *ebpf.Program) string {
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	id, ok := info.ID()
	qt.Assert(t, qt.IsTrue(ok))
	return strconv.Itoa(int(id))
}

// status shows a function's whole name, which the kernel cuts.
func TestWholeName(t *testing.T) {
	b := newBench(t)
	const name = "ldt_a_name_of_more_than_fifteen_bytes"
	spec := testenv.VerdictSpec(name[:15], testenv.XDPPass)
	withTypes(spec, name)
	prog := testenv.Load(t, spec)
	b.attach(t, prog)
	status, _ := b.run(t, 0, "status", "veth1")
	qt.Check(t, qt.StringContains(status, "\nveth1                  "+name+" native   "+id(t, prog)+" "))
	b.run(t, 0, "unload", "veth1", "--all")
}

// The maps of global variables have the names that libbpf gives them.
func TestMapNames(t *testing.T) {
	b := newBench(t)
	for object, want := range map[string][]string{
		"filter.o":  {"filter.bss", "filter.data", "filter.rodata", "ldt_dropped"},
		"globals.o": {"globals.bss", "globals.data", "globals.rodata"},
	} {
		env := map[string]string{"LIBXDP_SKIP_DISPATCHER": "1"}
		b.Server.Do(t, func() {
			_, stderr, exit := packageLoader(t, env, "load", "veth1", objects+"/"+object)
			qt.Assert(t, qt.Equals(exit, 0), qt.Commentf("%s", stderr))
		})
		qt.Check(t, qt.DeepEquals(b.mapNames(t), want))
		b.run(t, 0, "unload", "veth1", "--all")
	}
}

func TestVersion(t *testing.T) {
	stdout, stderr, exit := packageLoader(t, nil, "status", "--version")
	qt.Check(t, qt.Matches(stdout, `xdp-loader version 1\.6\.3 using cilium/ebpf version \S+ \(libdispatcher\)\n`))
	qt.Check(t, qt.Equals(stderr, ""))
	qt.Check(t, qt.Equals(exit, 1))
}

// withTypes gives a program the type of an XDP function.
func withTypes(spec *ebpf.ProgramSpec, name string) {
	spec.Instructions[0] = btf.WithFuncMetadata(spec.Instructions[0], code.Global(name))
}

// attach attaches a program by netlink.
func (b *bench) attach(t *testing.T, prog *ebpf.Program) {
	b.Server.Do(t, func() {
		conn, err := rtnl.Dial()
		qt.Assert(t, qt.IsNil(err))
		defer conn.Close()
		qt.Assert(t, qt.IsNil(conn.ReplaceXDP(b.ServerIfindex, prog.FD(), -1, hook.ModeNative)))
	})
}

// mapNames returns the names of the maps of the program on the device.
func (b *bench) mapNames(t *testing.T) (names []string) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(b.read(t).Members[0].Program.ID))
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	for _, m := range testenv.Maps(t, prog) {
		info, err := m.Info()
		m.Close()
		qt.Assert(t, qt.IsNil(err))
		names = append(names, info.Name)
	}
	slices.Sort(names)
	return names
}
