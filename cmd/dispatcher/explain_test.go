package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/packet"
)

// udp returns a packet with other bytes from 36 on.
func udp(t *testing.T, ports ...byte) []byte {
	t.Helper()
	p, err := packet.Build(packet.Spec{
		From: netip.MustParseAddr("192.0.2.1"), To: netip.MustParseAddr("198.51.100.7"), FromPort: 40000, ToPort: 53,
		FromMAC: somebody, ToMAC: somebody,
	})
	qt.Assert(t, qt.IsNil(err))
	copy(p[36:], ports)
	return p
}

func TestPrintExplained(t *testing.T) {
	settings := func(priority int) hook.Settings {
		return hook.Settings{Priority: priority, ContinueOn: hook.SetOf(hook.Pass), OnMissing: hook.MissingContinue}
	}
	member := func(name string, priority int, id uint32) hook.Member {
		return hook.Member{
			Name: name, Settings: settings(priority), Kind: hook.KindMember, State: hook.StateRunning, SlotID: id + 100,
			Program: hook.Program{ID: id, Name: name, Tag: "0123456789abcdef"},
		}
	}
	chain := &hook.Chain{
		Hook: hook.XDP, Target: "eth0", Ifindex: 2, NetNS: hook.NetNS{Inode: 4026531833, Cookie: 1}, Mode: hook.ModeNative,
		Style: hook.StyleOwned, LinkID: 12, DispatcherID: 45, Members: []hook.Member{
			member("push", 10, 41), {Name: "gone", Settings: settings(20), Kind: hook.KindMember, State: hook.StateEmpty, SlotID: 7},
			member("rewrite", 30, 42), member("filter", 40, 43), member("last", 50, 44),
		},
	}
	before, after := udp(t), udp(t, 0x14, 0xe9)
	pushed := append(append(append([]byte{}, before[:12]...), 0x81, 0, 0, 5), before[12:]...)
	ran := func(member int, returned uint32, before, after []byte) hook.Step {
		s := hook.Step{Member: member, Outcome: hook.OutcomeRan, Returned: returned, Packet: after, Change: hook.Compare(before, after)}
		s.Says, _, s.GoesOn = hook.XDP.Interpret(returned, hook.SetOf(hook.Pass))
		return s
	}
	empty := hook.Step{Member: 1, Outcome: hook.OutcomeEmpty, GoesOn: true}
	mark := uint32(7)
	marked := ran(2, 2, before, after)
	marked.Change.Mark, marked.Change.Meta = &mark, 4
	traces := []struct {
		packet packet.Captured
		trace  hook.Trace
	}{
		{packet.Captured{Data: before, Length: len(before)}, hook.Trace{
			Steps: []hook.Step{ran(0, 2, before, before), empty, marked, ran(3, 1, after, after), {Member: 4, Outcome: hook.OutcomeUnreached}},
			By:    3, Verdict: hook.Drop, Packet: after,
		}},
		{packet.Captured{Data: before, Length: 1500}, hook.Trace{
			Steps: []hook.Step{ran(0, 2, before, pushed), empty, ran(2, 2, pushed, pushed), ran(3, 2, pushed, pushed), ran(4, 2, pushed, pushed)},
			By:    4, Verdict: hook.Pass, Packet: pushed,
		}},
		{packet.Captured{Data: before, Length: len(before)}, hook.Trace{
			Steps: []hook.Step{ran(0, 7, before, before), {Member: 1, Outcome: hook.OutcomeUnreached}, {Member: 2, Outcome: hook.OutcomeUnreached}, {Member: 3, Outcome: hook.OutcomeUnreached}, {Member: 4, Outcome: hook.OutcomeUnreached}},
			By:    0, Verdict: hook.Aborted, Packet: before,
		}},
		{packet.Captured{Data: before[:5], Length: 5}, hook.Trace{By: -1, Verdict: hook.Pass, Packet: before[:5], Err: errors.New("it is\nshort")}},
	}
	drop := hook.Drop
	for _, test := range []struct {
		file, format string
		quiet        bool
	}{
		{"explain.txt", formatTable, false},
		{"explain-wide.txt", formatWide, false},
		{"explain-quiet.txt", formatTable, true},
		{"explain.json", formatJSON, false},
		{"explain-quiet.json", formatJSON, true},
	} {
		var out, errs bytes.Buffer
		x := &explained{
			a:     &app{stdout: &out, stderr: &errs, format: test.format, quiet: test.quiet},
			chain: chain, expected: &drop, outcomes: map[outcome]int{},
		}
		for i := range traces {
			qt.Assert(t, qt.IsNil(x.packet(&traces[i].packet, &traces[i].trace)))
		}
		qt.Assert(t, qt.IsNil(x.end()))
		golden(t, test.file, out.String())
		qt.Check(t, qt.Equals(errs.Len() > 0, !test.quiet))
		err := x.judge(nil)
		qt.Check(t, qt.ErrorMatches(err, "1 of 4 packets could not be run: packet 4: it is short"))
		qt.Check(t, qt.Equals(exitStatus(err), statusFailed))
		x.notRun = 0
		err = x.judge(nil)
		qt.Check(t, qt.ErrorMatches(err, "expected drop, but 3 of 4 packets got another verdict"))
		qt.Check(t, qt.Equals(exitStatus(err), statusDrift))
	}
}

// Members of a libxdp chain cannot be told apart.
func TestPrintExplainedWhole(t *testing.T) {
	chain := &hook.Chain{
		Hook: hook.XDP, Target: "eth0", Ifindex: 2, Style: hook.StyleLibxdp, DispatcherID: 45,
		Members: []hook.Member{{Name: "a", Kind: hook.KindLibxdp}, {Name: "b", Kind: hook.KindLibxdp}},
	}
	p := udp(t)
	var out bytes.Buffer
	x := &explained{a: &app{stdout: &out, format: formatTable}, chain: chain, whole: "of freplace", outcomes: map[outcome]int{}}
	err := x.packet(&packet.Captured{Data: p, Length: len(p)}, &hook.Trace{
		Steps: []hook.Step{{Member: -1, Outcome: hook.OutcomeRan, Returned: 1, Says: "drop", Packet: p}}, Verdict: hook.Drop, Packet: p,
	})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(out.String(), "packet 1  IPv4 192.0.2.1:40000 > 198.51.100.7:53 UDP  42 bytes\n"+
		"  -  the chain of libxdp  drop  ends here\n  => drop by the chain of libxdp\n"))
	qt.Check(t, qt.Equals(x.sum(), "1 packet: 1 dropped by the chain of libxdp"))
}

// Ctrl-C ends the wait for a pipe without data.
func TestExplainInterrupted(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := readAhead(ctx, "standard input", r)
	qt.Assert(t, qt.ErrorIs(err, errInterrupted))
	r.Close()
}
