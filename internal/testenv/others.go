package testenv

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// addHeld adds the BPF objects that this process and its children hold, and those that others hold. No object
// is opened: see openAfter.
func addHeld(ours, theirs things) {
	own := things{}
	_ = children(own)
	eachHeld(func(pid, _, key string) {
		switch {
		case !isBPF(key):
		case pid == fmt.Sprint(os.Getpid()) || isChild(own, pid):
			ours[key] = key
		default:
			theirs[key] = key
		}
	})
}

// addReachedByOthers adds the BPF objects that are pinned in a bpffs that is not a test's of this process,
// and what they and those in the list hold. It asks each object once: see openAfter.
func addReachedByOthers(theirs, asked things) {
	for _, key := range pinnedByOthers() {
		theirs[key] = key
	}
	for more := true; more; {
		more = false
		for key := range maps.Clone(theirs) {
			if has(asked, key) {
				continue
			}
			asked[key] = key
			for _, held := range heldBy(key) {
				theirs[held] = held
				more = true
			}
		}
	}
}

func isChild(children things, pid string) bool {
	for key := range children {
		if strings.HasPrefix(key, "child process "+pid+" ") {
			return true
		}
	}
	return false
}

// eachHeld calls fn for each line of fdinfo of all processes: the key is that of a BPF object where the
// line names one.
func eachHeld(fn func(pid, fd, key string)) {
	infos, _ := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	for _, path := range infos {
		info, _ := os.ReadFile(path) // the process may be gone
		for line := range strings.Lines(string(info)) {
			fn(strings.Split(path, "/")[2], filepath.Base(path), strings.Join(strings.Fields(strings.Replace(line, ":", " ", 1)), " "))
		}
	}
}

// pinnedByOthers lists what is pinned in all mounts of bpffs, but those that a test of this process made.
func pinnedByOthers() (keys []string) {
	seen := map[uint64]bool{}
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, table := range tables {
		mounts, _ := procfs.Mounts(table)
		for _, m := range mounts {
			if m.Type != "bpf" || seen[m.Dev] || strings.HasPrefix(filepath.Base(m.Point), fmt.Sprintf("%s%d-", prefix, os.Getpid())) {
				continue
			}
			// The root folder of some processes cannot be entered; others have the same mounts.
			seen[m.Dev] = filepath.WalkDir(filepath.Dir(table)+"/root"+m.Point, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					if key, err := pinned(path); err == nil {
						keys = append(keys, key)
					}
				}
				return err
			}) == nil
		}
	}
	return keys
}

func pinned(path string) (key string, err error) {
	p, err := pin.Load(path, nil)
	if err != nil {
		return "", err
	}
	defer p.Close()
	switch p := p.(type) {
	case *ebpf.Program:
		info, err := p.Info()
		if err != nil {
			return "", err
		}
		id, _ := info.ID()
		return fmt.Sprint("prog_id ", id), nil
	case *ebpf.Map:
		info, err := p.Info()
		if err != nil {
			return "", err
		}
		id, _ := info.ID()
		return fmt.Sprint("map_id ", id), nil
	case link.Link:
		info, err := p.Info()
		if err != nil {
			return "", err
		}
		return fmt.Sprint("link_id ", info.ID), nil
	}
	return "", fmt.Errorf("%s is a %T", path, p)
}

// heldBy lists what a BPF object holds: a link its program, a program its maps, and a map of programs or
// maps these.
func heldBy(key string) (keys []string) {
	var id uint32
	var kind string
	if n, _ := fmt.Sscanf(key, "%s %d", &kind, &id); n != 2 {
		return nil
	}
	switch kind {
	case "link_id":
		l, err := link.NewFromID(link.ID(id))
		if err != nil {
			return nil
		}
		defer l.Close()
		if info, err := l.Info(); err == nil {
			keys = append(keys, fmt.Sprint("prog_id ", info.Program))
		}
	case "prog_id":
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if err != nil {
			return nil
		}
		defer p.Close()
		if info, err := p.Info(); err == nil {
			ids, _ := info.MapIDs()
			for _, id := range ids {
				keys = append(keys, fmt.Sprint("map_id ", id))
			}
		}
	case "map_id":
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		if err != nil {
			return nil
		}
		defer m.Close()
		holds := map[ebpf.MapType]string{ebpf.ProgramArray: "prog_id ", ebpf.ArrayOfMaps: "map_id ", ebpf.HashOfMaps: "map_id "}[m.Type()]
		if holds == "" || m.KeySize() != 4 || m.ValueSize() != 4 {
			return nil
		}
		var k, v uint32
		for it := m.Iterate(); it.Next(&k, &v); {
			keys = append(keys, holds+fmt.Sprint(v))
		}
	}
	return keys
}
