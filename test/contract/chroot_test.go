package contract

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

func init() {
	// It works in the folder as its root, in namespaces of its own.
	testenv.RegisterHelper("chrooted", func(args []string) {
		runtime.LockOSThread()
		kernel.RaiseMemlock()
		spec := scene.CountingOn(hook.XDP)
		prog := spec.Programs["ldt_counting"]
		prog.Instructions = append(asm.Instructions{asm.LoadMapPtr(asm.R1, 0).WithReference("cpus")}, prog.Instructions...)
		spec.Maps["cpus"] = &ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1} // whose size is in /sys
		must := func(errs ...error) {
			if err := errors.Join(errs...); err != nil {
				panic(err)
			}
		}
		must(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNET|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		if len(args) > 1 {
			must(unix.Mount("proc", args[0]+"/proc", "proc", 0, ""))
		}
		must(unix.Chroot(args[0]), unix.Chdir("/"))
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); !errors.Is(err, unix.EINVAL) {
			panic(err)
		}
		for what, err := range map[string]error{
			"attach": scene.Second(dispatcher.Attach(context.Background(), dispatcher.XDP("lo"), dispatcher.Spec(spec, dispatcher.LoadOptions{}), dispatcher.Options{})),
			"list":   scene.Second(dispatcher.List(context.Background(), dispatcher.ListOptions{})),
		} {
			fmt.Printf("%s %v, %v\n", what, errors.Is(err, fs.ErrNotExist), err)
		}
	})
}

// In a chroot what is missing is the file system that is not mounted there, and not what was asked for.
func TestChroot(t *testing.T) {
	s := scene.New(t)
	defer s.Clear(t)
	dir := t.TempDir()
	qt.Assert(t, qt.IsNil(os.Mkdir(dir+"/proc", 0o755)))
	none := testenv.StartHelper(t, "chrooted", dir)
	for range 2 {
		qt.Check(t, qt.Matches(none.Expect(t, ""), `(attach|list) false, .*: no proc is mounted at /proc here, as in a chroot; mount it with "mount -t proc proc /proc"`))
	}
	qt.Check(t, qt.Matches(testenv.StartHelper(t, "chrooted", dir, "proc").Expect(t, "attach"),
		`false, .*: no sysfs is mounted at /sys here, as in a chroot; mount it with "mount -t sysfs sysfs /sys"`))
}
