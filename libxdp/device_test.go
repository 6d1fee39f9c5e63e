package libxdp

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

func TestFind(t *testing.T) {
	c := &Chain{Members: []Member{
		{Name: "one", Program: hook.Program{ID: 3}, LinkID: 7},
		{Name: "two", Program: hook.Program{ID: 4}, LinkID: 8},
		{Name: "two", Program: hook.Program{ID: 5}, LinkID: 9},
		{Missing: true},
	}}
	for ref, want := range map[hook.Ref]uint32{"one": 3, "id:3": 3, "id:5": 5, "link:8": 4} {
		m, err := c.Find(ref)
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", ref))
		qt.Assert(t, qt.Equals(m.Program.ID, want))
	}
	for ref, want := range map[hook.Ref]error{
		"two": hook.ErrUsage, "id:0": hook.ErrUsage, "": hook.ErrUsage, "id:9": fs.ErrNotExist, "three": fs.ErrNotExist, "link:1": fs.ErrNotExist,
	} {
		_, err := c.Find(ref)
		qt.Assert(t, qt.ErrorIs(err, want), qt.Commentf("%s", ref))
	}
	_, err := c.Find("two")
	qt.Assert(t, qt.ErrorMatches(err, `2 members have the name "two": say which with id:4 or id:5`))
	_, err = c.Find("three")
	qt.Assert(t, qt.ErrorMatches(err, `there is no member "three"; there is one \(id:3\), two \(id:4\), two \(id:5\)`))
	_, err = (&Chain{}).Find("three")
	qt.Assert(t, qt.ErrorMatches(err, `there is no member "three"; there is none`))
}

func TestUsage(t *testing.T) {
	s := newScene(t)
	for _, o := range []AttachOptions{
		{Settings: hook.Settings{Priority: -1}},
		{Settings: hook.Settings{OnMissing: hook.MissingDrop}},
		{Mode: hook.ModeOffload},
	} {
		o.Start = true
		_, _, err := s.Attach(t.Context(), s.source(t, 1), o)
		qt.Assert(t, qt.ErrorIs(err, hook.ErrUsage), qt.Commentf("%+v", o))
	}
	_, _, err := s.Attach(t.Context(), s.source(t, 1), AttachOptions{Version: MaxVersion + 1, Start: true})
	qt.Assert(t, qt.ErrorIs(err, ErrVersion))
	_, _, err = s.AttachAll(t.Context(), nil, at(1))
	qt.Assert(t, qt.ErrorIs(err, hook.ErrUsage))
	_, err = s.Build(t.Context(), nil, 0)
	qt.Assert(t, qt.ErrorIs(err, hook.ErrUsage))
	qt.Assert(t, qt.ErrorIs(s.Set(t.Context(), "x", hook.Settings{OnMissing: hook.MissingDrop}), hook.ErrUsage))
	_, err = FromSpec(s.spec(1, pass, "one"), "two", ebpf.CollectionOptions{})
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	tc := s.spec(1, pass, "one")
	tc.Programs["one"].Type = ebpf.SchedCLS
	_, err = FromSpec(tc, "one", ebpf.CollectionOptions{})
	qt.Assert(t, qt.ErrorIs(err, hook.ErrIncompatible))

	// Eleven programs for a dispatcher with ten slots.
	var many []Source
	for n := range MaxMembers + 1 {
		many = append(many, s.source(t, n))
	}
	_, _, err = s.AttachAll(t.Context(), many, at(1))
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChainFull))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}

// A new chain has the version of another dispatcher on the machine.
func TestVersionOfOthers(t *testing.T) {
	s := newScene(t)
	for _, version := range []uint8{2, 3, 1} {
		prog, err := newDispatcher(two(version), 0)
		qt.Assert(t, qt.IsNil(err))
		c, err := s.Plan(t.Context(), s.source(t, 1), at(1))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(c.Config.Version, version))
		c, err = s.Plan(t.Context(), s.source(t, 1), AttachOptions{Start: true, Version: 2})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(c.Config.Version, 2))
		prog.Close()
	}
}

func TestVersionOfLibrary(t *testing.T) {
	for _, test := range []struct {
		files []string
		want  uint8
	}{
		{nil, 0},
		{[]string{"libxdp.so", "libxdp.so.1", "libxdp.so.1.x", "libxdp.so.2.6.0"}, 0},
		{[]string{"libxdp.so.1.2.10"}, 1},
		{[]string{"libxdp.so.1.3.1"}, 2},
		{[]string{"libxdp.so.1.5.4"}, 2},
		{[]string{"libxdp.so.1.6.3"}, 3},
		{[]string{"libxdp.so.1.10"}, 3},
		{[]string{"libxdp.so.1.5.4", "libxdp.so.1.6.0"}, 3},
	} {
		dir := t.TempDir()
		for _, name := range test.files {
			qt.Assert(t, qt.IsNil(os.WriteFile(filepath.Join(dir, name), nil, 0o600)))
		}
		qt.Check(t, qt.Equals(installedVersion([]string{dir}), test.want), qt.Commentf("%v", test.files))
	}
}

// The lock is libxdp's, flock on its folder, and waiting for it has a limit.
func TestLock(t *testing.T) {
	s := newScene(t)
	f := folderIn(s.BPFFS)
	l, err := f.lock(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsTrue(l.alone))
	st, err := os.Stat(f.path)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(st.Mode().Perm(), 0o700))

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = f.lock(ctx)
	qt.Assert(t, qt.ErrorIs(err, context.DeadlineExceeded))

	released := make(chan struct{})
	go func() {
		time.Sleep(30 * time.Millisecond)
		close(released)
		l.unlock()
	}()
	next, err := f.lock(t.Context())
	qt.Assert(t, qt.IsNil(err))
	<-released
	qt.Assert(t, qt.IsTrue(next.alone))
	// A process that keeps the lock so long has been stopped.
	start := time.Now()
	late, err := f.lock(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsFalse(late.alone))
	qt.Assert(t, qt.IsTrue(time.Since(start) >= kernel.LockWait))
	late.unlock()
	next.unlock()
}

// When the context ends, the operation ends and says so.
func TestContext(t *testing.T) {
	s := newScene(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Read(ctx)
	qt.Assert(t, qt.ErrorIs(err, context.Canceled))
}
