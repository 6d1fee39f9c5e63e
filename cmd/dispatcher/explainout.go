package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

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
	if d := p.Data; len(d) > 14 && (d[12] == 0x81 && d[13] == 0 || d[12] == 0x88 && d[13] == 0xa8) {
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
	fmt.Fprintf(&b, "packet %d  %s  %s", x.count, packet.Describe(p.Data), length(p))
	if macs := packet.MACs(p.Data); x.a.format == formatWide && macs != "" {
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
			row = append(row, cell{x.change(s, packet.Describe(seen)), yellow})
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
		b.WriteString("  => " + x.a.paint(x.a.stdout, "pass", green) + "\n")
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
	if now := packet.Describe(s.Packet); now != before {
		text += "; now " + now
	}
	return text
}

// progress shows progress on a terminal while a long file is processed and nothing else is
// printed.
func (x *explained) progress() {
	f, ok := x.a.stderr.(*os.File)
	if !ok || time.Since(x.shown) < 500*time.Millisecond || !term.IsTerminal(int(f.Fd())) {
		return
	}
	if out, ok := x.a.stdout.(*os.File); !x.a.quiet && x.a.format != formatJSON && ok && term.IsTerminal(int(out.Fd())) {
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

// The JSON of explain is a contract, like the JSON of a chain.
type jsonExplained struct {
	Version    int          `json:"version"`
	Hook       string       `json:"hook"`
	Target     string       `json:"target"`
	Ifindex    int          `json:"ifindex"`
	CgroupID   uint64       `json:"cgroup_id,omitempty"`
	NetNS      jsonNetNS    `json:"netns"`
	Style      string       `json:"style,omitempty"`
	ToldApart  bool         `json:"told_apart"`
	Members    []jsonMember `json:"members"`
	Packets    []jsonPacket `json:"packets"`
	Summary    jsonSum      `json:"summary"`
	Expected   string       `json:"expected,omitempty"`
	Unexpected int          `json:"unexpected"`
}

type jsonPacket struct {
	Number  int        `json:"number"`
	Length  int        `json:"length"`
	Text    string     `json:"text"`
	Data    string     `json:"data"`
	Verdict string     `json:"verdict,omitempty"`
	By      string     `json:"by,omitempty"`
	Error   string     `json:"error,omitempty"`
	Steps   []jsonStep `json:"steps"`
}

type jsonStep struct {
	Member   string      `json:"member"`
	Program  uint32      `json:"program_id,omitempty"`
	Outcome  string      `json:"outcome"`
	Returned *int32      `json:"returned,omitempty"`
	Says     string      `json:"says,omitempty"`
	GoesOn   bool        `json:"goes_on"`
	Change   *jsonChange `json:"change,omitempty"`
}

type jsonChange struct {
	Head     int        `json:"head"`
	Tail     int        `json:"tail"`
	Meta     int        `json:"metadata"`
	Mark     *uint32    `json:"mark,omitempty"`
	Priority *uint32    `json:"priority,omitempty"`
	Edits    []jsonEdit `json:"edits"`
	Text     string     `json:"text"`
	Data     string     `json:"data"`
}

type jsonEdit struct {
	Offset int    `json:"offset"`
	Before string `json:"before"`
	After  string `json:"after"`
}

type jsonSum struct {
	Packets   int           `json:"packets"`
	Truncated int           `json:"truncated"`
	NotRun    int           `json:"not_run"`
	Outcomes  []jsonOutcome `json:"outcomes"`
}

type jsonOutcome struct {
	Verdict string `json:"verdict"`
	By      string `json:"by,omitempty"`
	Packets int    `json:"packets"`
}

func (x *explained) asJSON(p *packet.Captured, t *hook.Trace, by string) jsonPacket {
	j := jsonPacket{Number: x.count, Length: p.Length, Text: packet.Describe(p.Data), Data: hex.EncodeToString(p.Data), Steps: []jsonStep{}}
	if t.Err != nil {
		j.Error = why(t.Err)
	} else {
		j.Verdict, j.By = t.Verdict.String(), by
	}
	for i := range t.Steps {
		s := &t.Steps[i]
		js := jsonStep{Member: x.name(s), Outcome: string(s.Outcome), Says: s.Says, GoesOn: s.GoesOn}
		if s.Member >= 0 {
			js.Program = x.chain.Members[s.Member].Program.ID
		} else {
			js.Member, js.Program = "", x.chain.DispatcherID
		}
		if s.Outcome == hook.OutcomeRan {
			returned := int32(s.Returned)
			js.Returned = &returned
			if c := &s.Change; !c.IsZero() {
				jc := &jsonChange{
					Head: c.Head, Tail: c.Tail, Meta: c.Meta, Mark: c.Mark, Priority: c.Priority,
					Edits: []jsonEdit{}, Text: packet.Describe(s.Packet), Data: hex.EncodeToString(s.Packet),
				}
				for _, e := range c.Edits {
					jc.Edits = append(jc.Edits, jsonEdit{e.Offset, hex.EncodeToString(e.Before), hex.EncodeToString(e.After)})
				}
				js.Change = jc
			}
		}
		j.Steps = append(j.Steps, js)
	}
	return j
}

// all returns the whole object.
func (x *explained) all() jsonExplained {
	c := describeChain(x.chain, false)
	j := jsonExplained{
		Version: schema, Hook: c.Hook, Target: c.Target, Ifindex: c.Ifindex, CgroupID: c.CgroupID, NetNS: c.NetNS, Style: c.Style,
		ToldApart: x.whole == "", Members: c.Members, Packets: append([]jsonPacket{}, x.json...), Unexpected: x.unexpected,
		Summary: jsonSum{Packets: x.count, Truncated: x.truncated, NotRun: x.notRun, Outcomes: []jsonOutcome{}},
	}
	if x.expected != nil {
		j.Expected = x.expected.String()
	}
	for _, o := range x.sorted() {
		j.Summary.Outcomes = append(j.Summary.Outcomes, jsonOutcome{o.verdict.String(), o.by, x.outcomes[o]})
	}
	return j
}
