package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/packet"
)

// explainFlags are the flags of explain, and the packets to build.
type explainFlags struct {
	hex            []string
	make           map[packet.Protocol]*bool
	sport          uint16
	tcpFlags       string
	fromMAC, toMAC string
	vlan           uint16
	size           int
	queue          int
	expect         string
}

func (a *app) explainCommand() *cobra.Command {
	f := explainFlags{make: map[packet.Protocol]*bool{packet.UDP: new(bool), packet.TCP: new(bool), packet.ICMP: new(bool)}}
	cmd := &cobra.Command{
		Use:   "explain HOOK TARGET FILE|SRC DST [PORT]",
		Short: "Show what each program does to a packet: which one drops it?",
		Long: `Show what each program on a hook does to a packet: its verdict, what it changes
in the packet, and what happens to the packet then, in run order. explain runs
packets through the programs without sending or receiving them: the kernel runs
the programs on given packets (BPF_PROG_TEST_RUN). Only a tcx program that calls
bpf_clone_redirect really sends a packet.

HOOK is xdp, tcx/ingress, tcx/egress, cgroup_skb/ingress or cgroup_skb/egress.
On a cgroup, programs of the cgroups above run too.

The packets come from FILE, a capture of tcpdump or Wireshark (pcap or pcapng),
with - from standard input, or from --hex, with the Ethernet header in front. On
a device without Ethernet (tun, WireGuard, an IP tunnel) packets begin with the
IP header, in captures (raw IP) and --hex too. explain can also build a packet: with --udp or --tcp from the address
SRC to the address DST and its PORT, with --icmp an echo request, as IPv4 or
IPv6. A built packet is addressed to the device; on egress it comes from the
device.

The programs really run, with their maps: counters count, and rate limits and
lists change. A warning names those maps. A test run does not show where a
redirect goes, nor what the card and the stack know about a packet besides its
bytes. Behind a libxdp dispatcher the members cannot be told apart: they run as
one.

-q prints only the last line, the sum. With --expect the exit status is 6 when a
packet gets another verdict, and when there is no packet.`,
		Example: `  dispatcher explain xdp eth0 --udp 192.0.2.1 198.51.100.7 53
  dispatcher explain xdp eth0 --tcp 2001:db8::1 2001:db8::2 443 --tcp-flags syn,ack
  dispatcher explain tcx/ingress eth0 --icmp 192.0.2.1 198.51.100.7
  dispatcher explain xdp eth0 capture.pcap -q
  tcpdump -i eth0 -c 100 -w - | dispatcher explain xdp eth0 -
  dispatcher explain xdp eth0 --udp 203.0.113.9 198.51.100.7 53 --expect drop`,
		Args:              f.words,
		ValidArgsFunction: completeArgs(1, offerExplained, a.offerTargets, offerFiles),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.explain(cmd.Context(), cmd, withoutDev(args, 1), &f)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(f.make[packet.UDP], "udp", false, "a UDP datagram, from SRC to PORT of DST")
	flags.BoolVar(f.make[packet.TCP], "tcp", false, "a TCP segment, from SRC to PORT of DST")
	flags.BoolVar(f.make[packet.ICMP], "icmp", false, "an echo request from SRC to DST")
	flags.StringArrayVar(&f.hex, "hex", nil, "the packet with these `BYTES`, in hexadecimal; may be given several times")
	flags.StringVar(&f.expect, "expect", "", "end with exit status 6 unless every packet gets this `VERDICT`: pass, drop, tx, redirect or aborted")
	flags.Uint16Var(&f.sport, "sport", 40000, "the source `PORT` of a built packet")
	flags.StringVar(&f.tcpFlags, "tcp-flags", "syn", "the `FLAGS` of a TCP segment: syn,ack for example")
	flags.IntVar(&f.size, "size", 0, "make the packet at least `N` bytes long, with its headers")
	flags.Uint16Var(&f.vlan, "vlan", 0, "with the tag of VLAN `ID`")
	flags.StringVar(&f.fromMAC, "src-mac", "", "the source Ethernet `ADDRESS` of a built packet")
	flags.StringVar(&f.toMAC, "dst-mac", "", "the destination Ethernet `ADDRESS` of a built packet")
	flags.IntVar(&f.queue, "queue", 0, "xdp: the receive queue `N` that the programs see")
	completeFlag(cmd, "expect", fixed("pass", "drop", "tx", "redirect", "aborted"))
	completeFlag(cmd, "tcp-flags", fixed("syn", "ack", "syn,ack", "rst", "fin,ack"))
	return cmd
}

// offerExplained offers the hooks that explain can run.
var offerExplained = offerWords(wordsOf([]hook.Hook{hook.XDP, hook.TCXIngress, hook.TCXEgress, hook.CgroupSKBIngress, hook.CgroupSKBEgress})...)

func offerFiles(context.Context, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// words checks the arguments, which depend on the flags.
func (f *explainFlags) words(cmd *cobra.Command, args []string) error {
	made := 0
	for _, set := range f.make {
		if *set {
			made++
		}
	}
	switch {
	case made > 1, made > 0 && len(f.hex) > 0:
		return usage("", "only one of --udp, --tcp, --icmp and --hex")
	case len(f.hex) > 0:
		return words(1, "HOOK", "TARGET")(cmd, args)
	case *f.make[packet.ICMP]:
		return words(1, "HOOK", "TARGET", "SRC", "DST")(cmd, args)
	case made > 0:
		return words(1, "HOOK", "TARGET", "SRC", "DST", "PORT")(cmd, args)
	}
	for _, name := range []string{"sport", "tcp-flags", "size", "vlan", "src-mac", "dst-mac"} {
		if cmd.Flags().Changed(name) {
			return usage("add --udp, --tcp or --icmp", "--%s is for a packet that is built", name)
		}
	}
	return words(1, "HOOK", "TARGET", "FILE")(cmd, args)
}

// explain opens everything first, so that nothing has run when something is wrong,
// and then runs the packets.
func (a *app) explain(ctx context.Context, cmd *cobra.Command, args []string, f *explainFlags) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	t, err := a.target(args[0], args[1])
	if err != nil {
		return err
	}
	var expected *hook.Verdict
	if cmd.Flags().Changed("expect") {
		v, err := hook.ParseVerdict(f.expect)
		if err != nil {
			return usage("", "--expect: %v", err)
		}
		expected = &v
	}
	spec, given, err := f.packets(args)
	if err != nil {
		return err
	}
	if spec == nil && given == nil {
		in, name, err := openCapture(args[2])
		if err != nil {
			return err
		}
		defer in.Close()
		if given, err = readAhead(ctx, name, in); err != nil {
			return err
		}
	}
	e, err := dispatcher.Explain(ctx, t, dispatcher.ExplainOptions{Queue: f.queue, BPFFS: a.bpffs})
	if err != nil {
		return err
	}
	defer e.Close()
	if spec != nil {
		made, err := a.makePacket(t, e.Chain(), *spec)
		if err != nil {
			return err
		}
		given = feedOf(made)
	}
	a.warnExplained(e)
	return a.explainAll(ctx, e, given, expected)
}

// warnExplained says what running the programs does, and what it does not show.
func (a *app) warnExplained(e *dispatcher.Explainer) {
	c := e.Chain()
	if len(c.Members) == 0 {
		a.note("nothing is attached to %s %s: all packets pass it", c.Hook, c.Target)
	}
	writes := ""
	for i, m := range e.Maps() { // those of a member follow each other
		switch {
		case i > 0 && m.Member == e.Maps()[i-1].Member:
			writes += ", "
		case m.Member < 0:
			writes += "; the dispatcher: "
		default:
			writes += "; " + c.Members[m.Member].Name + ": "
		}
		writes += fmt.Sprintf("%s (id %d)", m.Name, m.ID)
	}
	if writes != "" {
		a.warn("the programs really run, and what they write to their maps stays; they may write to %s", strings.TrimPrefix(writes, "; "))
	}
	if why := e.Together(); why != "" && len(c.Members) > 1 {
		a.note("the members cannot be told apart: %s", why)
	}
	for _, limit := range e.Limits() {
		a.note("%s", limit)
	}
}

// packets returns the packets of the flags: one to build, or bytes. If it returns
// neither, the packets come from a file.
func (f *explainFlags) packets(args []string) (*packet.Spec, *feed, error) {
	if len(f.hex) > 0 {
		var list [][]byte
		for _, text := range f.hex {
			b, err := hex.DecodeString(strings.NewReplacer(" ", "", ":", "", "\n", "", "\t", "").Replace(strings.TrimPrefix(text, "0x")))
			if err != nil || len(b) == 0 {
				return nil, nil, usage("", "--hex: %q is not hexadecimal", text)
			}
			list = append(list, b)
		}
		return nil, feedOf(list...), nil
	}
	for protocol, set := range f.make {
		if *set {
			spec, err := f.spec(protocol, args[2:])
			return spec, nil, err
		}
	}
	return nil, nil, nil
}

// spec returns the packet to build; missing Ethernet addresses are not set yet.
func (f *explainFlags) spec(protocol packet.Protocol, args []string) (s *packet.Spec, err error) {
	s = &packet.Spec{Protocol: protocol, FromPort: f.sport, VLAN: f.vlan, Size: f.size}
	for i, to := range []*netip.Addr{&s.From, &s.To} {
		if *to, err = netip.ParseAddr(args[i]); err != nil || to.Zone() != "" {
			return nil, usage("", "%q is not an IP address", args[i])
		}
	}
	if protocol != packet.ICMP {
		port, err := strconv.ParseUint(args[2], 10, 16)
		if err != nil {
			return nil, usage("", "%q is not a port: ports are numbers up to 65535", args[2])
		}
		s.ToPort = uint16(port)
	}
	if s.Flags, err = packet.ParseFlags(f.tcpFlags); err != nil {
		return nil, usage("", "--tcp-flags: %v", err)
	}
	for _, mac := range []struct {
		flag, text string
		to         *net.HardwareAddr
	}{{"src-mac", f.fromMAC, &s.FromMAC}, {"dst-mac", f.toMAC, &s.ToMAC}} {
		if mac.text == "" {
			continue
		}
		if *mac.to, err = net.ParseMAC(mac.text); err != nil || len(*mac.to) != 6 {
			return nil, usage("", "--%s: %q is not an Ethernet address", mac.flag, mac.text)
		}
	}
	// Find all other mistakes before anything is opened.
	trial := *s
	trial.FromMAC, trial.ToMAC = somebody, somebody
	if _, err := packet.Build(trial); err != nil {
		return nil, usage("", "%v", err)
	}
	return s, nil
}

// somebody is the Ethernet address of the other end.
var somebody = net.HardwareAddr{2, 0, 0, 0, 0, 1}

// makePacket builds a packet as it arrives at the device, or leaves it.
func (a *app) makePacket(t dispatcher.Target, c *hook.Chain, s packet.Spec) ([]byte, error) {
	if s.Begins = c.Begins; s.Begins != "" {
		made, err := packet.Build(s)
		if err != nil {
			return nil, usage("", "%v", err)
		}
		return made, nil
	}
	own := net.HardwareAddr{2, 0, 0, 0, 0, 2}
	if c.Ifindex != 0 {
		err := kernel.InNetNS(a.netns, func() error {
			if dev, err := net.InterfaceByIndex(c.Ifindex); err == nil && len(dev.HardwareAddr) == 6 {
				own = dev.HardwareAddr
			}
			return nil // a device without an address gets the other one
		})
		if err != nil {
			return nil, err
		}
	}
	from, to := somebody, own
	if t.Hook == hook.TCXEgress || t.Hook == hook.CgroupSKBEgress {
		from, to = own, somebody
	}
	if s.FromMAC == nil {
		s.FromMAC = from
	}
	if s.ToMAC == nil {
		s.ToMAC = to
	}
	return packet.Build(s)
}

// batch is how many packets are run at once, so that the network namespace is entered
// once for all of them.
const batch = 64

// A feed has the packets to run. They come ahead, so that Ctrl-C ends the wait for a
// pipe without data.
type feed struct {
	packets  chan *packet.Captured
	captured bool  // they are from a capture, and not made for the hook
	err      error // why the packets ended; valid when the channel is closed
}

// feedOf has these packets.
func feedOf(list ...[]byte) *feed {
	f := &feed{packets: make(chan *packet.Captured, len(list))}
	for _, data := range list {
		f.packets <- &packet.Captured{Data: data, Length: len(data)}
	}
	close(f.packets)
	return f
}

// errInterrupted: Ctrl-C came before the last packet.
var errInterrupted = errors.New("interrupted: not all packets were run")

// readAhead returns the packets of a capture, once its header has been read, and reads
// them until ctx ends.
func readAhead(ctx context.Context, name string, in io.Reader) (*feed, error) {
	f := &feed{packets: make(chan *packet.Captured, batch), captured: true}
	begun := make(chan error, 1)
	go func() {
		defer close(f.packets)
		c, err := packet.NewCapture(in)
		begun <- captureError(name, err)
		for err == nil {
			var p *packet.Captured
			if p, err = c.Next(); err != nil {
				break
			}
			select {
			case f.packets <- p:
			case <-ctx.Done():
				return
			}
		}
		if !errors.Is(err, io.EOF) {
			f.err = captureError(name, err)
		}
	}()
	select {
	case <-ctx.Done():
		return nil, errInterrupted
	case err := <-begun:
		return f, err
	}
}

func openCapture(name string) (io.ReadCloser, string, error) {
	if name == "-" {
		if term.IsTerminal(int(os.Stdin.Fd())) {
			return nil, "", usage(`as in "tcpdump -i eth0 -c 10 -w - | dispatcher explain xdp eth0 -"`, "the capture should come from standard input, but that is a terminal")
		}
		return os.Stdin, "standard input", nil
	}
	f, err := os.Open(name)
	return f, name, err
}

// captureError is the error for a file that is not a readable capture.
func captureError(name string, err error) error {
	var path *os.PathError
	if err == nil || errors.As(err, &path) {
		return err
	}
	return usage("", "%s: %v", name, err)
}

// explainAll runs all packets and prints the results.
func (a *app) explainAll(ctx context.Context, e *dispatcher.Explainer, f *feed, expected *hook.Verdict) error {
	out := a.newExplained(e, expected)
	var err error
	for more := true; more && err == nil; {
		var some []*packet.Captured
		select {
		case <-ctx.Done():
			err = errInterrupted
			continue
		case p, ok := <-f.packets:
			if !ok {
				more, err = false, f.err
				continue
			}
			some = append(some, p)
		}
		for len(some) < batch && len(f.packets) > 0 {
			some = append(some, <-f.packets)
		}
		data := make([][]byte, len(some))
		for i, p := range some {
			if want := e.Chain().Begins; f.captured && p.Begins != want {
				return join(out.end(), usage("", "the captured packets begin with %v, and packets on %s with %v", p.Begins, e.Chain().Target, want))
			}
			data[i] = p.Data
		}
		var traces []hook.Trace
		traces, err = e.Run(ctx, data...)
		for i := range traces {
			if err := out.packet(some[i], &traces[i]); err != nil {
				return err
			}
		}
	}
	return join(out.end(), err, out.judge(err))
}
