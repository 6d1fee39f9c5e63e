package lifetime

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// asNobody runs fn with the files' rights of an ordinary user: with another fsuid the kernel takes away the capabilities that
// override modes and owners (cap_task_fix_setuid, security/commoncap.c).
func asNobody(t *testing.T, fn func() error) error {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	qt.Assert(t, qt.IsNil(unix.Setfsuid(65534)))
	defer unix.Setfsuid(0)
	return fn()
}

// In a bpffs that everybody may write to, as one is that was mounted without a mode, an ordinary user can make libdispatcher's folder
// first. The owner of a folder can rename
// what root pins in it, and so take members away: such a folder is not used.
func TestFolderOfAnotherUser(t *testing.T) {
	for name, h := range map[string]hook.Hook{"xdp": hook.XDP, "cgroup": hook.CgroupConnect4} {
		t.Run(name, func(t *testing.T) {
			s := scene.NewOn(t, h)
			qt.Assert(t, qt.IsNil(os.Chmod(s.BPFFS, 0o777|fs.ModeSticky)))
			tracer := s.Tracer(t, 1)
			dir := filepath.Join(s.BPFFS, "libdispatcher")
			refused := func(pattern string) {
				t.Helper()
				_, err := s.TryJoin(t, dispatcher.Program(tracer), scene.Persistent("filter", 10))
				qt.Check(t, qt.ErrorIs(err, fs.ErrPermission))
				qt.Check(t, qt.ErrorMatches(err, pattern))
				_, err = dispatcher.Read(t.Context(), s.Target, s.Look())
				qt.Check(t, qt.ErrorMatches(err, pattern))
				_, err = dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.BPFFS})
				qt.Check(t, qt.ErrorMatches(err, pattern))
				_, err = dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.BPFFS})
				qt.Check(t, qt.ErrorMatches(err, pattern))
				found, err := dispatcher.Doctor(t.Context(), s.Look())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.IsTrue(slices.ContainsFunc(found, func(f hook.Finding) bool { return f.Check == "access" && f.Level == hook.LevelBroken })))
			}
			qt.Assert(t, qt.IsNil(asNobody(t, func() error { return errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(dir+"/xdp_1", 0o700)) })))
			refused(`.*/libdispatcher belongs to user 65534, who can change what is in it; .*"rm -r .*`)
			qt.Assert(t, qt.IsNil(os.Remove(dir+"/xdp_1")))
			_, err := dispatcher.Read(t.Context(), s.Target, s.Look()) // nothing is in it, and it is out of the way now
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.IsNil(asNobody(t, func() error { return os.Symlink(t.TempDir(), dir) })))
			refused(`.*/libdispatcher belongs to user 65534.*`)
			qt.Assert(t, qt.IsNil(os.Remove(dir)))

			// What root made there an ordinary user can neither change nor move away.
			s.Attach(t, tracer, scene.Persistent("filter", 10))
			err = asNobody(t, func() error { return os.Rename(dir, dir+"_") })
			qt.Check(t, qt.ErrorIs(err, fs.ErrPermission))
			s.WantRun(t, 1)
			qt.Assert(t, qt.IsNil(os.Chmod(dir, 0o770)))
			refused(`.*other users may change what is in .*/libdispatcher: its mode is 0770; .*"chmod go-w .*`)
			qt.Assert(t, qt.IsNil(os.Chmod(dir, 0o700)))
			qt.Assert(t, qt.IsNil(os.Chmod(s.BPFFS, 0o777)))
			refused(`.*other users may change what is in [^ ]*: its mode is 0777; .*`)
			qt.Assert(t, qt.IsNil(os.Chmod(s.BPFFS, 0o700)))
			s.Clear(t)
		})
	}
}

// A process that may not read the folder, for the folder's mode, is told so, and by no verb that a security module or a missing
// capability is why.
func TestFolderThatMayNotBeRead(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.TCIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			ctx, tracer := t.Context(), s.Tracer(t, 1)
			s.Attach(t, tracer, scene.Persistent("filter", 10))
			again := dispatcher.Program(s.Tracer(t, 2))
			no := func(err error, folder string) {
				t.Helper()
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrPermission))
				qt.Check(t, qt.ErrorMatches(err, ".* may not "+folder+": its mode is [01]700 and its owner user 0, group 0; this process is user 65534 without CAP_DAC_OVERRIDE; run it as root"))
			}
			for what, verb := range map[string]func() error{
				"attach": func() error {
					return scene.Second(dispatcher.Attach(ctx, s.Target, again, dispatcher.Options{BPFFS: s.BPFFS}))
				},
				"read":    func() error { return scene.Second(dispatcher.Read(ctx, s.Target, s.Look())) },
				"open":    func() error { return scene.Second(dispatcher.Open(ctx, s.Target, "filter", s.Look())) },
				"detach":  func() error { return dispatcher.Detach(ctx, s.Target, "filter", s.Leave()) },
				"recover": func() error { return scene.Second(dispatcher.Recover(ctx, dispatcher.RecoverOptions{BPFFS: s.BPFFS})) },
			} {
				t.Log(what)
				no(asNobody(t, verb), "look into the folder "+s.BPFFS) // what is below cannot even be looked for
			}
			if h.OnCgroup() {
				qt.Assert(t, qt.IsNil(os.Chmod(s.Target.Cgroup, 0o700)))
				no(asNobody(t, func() error {
					return scene.Second(dispatcher.Attach(ctx, s.Target, again, dispatcher.Options{BPFFS: t.TempDir()}))
				}), "read "+s.Target.Cgroup)
			}
			s.WantRun(t, 1)
			s.Clear(t)
		})
	}
}
