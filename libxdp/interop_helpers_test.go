package libxdp

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// tools is one version of xdp-tools.
type tools struct {
	version string
	config  uint8 // the version that its library writes
}

// withTools runs a test with each installed version: with programs called
// xdp-loader-1.5.4, or xdp-loader alone.
func withTools(t *testing.T, test func(*testing.T, *theirs)) {
	t.Helper()
	testenv.NeedFreplace(t)
	found := map[string]bool{}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		paths, _ := filepath.Glob(filepath.Join(dir, "xdp-loader*"))
		for _, path := range paths {
			found[strings.TrimPrefix(strings.TrimPrefix(filepath.Base(path), "xdp-loader"), "-")] = true
		}
	}
	if len(found) == 0 {
		t.Skip("needs xdp-loader (xdp-tools), which is not installed: runs in the kernel matrix")
	}
	for version := range found {
		t.Run(version, func(t *testing.T) {
			x := tools{version, MaxVersion}
			if _, minor, ok := strings.Cut(version, "."); ok {
				minor, _, _ = strings.Cut(minor, ".")
				n, err := strconv.Atoi(minor)
				qt.Assert(t, qt.IsNil(err))
				x.config = versionOfLibrary(n)
			}
			test(t, &theirs{newScene(t), x})
		})
	}
}

// theirs is a scene with xdp-tools.
type theirs struct {
	*scene
	tools
}

// command returns a call of a tool in the namespace of a scene.
func (x *theirs) command(tool string, args ...string) *exec.Cmd {
	if x.version != "" {
		tool += "-" + x.version
	}
	cmd := exec.Command(tool, args...)
	cmd.Env = append(os.Environ(), "LIBXDP_BPFFS="+x.BPFFS)
	return cmd
}

// try runs xdp-loader in the namespace of the server.
func (x *theirs) try(args ...string) (string, error) {
	var out bytes.Buffer
	cmd := x.command("xdp-loader", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := x.Server.Run(cmd.Run)
	return out.String(), err
}

func (x *theirs) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := x.try(args...)
	if err != nil {
		t.Fatalf("xdp-loader %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// refused asserts that xdp-loader fails, with words in its message.
func (x *theirs) refused(t *testing.T, words string, args ...string) {
	t.Helper()
	out, err := x.try(args...)
	qt.Assert(t, qt.IsNotNil(err), qt.Commentf("xdp-loader %v: %s", args, out))
	qt.Assert(t, qt.StringContains(out, words))
}

// object returns the path of a compiled program of this project.
func object(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../programs/internal/object/" + name + "_bpfel.o")
	qt.Assert(t, qt.IsNil(err))
	_, err = os.Stat(path)
	qt.Assert(t, qt.IsNil(err))
	return path
}

func (x *theirs) loadArgs(t *testing.T, name string, args ...string) []string {
	return slices.Concat([]string{"load", x.Name, object(t, name), "-s", "xdp"}, args)
}

// load attaches one of this project's programs by xdp-loader.
func (x *theirs) load(t *testing.T, name string, args ...string) {
	t.Helper()
	x.run(t, x.loadArgs(t, name, args...)...)
}

// unload removes a member by xdp-loader.
func (x *theirs) unload(t *testing.T, name string) {
	t.Helper()
	x.run(t, "unload", x.Name, "-i", fmt.Sprint(x.member(t, name).Program.ID))
}

func (s *scene) member(t *testing.T, name string) *Member {
	t.Helper()
	m, err := s.read(t).Find(hook.Ref(name))
	qt.Assert(t, qt.IsNil(err))
	return m
}

// row is a member as "xdp-loader status" shows it.
type row struct {
	Prio    int
	Name    string
	ID      uint32
	Actions string
}

func (x *theirs) status(t *testing.T) []row {
	t.Helper()
	out := x.run(t, "status", x.Name)
	var rows []row
	for line := range strings.Lines(out) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "=>")
		if !ok {
			continue
		}
		f := strings.Fields(rest) // prio, name, id, tag, actions
		qt.Assert(t, qt.IsTrue(len(f) >= 4), qt.Commentf("%s", out))
		prio, err := strconv.Atoi(f[0])
		qt.Assert(t, qt.IsNil(err))
		id, err := strconv.ParseUint(f[2], 10, 32)
		qt.Assert(t, qt.IsNil(err))
		rows = append(rows, row{prio, f[1], uint32(id), strings.Join(f[4:], "")})
	}
	return rows
}

// wantSame asserts that xdp-loader lists the chain as this package reads it.
func (x *theirs) wantSame(t *testing.T, members ...string) {
	t.Helper()
	c := x.read(t)
	qt.Assert(t, qt.DeepEquals(names(c), members))
	x.wantPins(t)
	var want []row
	if c != nil {
		for _, m := range c.Members {
			qt.Assert(t, qt.IsFalse(m.Missing))
			var actions []string
			for _, v := range m.ContinueOn.List() {
				actions = append(actions, "XDP_"+strings.ToUpper(v.String()))
			}
			want = append(want, row{m.Priority, m.Name, m.Program.ID, strings.Join(actions, ",")})
		}
	}
	qt.Assert(t, qt.DeepEquals(x.status(t), want))
	if c != nil {
		qt.Assert(t, qt.Equals(c.Config.Version, x.config))
	}
}

// mapOf opens a member's map by its name.
func (s *scene) mapOf(t *testing.T, member, name string) *ebpf.Map {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.member(t, member).Program.ID))
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		qt.Assert(t, qt.IsNil(err))
		mi, err := m.Info()
		qt.Assert(t, qt.IsNil(err))
		if mi.Name == name {
			return m
		}
		m.Close()
	}
	t.Fatalf("%s has no map %s", member, name)
	return nil
}

// counted returns how many packets the program "count" has seen so far.
func (s *scene) counted(t *testing.T) int {
	t.Helper()
	m := s.mapOf(t, "count", "total")
	defer m.Close()
	var perCPU []struct{ Packets, Bytes uint64 }
	qt.Assert(t, qt.IsNil(m.Lookup(uint32(0), &perCPU)))
	n := 0
	for _, c := range perCPU {
		n += int(c.Packets)
	}
	return n
}

// wantCounted asserts that the program "count" sees the packets that pass.
func (s *scene) wantCounted(t *testing.T) {
	t.Helper()
	before := s.counted(t)
	qt.Assert(t, qt.Equals(s.Passed(t, port, 10), 10))
	s.Settle(t)
	qt.Assert(t, qt.IsTrue(s.counted(t) >= before+10))
}

// dropClient makes the program "droplist" drop the client's packets, or stop
// dropping them.
func (s *scene) dropClient(t *testing.T, do bool) {
	t.Helper()
	m := s.mapOf(t, "droplist", "droplist_v4")
	defer m.Close()
	key := struct {
		Len  uint32
		Addr [4]byte
	}{32, netip.MustParseAddr(testenv.ClientIPv4.String()).As4()}
	if do {
		qt.Assert(t, qt.IsNil(m.Put(key, uint64(0))))
	} else if err := m.Delete(key); err != nil && err != unix.ENOENT {
		t.Fatal(err)
	}
}
