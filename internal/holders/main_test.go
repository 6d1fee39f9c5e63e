package holders_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) {
	kernel.RaiseMemlock()
	testenv.RegisterHelper("hold", func([]string) { holdHelper() })
	testenv.RegisterHelper("isolated", isolatedHelper)
	testenv.RegisterHelper("unprivileged", unprivilegedHelper)
	testenv.Main(m)
}

// isolatedHelper is a holdHelper in pid, mount and network namespaces of its own.
func isolatedHelper([]string) {
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), "LDT_HELPER=hold")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:  syscall.SIGKILL,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET,
	}
	runtime.LockOSThread() // the child is killed when this thread ends
	must(child.Start())
	fmt.Println("child", child.Process.Pid)
	child.Wait()
}

// holdHelper runs the commands on its stdin, and reports the end of each.
func holdHelper() {
	var kept []link.Link
	commands := map[string]func(args ...string) any{
		"open":  func(a ...string) any { return open(a[0], a[1]) },
		"close": func(a ...string) any { return unix.Close(number(a[0])) },
		"dup":   func(a ...string) any { return dup(number(a[0])) },
		// fork starts a child that has the descriptor as its 3; the second word is sleep, by another path.
		"fork": func(a ...string) any {
			child := exec.Command(append(a, "/bin/sleep")[1], "1000")
			file := os.NewFile(uintptr(dup(number(a[0]))), "")
			defer file.Close()
			child.ExtraFiles = []*os.File{file}
			child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			must(child.Start())
			return child.Process.Pid
		},
		// thread starts a thread that has a table of descriptors of its own.
		"thread": func(a ...string) any {
			tid := make(chan int)
			go func() {
				runtime.LockOSThread()
				must(unix.Unshare(unix.CLONE_FILES))
				open(a[0], a[1])
				tid <- unix.Gettid()
				select {}
			}()
			return <-tid
		},
		// send leaves the descriptor in the queue of a socket of its own.
		"send": func(a ...string) any {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			must(err)
			must(unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(number(a[0])), nil, 0))
			return unix.Close(number(a[0]))
		},
		"ring": func(a ...string) any { return register(number(a[0])) },
		"pin": func(a ...string) any {
			fd := open(a[0], a[1])
			defer unix.Close(fd)
			return pin(fd, a[2])
		},
		"mkdir":   func(a ...string) any { return os.MkdirAll(a[0], 0o700) },
		"private": func(...string) any { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		"bpffs":   func(a ...string) any { return unix.Mount("bpf", a[0], "bpf", 0, "") },
		"bind":    func(a ...string) any { return unix.Mount(a[0], a[1], "", unix.MS_BIND, "") },
		"tmpfs":   func(a ...string) any { return unix.Mount("t", a[0], "tmpfs", 0, "") },
		"umount":  func(a ...string) any { return unix.Unmount(a[0], unix.MNT_DETACH) },
		"chdir":   func(a ...string) any { return os.Chdir(a[0]) },
		"path": func(a ...string) any {
			fd, err := unix.Open(a[0], unix.O_PATH|unix.O_CLOEXEC, 0)
			must(err)
			return fd
		},
		"namespace": func(a ...string) any {
			fd, err := unix.Open(a[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
			must(err)
			return fd
		},
		"touch": func(a ...string) any { return os.WriteFile(a[0], nil, 0o600) },
		"crowd": func(a ...string) any {
			for range number(a[0]) {
				child := exec.Command("/bin/sleep", "1000")
				child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				must(child.Start())
			}
			return nil
		},
		// links makes that many links, pinned or open.
		"links": func(a ...string) any {
			iter, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: "ldt_iter", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "bpf_map", License: "GPL",
				Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
			})
			must(err)
			for i := range number(a[0]) {
				l, err := link.AttachIter(link.IterOptions{Program: iter})
				must(err)
				if len(a) > 1 {
					must(l.Pin(fmt.Sprintf("%s/%d", a[1], i)))
					l.Close()
				} else {
					kept = append(kept, l)
				}
			}
			return nil
		},
		"remove": func(a ...string) any { return os.Remove(a[0]) },
		"link":   func(a ...string) any { return os.Link(a[0], a[1]) },
	}
	runtime.LockOSThread() // children are killed when this thread ends
	fmt.Println("pid", os.Getpid())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		words := strings.Split(in.Text(), " ")
		fmt.Println("done", commands[words[0]](words[1:]...))
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	must(err)
	return n
}

// open opens an object by its id.
func open(kind, id string) int {
	var fd int
	switch id := number(id); hook.HolderKind(kind) {
	case hook.HolderLink:
		l, err := link.NewFromID(link.ID(id))
		must(err)
		fd = dup(l.(interface{ FD() int }).FD())
		l.Close()
	case hook.HolderProgram:
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		must(err)
		fd = dup(p.FD())
		p.Close()
	case hook.HolderMap:
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		must(err)
		fd = dup(m.FD())
		m.Close()
	}
	return fd
}

func dup(fd int) int {
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	must(err)
	return fd
}

// A holder is a helper process.
type holder struct {
	*testenv.Proc
	t   testing.TB
	Pid int // of the process that holds, in the test's pid namespace
}

func newHolder(t testing.TB) *holder {
	p := testenv.StartHelper(t, "hold")
	p.Expect(t, "pid")
	return &holder{p, t, p.Pid}
}

func isolated(t testing.TB) *holder {
	p := testenv.StartHelper(t, "isolated")
	pid := number(p.Expect(t, "child"))
	qt.Assert(t, qt.Equals(p.Expect(t, "pid"), "1"))
	h := &holder{p, t, pid}
	h.do("private")
	return h
}

// do has the holder run a command that must succeed.
func (h *holder) do(format string, args ...any) {
	h.t.Helper()
	h.Send(fmt.Sprintf(format, args...))
	qt.Assert(h.t, qt.Equals(h.Expect(h.t, "done"), "<nil>"))
}

// ask has the holder run a command, and returns the number that results.
func (h *holder) ask(format string, args ...any) int {
	h.t.Helper()
	h.Send(fmt.Sprintf(format, args...))
	return number(h.Expect(h.t, "done"))
}

// newLink attaches a program to a cgroup, lets take open or pin the link, and closes
// it.
func newLink(t testing.TB, take func(hook.HolderRef)) hook.HolderRef {
	t.Helper()
	prog, _ := testenv.CgroupProgram(t, "ldt_hold", hook.CgroupConnect4, 1)
	cgroup := testenv.NewCgroup(t)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup.Path, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	ref := hook.HolderRef{Kind: hook.HolderLink, ID: uint32(info.ID)}
	take(ref)
	return ref
}

// inOwn returns pins without their mounts in other namespaces than this process's, where it has some: a mount
// namespace that another process makes meanwhile has what is mounted here, too.
func inOwn(t testing.TB, pins []hook.HolderPin) []hook.HolderPin {
	t.Helper()
	own := mountNS(t, os.Getpid())
	isOwn := func(m hook.HolderMount) bool { return m.NS == own }
	pins = slices.Clone(pins)
	for i := range pins {
		if slices.ContainsFunc(pins[i].Mounts, isOwn) {
			pins[i].Mounts = slices.DeleteFunc(slices.Clone(pins[i].Mounts), func(m hook.HolderMount) bool { return !isOwn(m) })
		}
	}
	return pins
}

// stranger tells whether a process is not one of the test's, which run the same file.
func stranger(p hook.HolderProcess) bool {
	own, _ := os.Executable()
	return p.Exe != own
}

// look asks with iterators and with /proc alone, and checks that the answers agree.
func look(t testing.TB, ref hook.HolderRef) *hook.Holders {
	t.Helper()
	var answers []*hook.Holders
	for _, o := range []holders.Options{{}, {NoIterators: true}} {
		f := holders.Open(o)
		defer f.Close()
		var h *hook.Holders
		// The kernel may take a moment for what was just closed, and a process that looks at
		// all links and programs of the machine holds this one for a moment.
		for try := range 50 {
			view, err := f.Look()
			qt.Assert(t, qt.IsNil(err))
			h, err = view.Of(ref)
			qt.Assert(t, qt.IsNil(err))
			if !slices.ContainsFunc(h.Processes, stranger) && (o.NoIterators || h.Verified || try > 20) {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		answers = append(answers, h)
	}
	slow := *answers[1]
	qt.Check(t, qt.Equals(slow.Counted, 0))
	qt.Check(t, qt.StringContains(slow.Missing, "only /proc was looked at"))
	slow.Pins, answers[0].Pins = inOwn(t, slow.Pins), inOwn(t, answers[0].Pins)
	slow.Counted, slow.Verified, slow.Missing, slow.Suspects = answers[0].Counted, answers[0].Verified, answers[0].Missing, answers[0].Suspects
	qt.Check(t, qt.CmpEquals(slow, *answers[0]))
	return answers[0]
}

// complete is look with the check that all references were found.
func complete(t testing.TB, ref hook.HolderRef) *hook.Holders {
	t.Helper()
	h := look(t, ref)
	qt.Check(t, qt.Equals(h.Missing, ""))
	qt.Check(t, qt.Equals(h.Counted, h.Found))
	qt.Check(t, qt.IsTrue(h.Verified))
	return h
}
