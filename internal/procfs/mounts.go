package procfs

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Mount is a line of /proc/PID/mountinfo.
type Mount struct {
	Dev   uint64 // the file system's device number
	Root  string // the folder or file of the file system that is mounted
	Point string // the path where it is mounted, as that process sees it
	Type  string // of the file system
	// Peers is the number of the mount's peer group, Master that of the group from which it
	// receives mounts (mount_namespaces(7)); empty for none.
	Peers, Master string
}

// Mounts reads a mountinfo file.
func Mounts(path string) ([]Mount, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ParseMounts(string(text)), nil
}

// ParseMounts parses a mountinfo file.
func ParseMounts(text string) []Mount {
	var list []Mount
	for line := range strings.Lines(text) {
		if m, ok := parseMount(strings.TrimSuffix(line, "\n")); ok {
			list = append(list, m)
		}
	}
	return list
}

// parseMount parses one line (show_mountinfo, fs/proc_namespace.c):
//
//	36 35 98:0 /root /point options [tag:value ...] - type source options
//
// Only a space separates fields. The kernel escapes space, tab, newline and
// backslash in paths; all other white space stands in them as it is.
func parseMount(line string) (m Mount, ok bool) {
	const dev, root, point, optional = 2, 3, 4, 6
	fields := strings.Split(line, " ")
	if len(fields) < optional {
		return m, false
	}
	end := slices.Index(fields[optional:], "-") + optional
	if end < optional || end+1 == len(fields) {
		return m, false
	}
	major, minor, _ := strings.Cut(fields[dev], ":")
	x, err1 := strconv.ParseUint(major, 10, 32)
	y, err2 := strconv.ParseUint(minor, 10, 32)
	m = Mount{Dev: unix.Mkdev(uint32(x), uint32(y)), Root: unescape(fields[root]), Point: unescape(fields[point]), Type: fields[end+1]}
	for _, field := range fields[optional:end] {
		switch tag, group, _ := strings.Cut(field, ":"); tag {
		case "shared":
			m.Peers = group
		case "master":
			m.Master = group
		}
	}
	return m, err1 == nil && err2 == nil
}

// unescape replaces a backslash and three octal digits by the byte that they
// stand for (mangle_path, fs/seq_file.c).
func unescape(s string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(s, `\`)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		s = after
		if len(s) >= 3 {
			if c, err := strconv.ParseUint(s[:3], 8, 8); err == nil {
				b.WriteByte(byte(c))
				s = s[3:]
				continue
			}
		}
		b.WriteByte('\\')
	}
}
