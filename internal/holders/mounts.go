package holders

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A mountLine is a line of /proc/PID/mountinfo.
type mountLine struct {
	dev    uint64
	root   string // what of the file system is mounted
	point  string
	fsType string
}

// parseMounts reads mountinfo. Lines that it does not understand are left out.
func parseMounts(text string) []mountLine {
	var list []mountLine
	for line := range strings.Lines(text) {
		// 36 35 98:0 /root /point options [tag:value ...] - type source options
		before, after, ok := strings.Cut(line, " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(head) < 6 || len(tail) < 1 {
			continue
		}
		major, minor, _ := strings.Cut(head[2], ":")
		x, err1 := strconv.ParseUint(major, 10, 32)
		y, err2 := strconv.ParseUint(minor, 10, 32)
		if err1 == nil && err2 == nil {
			dev := unix.Mkdev(uint32(x), uint32(y))
			list = append(list, mountLine{dev, unescape(head[3]), unescape(head[4]), tail[0]})
		}
	}
	return list
}

// unescape undoes what the kernel does to space, tab, newline and backslash
// (mangle_path, fs/seq_file.c): a backslash and three octal digits.
func unescape(s string) string {
	var b strings.Builder
	for {
		before, after, ok := strings.Cut(s, `\`)
		b.WriteString(before)
		if !ok {
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
