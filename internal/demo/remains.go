package demo

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// A ledger has the ids of the BPF objects that the demo made, and its pins. A
// comparison of the whole machine before and after would blame the demo for the
// work of other processes.
type ledger struct {
	links, programs, maps map[uint32]bool
	pins                  map[string]bool
}

func newLedger() ledger {
	return ledger{map[uint32]bool{}, map[uint32]bool{}, map[uint32]bool{}, map[string]bool{}}
}

func (l ledger) String() string {
	return fmt.Sprintf("links: %d, programs: %d, maps: %d, pins: %d", len(l.links), len(l.programs), len(l.maps), len(l.pins))
}

// addChain enters the objects of a hook.
func (l ledger) addChain(c *hook.Chain) {
	if c.LinkID != 0 {
		l.links[c.LinkID] = true
	}
	for _, path := range c.Pins {
		l.pins[path] = true
	}
	l.addProgram(c.DispatcherID)
	for _, m := range c.Members {
		l.addProgram(m.Program.ID)
		if m.LinkID != 0 {
			l.links[m.LinkID] = true
		}
	}
}

// addMap enters a pinned map, if the pin exists.
func (l ledger) addMap(pin string) {
	if l.pins[pin] {
		return
	}
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		return
	}
	defer m.Close()
	l.pins[pin] = true
	if info, err := m.Info(); err == nil {
		if id, ok := info.ID(); ok {
			l.maps[uint32(id)] = true
		}
	}
}

// addProgram enters a program and its maps. The maps of a dispatcher are the
// slots and the description of the chain.
func (l ledger) addProgram(id uint32) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return // no program, or it is gone already
	}
	defer prog.Close()
	l.programs[id] = true
	if info, err := prog.Info(); err == nil {
		ids, _ := info.MapIDs()
		for _, m := range ids {
			l.maps[uint32(m)] = true
		}
	}
}

// left describes what still exists.
func (l ledger) left() []string {
	var left []string
	for _, kind := range []struct {
		name   string
		nextID int
		ids    map[uint32]bool
	}{
		{"link", unix.BPF_LINK_GET_NEXT_ID, l.links},
		{"program", unix.BPF_PROG_GET_NEXT_ID, l.programs},
		{"map", unix.BPF_MAP_GET_NEXT_ID, l.maps},
	} {
		for id := range kind.ids {
			if exists(kind.nextID, id) {
				left = append(left, fmt.Sprintf("%s %d", kind.name, id))
			}
		}
	}
	for path := range l.pins {
		if _, err := os.Lstat(path); err == nil {
			left = append(left, path)
		}
	}
	return left
}

// exists tells whether there is an object of that id. It does not open the
// object, because that would keep the object alive.
func exists(nextID int, id uint32) bool {
	attr := struct{ id, next, flags uint32 }{id: id - 1}
	_, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(nextID), uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	return errno == 0 && attr.next == id
}

// remains describes what is left of the demo.
func (s *stage) remains() []string {
	return vanishing(func() []string {
		left := s.made.left()
		for _, name := range []string{s.vars["CLIENT"], s.vars["NS"]} {
			if _, err := os.Lstat(filepath.Join(netnsDir, name)); err == nil {
				left = append(left, "network namespace "+name)
			}
		}
		for _, path := range []string{s.bpffs, s.cgroup} {
			if _, err := os.Lstat(path); err == nil {
				left = append(left, path)
			}
		}
		return append(left, processes(s.name)...)
	})
}

// vanishing calls left again for a while before it returns the result: the
// kernel frees objects some milliseconds after the last reference is gone.
func vanishing(left func() []string) []string {
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if now := left(); len(now) == 0 || time.Since(start) > 3*time.Second {
			return now
		}
	}
}

// processes finds processes with a word in their command line.
func processes(word string) []string {
	var found []string
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		if line, err := os.ReadFile(path); err == nil && bytes.Contains(line, []byte(word)) {
			found = append(found, "process "+filepath.Base(filepath.Dir(path)))
		}
	}
	return found
}

// pinned lists the pins in a folder.
func pinned(dir string) []string {
	var paths []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			paths = append(paths, path)
		}
		return nil
	})
	return paths
}

// sweep removes what demos left behind that were killed with SIGKILL.
func sweep() {
	sweepIn(netnsDir, removeNetNS)
	sweepIn(os.TempDir(), func(path string) error {
		return errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	})
	if root, err := cgroupRoot(); err == nil {
		sweepIn(root, removeCgroup)
	}
}

// sweepIn removes each entry with the name of a demo that no longer runs.
func sweepIn(dir string, remove func(path string) error) {
	paths, _ := filepath.Glob(filepath.Join(dir, prefix+"*"))
	for _, path := range paths {
		var pid int
		if n, _ := fmt.Sscanf(filepath.Base(path), prefix+"%d", &pid); n == 1 && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			_ = remove(path)
		}
	}
}
