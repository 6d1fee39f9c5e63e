package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// lookAtPins checks all that is in the folder of libdispatcher.
func (e *exam) lookAtPins() {
	if e.pins == nil {
		return
	}
	dir := e.pins.Path("")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		e.add(hook.Finding{Check: "unreadable", Level: hook.LevelBroken, Text: oneLine(err)})
		return
	}
	e.access(dir)
	e.lock(dir)
	for _, entry := range entries {
		name := entry.Name()
		switch {
		case strings.HasPrefix(name, "tmp_"):
			e.drift("leftover", e.recover(), "%s was left by a process that died while it pinned or unpinned; what is in it is still held", e.pins.Path(name))
		case strings.HasPrefix(name, "move_"):
			e.move(name)
		case strings.HasPrefix(name, "xdp_"):
			e.chainFolder(name)
		case state.ParseLinkFolder(name) != 0:
			e.linkFolder(name)
		}
	}
}

// lockPatience is longer than any change has the lock, and many in turn.
const lockPatience = time.Second

// lock reports a process that does not let go of the lock of the pins.
func (e *exam) lock(dir string) {
	folder, err := kernel.OpenFolder(dir)
	if err != nil {
		return // access reports what is wrong with it
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockPatience)
	defer cancel()
	folder, _, err = kernel.Lock(ctx, folder, nil)
	folder.Close()
	if errors.Is(err, context.DeadlineExceeded) {
		e.drift("lock", "", "the lock of %s%s was not released in %v: each change waits for it for %v, and goes on without it", dir, kernel.LockedBy(dir), lockPatience, kernel.LockWait)
	}
}

// members returns the members that are pinned in a folder, and false when the folder
// could not be read.
func (e *exam) members(folder string) ([]string, bool) {
	members, err := e.pins.Members(folder)
	if err != nil {
		e.drift("unreadable", "", "%s", oneLine(err))
	}
	return members, err == nil
}

// chainFolder compares the pins of a chain with the chain.
func (e *exam) chainFolder(folder string) {
	linkID, chainID := state.ParseChainFolder(folder)
	path := e.pins.Path(folder)
	orphan := func(why string) { e.drift("orphan", e.recover(), "%s: %s", path, why) }
	if e.pins.HasRoot(folder) {
		id, err := pinnedLink(e.pins.RootPath(folder))
		switch {
		case err != nil:
			e.drift("unreadable", "", "%s: %s", e.pins.RootPath(folder), oneLine(err))
		case id != linkID:
			orphan(fmt.Sprintf("it is of link %d, and its name says otherwise", id))
		default:
			e.rootedFolder(folder, id)
		}
		return
	}
	switch {
	case linkID != 0 && e.links[linkID].ID == 0:
		orphan("the chain is gone, its link does not exist any more")
	case linkID != 0:
		e.drift("incomplete", "", "%s was removed: the chain is gone as soon as no process has it open; attaching a persistent member pins it again", e.pins.RootPath(folder))
	case chainID != 0 && !e.isLoaded(chainID) && len(e.later) == 0:
		orphan("the chain is gone, no dispatcher is loaded for it")
	}
}

// rootedFolder looks at a folder that holds its chain.
func (e *exam) rootedFolder(folder string, id uint32) {
	li := e.links[id]
	members, ok := e.members(folder)
	if !ok || li.ID == 0 {
		return // not readable, or made after the links were listed
	}
	if li.Gone() {
		e.defunct(folder, "device", members)
		return
	}
	chain := e.loaded[li.Program]
	if chain == nil || chain.Closed {
		return // closed and chain report these
	}
	for _, m := range members {
		path := filepath.Dir(e.pins.HeldPath(folder, m))
		switch {
		case chain.Named(m) < 0:
			e.add(hook.Finding{Check: "orphan", Level: hook.LevelDrift, Member: m, Mend: e.recover(), Text: fmt.Sprintf("%s: the member is in the chain no more", path)})
		case !e.pins.Has(folder, m):
			e.halfMember(folder, m, "slot")
		}
	}
}

// linkFolder compares the pin of a member with the member's link.
func (e *exam) linkFolder(folder string) {
	li := e.links[state.ParseLinkFolder(folder)]
	members, ok := e.members(folder)
	if !ok {
		return
	}
	switch next := e.movedTo[li.ID]; {
	case li.ID == 0:
		e.drift("orphan", e.recover(), "%s: the link does not exist any more", e.pins.Path(folder))
	case li.Gone() && next != 0:
		e.drift("orphan", e.recover(), "%s: link %d has taken its place", e.pins.Path(folder), next)
	case li.Gone() && li.Type == link.CgroupType:
		e.defunct(folder, "cgroup", members)
	case li.Gone():
		e.defunct(folder, "device", members)
	default:
		for _, m := range members {
			if !e.pins.Has(folder, m) {
				e.halfMember(folder, m, "link")
			}
		}
	}
}

// defunct reports the pins of a link that is attached to nothing. The kernel does not
// tell whether the target is gone or the link was detached.
func (e *exam) defunct(folder, what string, members []string) {
	e.drift("defunct", e.recover(), "%s: the %s is gone, or the link was detached; the pins are left, of %s; with --reattach they are attached again where it is back",
		e.pins.Path(folder), what, list(members))
}

// halfMember reports a member of which only the pins of its maps are left.
func (e *exam) halfMember(folder, member, held string) {
	path := filepath.Dir(e.pins.HeldPath(folder, member))
	e.add(hook.Finding{
		Check: "incomplete", Level: hook.LevelDrift, Member: member, Mend: kernel.Shell("rm", "-r", path),
		Text: fmt.Sprintf("%s/%s was removed: nothing is left there to hold the member", path, held),
	})
}

// access looks for pins that users other than root can open. A user who can open the
// pin of a link can detach the link.
func (e *exam) access(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err != nil || unix.Lstat(path, &st) != nil || d.Type()&fs.ModeSymlink != 0 {
			return nil // gone meanwhile, or without a mode
		}
		mode := "0600"
		if d.IsDir() {
			mode = "0700"
		}
		if st.Uid != 0 {
			e.drift("access", kernel.Shell("chown", "root:root", path), "%s belongs to user %d", path, st.Uid)
		}
		if st.Mode&0o077 != 0 {
			e.drift("access", kernel.Shell("chmod", mode, path), "%s is open to others: its mode is %04o", path, st.Mode&0o7777)
		}
		return nil
	})
}

// pinnedLink returns the id of the link that is pinned at path.
func pinnedLink(path string) (uint32, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	info, err := kernel.LinkInfoOf(l)
	if err != nil {
		return 0, err
	}
	return info.ID, nil
}

// list returns names in words.
func list(names []string) string {
	if len(names) == 0 {
		return "no member"
	}
	return strings.Join(names, ", ")
}
