package observe

import (
	"encoding/binary"
	"fmt"
	"os"
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
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

func TestDoctorPriorities(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	s.Member(t, 1)
	s.Member(t, 2)
	s.Member(t, 3)

	// Another process that may write to it gives a member another priority.
	records, link := s.Records(t, "1"), s.Read(t).Member("1").LinkID
	changed, err := records.Get(link)
	qt.Assert(t, qt.IsNil(err))
	changed.Priority = 90
	qt.Assert(t, qt.IsNil(records.Put(link, changed)))
	found := wantFindings(t, s, "order drift 1")
	qt.Check(t, qt.Equals(found[0].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s set tcx/ingress %s 1 --priority 90", s.Target.NetNS, s.BPFFS, s.ServerDev)))
	qt.Check(t, qt.StringContains(found[0].Text, "the order is 1 (90), 2 (20), 3 (30)"))
	mend(t, found...)
	wantFindings(t, s)
	s.WantRun(t, 2, 3, 1)

	// A record that is gone.
	qt.Assert(t, qt.IsNil(s.Records(t, "3").Delete(s.Read(t).Member("3").LinkID)))
	mends(t, s, "priority note 3")
	s.WantRun(t, 2, 3, 1)
	s.Clear(t)
}

// What is before the members.
func TestDoctorInFront(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Member(t, 1)
			_, id := s.Foreign(t, testenv.VerdictProgram(t, "ldt_other", s.GoOn(), s.On()), kernel.Before(0, false))
			found := wantFindings(t, s, "in-front note")
			qt.Check(t, qt.StringContains(found[0].Text, fmt.Sprintf("link:%d (foreign, program ldt_other)", id)))
			s.Clear(t)
		})
	}
}

// Members without an owner.
func TestDoctorEmpty(t *testing.T) {
	s := scene.New(t)
	keepApps(t)
	s.Member(t, 1)
	open := s.AttachIn(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "2"})
	door := s.AttachIn(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "3", OnMissing: hook.MissingDrop})
	wantFindings(t, s)
	open.Kill()
	door.Kill()
	scene.Soon(t, func() bool { return s.Passed(t, scene.Port, 10) == 0 })
	found := wantFindings(t, s, "empty drift 2", "empty broken 3")
	qt.Check(t, qt.Equals(found[1].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s detach xdp %s 3", s.Target.NetNS, s.BPFFS, s.ServerDev)))
	mend(t, found[1])
	qt.Check(t, qt.IsFalse(s.Drops(t)))
	wantFindings(t, s) // the change left the other one out
	s.Clear(t)
}

func TestDoctorUnprotected(t *testing.T) {
	s := scene.New(t)
	s.AttachLegacy(t, s.Tracer(t, 1, testenv.XDPPass))
	wantFindings(t, s) // not ours: no drift
	link, err := dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{NoGap: true, Name: "1", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	mends(t, s, "unprotected drift")
	qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
	s.Clear(t)
}

func TestDoctorTailCalls(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "1", Priority: 1})
	s.Join(t, scene.File("tailcall.o", "ldt_entry"), dispatcher.Options{Name: "jumper"})
	wantFindings(t, s) // the last one may do what it likes
	s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "2", OnMissing: hook.MissingDrop})
	if !kernel.Since(6, 2) { // each slot has all tail calls there
		wantFindings(t, s)
		s.Clear(t)
		return
	}
	found := wantFindings(t, s, "tail-calls note jumper")
	qt.Check(t, qt.StringContains(found[0].Text, "33 are allowed for a packet and the chain needs 3, so when its own are more than 30,"))
	qt.Check(t, qt.IsTrue(strings.HasSuffix(found[0].Text, ": 2 (drop)")))
	s.Clear(t)
}

// Descriptions that this version cannot read.
func TestDoctorUnreadable(t *testing.T) {
	s := scene.New(t)
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
		s.AttachLegacy(t, prog)
		found := wantFindings(t, s, "unreadable drift")
		qt.Check(t, qt.StringContains(found[0].Text, text))
		qt.Check(t, qt.Equals(found[0].Target, s.ServerDev))
		s.Server.IP(t, "link", "set", "dev", s.ServerDev, "xdp", "off")
	}
	wantFindings(t, s)
}

// The process that made the link that a chain was put into may put another program into the link.
func TestDoctorDisplaced(t *testing.T) {
	s := scene.New(t)
	var theirs link.Link
	s.Server.Do(t, func() {
		var err error
		theirs, err = link.AttachXDP(link.XDPOptions{Program: s.Tracer(t, 1, testenv.XDPPass), Interface: s.ServerIfindex})
		qt.Assert(t, qt.IsNil(err))
	})
	t.Cleanup(func() { theirs.Close() })
	info, err := theirs.Info()
	qt.Assert(t, qt.IsNil(err))
	adopted, err := dispatcher.AdoptLink(t.Context(), uint32(info.ID), dispatcher.AdoptOptions{Name: "1", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(adopted.Close()))
	wantFindings(t, s)
	qt.Assert(t, qt.IsNil(theirs.Update(s.Tracer(t, 2, testenv.XDPPass))))
	wantFindings(t, s, "displaced broken 1")
	qt.Assert(t, qt.IsNil(os.RemoveAll(s.BPFFS+"/libdispatcher")))
	qt.Assert(t, qt.IsNil(theirs.Close()))
}
