package links

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

func init() {
	// It prints what runs for the cgroup in which it is, seen from a cgroup namespace of its own.
	testenv.RegisterHelper("inherited", func(args []string) {
		runtime.LockOSThread()
		members, err := inherited(args[0])
		if err != nil {
			fmt.Println("failed:", err)
			return
		}
		b, _ := json.Marshal(members)
		fmt.Println("members", string(b))
		io.Copy(io.Discard, os.Stdin)
	})
}

func inherited(bpffs string) ([]hook.Member, error) {
	root, err := kernel.CgroupRoot()
	if err != nil {
		return nil, err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP); err != nil {
		return nil, err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, err
	}
	if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
		return nil, err
	}
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		return nil, err
	}
	chains, err := dispatcher.Effective(context.Background(), dispatcher.On(hook.CgroupConnect4, root), dispatcher.ReadOptions{BPFFS: bpffs})
	if err != nil {
		return nil, err
	}
	return chains[0].Members, nil
}

// Where the cgroups above cannot be seen, as in a container, what is inherited from them by a link is a link.
func TestInheritedFromUnseen(t *testing.T) {
	s := scene.NewOn(t, hook.CgroupConnect4)
	s.Attach(t, s.Tracer(t, 1), scene.Persistent("top", 10))
	want := s.Read(t).Members[0]
	p := s.Cgroup.Child(t, "below").StartHelper(t, "inherited", s.BPFFS)
	var got []hook.Member
	qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(p.Expect(t, "members")), &got)))
	p.Kill()
	qt.Assert(t, qt.HasLen(got, 1))
	qt.Check(t, qt.Equals(got[0].Name, "top"))
	qt.Check(t, qt.Equals(got[0].Kind, hook.KindMember))
	qt.Check(t, qt.Equals(got[0].LinkID, want.LinkID))
	qt.Check(t, qt.Matches(got[0].From, "a cgroup above /, id [0-9]+"))
	s.Clear(t)
}
