package kernel

import (
	"os"
	"strconv"
	"strings"
)

// A mount is a line of /proc/PID/mountinfo.
type mount struct {
	root   string // what of the file system is mounted
	point  string // where, as the process sees it
	fsType string
}

// mounts reads a mountinfo file. Lines that it does not understand are left out.
func mounts(path string) ([]mount, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list []mount
	for line := range strings.Lines(string(text)) {
		// 36 35 98:0 /root /point options [tag:value ...] - type source options
		before, after, ok := strings.Cut(line, " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if ok && len(head) >= 6 && len(tail) >= 1 {
			list = append(list, mount{unescape(head[3]), unescape(head[4]), tail[0]})
		}
	}
	return list, nil
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
