package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/explain"
)

// ExplainOptions say how to look at packets. The zero value is useful.
type ExplainOptions struct {
	// Queue is the receive queue that XDP programs are told. It must be one of the
	// device's. Default: the first one.
	Queue int
	// BPFFS is as in ReadOptions.
	BPFFS string
}

// An Explainer answers "who drops my packet?": see [Explain].
type Explainer struct {
	target Target
	e      *explain.Explainer
}

// Explain reads once, now, what is on a hook, and returns an Explainer of it. The
// Explainer runs the programs one after the other, as the hook does, on packets
// without sending them (BPF_PROG_TEST_RUN). It works on xdp, tcx/ingress, tcx/egress,
// and on cgroup_skb/ingress and cgroup_skb/egress of a cgroup, with what the cgroup
// inherits. The caller closes the Explainer.
//
// The programs run for real, with their own maps: counters count, rate limits and lists that
// they keep change, and whoever reads their ring buffers is told. [Explainer.Maps] names the
// maps. bpf_clone_redirect on TCX really sends its copy. Nothing else leaves the machine.
//
// What a test run cannot show: where a redirect goes, what is done to a packet on a card before
// or after, and the fields of a socket buffer that neither are in the packet nor can be given
// (its hash, its socket, the VLAN tag that the stack takes out of it). Fields that can be, metadata
// in front of the packet, and the device come along where the kernel allows; [Explainer.Limits]
// says what does not. A member that makes tail calls has the kernel's whole limit for itself.
//
// Errors: as for [Read], and ebpf.ErrNotSupported for hooks that have no test run.
func Explain(ctx context.Context, t Target, o ExplainOptions) (*Explainer, error) {
	if o.Queue < 0 {
		return nil, wrap("explain", t, hook.Because(ErrUsage, "receive queue %d: they count from 0", o.Queue))
	}
	e, err := explain.Explain(ctx, t.place(o.BPFFS), uint32(o.Queue))
	if err != nil {
		return nil, wrap("explain", t, err)
	}
	return &Explainer{t, e}, nil
}

// Run takes packets through the programs. A packet begins with its Ethernet header, also
// on cgroups, whose programs do not see it. What is wrong with one packet is in its trace;
// the error is about all: the end of ctx, or [ErrDefunct].
func (e *Explainer) Run(ctx context.Context, packets ...[]byte) ([]hook.Trace, error) {
	traces, err := e.e.Run(ctx, packets)
	return traces, wrap("explain", e.target, err)
}

// Chain is what is on the hook. It may have no members: then every packet passes.
func (e *Explainer) Chain() *hook.Chain { return e.e.Chain }

// Together is why the members are not told apart, and run as one: behind a dispatcher of
// libxdp. It is empty when they are told apart.
func (e *Explainer) Together() string { return e.e.Together }

// Limits is what this kernel does not let a test run show, in words.
func (e *Explainer) Limits() []string { return e.e.Limits }

// Maps are those that the programs may write to, by themselves; not those of what they
// tail-call.
func (e *Explainer) Maps() []hook.WritableMap { return e.e.Writable }

// Close lets the programs go.
func (e *Explainer) Close() { e.e.Close() }
