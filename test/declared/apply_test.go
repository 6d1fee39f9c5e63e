package declared

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/apply"
	"github.com/libdispatcher/dispatcher/internal/mapdata"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// What is declared is attached; twice changes nothing; what differs is changed, and nothing else.
func TestApply(t *testing.T) {
	s := newStage(t)
	a := s.filter("a")
	o := s.order(a)
	s.apply(t, o, "attach a")
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	first := s.Read(t)
	s.again(t, o)
	qt.Check(t, qt.DeepEquals(s.Read(t), first))

	// A global makes another program; its maps stay.
	o.Attachments[0] = s.filter("a", "7001")
	s.apply(t, o, "change a program")
	qt.Check(t, qt.IsTrue(s.drops(t, 7001)))
	qt.Check(t, qt.IsFalse(s.drops(t, 7000)))
	s.again(t, o)

	// Another file, settings, and a second member.
	o.Attachments[0] = s.other("a")
	o.Attachments[0].Order = declare.Order{Priority: 30, ContinueOn: []string{"pass", "drop"}, OnMissing: "drop", After: []string{"b"}}
	o.Attachments = append(o.Attachments, s.filter("b", "7001"))
	s.apply(t, o, "attach b; change a program priority 50>51 continue_on pass>drop,pass on_missing continue>drop")
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	qt.Check(t, qt.IsTrue(s.drops(t, 7001)))
	s.WantChain(t, "b* a*")
	s.again(t, o)

	// What is not declared any more stays until it is pruned.
	o.Attachments = o.Attachments[1:]
	s.apply(t, o, "keep b; undeclared a")
	o.Prune = true
	s.apply(t, o, "keep b; detach a")
	s.WantChain(t, "b*")
	qt.Check(t, qt.IsFalse(s.drops(t, 7000)))
	o.Attachments = nil
	s.apply(t, o, "detach b")
	s.WantChain(t, "")
}

// The maps of a program that is replaced stay, unless the document says otherwise.
func TestMapsStay(t *testing.T) {
	s := newStage(t)
	dropped := func() (n uint64) {
		maps, err := mapdata.Of(s.Read(t).Members[0].Program.ID)
		qt.Assert(t, qt.IsNil(err))
		defer mapdata.Close(maps)
		for _, m := range maps {
			if m.Name == "ldt_dropped" {
				counter, err := ebpf.NewMapFromID(ebpf.MapID(m.ID))
				qt.Assert(t, qt.IsNil(err))
				defer counter.Close()
				qt.Assert(t, qt.IsNil(counter.Lookup(uint32(0), &n)))
			}
		}
		return n
	}
	o := s.order(s.filter("a"))
	s.apply(t, o, "attach a")
	s.Send(t, 7000, 3)
	qt.Check(t, qt.Equals(dropped(), 3))
	o.Attachments[0] = s.filter("a", "7001")
	s.apply(t, o, "change a program")
	qt.Check(t, qt.Equals(dropped(), 3))
	o.Attachments[0] = s.filter("a")
	o.Attachments[0].Maps.Reuse = "none"
	s.apply(t, o, "change a program")
	qt.Check(t, qt.Equals(dropped(), 0))
	o.Attachments, o.Prune = nil, true
	s.apply(t, o, "detach a")
}

// A changed file is another program; a touched one is not.
func TestChangedFile(t *testing.T) {
	s := newStage(t)
	file := filepath.Join(t.TempDir(), "x.o")
	put := func(from string) {
		b, err := os.ReadFile(filepath.Join(s.objects, from))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(os.WriteFile(file, b, 0o600)))
	}
	a := s.filter("a")
	a.Program.File = file
	o := s.order(a)
	put("filter.o")
	s.apply(t, o, "attach a")
	put("filter.o")
	s.again(t, o)

	// What does not load leaves the old program running, and the rest is done.
	put("refused.o")
	o.Attachments = append(o.Attachments, s.filter("b", "7001"))
	report, err := o.run(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(report.Results, 2))
	qt.Check(t, qt.ErrorMatches(report.Results[0].Err, `apply xdp veth1: "a" of test.yaml: .*the verifier refused program "ldt_refused": .*`))
	qt.Check(t, qt.IsNil(report.Results[1].Err))
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	qt.Check(t, qt.IsTrue(s.drops(t, 7001)))

	// Nor does a file that is gone.
	qt.Assert(t, qt.IsNil(os.Remove(file)))
	report, err = o.run(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.ErrorMatches(report.Results[0].Err, `apply xdp veth1: "a" of test.yaml: open .*/x.o: no such file or directory`))
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	o.Attachments, o.Prune = nil, true
	s.apply(t, o, "detach a; detach b")
}

// A program that somebody has put in by hand is replaced by what is declared, and lost pins come back.
func TestDrift(t *testing.T) {
	s := newStage(t)
	o := s.order(s.filter("a"))
	s.apply(t, o, "attach a")
	l := s.Open(t, "a")
	qt.Assert(t, qt.IsNil(l.Update(t.Context(), dispatcher.Program(s.Tracer(t, 1)))))
	qt.Check(t, qt.IsFalse(s.drops(t, 7000)))
	s.apply(t, o, "change a program")
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))

	qt.Assert(t, qt.IsNil(l.Set(t.Context(), hook.Settings{Priority: 7})))
	s.apply(t, o, "change a priority 7>50")
	qt.Assert(t, qt.IsNil(l.Unpin(t.Context())))
	s.apply(t, o, "change a pinned no>yes")
	l.Close()
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	o.Attachments, o.Prune = nil, true
	s.apply(t, o, "detach a")
}

// Members of others are not touched, whatever is declared.
func TestOthersStay(t *testing.T) {
	s := newStage(t)
	s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "b", Priority: 10, Owner: "somebody"})
	s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "c", Priority: 90, Owner: "apply/another"})
	a := s.filter("a", "7001")
	a.Order.Before = []string{"b"}
	o := s.order(a, s.filter("b"))
	o.Prune = true
	s.apply(t, o, `attach a; blocked b: apply xdp veth1: "b" of test.yaml: there is a member "b" already, of owner "somebody": `+
		`this document did not make it, and leaves it alone; choose another name, or detach that member`)
	s.WantChain(t, "a* b c")
	s.WantRun(t, 1, 2)
	o.Attachments = nil
	s.apply(t, o, "detach a")
	s.WantRun(t, 1, 2)
}

// A chain whose members are all declared is sealed; one with members of others is not.
func TestSealed(t *testing.T) {
	s := newStage(t)
	sealed := func() (names []string) {
		for _, m := range s.Read(t).Members {
			if m.Sealed {
				names = append(names, m.Name)
			}
		}
		return names
	}
	o := s.order(s.filter("a"))
	s.apply(t, o, "attach a")
	qt.Check(t, qt.DeepEquals(sealed(), []string{"a"}))
	no := false
	b := s.other("b")
	b.Seal = &no
	o.Attachments = append(o.Attachments, b)
	s.apply(t, o, "keep a; attach b")
	qt.Check(t, qt.DeepEquals(sealed(), []string{"a"}))
	o.Attachments[1].Seal = nil
	s.apply(t, o, "keep a; keep b")
	qt.Check(t, qt.DeepEquals(sealed(), []string{"a", "b"}))
	s.again(t, o)
	o.Attachments, o.Prune = nil, true
	s.apply(t, o, "detach a; detach b")
}

// A program without a link is in the way, or becomes a member.
func TestConflict(t *testing.T) {
	s := newStage(t)
	path := s.Pinned(t, testenv.VerdictProgram(t, "ldt_legacy", testenv.XDPPass))
	s.Server.IP(t, "link", "set", "dev", s.ServerDev, "xdp", "pinned", path)
	o := s.order(s.filter("a"))
	report, err := o.run(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.ErrorMatches(report.Results[0].Err, `apply xdp veth1: held by a program without a link \(program ldt_legacy, .*\): "a" of test.yaml: hook is busy; onConflict: adopt makes it a member`))
	qt.Check(t, qt.ErrorIs(report.Results[0].Err, dispatcher.ErrBusy))
	o.Attachments[0].OnConflict = "adopt"
	s.apply(t, o, "attach a")
	s.WantChain(t, "ldt_legacy* a*")
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	s.again(t, o)
	s.Clear(t)
}

// Hooks with links of their own: TCX and cgroups.
func TestLinks(t *testing.T) {
	s := newStage(t)
	tc := declare.Attachment{Name: "tc", Hook: "tc/ingress", On: declare.Match{Kind: []string{"veth"}}, Program: declare.Program{Builtin: "droplist"}}
	cgroup := testenv.NewCgroup(t)
	cg := declare.Attachment{Name: "cg", Hook: "cgroup_skb/ingress", On: declare.Match{Cgroup: cgroup.Path}, Program: declare.Program{Builtin: "count"}}
	list := []declare.Attachment{tc, cg}
	if testenv.HasHook(t, hook.TCXIngress) {
		tcx := tc
		tcx.Name, tcx.Hook = "tcx", "tcx/ingress"
		list = append(list, tcx)
	}
	o := s.order(list...)
	done := func(state string) {
		t.Helper()
		report, err := o.run(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.HasLen(report.Results, len(list)))
		for _, r := range report.Results {
			qt.Check(t, qt.Equals(string(r.State), state), qt.Commentf("%s", words(report)))
			qt.Check(t, qt.IsNil(r.Err))
		}
	}
	done("attach")
	s.again(t, o)
	for i := range o.Attachments {
		o.Attachments[i].Order.Priority = 7
	}
	done("change")
	s.again(t, o)
	o.Attachments, o.Prune = nil, true
	done("detach")
}

// Nothing that matches is no success, and with a Waiter what comes is attached.
func TestDevices(t *testing.T) {
	s := newStage(t)
	a := s.filter("a")
	a.On = declare.Match{Names: []string{"new*"}}
	o := s.order(a)
	report := s.apply(t, o, `no-device a: apply xdp: "a" of test.yaml: no device matches: names new*`)
	qt.Check(t, qt.ErrorIs(report.Results[0].Err, apply.ErrNoDevice))
	qt.Check(t, qt.IsTrue(report.Missing()))

	w, err := apply.NewWaiter(o.docs(), o.NetNS)
	qt.Assert(t, qt.IsNil(err))
	defer w.Close()
	s.Server.IP(t, "link", "add", "new1", "type", "veth", "peer", "name", "other1")
	for report.Missing() {
		qt.Assert(t, qt.IsNil(w.Wait(t.Context(), report)))
		report, err = o.run(t.Context())
		qt.Assert(t, qt.IsNil(err))
	}
	qt.Check(t, qt.Equals(words(report), "attach a"))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	qt.Check(t, qt.ErrorIs(w.Wait(ended, &apply.Report{}), context.Canceled))

	// By its other name, its driver, its kind and its place in the stack.
	s.Server.IP(t, "link", "property", "add", "dev", "other1", "altname", "uplink")
	s.Server.IP(t, "link", "add", "link", "other1", "name", "above", "type", "macvlan")
	for _, test := range []struct {
		on   declare.Match
		want []string
	}{
		{declare.Match{Names: []string{"up*"}}, []string{"other1"}},
		{declare.Match{Names: []string{"other*"}, Role: "leaf"}, nil},
		{declare.Match{Names: []string{"new*", "other*", "above"}, Role: "leaf"}, []string{"above", "new1"}},
		{declare.Match{Driver: []string{"macvlan"}}, []string{"above"}},
		{declare.Match{Kind: []string{"macvlan"}}, []string{"above"}},
		{declare.Match{Driver: []string{"veth"}, Names: []string{"new*", "above"}}, []string{"new1"}},
		{declare.Match{Kind: []string{"loopback"}}, []string{"lo"}},
		{declare.Match{Names: []string{"*"}, NetNS: "no-such"}, nil},
	} {
		a.Name, a.On = "other", test.on
		report, err := apply.Diff(t.Context(), s.order(a).docs(), s.order().options())
		qt.Assert(t, qt.IsNil(err))
		var got []string
		for _, r := range report.Results {
			if r.State == "attach" {
				got = append(got, r.Target)
			}
		}
		slices.Sort(got)
		qt.Check(t, qt.DeepEquals(got, test.want), qt.Commentf("%+v", test.on))
	}
	s.Server.IP(t, "link", "del", "new1")
	s.Clear(t)
	_, err = dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.BPFFS})
	qt.Check(t, qt.IsNil(err))
}
