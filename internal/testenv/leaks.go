package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// CheckLeaks fails the test if it leaves anything behind: BPF links, programs and maps of this project, open
// files of this process, namespaces, cgroups, child processes, goroutines of this package. Call it first:
// functions that are registered with t.Cleanup later run before the check. It also fails the test if
// the library returned an error that [CheckError] refuses.
//
// Programs and maps of this project have names that begin with libdispatcher, ld_, ldt_ or xdp_disp. The check
// covers these, links that carry such programs, and every new link of a type that the project attaches. What
// others hold or have pinned is theirs: a user of the machine may attach members during a test.
//
// The check only logs prog arrays that the kernel lost: no descriptor, pin or program holds them, so the
// test cannot be the cause. That happens where all CPUs are busy, and where another process, such as a list of the
// machine, opens an array just after its last descriptor was closed: see hold in internal/state.
func CheckLeaks(t testing.TB) {
	t.Helper()
	Require(t)
	startPoller(t)
	before, err := inventory()
	if err != nil {
		t.Fatalf("leak check: %v", err)
	}
	t.Cleanup(func() {
		t.Helper()
		reportErrors(t)
		leaked, lost, err := waitForLeaks(before)
		if err != nil {
			t.Errorf("leak check: %v", err)
		}
		if len(lost) > 0 {
			t.Logf("the kernel lost:\n\t%s", strings.Join(lost, "\n\t"))
		}
		if len(leaked) > 0 {
			t.Errorf("leaked:\n\t%s", strings.Join(leaked, "\n\t"))
		}
	})
}

// things are what may leak: a key that is never reused, and a description for the
// reader.
type things map[string]string

const (
	// leakPatience is how long the kernel may take to free an unused object.
	leakPatience = 10 * time.Second

	// lostPatience is the same for prog arrays that nobody holds: see [CheckLeaks].
	lostPatience = 2 * time.Second

	// sharedPatience is the same beside other test processes. What only a device or cgroup of theirs holds
	// cannot be told from a leak, and goes with their test.
	sharedPatience = time.Minute

	// askAfter is how long the check takes what there is for the test's own. After that it asks who holds it.
	askAfter = 100 * time.Millisecond

	// openAfter is how long the check uses only the ids of BPF objects. After that it opens each object once
	// to learn its name. Opening and closing a prog array just after its last descriptor was closed makes the
	// array stay forever: the kernel loses the reference for the deferred clearing when the clearing is
	// queued already (Linux 6.18). So it is open for nobody when the check opens it.
	openAfter = 2 * askAfter
)

// waitForLeaks returns what exists now and did not exist before, unless it goes away in
// time, and apart from that the prog arrays that the kernel lost. BPF objects that come meanwhile are not the test's,
// which has ended.
func waitForLeaks(before things) (leaked, lost []string, err error) {
	first, err := inventory()
	if err != nil {
		return nil, nil, err
	}
	opened, theirs, asked, ours := things{}, things{}, things{}, things{}
	// What this process holds is its own, also while another looks at it.
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		now, err := inventory()
		if err != nil {
			return nil, nil, err
		}
		maps.DeleteFunc(now, func(key, _ string) bool {
			return has(before, key) || has(theirs, key) && !has(ours, key) || isBPF(key) && !has(first, key)
		})
		age := time.Since(start)
		if len(now) > 0 && age > askAfter {
			addHeld(ours, theirs)
		}
		if len(now) > 0 && age > openAfter {
			addReachedByOthers(theirs, asked)
			maps.DeleteFunc(now, func(key, _ string) bool { return has(theirs, key) && !has(ours, key) })
			nameObjects(now, opened)
		}
		if len(now) == 0 {
			return nil, nil, nil
		}
		if age > lostPatience {
			addHolders(now)
			leaked, lost := split(slices.Sorted(maps.Values(now)))
			if len(leaked) == 0 || age > sharedPatience || age > leakPatience && alone() {
				return leaked, lost, nil
			}
		}
	}
}

func has(list things, key string) bool {
	_, known := list[key]
	return known
}

func isBPF(key string) bool {
	kind, _, _ := strings.Cut(key, " ")
	_, known := bpfKinds[kind]
	return known
}

// inventory lists what exists. BPF objects have only ids at first, see
// [nameObjects].
func inventory() (things, error) {
	found := things{}
	for _, list := range []func(things) error{bpfObjects, files, namespaces, cgroups, children, goroutines} {
		if err := list(found); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// bpfKinds are the kinds of BPF objects: the key of the id in fdinfo, the function that lists them, and
// the function that describes an object. The description is empty for an object of another project.
var bpfKinds = map[string]struct {
	nextID   int
	describe func(id uint32) (string, error)
}{
	"link_id": {unix.BPF_LINK_GET_NEXT_ID, describeLink},
	"prog_id": {unix.BPF_PROG_GET_NEXT_ID, describeProgram},
	"map_id":  {unix.BPF_MAP_GET_NEXT_ID, describeMap},
}

func bpfObjects(found things) error {
	for kind, k := range bpfKinds {
		attr := struct{ id, next, flags uint32 }{}
		for {
			_, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(k.nextID), uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
			if errno == unix.ENOENT {
				break
			} else if errno != 0 {
				return fmt.Errorf("enumerate %ss: %w", kind, errno)
			}
			attr.id = attr.next
			key := fmt.Sprintf("%s %d", kind, attr.id)
			found[key] = key
		}
	}
	return nil
}

// nameObjects gives the BPF objects in found their descriptions and removes objects of other projects.
// opened has the descriptions of earlier calls.
func nameObjects(found, opened things) {
	for key := range found {
		kind, number, _ := strings.Cut(key, " ")
		k, isBPF := bpfKinds[kind]
		if !isBPF {
			continue
		}
		if _, known := opened[key]; !known {
			id, _ := strconv.ParseUint(number, 10, 32)
			words, err := k.describe(uint32(id))
			if errors.Is(err, fs.ErrNotExist) {
				delete(found, key) // gone meanwhile
				continue
			} else if err != nil {
				continue // try later: a link under construction cannot be opened yet (EAGAIN)
			}
			opened[key] = words
		}
		if opened[key] == "" {
			delete(found, key)
		} else {
			found[key] = opened[key]
		}
	}
}

func ours(name string) bool {
	return strings.HasPrefix(name, "libdispatcher") || strings.HasPrefix(name, "ld_") || strings.HasPrefix(name, "ldt_") ||
		strings.HasPrefix(name, "xdp_disp") // a dispatcher of libxdp, or its configuration
}

// linkTypes are the types of links that the project attaches.
var linkTypes = []link.Type{
	link.XDPType, link.TCXType, link.CgroupType, link.NetkitType, link.NetfilterType, link.NetNsType,
}

func describeLink(id uint32) (string, error) {
	l, err := link.NewFromID(link.ID(id))
	if err != nil {
		return "", err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return "", err
	}
	name, err := programName(info.Program)
	if err != nil || !slices.Contains(linkTypes, info.Type) && !ours(name) {
		return "", err
	}
	return fmt.Sprintf("link %d (type %d, program %d %q)", id, info.Type, info.Program, name), nil
}

func describeProgram(id uint32) (string, error) {
	name, err := programName(ebpf.ProgramID(id))
	if err != nil || !ours(name) {
		return "", err
	}
	return fmt.Sprintf("program %d %q", id, name), nil
}

func programName(id ebpf.ProgramID) (string, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "", err
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return "", err
	}
	return info.Name, nil
}

func describeMap(id uint32) (string, error) {
	m, err := ebpf.NewMapFromID(ebpf.MapID(id))
	if err != nil {
		return "", err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil || !ours(info.Name) {
		return "", err
	}
	if info.Type == ebpf.ProgramArray {
		return fmt.Sprintf("%s %d %q", slot, id, info.Name), nil
	}
	return fmt.Sprintf("map %d %q", id, info.Name), nil
}

// slot describes a prog array in a list of leaks.
const slot = "prog array"

// split separates leaks from prog arrays that no process holds, which are lost.
func split(things []string) (leaked, lost []string) {
	for _, what := range things {
		if strings.HasPrefix(what, slot) && !strings.Contains(what, "held by") {
			lost = append(lost, what)
		} else {
			leaked = append(leaked, what)
		}
	}
	return leaked, lost
}

func files(found things) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		if err != nil {
			continue // the descriptor of the folder itself
		}
		fd := fmt.Sprintf("fd %s -> %s", entry.Name(), target)
		found[fd] = fd
	}
	return nil
}

func namespaces(found things) error {
	paths, err := filepath.Glob(fmt.Sprintf("%s/%s%d-*", kernel.NetNSDir, prefix, os.Getpid()))
	for _, path := range paths {
		found[path] = "netns " + path
	}
	return err
}

func cgroups(found things) error {
	root, err := cgroupRoot()
	if err != nil {
		return nil // so there are none
	}
	paths, err := filepath.Glob(fmt.Sprintf("%s/%s%d-*", root, prefix, os.Getpid()))
	for _, path := range paths {
		found[path] = "cgroup " + path
	}
	return err
}

func children(found things) error {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return err
	}
	for _, stat := range stats {
		// pid (comm) state ppid ...: comm may contain anything, brackets too.
		line, err := os.ReadFile(stat)
		after := bytes.LastIndexByte(line, ')')
		if err != nil || after < 0 {
			continue // gone meanwhile
		}
		fields := strings.Fields(string(line[after+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			child := "child process " + string(line[:after+1])
			found[child] = child
		}
	}
	return nil
}

// goroutines lists the goroutines that run code of this package, except the calling one, which is the
// first in the dump.
func goroutines(found things) error {
	dump := make([]byte, 1<<20)
	dump = dump[:runtime.Stack(dump, true)]
	_, others, _ := bytes.Cut(dump, []byte("\n\n"))
	for stack := range bytes.SplitSeq(others, []byte("\n\n")) {
		if !bytes.Contains(stack, []byte("/internal/testenv.")) {
			continue
		}
		// goroutine 12 [chan receive, 2 minutes]:
		id, _, _ := bytes.Cut(stack, []byte(" ["))
		found[string(id)] = string(stack)
	}
	return nil
}

// startPoller makes the Go runtime open its poller's files now, so that they do not look like leaks.
func startPoller(t testing.TB) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
}

// addHolders adds to each BPF object the processes that hold it, to help the reader find the cause.
func addHolders(leaked things) {
	eachHeld(func(pid, fd, key string) {
		if _, ok := leaked[key]; ok {
			leaked[key] += fmt.Sprintf(", held by pid %s, fd %s", pid, fd)
		}
	})
}
