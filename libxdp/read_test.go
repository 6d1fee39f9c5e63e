package libxdp

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// two is a configuration that all versions can have.
func two(version uint8) Config {
	return Config{Version: version, Programs: []ProgramConfig{{Priority: 7, Actions: 1 << hook.Pass}, {Priority: 50, Actions: 1<<hook.Drop | 1<<hook.TX}}}
}

// A dispatcher without its programs can still be read, and detached from the
// device.
func TestReadWithoutMembers(t *testing.T) {
	for version := uint8(1); version <= MaxVersion; version++ {
		s := newScene(t)
		prog := s.hand(t, two(version))
		c := s.read(t)
		qt.Assert(t, qt.Equals(c.Device, s.Name))
		qt.Assert(t, qt.Equals(c.Ifindex, s.ServerIfindex))
		qt.Assert(t, qt.Equals(c.Mode, hook.ModeNative))
		qt.Assert(t, qt.Equals(c.Dispatcher.ID, idOf(t, prog)))
		qt.Assert(t, qt.DeepEquals(c.Config, two(version)))
		qt.Assert(t, qt.Equals(c.Folder, ""))
		qt.Assert(t, qt.HasLen(c.Pins, 0))
		qt.Assert(t, qt.DeepEquals(c.Members, []Member{
			{Priority: 7, ContinueOn: hook.SetOf(hook.Pass), Missing: true},
			{Priority: 50, ContinueOn: hook.SetOf(hook.Drop, hook.TX), Slot: 1, Missing: true},
		}))

		same, err := ReadProgram(prog, s.ServerIfindex, s.BPFFS)
		qt.Assert(t, qt.IsNil(err))
		c.Device, c.Mode = "", hook.ModeAuto
		qt.Assert(t, qt.DeepEquals(same, c))

		qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
		qt.Assert(t, qt.IsNil(s.read(t)))
		qt.Assert(t, qt.ErrorIs(s.DetachAll(t.Context()), fs.ErrNotExist))
	}
}

// Generic mode is recognized, and a change keeps it.
func TestReadGeneric(t *testing.T) {
	s := newScene(t)
	prog, err := newDispatcher(two(2), 0)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	s.replace(t, prog, nil, hook.ModeGeneric)
	qt.Assert(t, qt.Equals(s.read(t).Mode, hook.ModeGeneric))
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	qt.Assert(t, qt.IsNil(s.read(t)))
}

// changes returns all methods that change an existing chain.
func (s *scene) changes(t *testing.T) map[string]func() error {
	return map[string]func() error{
		"attach":  func() error { _, _, err := s.Attach(t.Context(), s.source(t, 1), AttachOptions{}); return err },
		"start":   func() error { _, _, err := s.Attach(t.Context(), s.source(t, 1), at(10)); return err },
		"plan":    func() error { _, err := s.Plan(t.Context(), s.source(t, 1), at(10)); return err },
		"detach":  func() error { return s.Detach(t.Context(), "one") },
		"set":     func() error { return s.Set(t.Context(), "one", hook.Settings{Priority: 1}) },
		"replace": func() error { return s.Replace(t.Context(), "one", s.source(t, 1)) },
	}
}

// Other programs are not touched, and the error says what they are.
func TestOccupied(t *testing.T) {
	s := newScene(t)
	legacy := testenv.VerdictProgram(t, "ldt_legacy", pass)
	s.replace(t, legacy, nil, hook.ModeAuto)
	check := func(kind hook.Kind, linkID uint32) {
		t.Helper()
		refuse := s.changes(t)
		refuse["read"] = func() error { _, err := s.Read(t.Context()); return err }
		refuse["detach all"] = func() error { return s.DetachAll(t.Context()) }
		for name, do := range refuse {
			err := do()
			var e *hook.Error
			qt.Assert(t, qt.IsTrue(errors.As(err, &e)), qt.Commentf("%s: %v", name, err))
			qt.Assert(t, qt.ErrorIs(err, hook.ErrBusy))
			qt.Assert(t, qt.ErrorIs(err, ErrNotDispatcher))
			qt.Assert(t, qt.Equals(e.Target, s.Name))
			qt.Assert(t, qt.Equals(e.Occupant.Kind, kind))
			qt.Assert(t, qt.Equals(e.Occupant.LinkID, linkID))
			qt.Assert(t, qt.Equals(e.Occupant.Program.Name, "ldt_legacy"))
		}
		qt.Assert(t, qt.HasLen(s.pinned(t), 0))
	}
	check(hook.KindLegacy, 0)

	s.replace(t, nil, legacy, hook.ModeAuto)
	var l link.Link
	s.Server.Do(t, func() {
		var err error
		l, err = link.AttachXDP(link.XDPOptions{Program: legacy, Interface: s.ServerIfindex})
		qt.Assert(t, qt.IsNil(err))
	})
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	check(hook.KindForeign, uint32(info.ID))
}

// A dispatcher that a link carries can be read, but netlink cannot replace it.
func TestLinkCarriesDispatcher(t *testing.T) {
	s := newScene(t)
	prog, err := newDispatcher(two(3), 0)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	var l link.Link
	s.Server.Do(t, func() {
		l, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: s.ServerIfindex})
		qt.Assert(t, qt.IsNil(err))
	})
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(s.read(t).Members, 2))

	err = s.DetachAll(t.Context())
	var e *hook.Error
	qt.Assert(t, qt.IsTrue(errors.As(err, &e)))
	qt.Assert(t, qt.ErrorIs(err, hook.ErrBusy))
	qt.Assert(t, qt.Equals(e.Occupant.LinkID, uint32(info.ID)))
	qt.Assert(t, qt.ErrorMatches(err, `detach xdp veth1: held by link \d+ .*: a dispatcher of libxdp's that a link carries.*`))
}

// A free device changes only when a chain is started.
func TestFree(t *testing.T) {
	s := newScene(t)
	refuse := s.changes(t)
	delete(refuse, "start")
	delete(refuse, "plan")
	refuse["read"] = func() error { _, err := s.Read(t.Context()); return err }
	for name, do := range refuse {
		qt.Assert(t, qt.ErrorIs(do(), fs.ErrNotExist), qt.Commentf(name))
	}
	c, err := s.Plan(t.Context(), s.source(t, 1), at(10))
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(c.Members, []Member{{Name: tracerName(1), Priority: 10, ContinueOn: hook.SetOf(hook.Pass)}}))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}

// No bpffs, no device, no namespace.
func TestNotThere(t *testing.T) {
	s := newScene(t)
	_, _, err := Device{s.Name, s.NetNS, t.TempDir()}.Attach(t.Context(), s.source(t, 1), at(1))
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.ErrorMatches(err, `attach xdp veth1: .* there is no bpffs at .*; mount one with .*`))
	_, err = Device{"none0", s.NetNS, s.BPFFS}.Read(t.Context())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = Device{s.Name, "no-such-namespace", s.BPFFS}.Read(t.Context())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
}

// A dispatcher of a later version can be listed and detached, no more.
func TestLaterVersion(t *testing.T) {
	s := newScene(t)
	prog := laterDispatcher(t)
	s.replace(t, prog, nil, hook.ModeAuto)
	c, err := s.Read(t.Context())
	qt.Assert(t, qt.ErrorIs(err, ErrVersion))
	qt.Assert(t, qt.Equals(c.Dispatcher.ID, idOf(t, prog)))
	qt.Assert(t, qt.Equals(c.Config.Version, MaxVersion+1))
	qt.Assert(t, qt.HasLen(c.Members, 0))
	for name, do := range s.changes(t) {
		qt.Assert(t, qt.ErrorIs(do(), ErrVersion), qt.Commentf(name))
	}
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	qt.Assert(t, qt.IsNil(s.read(t)))
}

// laterDispatcher returns a dispatcher of a version that does not exist yet.
func laterDispatcher(t *testing.T) *ebpf.Program {
	t.Helper()
	value, err := two(MaxVersion).MarshalBinary()
	qt.Assert(t, qt.IsNil(err))
	value[atVersion] = MaxVersion + 1
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ldt_config", Type: ebpf.Array, Flags: 1 << 7, // BPF_F_RDONLY_PROG
		KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	prog, err := loadDispatcher(two(MaxVersion), 0, stubBody)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	qt.Assert(t, qt.IsNil(prog.BindMap(m)))
	return prog
}

// Where the kernel refuses freplace, the error says so and names what does not
// need it. The chain stays the same.
func TestRefusedFreplace(t *testing.T) {
	if Supported() == nil {
		t.Skip("this kernel has freplace: runs where it is refused")
	}
	s := newScene(t)
	for _, start := range []bool{true, false} {
		if !start {
			s.hand(t, two(2))
		}
		before := s.Device
		_, _, err := before.Attach(t.Context(), s.source(t, 1), at(10))
		qt.Assert(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
		qt.Assert(t, qt.ErrorMatches(err, `attach xdp veth1: .*BPF_PROG_TYPE_EXT.*`))
		qt.Assert(t, qt.HasLen(s.pinned(t), 0))
		if c := s.read(t); start {
			qt.Assert(t, qt.IsNil(c))
		} else {
			qt.Assert(t, qt.HasLen(c.Members, 2))
		}
	}
}

// Detaching a dispatcher needs no bpffs.
func TestDetachAllWithoutBPFFS(t *testing.T) {
	s := newScene(t)
	s.hand(t, two(3))
	d := Device{s.Name, s.NetNS, t.TempDir()}
	qt.Assert(t, qt.ErrorIs(d.Detach(t.Context(), "one"), fs.ErrNotExist))
	qt.Assert(t, qt.IsNotNil(s.read(t)))
	qt.Assert(t, qt.IsNil(d.DetachAll(t.Context())))
	qt.Assert(t, qt.IsNil(s.read(t)))
}

// A change that leaves no members detaches the dispatcher.
func TestDetachMissing(t *testing.T) {
	s := newScene(t)
	s.hand(t, two(3))
	err := s.Detach(t.Context(), "one")
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.IsNotNil(s.read(t)))
}

// Foreign files in the folder of a dispatcher are not pins, and stay.
func TestForeignFiles(t *testing.T) {
	s := newScene(t)
	prog := s.hand(t, two(3))
	dir := filepath.Join(s.BPFFS, "xdp", folderName(s.ServerIfindex, idOf(t, prog)))
	qt.Assert(t, qt.IsNil(os.MkdirAll(dir, 0o700)))
	foreign := filepath.Join(dir, "prog0-map")
	qt.Assert(t, qt.IsNil(pinProgram(testenv.VerdictProgram(t, "ldt_foreign", pass), foreign)))
	c := s.read(t)
	qt.Assert(t, qt.Equals(c.Folder, dir))
	qt.Assert(t, qt.HasLen(c.Pins, 0))
	qt.Assert(t, qt.HasLen(c.Members, 2))
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	qt.Assert(t, qt.DeepEquals(s.pinned(t), []string{dir, foreign}))
}

// A pinned program with a member's pin name that runs nowhere.
func TestPinWithoutLink(t *testing.T) {
	s := newScene(t)
	prog := s.hand(t, two(3))
	dir := filepath.Join(s.BPFFS, "xdp", folderName(s.ServerIfindex, idOf(t, prog)))
	qt.Assert(t, qt.IsNil(os.MkdirAll(dir, 0o700)))
	stray := testenv.VerdictProgram(t, "ldt_stray", pass)
	qt.Assert(t, qt.IsNil(pinProgram(stray, filepath.Join(dir, progPin(1)))))
	c := s.read(t)
	qt.Assert(t, qt.DeepEquals(c.Pins, []string{filepath.Join(dir, progPin(1))}))
	m := c.Members[1]
	qt.Assert(t, qt.IsTrue(m.Missing))
	qt.Assert(t, qt.Equals(m.Name, "ldt_stray"))
	qt.Assert(t, qt.Equals(m.Program.ID, idOf(t, stray)))
	qt.Assert(t, qt.Equals(m.LinkID, 0))
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}
