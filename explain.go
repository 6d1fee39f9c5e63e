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

// An Explainer answers "which program drops my packet?": see [Explain].
type Explainer struct {
	target Target
	e      *explain.Explainer
}

// Explain reads what is on a hook, once, and returns an Explainer of it. The
// Explainer runs the programs one after the other, as the hook does, on packets
// without sending them (BPF_PROG_TEST_RUN). It works on xdp, tcx/ingress, tcx/egress,
// and on cgroup_skb/ingress and cgroup_skb/egress of a cgroup, with what the cgroup
// inherits. The caller closes the Explainer.
//
// The programs really run, with their own maps: their counters, rate limits and lists change,
// and readers of their ring buffers get records. [Explainer.Maps] names the maps.
// bpf_clone_redirect on TCX really sends its copy. Nothing else leaves the machine.
//
// A test run cannot show where a redirect goes, what the card does to a packet before or after,
// and some fields of a socket buffer (its hash, its socket, the VLAN tag that the stack takes
// out of it). It has the other fields, the metadata in front of the packet, and the device as
// far as the kernel allows; [Explainer.Limits] says what is missing. A member that makes tail
// calls has the kernel's whole limit for itself.
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
// on cgroups, where programs do not see the header; on a device without Ethernet it begins
// with what its packets begin with there (Begins of [Explainer.Chain]). An error about one packet is in the
// packet's trace. The returned error ends the run: the end of ctx, or [ErrDefunct].
func (e *Explainer) Run(ctx context.Context, packets ...[]byte) ([]hook.Trace, error) {
	traces, err := e.e.Run(ctx, packets)
	return traces, wrap("explain", e.target, err)
}

// Chain is what is on the hook. It may have no members: then every packet passes.
func (e *Explainer) Chain() *hook.Chain { return e.e.Chain }

// Together says why all members run as one step, as they do behind a dispatcher of libxdp.
// It is empty when they run one by one.
func (e *Explainer) Together() string { return e.e.Together }

// Limits says in words what a test run on this kernel cannot show.
func (e *Explainer) Limits() []string { return e.e.Limits }

// Maps returns the maps that the programs themselves may write to. Maps of programs that
// they tail-call are not among them.
func (e *Explainer) Maps() []hook.WritableMap { return e.e.Writable }

// Close closes the programs.
func (e *Explainer) Close() { e.e.Close() }
