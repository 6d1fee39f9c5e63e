package xdploader_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/internal/xdploader"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A dispatcher of a later libxdp is not changed, and the messages are
// xdp-loader's.
func TestLaterVersion(t *testing.T) {
	b := newBench(t)
	const name = "xdp_dispatcher"
	spec := testenv.VerdictSpec("ldt_later", testenv.XDPPass)
	withTypes(spec, name)
	spec.Name = name
	prog, err := ebpf.NewProgram(spec)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	config, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ldt_config", Type: ebpf.Array, KeySize: 4, ValueSize: 128, MaxEntries: 1, Flags: unix.BPF_F_RDONLY_PROG,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: append([]byte{236, 4, 1}, make([]byte, 125)...)}},
	})
	qt.Assert(t, qt.IsNil(err))
	defer config.Close()
	qt.Assert(t, qt.IsNil(config.Freeze()))
	qt.Assert(t, qt.IsNil(prog.BindMap(config)))
	b.attach(t, prog)

	const script = `$ status veth1
$ status
$ load veth1 ../../test/testdata/filter.o
$ load veth1 ../../test/testdata/filter.o -m skb
$ unload veth1 --all
$ unload veth1 -i {id}
`
	play := func(run xdpLoader) (text string) {
		b.Server.Do(t, func() {
			s := &scene{pair: b.Pair, bpffs: b.bpffs, next: always(run)}
			text = s.play(t, strings.ReplaceAll(script, "{id}", id(t, prog)))
		})
		return text
	}
	got := play(packageLoader)
	qt.Check(t, qt.StringContains(got, `$ load veth1 ../../test/testdata/filter.o
2>  libxdp: XDP dispatcher version 4 higher than supported 3
2>  libxdp: Dispatcher version check failed for ID N
2> Couldn't attach XDP program on iface 'veth1': Device or resource busy(-16)
= 240
`))
	if path, err := findReal(); err == nil && libxdp.Supported() == nil {
		qt.Check(t, qt.Equals(got, play(realLoader(path))))
	}
	b.Server.IP(t, "link", "set", "dev", "veth1", "xdp", "off")
}

// Chains of older versions are changed in their version, so that the older tool
// can continue to use them; xdp-loader 1.6.3 refuses to change them.
func TestOlderVersions(t *testing.T) {
	testenv.Require(t)
	if err := libxdp.Supported(); err != nil {
		t.Skip("this kernel has no dispatcher of libxdp's: runs in the kernel matrix")
	}
	for _, version := range []string{"1.3.1", "1.5.4"} {
		path, err := exec.LookPath("xdp-loader-" + version)
		if err != nil {
			t.Skipf("no xdp-loader-%s here: runs in the kernel matrix", version)
		}
		t.Run(version, func(t *testing.T) {
			b := newBench(t)
			b.Server.Do(t, func() {
				env := map[string]string{"LIBXDP_BPFFS": b.bpffs}
				do := func(tool xdpLoader, args ...string) string {
					t.Helper()
					stdout, stderr, exit := tool(t, env, args...)
					qt.Assert(t, qt.Equals(exit, 0), qt.Commentf("%q: %s%s", args, stdout, stderr))
					return stdout
				}
				older := realLoader(path)
				members := func(tool xdpLoader) (names []string) {
					for line := range strings.Lines(do(tool, "status", "veth1")) {
						if f := strings.Fields(line); len(f) > 2 && f[0] == "=>" {
							names = append(names, f[2])
						}
					}
					return names
				}
				do(older, "load", "veth1", objects+"/filter.o")
				do(packageLoader, "load", "veth1", objects+"/globals.o", objects+"/several.o", "-P", "60")
				want := []string{"ldt_filter", "ldt_first", "ldt_globals"} // by priority, then by name
				qt.Check(t, qt.DeepEquals(members(packageLoader), want))
				qt.Check(t, qt.DeepEquals(members(older), want))

				do(packageLoader, "unload", "veth1", "-i", memberID(do(packageLoader, "status"), "ldt_first"))
				want = []string{"ldt_filter", "ldt_globals"}
				qt.Check(t, qt.DeepEquals(members(packageLoader), want))
				do(older, "load", "veth1", objects+"/runconfig.o")
				want = append([]string{"ldt_drop_only"}, want...)
				qt.Check(t, qt.DeepEquals(members(packageLoader), want))
				do(older, "unload", "veth1", "-i", memberID(do(packageLoader, "status"), "ldt_filter"))
				want = []string{"ldt_drop_only", "ldt_globals"}
				qt.Check(t, qt.DeepEquals(members(packageLoader), want))
				qt.Check(t, qt.DeepEquals(members(older), want))
				do(packageLoader, "unload", "veth1", "--all")
				qt.Check(t, qt.StringContains(do(older, "status", "veth1"), "<No XDP program loaded!>"))
			})
		})
	}
}

// A bpffs is mounted when LIBXDP_BPFFS_AUTOMOUNT asks for it.
func TestAutomount(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	env := map[string]string{"LIBXDP_BPFFS": dir, "LIBXDP_BPFFS_AUTOMOUNT": "1"}
	b.Server.Do(t, func() {
		_, stderr, exit := packageLoader(t, env, "load", "veth1", objects+"/filter.o")
		qt.Assert(t, qt.Equals(exit, 0), qt.Commentf("%s", stderr))
		qt.Check(t, qt.Equals(stderr, ""))
		_, stderr, exit = packageLoader(t, env, "unload", "veth1", "--all")
		qt.Assert(t, qt.Equals(exit, 0), qt.Commentf("%s", stderr))
	})
	qt.Check(t, qt.IsTrue(kernel.IsBPFFS(dir)))
	qt.Check(t, qt.IsNil(unix.Unmount(dir, 0)))
}

// A damaged file gives an error, never a panic.
func TestDamagedFiles(t *testing.T) {
	for _, name := range []string{"filter.o", "several.o", "nobtf.o"} {
		whole, err := os.ReadFile(objects + "/" + name)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(xdploader.Programs(whole)))
		for n := range whole {
			if n%7 == 0 {
				_ = xdploader.Programs(whole[:n]) // some parts are complete enough
			}
			bent := append([]byte{}, whole...)
			bent[n] ^= 0xff
			_ = xdploader.Programs(bent)
		}
		qt.Check(t, qt.IsNotNil(xdploader.Programs(whole[:len(whole)/2])))
	}
}
