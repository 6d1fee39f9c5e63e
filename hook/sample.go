package hook

import "time"

// A Method says how a hook was measured.
type Method string

const (
	// MethodNone: it was not measured. Sample.Err says why, unless there was nothing to
	// measure.
	MethodNone Method = ""
	// MethodChain: by a counting dispatcher of an owned XDP chain. All fields of Counts
	// are known.
	MethodChain Method = "chain"
	// MethodKernel: by the kernel's run statistics of programs (BPF_ENABLE_STATS,
	// Linux 5.8): how often each ran, and for how long. A program that is attached
	// several times has one sum for all.
	MethodKernel Method = "kernel"
)

// A Sample is what happened on one hook in one interval.
type Sample struct {
	// Chain is what is on the hook at the end of the interval.
	Chain Chain
	// Time is the end of the interval, and Elapsed how long it was, as measured.
	Time    time.Time
	Elapsed time.Duration
	Method  Method
	// Clock is how much of the time of each run it took to read the clock, with
	// MethodChain.
	Clock time.Duration
	// Interrupted: the chain was changed in this interval, and what it did just after
	// that was not counted.
	Interrupted bool
	// Whole has the counts of an XDP hook: for an owned chain the packets and the time of
	// all members together, for libxdp's chain all that is known. On other hooks it is
	// not known.
	Whole Counts
	// Entries are the counts of Chain.Members, one for each.
	Entries []Counts
	// Err says why the hook was not measured.
	Err error
}

// Counts are what the program of an entry did in one interval.
type Counts struct {
	// Known tells whether the entry was measured. An entry that came in this interval
	// was not.
	Known bool
	// Runs is how often the program ran: on XDP and TCX, how many packets it saw.
	Runs uint64
	// Verdicts is how often it returned each [Verdict], and Other how often it returned
	// something else. With MethodChain only.
	Verdicts [Verdicts]uint64
	Other    uint64
	// Empty is how many packets found the slot of the member empty.
	Empty uint64
	// Time is how long it ran in all. With MethodChain that includes the clock,
	// see Sample.Clock, and the call.
	Time time.Duration
}

// PerRun returns how long one run took on average; 0 without runs.
func (c Counts) PerRun() time.Duration {
	if c.Runs == 0 {
		return 0
	}
	return c.Time / time.Duration(c.Runs)
}
