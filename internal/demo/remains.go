package demo

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
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

// left describes what still exists. It opens no object, because that would keep the
// object alive.
func (l ledger) left() []string {
	var left []string
	find := func(kind string, ids map[uint32]bool, exists func(id uint32) bool) {
		for id := range ids {
			if exists(id) {
				left = append(left, fmt.Sprintf("%s %d", kind, id))
			}
		}
	}
	find("link", l.links, kernel.LinkMayExist)
	find("program", l.programs, func(id uint32) bool {
		next, err := ebpf.ProgramGetNextID(ebpf.ProgramID(id - 1))
		return err == nil && uint32(next) == id
	})
	find("map", l.maps, func(id uint32) bool {
		next, err := ebpf.MapGetNextID(ebpf.MapID(id - 1))
		return err == nil && uint32(next) == id
	})
	return append(left, existing(slices.Collect(maps.Keys(l.pins))...)...)
}

// existing returns the paths at which there is a file.
func existing(paths ...string) []string {
	return slices.DeleteFunc(paths, func(path string) bool {
		_, err := os.Lstat(path)
		return err != nil
	})
}

// remains describes what is left of the demo.
func (s *stage) remains() []string {
	return vanishing(func() []string {
		left := existing(filepath.Join(kernel.NetNSDir, s.vars["CLIENT"]), filepath.Join(kernel.NetNSDir, s.vars["NS"]), s.bpffs, s.cgroup)
		return slices.Concat(s.made.left(), left, processes(s.name))
	})
}

// vanishing calls left again for a while before it returns the result: the
// kernel frees objects some milliseconds after the last reference is gone.
func vanishing(left func() []string) []string {
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		now := left()
		if len(now) > 0 && time.Since(start) < 3*time.Second {
			continue
		}
		if !slices.ContainsFunc(now, func(what string) bool { return !isSlot(what) }) {
			return nil
		}
		return now
	}
}

// isSlot tells whether what is left is a slot. If slots are all that is left, the kernel has
// lost them: no program, pin or process of the demo is there that could hold one. That happens where another
// process, for instance a list of the whole machine, opens a slot just after its owner
// closed it: see hold in internal/state.
func isSlot(what string) bool {
	var id uint32
	if n, _ := fmt.Sscanf(what, "map %d", &id); n != 1 {
		return false
	}
	m, err := ebpf.NewMapFromID(ebpf.MapID(id))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer m.Close()
	return m.Type() == ebpf.ProgramArray
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
	sweepIn(kernel.NetNSDir, removeNetNS)
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
