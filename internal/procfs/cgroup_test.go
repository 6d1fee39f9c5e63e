package procfs

import (
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestParseCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"":                       "",
		"0::/system.slice/a:b\n": "/system.slice/a:b",
		"4:memory:/m\n1:name=systemd:/s.service\n0::/\n":         "/s.service",
		"1:name=systemd:/s.service\n":                            "/s.service",
		"1:name=systemd:/\n0::/system.slice/docker.service\nx\n": "/system.slice/docker.service",
	} {
		qt.Check(t, qt.Equals(ParseCgroup(text), want), qt.Commentf("%q", text))
	}
}

// Whatever a cgroup is called, and whatever stands in the lines before, its path is read as it is. The kernel allows no newline
// in the name of a cgroup (cgroup_mkdir, kernel/cgroup/cgroup.c).
func FuzzParseCgroup(f *testing.F) {
	f.Add("/system.slice/a:b", "4:memory:/m\n1:cpu,cpuacct:/")
	f.Add("/a\r \t::/", "x\n0::")
	f.Fuzz(func(t *testing.T, path, before string) {
		if strings.Contains(path, "\n") || len(path) < 2 || strings.Contains(before, "name=systemd") {
			t.Skip("this is no path of a cgroup, or these lines are about another hierarchy")
		}
		qt.Check(t, qt.Equals(ParseCgroup(before+"\n0::"+path+"\n"), path))
		qt.Check(t, qt.Equals(ParseCgroup("1:name=systemd:"+path+"\n0::/\n"), path))
	})
}
