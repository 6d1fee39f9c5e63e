package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) topCommand() *cobra.Command {
	o := dispatcher.MeasureOptions{Interval: time.Second}
	var count int
	cmd := &cobra.Command{
		Use:   "top [HOOK|FAMILY [TARGET]]",
		Short: "Show how often programs run, which verdicts they give, and how long they take",
		Long: `Show how often each program runs, how long it takes, and on an xdp chain which
verdicts it gives, for all hooks that "list" shows, for one HOOK, or for one
device or cgroup. On a terminal the figures stay in place; elsewhere one block
follows the other, until Ctrl-C. With -o json there is one sample, unless
--count asks for more.

An xdp chain runs a dispatcher that counts while top watches it, and its plain
dispatcher again afterwards. The link between the two is the watch, a map that
only the watching processes hold: when they are killed the kernel empties it,
and the counting ends. Nothing is attached or detached for that, and no packet
passes unfiltered. NS/PACKET includes the clock's own time, which is in the line
above, and the call.

All other programs are measured by the kernel's run statistics. These have no
verdicts, and while top runs they are on for all programs of the machine. A
program that is attached several times has the same figures everywhere.`,
		Example: `  dispatcher top
  dispatcher top xdp eth0
  dispatcher top tcx --interval 5s
  dispatcher top xdp eth0 -j | jq '.hooks[0].members[] | {name, counts}'`,
		Args:              words(1, "[HOOK]", "[TARGET]"),
		ValidArgsFunction: completeArgs(1, offerListed, a.offerTargets),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("count") && a.format == formatJSON {
				count = 1
			}
			return a.top(cmd.Context(), withoutDev(args, 1), o, count)
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&o.Interval, "interval", o.Interval, "take a sample every `D`, such as 200ms or 5s")
	flags.IntVar(&count, "count", 0, "end after `N` samples (default: with -o json 1, else none)")
	return cmd
}

// top prints samples until ctx ends, which is the normal end.
func (a *app) top(ctx context.Context, args []string, o dispatcher.MeasureOptions, count int) error {
	switch {
	case o.Interval < 10*time.Millisecond:
		return usage("", "--interval %v: at least 10ms", o.Interval)
	case count < 0:
		return usage("", "--count %d: the number of samples must be 1 or more", count)
	}
	only, err := a.toMeasure(ctx, args, &o)
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGPIPE) // the failed write reports it
	// A closed terminal also ends the command in an orderly way.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	screen := a.screen()
	defer screen.restore()
	taken := 0
	for samples, err := range dispatcher.Measure(ctx, o) {
		if err != nil {
			return err
		}
		err = a.printSamples(screen, only.filter(samples))
		if err != nil && !errors.Is(err, syscall.EPIPE) { // the reader has gone
			return err
		}
		if taken++; taken == count || err != nil {
			cancel() // no return here: an error at the end must be reported
		}
	}
	return nil
}

// filter leaves the samples of the target; nil leaves all.
func (t *onTarget) filter(samples []hook.Sample) []hook.Sample {
	return slices.DeleteFunc(samples, func(s hook.Sample) bool { return t != nil && !t.is(s.Chain.At()) })
}

// toMeasure sets the options that args name.
func (a *app) toMeasure(ctx context.Context, args []string, o *dispatcher.MeasureOptions) (only *onTarget, err error) {
	o.NetNS, o.BPFFS = a.netns, a.bpffs
	if len(args) == 0 {
		return nil, nil
	}
	if o.Hooks, err = a.parseHooks(args[0]); err != nil {
		return nil, err
	}
	h := o.Hooks[0]
	switch {
	case len(args) < 2:
	case len(o.Hooks) == 1 && !isShown(h):
		t := dispatcher.On(h, args[1]).In(a.netns)
		o.Target, o.NetNS, o.Hooks = &t, "", nil
	default:
		if only, err = a.onTarget(ctx, h, args[1]); err == nil && h.OnDevice() && o.NetNS == "" {
			o.NetNS = ownNetNS
		}
	}
	return only, err
}

// printSamples writes the samples of one moment.
func (a *app) printSamples(screen *screen, samples []hook.Sample) error {
	now := time.Now()
	if len(samples) > 0 {
		now = samples[len(samples)-1].Time
	}
	if a.format == formatJSON {
		return a.printJSON(describeSamples(samples, now))
	}
	var b strings.Builder
	for i := range samples {
		if i > 0 {
			b.WriteByte('\n')
		}
		a.sample(&b, &samples[i])
	}
	if len(samples) == 0 {
		b.WriteString("nothing is attached\n")
	}
	return screen.show(now, b.String())
}

// sample writes the block of one hook.
func (a *app) sample(b *strings.Builder, s *hook.Sample) {
	c := &s.Chain
	parts := []string{}
	if at := where(c); at != "" {
		parts = append(parts, at)
	}
	if netns := netnsPart(c, false); netns != "" {
		parts = append(parts, netns)
	}
	unit := "packet"
	if !seesPackets(c.Hook) {
		unit = "run"
	}
	if s.Whole.Known {
		parts = append(parts, fmt.Sprintf("%s packets/s", perSecond(s.Whole.Runs, s.Elapsed)))
		if s.Method == hook.MethodKernel && c.Style == hook.StyleLibxdp {
			parts = append(parts, fmt.Sprintf("%s ns/packet", perRun(s.Whole)))
		}
	}
	switch s.Method {
	case hook.MethodChain:
		parts = append(parts, fmt.Sprintf("counted, clock %d ns", s.Clock.Nanoseconds()))
	case hook.MethodKernel:
		parts = append(parts, "by the kernel's statistics, which have no verdicts")
	}
	b.WriteString(strings.Join(parts, "  ") + "\n")
	if s.Interrupted {
		b.WriteString("  " + a.paint(a.stdout, "the chain changed: a part of this interval was not counted", yellow) + "\n")
	}
	if s.Err != nil {
		b.WriteString("  " + a.paint(a.stdout, "cannot be measured: "+why(s.Err), red) + "\n")
	}
	if len(c.Members) == 0 {
		if s.Err == nil {
			b.WriteString("  nothing is attached\n")
		}
		return
	}
	per := strings.ToUpper(unit)
	rows := [][]cell{heads("PRIO", "NAME", "PROGRAM", "ID", per+"S/S", "NS/"+per, "STATE")}
	if s.Method == hook.MethodChain {
		rows[0] = append(rows[0], cell{text: "VERDICTS"})
	}
	for i := range c.Members {
		m, n := &c.Members[i], s.Entries[i]
		row := []cell{
			priorityCell(m), {text: orDash(m.Name)}, {text: orDash(m.Program.Name)}, number(m.Program.ID),
			{text: "-"}, {text: "-"}, stateCell(m),
		}
		if n.Known {
			row[4].text, row[5].text = perSecond(n.Runs, s.Elapsed), perRun(n)
		}
		if s.Method == hook.MethodChain {
			row = append(row, cell{text: orDash(shares(n))})
		}
		rows = append(rows, row)
	}
	alignRight(rows, 4, 5)
	a.table(b, "  ", rows)
}

// seesPackets tells whether the programs on the hook run for packets.
func seesPackets(h hook.Hook) bool {
	return h.OnDevice() || h == hook.CgroupSKBIngress || h == hook.CgroupSKBEgress || h == hook.Netfilter
}

// alignRight pads cells of columns, so that numbers are aligned to the right.
func alignRight(rows [][]cell, columns ...int) {
	for _, i := range columns {
		width := 0
		for _, r := range rows {
			width = max(width, len(r[i].text))
		}
		for _, r := range rows {
			r[i].text = strings.Repeat(" ", width-len(r[i].text)) + r[i].text
		}
	}
}

// perSecond writes a rate. It uses the measured time, never the interval that
// was asked for.
func perSecond(n uint64, elapsed time.Duration) string {
	rate := ratePerSecond(n, elapsed)
	if rate > 0 && rate < 10 {
		return fmt.Sprintf("%.1f", rate)
	}
	return thousands(uint64(rate + 0.5))
}

func ratePerSecond(n uint64, elapsed time.Duration) float64 {
	if elapsed <= 0 {
		return 0
	}
	return float64(n) / elapsed.Seconds()
}

func perRun(c hook.Counts) string {
	if c.Runs == 0 {
		return "-"
	}
	return thousands(uint64(c.PerRun().Nanoseconds()))
}

// thousands writes 1234567 as 1,234,567.
func thousands(n uint64) string {
	digits := fmt.Sprint(n)
	var b strings.Builder
	for i, d := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			b.WriteByte(',')
		}
		b.WriteRune(d)
	}
	return b.String()
}

// shares writes the verdicts, the most frequent ones first, and how often the slot
// was empty.
func shares(c hook.Counts) string {
	var words []string
	add := func(what string, n uint64) {
		if n > 0 {
			words = append(words, what+" "+percent(n, c.Runs+c.Empty))
		}
	}
	for _, v := range []hook.Verdict{hook.Pass, hook.Drop, hook.TX, hook.Redirect, hook.Aborted} {
		add(v.String(), c.Verdicts[v])
	}
	add("other", c.Other)
	add("empty", c.Empty)
	return strings.Join(words, ", ")
}

func percent(n, of uint64) string {
	switch share := 100 * float64(n) / float64(of); {
	case n == of:
		return "100%"
	case share < 0.1:
		return "<0.1%"
	case share > 99.9:
		return ">99.9%"
	default:
		return fmt.Sprintf("%.1f%%", share)
	}
}
