package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// bpffsMount checks that the bpffs for pins is mounted, and its mode.
func (m machine) bpffsMount() []hook.Finding {
	var st unix.Stat_t
	switch err := unix.Stat(m.bpffs, &st); {
	case errors.Is(err, unix.EACCES):
		return note("", fmt.Sprintf("%v; members cannot outlive their process, and there is no lock", kernel.PathErrno("stat", m.bpffs, err)))
	case err != nil:
		if errors.Is(err, fs.ErrNotExist) {
			return m.missing("there is no folder " + m.bpffs)
		}
		return note("", fmt.Sprintf("%s: %v; members cannot outlive their process, and there is no lock", m.bpffs, err))
	case !kernel.IsBPFFS(m.bpffs):
		return m.missing("none is mounted at " + m.bpffs)
	case kernel.ReadOnly(m.bpffs):
		return note("", m.bpffs+" is read-only: nothing can be pinned there, nor unpinned")
	case st.Mode&0o002 != 0:
		return note(kernel.Shell("chmod", "0700", m.bpffs), fmt.Sprintf("everybody may make pins in %s: its mode is %04o", m.bpffs, st.Mode&0o7777))
	}
	if life := kernel.LifeOf(m.bpffs); life != kernel.Lasting {
		return note("", fmt.Sprintf("the one at %s %v; %s", m.bpffs, life, kernel.LastingHint))
	}
	return nil
}

// missing is the finding of a bpffs that is not there, as what says.
func (m machine) missing(what string) []hook.Finding {
	if kernel.InPrivateMounts() {
		return note("", fmt.Sprintf("%s in this mount namespace: members cannot outlive their process, and there is no lock; %s", what, kernel.MountHint(m.bpffs)))
	}
	return note(kernel.MountCommand(m.bpffs), what+": members cannot outlive their process, and there is no lock")
}

// otherMounts looks for pins in other bpffs than the requested one.
func (m machine) otherMounts() []hook.Finding {
	var found []hook.Finding
	var own unix.Stat_t
	_ = unix.Stat(m.bpffs, &own)
	seen := map[uint64]bool{own.Dev: true}
	text, _ := m.read("/proc/thread-self/mountinfo")
	for _, mount := range procfs.ParseMounts(text) {
		var st unix.Stat_t
		if mount.Type != "bpf" || unix.Stat(mount.Point, &st) != nil {
			continue
		}
		if mount.Dev != st.Dev {
			found = append(found, note("", "another file system is mounted over a bpffs: what is pinned there stays, and cannot be reached by its path: "+filepath.Clean(mount.Point))...)
			continue
		}
		if seen[st.Dev] {
			continue
		}
		seen[st.Dev] = true
		pins, err := state.OpenPins(mount.Point)
		if err != nil {
			continue // another file system is mounted over it
		}
		if entries, err := os.ReadDir(pins.Path("")); err == nil && len(entries) > 0 {
			found = append(found, note(kernel.Command("", mount.Point, nil, "doctor"),
				"members are pinned in another bpffs, which was not looked at: "+filepath.Clean(mount.Point))...)
		}
	}
	return found
}

func cgroups() []hook.Finding {
	root, err := kernel.CgroupRoot()
	switch {
	case errors.Is(err, fs.ErrNotExist) && kernel.InPrivateMounts():
		return note("", "cgroup v2 is not mounted in this mount namespace: nothing can be attached to cgroups; "+kernel.OutsideHint())
	case errors.Is(err, fs.ErrNotExist):
		return note("mount -t cgroup2 cgroup2 /sys/fs/cgroup", "cgroup v2 is not mounted: nothing can be attached to cgroups")
	case err != nil:
		return note("", oneLine(err))
	}
	return ok("mounted at " + root)
}
