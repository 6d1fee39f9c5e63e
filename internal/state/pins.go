package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	folderName   = "libdispatcher"
	rootName     = "root"
	slotName     = "slot" // of a member of a chain
	linkName     = "link" // of a member with a link of its own
	memberPrefix = "member_"
	mapPrefix    = "map_"
	tmpPrefix    = "tmp_"
)

// Pins is the folder of libdispatcher in a bpffs.
type Pins struct{ dir string }

// OpenPins returns the folder in the bpffs at path. The folder need not exist yet. The
// error is fs.ErrNotExist if path is not in a bpffs, and fs.ErrPermission if other users
// can change the pins. OpenPins removes an empty folder that another user has put there.
func OpenPins(path string) (*Pins, error) {
	if err := kernel.FindBPFFS(path); err != nil {
		return nil, err
	}
	p := &Pins{filepath.Join(path, folderName)}
	err := kernel.Guarded(p.dir)
	// An empty folder of another user is in the way of ours, and holds nothing.
	if err == nil || errors.Is(err, fs.ErrNotExist) || unix.Rmdir(p.dir) == nil {
		return p, nil
	}
	return nil, err
}

// Path returns the path of a pin in a chain's folder.
func (p *Pins) Path(folder string, elem ...string) string {
	return filepath.Join(append([]string{p.dir, folder}, elem...)...)
}

// RootPath is the path of the pin of a chain's root link.
func (p *Pins) RootPath(folder string) string { return p.Path(folder, rootName) }

// HeldPath is the path of the pin of a member's slot or link.
func (p *Pins) HeldPath(folder, member string) string {
	return p.Path(folder, memberPrefix+escape(member), heldName(folder))
}

// List returns the paths of the pins that keep a chain and its members, sorted; not those of
// its dispatcher, see PinDispatcher.
func (p *Pins) List(folder string) []string {
	var paths []string
	_ = filepath.WalkDir(p.Path(folder), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !ofDispatcher(d.Name()) {
			paths = append(paths, path)
		}
		return nil
	})
	return paths
}

// Has tells whether the member is pinned.
func (p *Pins) Has(folder, member string) bool {
	_, err := os.Lstat(p.HeldPath(folder, member))
	return err == nil
}

// HasRoot tells whether the root link of the chain is pinned.
func (p *Pins) HasRoot(folder string) bool {
	_, err := os.Lstat(p.RootPath(folder))
	return err == nil
}

// Chains returns the folders of all chains.
func (p *Pins) Chains() ([]string, error) { return folders(p.dir, "xdp_") }

// Links returns the folders of all members with links of their own.
func (p *Pins) Links() ([]string, error) {
	var all []string
	for _, family := range linkFamilies {
		of, err := folders(p.dir, family+"_")
		if err != nil {
			return nil, err
		}
		all = append(all, of...)
	}
	return all, nil
}

// Members returns the names of a chain's pinned members.
func (p *Pins) Members(folder string) ([]string, error) {
	names, err := folders(p.Path(folder), memberPrefix)
	var members []string
	for _, name := range names {
		if member, err := unescape(strings.TrimPrefix(name, memberPrefix)); err == nil {
			members = append(members, member)
		}
	}
	return members, err
}

// folders returns the names of the folders in dir that begin with prefix.
func folders(dir, prefix string) ([]string, error) {
	entries, err := entriesOf(dir, prefix)
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// entriesOf returns the entries of dir that begin with prefix; none if there is no dir.
func entriesOf(dir, prefix string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, kernel.Errno("read pins", err)
	}
	return slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return !strings.HasPrefix(e.Name(), prefix) }), nil
}

// A Pinner can be pinned: a map, a program, a link.
type Pinner interface{ Pin(path string) error }

// A MemberPins is what to pin of a member.
type MemberPins struct {
	Name string
	Slot *ebpf.Map            // either this
	Link Pinner               // or this, which must not be pinned yet
	Maps map[string]*ebpf.Map // the program's own maps, by name
}

// pinHeld pins the member's slot or link.
func (m MemberPins) pinHeld(path string) error {
	if m.Link != nil {
		return kernel.PathErrno("pin", path, m.Link.Pin(path))
	}
	return pinClone(m.Slot, path)
}

// Add pins a member. Others see this as one step: Add fills the member's folder under
// another name and then renames it. For the first member of a chain this is the
// chain's folder with its root link. root may be nil.
func (l *Locked) Add(folder string, root Pinner, m MemberPins) (err error) {
	tmp := filepath.Join(l.dir, fmt.Sprintf("%s%d_%d", tmpPrefix, os.Getpid(), time.Now().UnixNano()))
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return kernel.Errno("pin", err)
	}
	defer func() {
		if err != nil {
			err = kernel.Undo(err, l.removeAll(tmp))
		}
	}()

	member := memberPrefix + escape(m.Name)
	from, to := filepath.Join(tmp, member), l.Path(folder, member)
	if err := os.Mkdir(from, 0o700); err != nil {
		return kernel.Errno("pin", err)
	}
	if err := m.pinHeld(filepath.Join(from, heldName(folder))); err != nil {
		return err
	}
	kernel.Step("pin: it is held")
	for name, mp := range m.Maps {
		if err := pinClone(mp, filepath.Join(from, mapPrefix+escape(name))); err != nil {
			return err
		}
	}
	rooted := root == nil || l.HasRoot(folder)
	if !rooted {
		if err := pinRoot(root, filepath.Join(tmp, rootName)); err != nil {
			return err
		}
	}
	if _, err := os.Lstat(l.Path(folder)); errors.Is(err, fs.ErrNotExist) {
		from, to = tmp, l.Path(folder)
	} else {
		// Pins may have been removed by hand: then the root is missing, or a part of
		// the member is there.
		if !rooted {
			if err := os.Rename(filepath.Join(tmp, rootName), l.RootPath(folder)); err != nil {
				return kernel.Errno("pin the root link", err)
			}
		}
		if err := l.discard(to); err != nil {
			return err
		}
	}
	kernel.Step("pin: before the rename")
	if err := os.Rename(from, to); err != nil {
		return kernel.Errno("pin", err)
	}
	kernel.Step("pin: after the rename")
	_ = os.Remove(tmp) // empty, if it is there; else the next change removes it
	return nil
}

func pinRoot(root Pinner, path string) error {
	return kernel.Errno("the root link", kernel.PathErrno("pin", path, root.Pin(path)))
}

// pinClone pins a second descriptor of the map. If cilium/ebpf has pinned the first
// one before, it would move that pin.
func pinClone(m *ebpf.Map, path string) error {
	c, err := m.Clone()
	if err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	defer c.Close()
	return kernel.PathErrno("pin", path, c.Pin(path))
}

// SetMaps replaces the pins of a member's maps by those of its new program's maps, after
// the program is in its place. A map that both programs use is pinned all the time. It does
// nothing without the lock, or for a member that is not pinned. The error is ErrPins.
func (l *Locked) SetMaps(folder, member string, maps map[string]*ebpf.Map) error {
	if l == nil || !l.Has(folder, member) {
		return nil
	}
	if err := l.setMaps(folder, member, maps); err != nil {
		return hook.Because(hook.ErrPins, "the new program runs, but its maps are not pinned: %w", err).
			Hint("make %s writable, and replace the program again", l.BPFFS())
	}
	return nil
}

func (l *Locked) setMaps(folder, member string, maps map[string]*ebpf.Map) error {
	dir := l.Path(folder, memberPrefix+escape(member))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return kernel.Errno("pin maps", err)
	}
	keep := map[string]bool{heldName(folder): true}
	for name, m := range maps {
		file := mapPrefix + escape(name)
		keep[file] = true
		tmp := filepath.Join(dir, tmpPrefix+file)
		_ = os.Remove(tmp)
		if err := pinClone(m, tmp); err != nil {
			return err
		}
		kernel.Step("pin maps: before the rename")
		if err := os.Rename(tmp, filepath.Join(dir, file)); err != nil {
			return kernel.Errno("pin maps", err)
		}
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return kernel.Errno("unpin maps", err)
			}
		}
	}
	return nil
}

// Remove removes the pins of a member. After the last member it removes the chain's
// folder with the root. It is no error if there are no such pins.
func (l *Locked) Remove(folder, member string) error {
	return l.RemoveWith(folder, member, func() error { return nil })
}

// RemoveWith is Remove together with a change that the pins must not outlive: on an error of
// either, both are as before.
func (l *Locked) RemoveWith(folder, member string, change func() error) error {
	members, err := l.Members(folder)
	if err != nil {
		return err
	}
	path := l.Path(folder, memberPrefix+escape(member))
	if len(members) == 1 && members[0] == member {
		path = l.Path(folder)
	}
	tmp, err := l.hide(path)
	if err != nil {
		return err
	}
	if err := change(); err != nil {
		back := os.Rename(tmp, path)
		if errors.Is(back, fs.ErrNotExist) { // there were no pins
			back = nil
		}
		return kernel.Undo(err, kernel.Errno("pin again", back))
	}
	return l.removeAll(tmp)
}

// RemoveChain removes all pins of a chain.
func (l *Locked) RemoveChain(folder string) error { return l.discard(l.Path(folder)) }

// DropChain is RemoveChain for pins that hold nothing of use any more. Pins that
// cannot be removed at once become leftovers, which the next change removes.
func (l *Locked) DropChain(folder string) error {
	tmp, err := l.hide(l.Path(folder))
	_ = l.removeAll(tmp)
	return err
}

// discard removes a folder. Others see this as one step: discard renames it first.
func (l *Locked) discard(path string) error {
	tmp, err := l.hide(path)
	if err != nil {
		return err
	}
	return l.removeAll(tmp)
}

// removeAll removes a folder of pins with all that is in it. It is no error if there is
// none. Other than os.RemoveAll it has one folder open at a time, for which it gives up
// the spare descriptor.
func (l *Locked) removeAll(path string) error {
	l.spare.Close()
	defer func() { l.spare, _ = os.Open(l.dir) }()
	var remove func(path string) error
	remove = func(path string) error {
		err := os.Remove(path)
		if !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
		entries, err := os.ReadDir(path)
		for _, e := range entries {
			if err := remove(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		return os.Remove(path)
	}
	if err := remove(path); !errors.Is(err, fs.ErrNotExist) {
		return kernel.Errno("unpin", err)
	}
	return nil
}

// hide renames a folder so that it is a leftover.
func (l *Locked) hide(path string) (tmp string, err error) {
	tmp = filepath.Join(l.dir, fmt.Sprintf("%s%d_%d", tmpPrefix, os.Getpid(), time.Now().UnixNano()))
	kernel.Step("unpin: before the rename")
	err = os.Rename(path, tmp)
	if errors.Is(err, fs.ErrNotExist) {
		return tmp, nil
	}
	if err == nil {
		kernel.Step("unpin: after the rename")
	}
	return tmp, kernel.Errno("unpin", err)
}

// Move renames the folder of a chain after its root has become a link, or is no link
// any more, and pins the new root in it. root may be nil.
func (l *Locked) Move(from, to string, root Pinner) error {
	if _, err := os.Lstat(l.Path(from)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if root != nil {
		if err := pinRoot(root, filepath.Join(l.Path(from), rootName)); err != nil {
			return err
		}
	}
	kernel.Step("move pins: before the rename")
	return kernel.Errno("move pins", os.Rename(l.Path(from), l.Path(to)))
}

// Succession replaces the pinned root in the folder of a chain by a new one, and
// renames the folder after it.
func (l *Locked) Succession(from, to string, root Pinner) error {
	// If this process dies, the pin under this name is removed as a leftover.
	tmp := filepath.Join(l.dir, fmt.Sprintf("%sroot_%d_%d", tmpPrefix, os.Getpid(), time.Now().UnixNano()))
	if err := pinRoot(root, tmp); err != nil {
		return err
	}
	kernel.Step("recover: before the rename")
	err := os.Rename(tmp, l.RootPath(from))
	kernel.Step("recover: pinned")
	if err == nil {
		err = os.Rename(l.Path(from), l.Path(to))
	}
	return kernel.Errno("pin the root link", err)
}

// Leftovers returns the paths that RemoveLeftovers removes.
func (p *Pins) Leftovers() ([]string, error) {
	entries, err := entriesOf(p.dir, "")
	var paths []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) || stale(e) {
			paths = append(paths, filepath.Join(p.dir, e.Name()))
		}
	}
	return paths, err
}

// RemoveLeftovers removes what processes left behind that died while they pinned or
// unpinned.
func (l *Locked) RemoveLeftovers() {
	if !l.Alone {
		return
	}
	paths, _ := l.Leftovers()
	for _, path := range paths {
		_ = l.removeAll(path)
	}
}

// BPFFS is the path of the bpffs that has the folder.
func (p *Pins) BPFFS() string { return filepath.Dir(p.dir) }
