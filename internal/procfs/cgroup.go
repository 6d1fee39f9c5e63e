package procfs

import "strings"

// ParseCgroup returns the path of version 2 in /proc/PID/cgroup. Where version 1 is in
// use it returns systemd's path.
func ParseCgroup(text string) string {
	var v1, v2 string
	for line := range strings.Lines(text) {
		// hierarchy:controllers:path
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) < 3 {
			continue
		}
		switch fields[1] {
		case "":
			v2 = fields[2]
		case "name=systemd":
			v1 = fields[2]
		}
	}
	if v1 != "" && (v2 == "" || v2 == "/") {
		return v1
	}
	return v2
}
