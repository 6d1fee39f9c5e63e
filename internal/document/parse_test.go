package document_test

import (
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/document"
)

// whole has every key that is supported.
const whole = `# a comment
attachments:
- name: droplist
  hook: xdp
  on: {names: ["eth*"], driver: [mlx5_core], kind: [physical], role: leaf, netns: blue}
  program: {file: /usr/lib/bpf/filter.o, entry: filter, globals: {limit: 5, on: true, name: "x", hex: 0x10, rate: 1.5}}
  maps: {reuse: by-name}
  order: {priority: 20, before: [lb], after: [count], continueOn: [pass, tx], onMissing: drop}
  mode: native
  seal: false
  onConflict: adopt
  onDrift: report
- name: proxy
  hook: cgroup/connect4
  on: {cgroup: /system.slice}
  program:
    builtin: redirect
    globals:
      from_port: 80
`

func TestParse(t *testing.T) {
	d, errs := document.Parse("x.yaml", []byte(whole))
	qt.Assert(t, qt.HasLen(errs, 0))
	no := false
	qt.Check(t, qt.DeepEquals(d, &declare.Document{Attachments: []declare.Attachment{
		{
			Name: "droplist", Hook: "xdp",
			On: declare.Match{Names: []string{"eth*"}, Driver: []string{"mlx5_core"}, Kind: []string{"physical"}, Role: "leaf", NetNS: "blue"},
			Program: declare.Program{
				File: "/usr/lib/bpf/filter.o", Entry: "filter",
				Globals: map[string]declare.Value{"limit": "5", "on": "true", "name": "x", "hex": "16", "rate": "1.5"},
			},
			Maps: declare.Maps{Reuse: "by-name"},
			Order: declare.Order{
				Priority: 20, Before: []string{"lb"}, After: []string{"count"}, ContinueOn: []string{"pass", "tx"}, OnMissing: "drop",
			},
			Mode: "native", Seal: &no, OnConflict: "adopt", OnDrift: "report",
		},
		{
			Name: "proxy", Hook: "cgroup/connect4", On: declare.Match{Cgroup: "/system.slice"},
			Program: declare.Program{Builtin: "redirect", Globals: map[string]declare.Value{"from_port": "80"}},
		},
	}}))
	settings, err := d.Attachments[0].Settings()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(settings, hook.Settings{Priority: 20, ContinueOn: hook.SetOf(hook.Pass, hook.TX), OnMissing: hook.MissingDrop}))

	for _, nothing := range []string{"", "# nothing yet\n", "---\n", "attachments: []\n", "attachments:\n"} {
		d, errs := document.Parse("x.yaml", []byte(nothing))
		qt.Assert(t, qt.HasLen(errs, 0), qt.Commentf("%q", nothing))
		qt.Check(t, qt.HasLen(d.Attachments, 0))
	}
}

// What is wrong is said with its line and column, and the next word.
func TestParseErrors(t *testing.T) {
	good := "attachments:\n- name: a\n  hook: xdp\n  on: {names: [eth0]}\n  program: {builtin: count}\n"
	for _, test := range []struct{ text, want string }{
		{strings.Replace(good, "hook:", "hok:", 1), `x.yaml:3:3: unknown key "hok"; did you mean "hook"?`},
		{strings.Replace(good, "names:", "name:", 1), `x.yaml:4:8: unknown key "name"; did you mean "names"?`},
		{good + "  order: {prioritty: 5}\n", `x.yaml:6:11: unknown key "prioritty"; did you mean "priority"?`},
		{good + "  order:\n    contineuOn: [tx]\n", `x.yaml:7:5: unknown key "contineuOn"; did you mean "continueOn"?`},
		{good + "  maps: {zzzzz: 1}\n", `x.yaml:6:10: unknown key "zzzzz"; known here: reuse`},
		{"attachment: []\n", `x.yaml:1:1: unknown key "attachment"; did you mean "attachments"?`},
		{good + "  order: {priority: high}\n", `x.yaml:6:21: "high" is not a whole number`},
		{good + "  order: {priority: 99999}\n", `x.yaml:6:21: order.priority: priority 99999: must be from 1 (runs first) to 65535`},
		{good + "  seal: maybe\n", `x.yaml:6:9: "maybe" is not true or false`},
		{good + "  order: 5\n", `x.yaml:6:10: there is a single value where a group of keys belongs`},
		{good + "  name: b\n", `x.yaml:6:3: mapping key "name" already defined at [2:3]`},
		{good + "  mode: fast\n", `x.yaml:6:9: mode: "fast": must be auto or native or generic`},
		{good + "  order: {continueOn: [pas]}\n", `x.yaml:6:23: order.continueOn: unknown verdict "pas" (known: aborted, drop, pass, tx, redirect); "none" ends the chain here, "any" always goes on`},
		{good + "  order: {before: [a]}\n", `x.yaml:6:20: order.before[0]: "a" is this member itself`},
		{good + "  confirm: {within: 30s, probes: []}\n", `x.yaml:6:34: confirm.probes: without a probe nothing is confirmed`},
		{good + "  confirm: {within: soon, probes: [{tcp: \"192.0.2.1:179\"}]}\n", `x.yaml:6:21: confirm.within: "soon": must be a time of at most an hour, as in 30s`},
		{good + "  confirm: {within: 30s, probes: [{tcp: \"router:179\"}]}\n", `x.yaml:6:41: confirm.probes[0].tcp: "router:179": must be an address and a port, as in "192.0.2.1:179"`},
		{good + "  confirm: {within: 30s, probes: [{}]}\n", `x.yaml:6:35: confirm.probes[0]: a probe has one of tcp and exec`},
		{strings.Replace(good, "hook: xdp", "hook: tc/ingress", 1) + "  confirm: {within: 30s, probes: [{exec: [\"true\"]}]}\n", `x.yaml:6:12: confirm: on tc/ingress a program has no owner with whom it could leave; tcx/* has one`},
		{good + good[len("attachments:\n"):], `x.yaml:6:9: name: "a" is also the name of number 1 in this document, on the same hook`},
		{strings.Replace(good, "builtin: count", "image: reg/x", 1), `x.yaml:5:20: program.image: images are not supported yet; set file, builtin or pin`},
		{strings.Replace(good, "builtin: count", "builtin: count, file: x.o", 1), `x.yaml:5:12: program: it comes from one place: leave builtin out`},
		{strings.Replace(good, "{builtin: count}", "{}", 1), `x.yaml:5:12: program: nothing says where it comes from: set one of file, builtin and pin`},
		{strings.Replace(good, "  program: {builtin: count}\n", "", 1), `x.yaml:2:3: program: nothing says where it comes from: set one of file, builtin and pin`},
		{strings.Replace(good, "names: [eth0]", "cgroup: /x", 1), `x.yaml:4:16: on.cgroup: xdp is a hook of a device: say which, as in {names: [eth0]}`},
		{strings.Replace(good, "hook: xdp", "hook: cgroup/connect4", 1), `x.yaml:4:7: on: cgroup/connect4 is a hook of a cgroup: say which, as in {cgroup: /system.slice}`},
		{strings.Replace(good, "hook: xdp", "hook: tcx", 1), `x.yaml:3:9: hook: hook "tcx" has two sides: tcx/ingress and tcx/egress`},
		{strings.Replace(good, "[eth0]", `["eth[0"]`, 1), `x.yaml:4:16: on.names[0]: "eth[0" is no pattern`},
		{strings.Replace(good, "name: a", "name: a b", 1), `x.yaml:2:9: name: the name "a b" has the character ' '; use printable characters without spaces`},
		{"attachments: {a: &x 1, b: *x}\n", `x.yaml:1:18: anchors and aliases are not supported; write it out`},
		{good + "---\n" + good, `x.yaml:7:12: a second document begins here; a file has one`},
		{"attachments: [\n", `x.yaml:1:14: sequence end token ']' not found`},
		{"\tattachments:\n", `x.yaml:1:12: tab character cannot use as a map key directly`},
		{strings.Repeat("#", 1<<20+1), `x.yaml: 1048577 bytes; a document has at most 1048576`},
	} {
		_, errs := document.Parse("x.yaml", []byte(test.text))
		qt.Assert(t, qt.Not(qt.HasLen(errs, 0)), qt.Commentf("%s", test.text))
		got := hook.Wrap("", "", "", errs[0])
		qt.Check(t, qt.Equals(got.Error(), test.want))
		qt.Check(t, qt.ErrorIs(got, hook.ErrUsage))
	}
}

// Whatever the bytes, there is a document or an error, and no panic.
func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("attachments: [{name: a, order: {prio: 1}}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, errs := document.Parse("x.yaml", b)
		if d == nil && len(errs) == 0 {
			t.Error("neither a document nor an error")
		}
		for _, err := range errs {
			_ = err.Error()
		}
	})
}
