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
	f := hook.Finding{Check: "bpffs", Level: hook.LevelOK, Text: "mounted at " + m.bpffs}
	var st unix.Stat_t
	switch err := unix.Stat(m.bpffs, &st); {
	case err != nil:
		f.Level = hook.LevelNote
		if errors.Is(err, fs.ErrNotExist) {
			f.Mend = kernel.MountCommand(m.bpffs)
		}
		f.Text = fmt.Sprintf("%s: %v; members cannot outlive their process, and there is no lock", m.bpffs, err)
	case !kernel.IsBPFFS(m.bpffs):
		f.Level, f.Mend = hook.LevelNote, kernel.MountCommand(m.bpffs)
		f.Text = fmt.Sprintf("none is mounted at %s: members cannot outlive their process, and there is no lock", m.bpffs)
	case st.Mode&0o002 != 0:
		f.Level, f.Mend = hook.LevelNote, kernel.Shell("chmod", "0700", m.bpffs)
		f.Text = fmt.Sprintf("everybody may make pins in %s: its mode is %04o", m.bpffs, st.Mode&0o7777)
	}
	return []hook.Finding{f}
}

// otherMounts looks for pins in other bpffs than the requested one.
func (m machine) otherMounts() []hook.Finding {
	var found []hook.Finding
	var own unix.Stat_t
	_ = unix.Stat(m.bpffs, &own)
	seen := map[uint64]bool{own.Dev: true}
	for _, point := range m.mounts("bpf") {
		var st unix.Stat_t
		if unix.Stat(point, &st) != nil || seen[st.Dev] || !kernel.IsBPFFS(point) {
			continue
		}
		seen[st.Dev] = true
		pins, err := state.OpenPins(point)
		if err != nil {
			continue
		}
		if entries, err := os.ReadDir(pins.Path("")); err == nil && len(entries) > 0 {
			found = append(found, hook.Finding{
				Check: "other-bpffs", Level: hook.LevelNote, Mend: kernel.Command("", point, "doctor"),
				Text: fmt.Sprintf("members are pinned in another bpffs, which was not looked at: %s", filepath.Clean(point)),
			})
		}
	}
	if len(found) == 0 {
		found = append(found, hook.Finding{Check: "other-bpffs", Level: hook.LevelOK, Text: "no other one has pins of members"})
	}
	return found
}

// mounts returns where file systems of a type are mounted.
func (m machine) mounts(fsType string) []string {
	text, _ := m.read("/proc/thread-self/mountinfo")
	var points []string
	for _, mount := range procfs.ParseMounts(text) {
		if mount.Type == fsType {
			points = append(points, mount.Point)
		}
	}
	return points
}

func cgroups() []hook.Finding {
	root, err := kernel.CgroupRoot()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return []hook.Finding{{Check: "cgroups", Level: hook.LevelNote, Text: oneLine(err)}}
	}
	if err != nil {
		return []hook.Finding{{
			Check: "cgroups", Level: hook.LevelNote, Mend: "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
			Text: "cgroup v2 is not mounted: nothing can be attached to cgroups",
		}}
	}
	return []hook.Finding{{Check: "cgroups", Level: hook.LevelOK, Text: "mounted at " + root}}
}
