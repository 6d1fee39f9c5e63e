package main

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/packet"
)

// explained prints packets, and sums up their outcomes.
type explained struct {
	a        *app
	chain    *hook.Chain
	whole    string
	expected *hook.Verdict

	json       []jsonPacket
	count      int
	truncated  int
	tagged     int
	redirected int
	unexpected int
	notRun     int
	firstError error
	outcomes   map[outcome]int
	shown      time.Time // time of the last progress
}

// An outcome is the verdict on packets, and the name of the program that decided it;
// empty for packets that pass.
type outcome struct {
	verdict hook.Verdict
	by      string
}

func (a *app) newExplained(e *dispatcher.Explainer, expected *hook.Verdict) *explained {
	return &explained{a: a, chain: e.Chain(), whole: e.Together(), expected: expected, outcomes: map[outcome]int{}, shown: time.Now()}
}

// packet prints one packet.
func (x *explained) packet(p *packet.Captured, t *hook.Trace) error {
	x.count++
	x.progress()
	if p.Truncated() {
		x.truncated++
	}
	if d := p.Data; x.chain.Begins == "" && len(d) > 14 && (d[12] == 0x81 && d[13] == 0 || d[12] == 0x88 && d[13] == 0xa8) {
		x.tagged++
	}
	by := ""
	if t.By >= 0 {
		by = x.name(&t.Steps[t.By])
	}
	switch {
	case t.Err != nil:
		if x.notRun++; x.firstError == nil {
			x.firstError = fmt.Errorf("packet %d: %w", x.count, t.Err)
		}
	case t.Verdict == hook.Pass:
		x.outcomes[outcome{verdict: hook.Pass}]++
	default:
		x.outcomes[outcome{t.Verdict, by}]++
		if t.Verdict == hook.Redirect {
			x.redirected++
		}
	}
	if x.expected != nil && (t.Err != nil || t.Verdict != *x.expected) {
		x.unexpected++
	}
	switch {
	case x.a.quiet:
		return nil
	case x.a.format == formatJSON:
		x.json = append(x.json, x.asJSON(p, t, by))
		return nil
	}
	return x.a.print(x.text(p, t, by))
}

// name returns the name of a step's member.
func (x *explained) name(s *hook.Step) string {
	if s.Member < 0 {
		return "the chain of libxdp"
	}
	return x.chain.Members[s.Member].Name
}

var verdictColors = map[hook.Verdict]string{hook.Pass: green, hook.Drop: red, hook.Aborted: red, hook.TX: yellow, hook.Redirect: yellow}

// text returns a packet as text.
func (x *explained) text(p *packet.Captured, t *hook.Trace, by string) string {
	var b strings.Builder
	if x.count > 1 {
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "packet %d  %s  %s", x.count, packet.Describe(p.Data, x.chain.Begins), length(p))
	if macs := packet.MACs(p.Data, x.chain.Begins); x.a.format == formatWide && macs != "" {
		b.WriteString("  " + macs)
	}
	b.WriteByte('\n')
	if x.a.format == formatWide {
		for line := range strings.Lines(hex.Dump(p.Data)) {
			b.WriteString("    " + line)
		}
	}
	var rows [][]cell
	seen := p.Data
	for i := range t.Steps {
		s := &t.Steps[i]
		says := cell{text: s.Says}
		if i == t.By {
			says.color = verdictColors[t.Verdict]
		}
		row := []cell{x.priority(s), {text: x.name(s)}, says, {text: x.then(s, i == t.By)}}
		if s.Outcome == hook.OutcomeRan && !s.Change.IsZero() {
			row = append(row, cell{x.change(s, packet.Describe(seen, x.chain.Begins)), yellow})
		}
		if s.Says == "" {
			row[2].text = "-"
		}
		if s.Packet != nil {
			seen = s.Packet
		}
		rows = append(rows, row)
	}
	x.a.table(&b, "  ", rows)
	switch {
	case t.Err != nil:
		b.WriteString("  " + x.a.paint(x.a.stdout, "not run: ", red) + why(t.Err) + "\n")
	case t.Verdict == hook.Pass:
		says := x.a.paint(x.a.stdout, "pass", green)
		if t.Onward != "" {
			says = x.a.paint(x.a.stdout, "pass to the filters of "+string(t.Onward), yellow)
		}
		b.WriteString("  => " + says + "\n")
	default:
		b.WriteString("  => " + x.a.paint(x.a.stdout, t.Verdict.String(), verdictColors[t.Verdict]) + " by " + by + "\n")
	}
	return b.String()
}

func length(p *packet.Captured) string {
	if p.Truncated() {
		return fmt.Sprintf("%d of %d bytes, the rest was not captured", len(p.Data), p.Length)
	}
	return fmt.Sprintf("%d bytes", len(p.Data))
}

func (x *explained) priority(s *hook.Step) cell {
	if s.Member < 0 {
		return cell{text: "-"}
	}
	return priorityCell(&x.chain.Members[s.Member])
}

// then says what happens after a step.
func (x *explained) then(s *hook.Step, decides bool) string {
	switch s.Outcome {
	case hook.OutcomeEmpty:
		return "empty, passed by"
	case hook.OutcomeClosed:
		return "empty, a closed door"
	case hook.OutcomeUnreached:
		return "not reached"
	}
	switch {
	case decides && x.chain.Hook == hook.XDP && s.GoesOn:
		return "the last one" // the last one that ran
	case s.GoesOn && decides:
		return "decides, the others run too"
	case s.GoesOn:
		return "goes on"
	}
	return "ends here"
}

// change says what a program changed in a packet. before describes the packet
// before that.
func (x *explained) change(s *hook.Step, before string) string {
	const most, long = 3, 8
	var parts []string
	c := &s.Change
	for _, end := range []struct {
		name string
		n    int
	}{{"head", c.Head}, {"tail", c.Tail}, {"metadata", c.Meta}} {
		if end.n != 0 {
			parts = append(parts, fmt.Sprintf("%s %+d", end.name, end.n))
		}
	}
	cut := func(b []byte) string {
		if len(b) > long {
			return hex.EncodeToString(b[:long]) + ".."
		}
		return hex.EncodeToString(b)
	}
	for i, e := range c.Edits {
		if i == most {
			parts = append(parts, fmt.Sprintf("and at %d more places", len(c.Edits)-most))
			break
		}
		parts = append(parts, fmt.Sprintf("%d: %s -> %s", e.Offset, cut(e.Before), cut(e.After)))
	}
	if c.Mark != nil {
		parts = append(parts, fmt.Sprintf("mark %#x", *c.Mark))
	}
	if c.Priority != nil {
		parts = append(parts, fmt.Sprintf("priority %#x", *c.Priority))
	}
	text := strings.Join(parts, ", ")
	if now := packet.Describe(s.Packet, x.chain.Begins); now != before {
		text += "; now " + now
	}
	return text
}

// progress shows progress on a terminal while a long file is processed and nothing else is
// printed.
func (x *explained) progress() {
	f := terminal(x.a.stderr)
	if f == nil || time.Since(x.shown) < 500*time.Millisecond {
		return
	}
	if !x.a.quiet && x.a.format != formatJSON && terminal(x.a.stdout) != nil {
		return
	}
	x.shown = time.Now()
	fmt.Fprintf(f, "\r%d packets\r", x.count)
}

// end prints the sum, and notes about it.
func (x *explained) end() error {
	if x.truncated > 0 {
		x.a.warn("the capture cut %d of %s; programs did not see the rest (tcpdump -s 0 captures all)", x.truncated, packets(x.count))
	}
	if x.tagged > 0 && x.chain.Hook != hook.XDP {
		x.a.note("the stack removes a packet's VLAN tag before programs see it; a test run keeps it (%d packets)", x.tagged)
	}
	if x.redirected > 0 {
		x.a.note("a test run does not show where a redirect goes, nor whether the packet would arrive there")
	}
	if x.a.format == formatJSON {
		return x.a.printJSON(x.all())
	}
	if x.count == 1 && !x.a.quiet {
		return nil
	}
	text := x.sum() + "\n"
	if x.count > 0 && !x.a.quiet {
		text = "\n" + text
	}
	return x.a.print(text)
}

var became = map[hook.Verdict]string{hook.Pass: "passed", hook.Drop: "dropped", hook.Aborted: "aborted", hook.TX: "sent back", hook.Redirect: "redirected"}

// sum returns the last line.
func (x *explained) sum() string {
	var parts []string
	for _, o := range x.sorted() {
		part := fmt.Sprintf("%d %s", x.outcomes[o], became[o.verdict])
		if o.by != "" {
			part += " by " + o.by
		}
		parts = append(parts, part)
	}
	if x.notRun > 0 {
		parts = append(parts, fmt.Sprintf("%d not run", x.notRun))
	}
	if len(parts) == 0 {
		return packets(x.count)
	}
	return packets(x.count) + ": " + strings.Join(parts, ", ")
}

// errUnexpected is explain's error when a packet got another verdict.
var errUnexpected = errors.New("another verdict than expected")

// judge returns the error for results that are not as expected. After another error
// it does not complain about a missing packet.
func (x *explained) judge(other error) error {
	switch {
	case x.notRun > 0:
		return fmt.Errorf("%d of %s could not be run: %s", x.notRun, packets(x.count), why(x.firstError))
	case x.expected == nil:
	case x.count == 0 && other == nil:
		return hook.Because(errUnexpected, "expected %v, but there was no packet", x.expected)
	case x.unexpected > 0:
		return hook.Because(errUnexpected, "expected %v, but %d of %s got another verdict", x.expected, x.unexpected, packets(x.count))
	}
	return nil
}

func packets(n int) string {
	if n == 1 {
		return "1 packet"
	}
	return fmt.Sprintf("%d packets", n)
}

// sorted returns the kinds of outcomes, pass first and then by number.
func (x *explained) sorted() []outcome {
	return slices.SortedFunc(maps.Keys(x.outcomes), func(a, b outcome) int {
		switch {
		case a.verdict == hook.Pass:
			return -1
		case b.verdict == hook.Pass:
			return 1
		}
		return cmp.Or(x.outcomes[b]-x.outcomes[a], strings.Compare(a.by+a.verdict.String(), b.by+b.verdict.String()))
	})
}
