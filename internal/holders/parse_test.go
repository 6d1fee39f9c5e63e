package holders

import (
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestOwner(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for _, test := range []struct{ cgroup, unit, container string }{
		{"/", "", ""},
		{"/system.slice/ssh.service", "ssh.service", ""},
		{"/user.slice/user-0.slice/session-1.scope", "session-1.scope", ""},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/a.service", "a.service", ""},
		{"/system.slice/docker-" + id + ".scope", "docker-" + id + ".scope", id},
		{"/system.slice/docker-" + id + ".scope/init/inner", "docker-" + id + ".scope", id},
		{"/docker/" + id, "", id},
		{"/kubepods/burstable/pod1/" + id, "", id},
		{"/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", "cri-containerd-" + id + ".scope", id},
		{"/machine.slice/libpod-" + id + ".scope/container", "libpod-" + id + ".scope", id},
		{"/lxc.payload.web", "", "web"},
		{"/machine.slice/machine-db.scope", "machine-db.scope", "db"},
	} {
		unit, container := owner(test.cgroup)
		qt.Check(t, qt.Equals(unit, test.unit), qt.Commentf("%s", test.cgroup))
		qt.Check(t, qt.Equals(container, test.container), qt.Commentf("%s", test.cgroup))
	}
}

// Whatever the name of a cgroup is, the unit and the container are parts of its path.
func FuzzOwner(f *testing.F) {
	f.Add("/system.slice/docker-" + strings.Repeat("0123456789abcdef", 4) + ".scope")
	f.Add("/lxc.payload.a.service/../machine-.scope")
	f.Fuzz(func(t *testing.T, cgroup string) {
		unit, container := owner(cgroup)
		qt.Check(t, qt.StringContains(cgroup, unit))
		qt.Check(t, qt.StringContains(cgroup, container))
		qt.Check(t, qt.IsFalse(strings.Contains(unit+container, "/")))
	})
}

func TestBelow(t *testing.T) {
	for _, test := range []struct {
		name, root, rest string
		ok               bool
	}{
		{"/a/b", "/", "/a/b", true},
		{"/a/b", "/a", "/b", true},
		{"/a", "/a", "", true},
		{"/ab", "/a", "", false},
	} {
		rest, ok := below(test.name, test.root)
		qt.Check(t, qt.Equals(ok, test.ok))
		if ok {
			qt.Check(t, qt.Equals(rest, test.rest))
		}
	}
}
