package dispatcher_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestDoctorRegistry(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	s.member(t, 1)
	s.member(t, 2)
	s.member(t, 3)
	records := s.registry(t)
	link := map[string]uint32{}
	for _, m := range s.read(t).Members {
		link[m.Name] = m.LinkID
	}
	put := func(id uint32, record []byte) {
		t.Helper()
		m, err := ebpf.LoadPinnedMap(s.registryPath(), nil)
		qt.Assert(t, qt.IsNil(err))
		defer m.Close()
		if record == nil {
			qt.Assert(t, qt.IsNil(m.Delete(id)))
		} else {
			qt.Assert(t, qt.IsNil(m.Put(id, record)))
		}
	}

	// Whoever else may write to it gives a member another priority: byte 8 of the record.
	changed := slices.Clone(records[link["1"]])
	changed[8] = 90
	put(link["1"], changed)
	found := s.wantFindings(t, "order drift 1")
	qt.Check(t, qt.Equals(found[0].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s set tcx/ingress %s 1 --priority 90", s.target.NetNS, s.bpffs, s.ServerDev)))
	qt.Check(t, qt.StringContains(found[0].Text, "the order is 1 (90), 2 (20), 3 (30)"))
	mend(t, found...)
	s.wantFindings(t)
	s.wantRun(t, 2, 3, 1)

	// A record that is gone, and one that is none.
	put(link["3"], nil)
	s.mends(t, "priority note 3")
	s.wantRun(t, 2, 3, 1)
	put(link["2"], make([]byte, len(records[link["2"]])))
	s.wantFindings(t, "registry drift", "priority note 2")
	put(link["2"], records[link["2"]])
	s.wantFindings(t)

	// Something else in its place.
	qt.Assert(t, qt.IsNil(os.Remove(s.registryPath())))
	qt.Assert(t, qt.IsNil(s.tracer(t, 7).Pin(s.registryPath())))
	s.wantFindings(t, "registry drift", "priority note 2", "priority note 3", "priority note 1")
	mend(t, s.doctor(t)[0])
	s.wantFindings(t, "priority note 2", "priority note 3", "priority note 1")

	// One of a later version is for that version.
	later, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ld_registry", Type: ebpf.Hash, KeySize: 4, ValueSize: 999, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer later.Close()
	qt.Assert(t, qt.IsNil(later.Pin(s.registryPath())))
	found = s.doctor(t)
	qt.Check(t, qt.StringContains(found[0].Text, "of another version"))
	qt.Check(t, qt.Equals(found[0].Mend, ""))
	qt.Assert(t, qt.IsNil(os.Remove(s.registryPath())))
	s.clear(t)
}

// What is before the members.
func TestDoctorInFront(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			s.member(t, 1)
			id := s.foreign(t, testenv.VerdictProgram(t, "ldt_other", s.goOn(), s.on()), kernel.Before(0, false))
			found := s.wantFindings(t, "in-front note")
			qt.Check(t, qt.StringContains(found[0].Text, fmt.Sprintf("link:%d (foreign, program ldt_other)", id)))
			s.clear(t)
		})
	}
}

// Members whose owner is gone.
func TestDoctorEmpty(t *testing.T) {
	s := newScene(t)
	keepApps(t)
	s.persistent(t, 1)
	open := s.attachIn(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "2"})
	door := s.attachIn(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "3", Settings: hook.Settings{OnMissing: hook.MissingDrop}})
	s.wantFindings(t)
	open.Kill()
	door.Kill()
	soon(t, func() bool { return s.Passed(t, port, 10) == 0 })
	found := s.wantFindings(t, "empty drift 2", "empty broken 3")
	qt.Check(t, qt.Equals(found[1].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s detach xdp %s 3", s.target.NetNS, s.bpffs, s.ServerDev)))
	mend(t, found[1])
	qt.Check(t, qt.IsFalse(s.drops(t)))
	s.wantFindings(t) // the change left the other one out
	s.clear(t)
}

func TestDoctorUnprotected(t *testing.T) {
	s := newScene(t)
	s.attachLegacy(t, s.tracer(t, 1, testenv.XDPPass))
	s.wantFindings(t) // not ours: no drift
	link, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{NoGap: true, Options: dispatcher.Options{Name: "1", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	s.mends(t, "unprotected drift")
	qt.Check(t, qt.IsTrue(s.read(t).Protected()))
	s.clear(t)
}

func TestDoctorTailCalls(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "1", Settings: priority(1)})
	s.join(t, file("tailcall.o", "ldt_entry"), dispatcher.Options{Name: "jumper"})
	s.wantFindings(t) // the last one may do what it likes
	s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "2", Settings: hook.Settings{OnMissing: hook.MissingDrop}})
	if !kernel.Since(6, 2) { // each slot has all tail calls there
		s.wantFindings(t)
		s.clear(t)
		return
	}
	found := s.wantFindings(t, "tail-calls note jumper")
	qt.Check(t, qt.StringContains(found[0].Text, "33 are allowed for a packet and the chain needs 3, so when its own are more than 30,"))
	qt.Check(t, qt.IsTrue(strings.HasSuffix(found[0].Text, ": 2 (drop)")))
	s.clear(t)
}

// Descriptions that this version cannot read.
func TestDoctorUnreadable(t *testing.T) {
	s := newScene(t)
	for version, text := range map[uint32]string{0: "damaged chain description", 3: "of version 3, this program knows up to 2"} {
		value := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, 0x6c646331), version)
		m, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "ld_chain", Type: ebpf.Array, KeySize: 4, ValueSize: 4640, MaxEntries: 1, Flags: unix.BPF_F_RDONLY_PROG,
			Contents: []ebpf.MapKV{{Key: uint32(0), Value: append(value, make([]byte, 4640-len(value))...)}},
		})
		qt.Assert(t, qt.IsNil(err))
		defer m.Close()
		qt.Assert(t, qt.IsNil(m.Freeze()))
		spec := testenv.VerdictSpec("libdispatcher", testenv.XDPPass)
		prog, err := ebpf.NewProgram(spec)
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		qt.Assert(t, qt.IsNil(prog.BindMap(m)))
		s.attachLegacy(t, prog)
		found := s.wantFindings(t, "unreadable drift")
		qt.Check(t, qt.StringContains(found[0].Text, text))
		qt.Check(t, qt.Equals(found[0].Target, s.ServerDev))
		s.Server.IP(t, "link", "set", "dev", s.ServerDev, "xdp", "off")
	}
	s.wantFindings(t)
}

// Whoever made the link that a chain was put into may put another program into it.
func TestDoctorDisplaced(t *testing.T) {
	s := newScene(t)
	var theirs link.Link
	s.Server.Do(t, func() {
		var err error
		theirs, err = link.AttachXDP(link.XDPOptions{Program: s.tracer(t, 1, testenv.XDPPass), Interface: s.ServerIfindex})
		qt.Assert(t, qt.IsNil(err))
	})
	t.Cleanup(func() { theirs.Close() })
	info, err := theirs.Info()
	qt.Assert(t, qt.IsNil(err))
	adopted, err := dispatcher.AdoptLink(t.Context(), uint32(info.ID), dispatcher.AdoptOptions{Options: dispatcher.Options{Name: "1", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(adopted.Close()))
	s.wantFindings(t)
	qt.Assert(t, qt.IsNil(theirs.Update(s.tracer(t, 2, testenv.XDPPass))))
	s.wantFindings(t, "displaced broken 1")
	qt.Assert(t, qt.IsNil(os.RemoveAll(s.bpffs+"/libdispatcher")))
	qt.Assert(t, qt.IsNil(theirs.Close()))
}
