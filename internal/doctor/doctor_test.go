package doctor

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"github.com/libdispatcher/dispatcher/hook"
)

// with returns a machine that has these files.
func with(files map[string]string) machine {
	return machine{bpffs: "/sys/fs/bpf", read: func(path string) (string, error) {
		text, ok := files[path]
		if !ok {
			return "", fs.ErrNotExist
		}
		return text, nil
	}}
}

// Kernel settings that matter are found, with the right level.
func TestMachine(t *testing.T) {
	const jit, status = "/proc/sys/net/core/bpf_jit_", "/proc/thread-self/status"
	for _, test := range []struct {
		check func(machine) []hook.Finding
		files map[string]string
		want  string // levels, none if all is well, and the beginning of the last mending
	}{
		{machine.jit, nil, "ok"},
		{machine.jit, map[string]string{jit + "enable": "1", jit + "kallsyms": "1", jit + "harden": "0"}, ""},
		{machine.jit, map[string]string{jit + "enable": "0"}, "broken sysctl -w net.core.bpf_jit_enable=1"},
		{machine.jit, map[string]string{jit + "enable": "1", jit + "kallsyms": "0", jit + "harden": "2"}, "note note"},
		{machine.jit, map[string]string{jit + "enable": "2", jit + "kallsyms": "1", jit + "harden": "1"}, "note sysctl -w net.core.bpf_jit_enable=1"},
		{machine.unprivileged, nil, "ok"},
		{machine.unprivileged, map[string]string{"/proc/sys/kernel/unprivileged_bpf_disabled": "2"}, ""},
		{machine.unprivileged, map[string]string{"/proc/sys/kernel/unprivileged_bpf_disabled": "0"}, "note sysctl -w kernel.unprivileged_bpf_disabled=2"},
		{machine.lockdown, nil, ""},
		{machine.lockdown, map[string]string{"/sys/kernel/security/lockdown": "[none] integrity confidentiality"}, "ok"},
		{machine.lockdown, map[string]string{"/sys/kernel/security/lockdown": "none [integrity] confidentiality"}, "ok"},
		{machine.lockdown, map[string]string{"/sys/kernel/security/lockdown": "none integrity [confidentiality]"}, "note"},
		{machine.modules, map[string]string{"/sys/kernel/security/lsm": "capability,apparmor"}, "ok"},
		{machine.seccomp, map[string]string{status: "Name:\tx\nSeccomp:\t2\n"}, "note"},
		{machine.seccomp, map[string]string{status: "Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n"}, ""},
	} {
		var words []string
		mend := ""
		for _, f := range test.check(with(test.files)) {
			qt.Check(t, qt.Not(qt.Equals(f.Text, "")))
			words = append(words, string(f.Level))
			mend = f.Mend
		}
		got := strings.TrimSpace(strings.Join(words, " ") + " " + mend)
		qt.Check(t, qt.Equals(got, test.want), qt.Commentf("%v", test.files))
	}
}

// As few members as possible are moved.
func TestStrays(t *testing.T) {
	for _, test := range []struct {
		order  []int
		strays []int
	}{
		{nil, nil},
		{[]int{5}, nil},
		{[]int{1, 1, 2, 9}, nil},
		{[]int{9, 1, 2, 3}, []int{9}},
		{[]int{1, 2, 3, 0}, []int{0}},
		{[]int{10, 30, 20, 40}, []int{20}},
		{[]int{40, 30, 20}, []int{30, 20}},
		{[]int{5, 1, 6, 2, 7, 3}, []int{1, 2, 3}},
	} {
		var members []*hook.Member
		for _, p := range test.order {
			members = append(members, &hook.Member{Settings: hook.Settings{Priority: p}})
		}
		var got []int
		for _, m := range strays(members) {
			got = append(got, m.Priority)
		}
		qt.Check(t, qt.DeepEquals(got, test.strays), qt.Commentf("%v", test.order))
	}
}

// A chain without a target gets no command.
func TestCommandNowhere(t *testing.T) {
	e := exam{bpffs: "/sys/fs/bpf"}
	qt.Check(t, qt.Equals(e.on(&hook.Chain{Hook: hook.XDP}, nil, "adopt"), ""))
}

// The level of a replaced function follows from what happens to the packets.
func TestExtended(t *testing.T) {
	list := func(function string, main bool) []hook.Extension {
		return []hook.Extension{{LinkID: 30, Program: hook.Program{ID: 9, Name: "decoy"}, Function: function, Main: main}}
	}
	member := func(kind hook.Kind, state hook.State, sealed bool, main bool) hook.Chain {
		return hook.Chain{Members: []hook.Member{{Name: "a", Kind: kind, State: state, Sealed: sealed, Extensions: list("f", main)}}}
	}
	for _, test := range []struct {
		chain hook.Chain
		want  string // level and member
		text  string // behind "in the place of the"
		mend  string
	}{
		{hook.Chain{}, "", "", ""},
		{hook.Chain{Extensions: list("libdispatcher", true)}, "broken", "main function libdispatcher: packets meet no member until .*", ""},
		{hook.Chain{Extensions: list("f", false)}, "note", "function f, of the dispatcher", ""},
		{member(hook.KindMember, hook.StateBypassed, false, true), "broken a", "main function f: packets do not meet the member .*", ""},
		{member(hook.KindMember, hook.StateBypassed, true, true), "broken a", "main function f: packets do not meet the member .*", "dispatcher unseal xdp eth0"},
		{member(hook.KindMember, hook.StateRunning, false, true), "note a", "main function f", ""},
		{member(hook.KindMember, hook.StateRunning, false, false), "note a", "function f", ""},
		{member(hook.KindForeign, hook.StateBypassed, false, true), "", "", ""},
	} {
		e := exam{bpffs: "/sys/fs/bpf"}
		test.chain.Hook, test.chain.Target = hook.XDP, "eth0"
		e.extended(&test.chain)
		if test.want == "" {
			qt.Check(t, qt.HasLen(e.found, 0))
			continue
		}
		qt.Assert(t, qt.HasLen(e.found, 1))
		f := e.found[0]
		qt.Check(t, qt.Equals(strings.TrimSpace(fmt.Sprintf("%s %s", f.Level, f.Member)), test.want))
		qt.Check(t, qt.Matches(f.Text, `freplace has put decoy \(id 9, link 30\) in the place of the `+test.text+
			`; "dispatcher holders --link 30" tells which process can close the link`))
		qt.Check(t, qt.Equals(f.Mend, test.mend))
	}
}
