package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/apply"
	"github.com/libdispatcher/dispatcher/internal/plan"
)

// jsonAttachment is a declared or made member in the JSON of apply and diff.
type jsonAttachment struct {
	Hook        hook.Hook         `json:"hook"`
	Target      string            `json:"target"`
	NetNS       string            `json:"netns,omitempty"`
	Name        string            `json:"name"`
	Owner       string            `json:"owner"`
	Document    string            `json:"document,omitempty"`
	State       plan.State        `json:"state"`
	Differences []plan.Difference `json:"differences"`
	Done        bool              `json:"done"`
	Error       string            `json:"error,omitempty"`
}

// jsonSealed is a chain that was sealed.
type jsonSealed struct {
	Target string `json:"target"`
	NetNS  string `json:"netns,omitempty"`
	Done   bool   `json:"done"`
	Error  string `json:"error,omitempty"`
}

// signs of the states, and their colours.
var signs = map[plan.State]cell{
	plan.Attach: {"+", green}, plan.Change: {"~", yellow}, plan.Detach: {"-", red}, plan.Keep: {"=", ""},
	plan.Undeclared: {"?", yellow}, plan.Blocked: {"!", red}, plan.NoDevice: {"!", yellow},
}

// printReport prints what was done, or what is to be done.
func (a *app) printReport(r *apply.Report, dryRun bool) error {
	if a.format == formatJSON {
		return a.printJSON(describeReport(r, dryRun))
	}
	var b strings.Builder
	var rows [][]cell
	flush := func() {
		a.table(&b, "  ", rows)
		rows = nil
	}
	at, counts := "", map[plan.State]int{}
	failed := 0
	for i := range r.Results {
		item := &r.Results[i]
		if item.Acts() && item.Err != nil {
			failed++
		} else {
			counts[item.State]++
		}
		if item.State == plan.Keep && !a.verbose {
			continue
		}
		if here := placeOf(&item.Item); here != at {
			flush()
			b.WriteString(here + "\n")
			at = here
		}
		rows = append(rows, a.rowOf(item))
	}
	flush()
	for i := range r.Sealed {
		if s := &r.Sealed[i]; s.Err != nil {
			a.note("the chain on %s is not sealed, and works as well: %s", s.Target, why(s.Err))
		}
	}
	b.WriteString(summary(counts, failed, len(r.Sealed), dryRun) + "\n")
	return a.print(b.String())
}

func placeOf(item *plan.Item) string {
	words := []string{string(item.Place.Hook)}
	if item.State != plan.NoDevice || item.Place.Hook.OnCgroup() {
		words = append(words, item.Target)
	}
	if item.NetNS != "" {
		words = append(words, " netns "+item.NetNS)
	}
	return strings.Join(words, " ")
}

func (a *app) rowOf(r *apply.Result) []cell {
	sign := signs[r.State]
	if r.Acts() && r.Err != nil && !r.Done {
		sign = cell{"!", red}
	}
	return []cell{sign, {text: r.Name}, {text: a.wordsOf(r)}}
}

func (a *app) wordsOf(r *apply.Result) string {
	switch r.State {
	case plan.Attach:
		text := fmt.Sprintf("priority %d, %s", r.Settings.Priority, programOf(r.Want))
		if r.Adopt != "" {
			text += fmt.Sprintf(", beside program %s, which becomes a member", r.Adopt)
		}
		return text
	case plan.Change:
		var words []string
		for _, d := range r.Differences {
			switch {
			case d.What == "program" && d.From == "unknown":
				words = append(words, fmt.Sprintf("program %s, in the place of one that was not declared", programOf(r.Want)))
			case d.What == "program":
				words = append(words, "program "+programOf(r.Want))
			case d.What == "pinned":
				words = append(words, "pinned again")
			default:
				words = append(words, fmt.Sprintf("%s %s -> %s", strings.ReplaceAll(d.What, "_", "-"), d.From, d.To))
			}
		}
		return strings.Join(words, ", ")
	case plan.Detach:
		return "no longer declared"
	case plan.Undeclared:
		return "no longer declared; --prune detaches it"
	case plan.NoDevice:
		if r.Place.Hook.OnCgroup() {
			return "there is no such cgroup"
		}
		return "no device: " + r.Target
	case plan.Blocked:
		return "cannot be as declared"
	}
	return "as declared"
}

// programOf names the program of an attachment.
func programOf(w *plan.Want) string {
	switch p := &w.Attachment.Program; {
	case p.Builtin != "":
		return "builtin:" + p.Builtin
	case p.Pin != "":
		return "pin:" + p.Pin
	case p.Entry != "":
		return filepath.Base(p.File) + ":" + p.Entry
	default:
		return filepath.Base(p.File)
	}
}

// summary is the last line.
func summary(counts map[plan.State]int, failed, sealed int, dryRun bool) string {
	var words []string
	add := func(n int, done, todo string) {
		if dryRun {
			done = todo
		}
		if n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, done))
		}
	}
	add(counts[plan.Attach], "attached", "to attach")
	add(counts[plan.Change], "changed", "to change")
	add(counts[plan.Detach], "detached", "to detach")
	if len(words) == 0 { // else it goes without saying
		add(sealed, "chains sealed", "chains to seal")
	}
	acted := len(words) > 0 || failed > 0
	add(failed, "failed", "would fail")
	add(counts[plan.Blocked], "cannot be as declared", "cannot be as declared")
	add(counts[plan.NoDevice], "without a device", "without a device")
	add(counts[plan.Undeclared], "no longer declared", "no longer declared")
	add(counts[plan.Keep], "as declared", "as declared")
	text := strings.Join(words, ", ")
	switch {
	case text == "":
		return "nothing is declared"
	case !acted:
		return "nothing to do: " + text
	}
	return text
}

func describeReport(r *apply.Report, dryRun bool) any {
	attachments, sealed := []jsonAttachment{}, []jsonSealed{}
	for i := range r.Results {
		item := &r.Results[i]
		j := jsonAttachment{
			Hook: item.Place.Hook, Target: item.Target, NetNS: item.NetNS, Name: item.Name, Owner: item.Owner, State: item.State,
			Differences: append([]plan.Difference{}, item.Differences...), Done: item.Done,
		}
		if item.Want != nil {
			j.Document = item.Want.File
		}
		if item.State == plan.NoDevice && !item.Place.Hook.OnCgroup() {
			j.Target = ""
		}
		if item.Err != nil {
			j.Error = why(item.Err)
		}
		attachments = append(attachments, j)
	}
	for i := range r.Sealed {
		s := &r.Sealed[i]
		j := jsonSealed{Target: s.Target, NetNS: s.NetNS, Done: s.Done}
		if s.Err != nil {
			j.Error = why(s.Err)
		}
		sealed = append(sealed, j)
	}
	return struct {
		Version     int              `json:"version"`
		DryRun      bool             `json:"dry_run"`
		Attachments []jsonAttachment `json:"attachments"`
		Sealed      []jsonSealed     `json:"sealed"`
	}{schema, dryRun, attachments, sealed}
}
