package explain

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// An Explainer runs packets through what was on a hook at one moment, without sending
// them (BPF_PROG_TEST_RUN). It holds the programs and not the slots, so it keeps no
// member in its chain.
type Explainer struct {
	Chain *hook.Chain
	// Together says why all members run as one step; empty when they run one by one.
	Together string
	// Limits says in words what a test run on this kernel cannot show.
	Limits []string
	// Writable are the maps that the programs may write to.
	Writable []hook.WritableMap

	opened *target.Opened
	queue  uint32
	progs  []*ebpf.Program // of the members; nil where none runs
	onward hook.Hook       // with the filters of tc behind TCX; empty if there are none
	whole  *ebpf.Program   // the dispatcher, when it runs all members as one step; else nil
	with   knowledge
	room   []byte // for a packet that comes out
}

// knowledge says what a test run can be told of a packet beside its bytes.
type knowledge uint8

const (
	bytesOnly   knowledge = iota
	itsContext            // the fields that are not about a device
	itsDevice             // also the device where programs see the packet
	itsReceiver           // also, for socket buffers, that the packet came in there
)

// grow is how much a packet may grow on its way through one program. The buffer of a test run
// has no room for more, except with bpf_skb_change_tail.
const grow = 64 << 10

// Explain reads what is on the hook and returns an Explainer of it, which the caller closes.
// XDP programs are told that packets come from the given receive queue. It returns
// ebpf.ErrNotSupported for a hook that has no test run.
func Explain(ctx context.Context, t target.Target, queue uint32) (*Explainer, error) {
	switch {
	case t.Hook == hook.XDP, t.Hook.Family() == "tcx", t.Hook == hook.CgroupSKBIngress, t.Hook == hook.CgroupSKBEgress:
	default:
		return nil, cannotRun(t.Hook)
	}
	o, err := target.Open(t, nil)
	if err != nil {
		return nil, err
	}
	e := &Explainer{opened: o, queue: queue}
	err = kernel.Retry(ctx, func() error {
		e.release()
		if e.Chain, err = attach.ReadEffective(ctx, t); err != nil {
			return err
		}
		return e.open()
	})
	if err == nil {
		err = e.do(e.probe)
	}
	if err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

// cannotRun returns an error for a hook that takes no packets, and for a hook where other
// programs run between the entries.
func cannotRun(h hook.Hook) error {
	if _, err := hook.Parse(string(h)); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	why := "its programs see none, and the kernel has no test run for them"
	if h.Family() == "tc" {
		why = "filters that are no BPF programs may run between its programs"
	}
	return hook.Because(ebpf.ErrNotSupported, "packets cannot be taken through this hook: %s", why).
		Hint("xdp, tcx/ingress, tcx/egress, cgroup_skb/ingress and cgroup_skb/egress can")
}

// open opens the programs of the chain.
func (e *Explainer) open() error {
	e.Writable = nil
	if e.Chain.Style == hook.StyleLibxdp {
		if len(e.Chain.Members) != 1 { // a single member is the one step anyway
			e.Together = "behind a dispatcher of libxdp they are freplace programs, which the kernel runs as a part of the dispatcher only"
		}
		var err error
		e.whole, err = e.openProgram(-1, e.Chain.DispatcherID)
		for i := range e.Chain.Members {
			if id := e.Chain.Members[i].Program.ID; id != 0 && err == nil {
				var prog *ebpf.Program
				if prog, err = e.openProgram(i, id); err == nil {
					prog.Close()
				}
			}
		}
		return err
	}
	for i := range e.Chain.Members {
		m := &e.Chain.Members[i]
		var prog *ebpf.Program
		if m.Program.ID != 0 && m.State == hook.StateRunning {
			var err error
			if prog, err = e.openProgram(i, m.Program.ID); err != nil {
				return err
			}
		}
		e.progs = append(e.progs, prog)
	}
	return nil
}

func (e *Explainer) openProgram(member int, id uint32) (*ebpf.Program, error) {
	prog, err := kernel.OpenProgram(id, fmt.Sprintf("program id %d", id))
	if err != nil {
		return nil, err
	}
	if dispatch.IsOurs(kernel.Describe(prog).Name) {
		return prog, nil // its maps are slots: do not open them, see state.Slots
	}
	ids, err := kernel.ProgramMaps(prog)
	if err != nil {
		prog.Close()
		return nil, err
	}
	for _, id := range ids {
		if w, ok := writable(id); ok {
			w.Member = member
			e.Writable = append(e.Writable, w)
		}
	}
	return prog, nil
}

// writable describes a map of a program, and tells whether the program may write to the map or
// to maps in it. Programs cannot write to maps that are read-only for them, nor to maps with
// entries that only user space sets.
func writable(id ebpf.MapID) (w hook.WritableMap, ok bool) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return w, false // gone meanwhile
	}
	defer m.Close()
	switch m.Type() {
	case ebpf.ProgramArray, ebpf.DevMap, ebpf.DevMapHash, ebpf.CPUMap, ebpf.XSKMap, ebpf.CGroupArray:
		return w, false
	}
	info, err := m.Info()
	if err != nil || m.Flags()&unix.BPF_F_RDONLY_PROG != 0 {
		return w, false
	}
	return hook.WritableMap{ID: uint32(id), Name: info.Name, Type: m.Type().String()}, true
}

func (e *Explainer) release() {
	for _, p := range append(e.progs, e.whole) {
		p.Close()
	}
	e.progs, e.whole = nil, nil
}

// Close closes the programs.
func (e *Explainer) Close() {
	e.release()
	e.opened.Close()
}

// do runs fn in the network namespace of the device, where the device's index is valid.
func (e *Explainer) do(fn func() error) error {
	if e.Chain.Hook.OnCgroup() {
		return fn()
	}
	return e.opened.NS.Do(fn)
}

// probe finds out, with a program without effect, what a test run on this kernel can be told.
func (e *Explainer) probe() error {
	spec := &ebpf.ProgramSpec{
		Name: "ld_probe", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(hook.Pass)), asm.Return()},
	}
	levels := []knowledge{itsDevice, itsContext, bytesOnly}
	switch e.Chain.Hook.Family() {
	case "tcx":
		spec.Type = ebpf.SchedCLS
		if e.Chain.Hook == hook.TCXIngress {
			levels = append([]knowledge{itsReceiver}, levels...)
		}
	case "cgroup":
		spec.Type, spec.AttachType = ebpf.CGroupSKB, kernel.KindOf(e.Chain.Hook).Attach
		levels = []knowledge{itsContext, bytesOnly}
		const data, end = 76, 80              // in struct __sk_buff
		spec.Instructions = asm.Instructions{ // the program returns whether it sees the packet's bytes
			asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, end, asm.Word),
			asm.Mov.Imm(asm.R0, 0),
			asm.Add.Imm(asm.R2, 20),
			asm.JGT.Reg(asm.R2, asm.R3, "exit"),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return().WithSymbol("exit"),
		}
	}
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		return kernel.Errno("load a program to try the test run", err)
	}
	defer prog.Close()
	sample := make([]byte, 64)
	sample[12], sample[14], sample[17] = 0x08, 0x45, 50 // an IPv4 packet
	var refused error
	for _, e.with = range levels {
		var seen uint32
		f := frame{data: sample}
		if seen, err = e.run(prog, &f); err != nil {
			if refused == nil {
				refused = err
			}
			continue
		}
		if e.Chain.Hook.OnCgroup() && seen == 0 {
			return hook.Because(ebpf.ErrNotSupported, "a test run shows no packets to programs of %s on this kernel (seen to on Linux 6.18, and not on 6.12)", e.Chain.Hook)
		}
		break
	}
	switch {
	case err != nil:
		return kernel.Errno("test run", err)
	case e.queue != 0 && e.with < itsDevice:
		return hook.Because(hook.ErrUsage, "receive queue %d: %s has none, or this kernel cannot pretend it on a test run (Linux 5.15 can): %w", e.queue, e.Chain.Target, refused)
	case e.with == levels[0]:
	case e.with == itsDevice:
		e.Limits = append(e.Limits, "programs see the device in ifindex, and 0 in ingress_ifindex")
	case !e.Chain.Hook.OnCgroup():
		e.Limits = append(e.Limits, fmt.Sprintf("this kernel cannot pretend on a test run that a packet is on %s (%v): programs that look at the device see lo", e.Chain.Target, refused))
	}
	if e.Chain.Begins != "" && e.Chain.Hook.Family() == "tcx" {
		// bpf_prog_test_run_skb takes every packet for one with an Ethernet header
		// (eth_type_trans, net/bpf/test_run.c).
		e.Limits = append(e.Limits, "packets have no Ethernet header here, and a test run takes their beginning for one: programs see wrong values in protocol and pkt_type")
	}
	if e.Chain.Hook.Family() == "tcx" {
		e.look()
	}
	if e.with == bytesOnly {
		e.Limits = append(e.Limits, "metadata does not come from one program to the next")
	}
	return nil
}

// A frame is a packet on its way through the programs, with the data that goes along.
type frame struct {
	data []byte // the metadata, and then the packet
	meta int    // bytes of metadata
	skb  [skbSize]byte
}

func (f *frame) packet() []byte { return f.data[f.meta:] }

// Offsets in struct __sk_buff (linux/bpf.h) of what a test run takes and returns.
const (
	skbSize     = 192
	skbMark     = 8
	skbPriority = 32
	skbReceiver = 36 // ingress_ifindex
	skbDevice   = 40 // ifindex
	skbCB       = 48
	skbTime     = 152
)

// skbKept are the fields that a packet keeps from program to program.
var skbKept = []struct{ at, size int }{{skbMark, 4}, {skbPriority, 4}, {skbCB, 20}, {skbTime, 8}}

// xdpMD is struct xdp_md, linux/bpf.h.
type xdpMD struct{ Data, DataEnd, DataMeta, Ingress, Queue, Egress uint32 }

// run runs one program on the packet.
func (e *Explainer) run(prog *ebpf.Program, f *frame) (uint32, error) {
	if need := len(f.data) + grow; len(e.room) < need {
		e.room = make([]byte, need)
	}
	o := ebpf.RunOptions{Data: f.data, DataOut: e.room}
	var md xdpMD
	var skb [skbSize]byte
	switch {
	case e.with == bytesOnly:
	case e.Chain.Hook == hook.XDP:
		in := xdpMD{Data: uint32(f.meta), DataEnd: uint32(len(f.data))}
		if e.with == itsDevice {
			in.Ingress, in.Queue = uint32(e.Chain.Ifindex), e.queue
		}
		o.Context, o.ContextOut = in, &md
	default:
		in := f.skb
		if e.with >= itsDevice {
			binary.NativeEndian.PutUint32(in[skbDevice:], uint32(e.Chain.Ifindex))
		}
		if e.with >= itsReceiver {
			binary.NativeEndian.PutUint32(in[skbReceiver:], uint32(e.Chain.Ifindex))
		}
		o.Context, o.ContextOut = in, &skb
	}
	returned, err := prog.Run(&o)
	if err != nil {
		return 0, err
	}
	out := bytes.Clone(o.DataOut)
	if e.Chain.Hook.OnCgroup() {
		copy(out, f.data[:min(etherSize, len(f.data))]) // these programs do not see the header, and it comes back as zeros
	}
	f.data, f.meta = out, min(int(md.Data), len(out))
	for _, k := range skbKept {
		copy(f.skb[k.at:k.at+k.size], skb[k.at:])
	}
	return returned, nil
}

// etherSize is the length of an Ethernet header. The kernel takes no shorter packet.
const etherSize = 14

// Run takes packets through the programs, one after the other. An error about one packet is in
// the packet's trace; the returned error ends the run.
func (e *Explainer) Run(ctx context.Context, packets [][]byte) (traces []hook.Trace, err error) {
	err = e.do(func() error {
		for _, p := range packets {
			if err := ctx.Err(); err != nil {
				return err
			}
			t := e.trace(p)
			if errors.Is(t.Err, unix.ENODEV) {
				return hook.Because(hook.ErrDefunct, "the device is gone: %w", t.Err)
			}
			traces = append(traces, t)
		}
		return nil
	})
	return traces, err
}

// trace takes one packet through the programs.
func (e *Explainer) trace(packet []byte) hook.Trace {
	f := &frame{data: bytes.Clone(packet)}
	t := hook.Trace{Verdict: hook.Pass, By: -1, Packet: packet}
	if len(packet) < etherSize && e.Chain.Begins == "" {
		t.Err = hook.Because(hook.ErrUsage, "it has %d bytes, and an Ethernet header alone has %d", len(packet), etherSize)
		return t
	}
	if e.whole != nil {
		e.traceWhole(&t, f)
		t.Packet = f.packet()
		return t
	}
	reached := true
	t.Onward = e.onward
	for i, prog := range e.progs {
		m := &e.Chain.Members[i]
		step := hook.Step{Member: i, Outcome: hook.OutcomeUnreached}
		decides := false
		switch {
		case !reached, m.State == hook.StateDisplaced:
		case prog == nil:
			step.Outcome, step.GoesOn = hook.OutcomeEmpty, true
			if v, closed := closedDoor(m.OnMissing); closed {
				step.Outcome, step.GoesOn, step.Says = hook.OutcomeClosed, false, v.String()
				t.Verdict, decides = v, true
			}
			reached = step.GoesOn
		default:
			var v hook.Verdict
			if v, t.Err = e.step(&step, prog, f, m.ContinueOn); t.Err != nil {
				t.Err = fmt.Errorf("%q: %w", m.Name, t.Err)
				t.Steps = append(t.Steps, step)
				return t
			}
			switch {
			case e.Chain.Hook == hook.XDP, !step.GoesOn, v != hook.Pass && t.By < 0:
				t.Verdict, decides = v, true
			}
			reached = step.GoesOn
			switch int32(step.Returned) { // tcx_run, net/core/dev.c
			case 0, 2, 7: // TCX_PASS, TCX_DROP, TCX_REDIRECT
				t.Onward = ""
			}
		}
		if decides {
			t.By = len(t.Steps)
		}
		t.Steps = append(t.Steps, step)
	}
	t.Packet = f.packet()
	return t
}

// closedDoor returns the verdict of an empty slot, and false if the chain goes on instead.
func closedDoor(m hook.OnMissing) (hook.Verdict, bool) {
	switch m {
	case hook.MissingDrop:
		return hook.Drop, true
	case hook.MissingAborted:
		return hook.Aborted, true
	}
	return hook.Pass, false
}

// step runs a program, and fills in the step with what the program did.
func (e *Explainer) step(step *hook.Step, prog *ebpf.Program, f *frame, on hook.VerdictSet) (hook.Verdict, error) {
	before := *f
	returned, err := e.run(prog, f)
	if err != nil {
		return 0, e.refused(err, len(before.packet()))
	}
	var v hook.Verdict
	step.Says, v, step.GoesOn = e.Chain.Hook.Interpret(returned, on)
	step.Outcome, step.Returned, step.Packet = hook.OutcomeRan, returned, f.packet()
	step.Change = hook.Compare(before.packet(), f.packet())
	step.Change.Meta = f.meta - before.meta
	changed := func(at int) *uint32 {
		now := binary.NativeEndian.Uint32(f.skb[at:])
		if now == binary.NativeEndian.Uint32(before.skb[at:]) {
			return nil
		}
		return &now
	}
	step.Change.Mark, step.Change.Priority = changed(skbMark), changed(skbPriority)
	return v, nil
}

// traceWhole runs all members at once.
func (e *Explainer) traceWhole(t *hook.Trace, f *frame) {
	step := hook.Step{Member: -1, Outcome: hook.OutcomeUnreached}
	if len(e.Chain.Members) == 1 {
		step.Member = 0 // a single member decides every verdict
	}
	if t.Verdict, t.Err = e.step(&step, e.whole, f, hook.Never); t.Err == nil {
		t.By = 0
	}
	t.Steps = append(t.Steps, step)
}

// refused says why the kernel did not take a packet.
func (e *Explainer) refused(err error, length int) error {
	err = kernel.Errno(fmt.Sprintf("test run of a packet of %d bytes", length), err)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	why := "the kernel takes no packet that is so short, or so long, on a test run"
	if e.Chain.Hook == hook.XDP && !e.Chain.Frags && length > 3000 {
		why = "longer packets than about a page are for programs with frags only"
	}
	return fmt.Errorf("%w: %s", err, why)
}
