package hook_test

import (
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

func TestParse(t *testing.T) {
	for _, h := range hook.Hooks() {
		got, err := hook.Parse(string(h))
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, h))
	}
	for _, text := range []string{"", "XDP", "xdp ", "xdp/devmap", "nosuch"} {
		_, err := hook.Parse(text)
		qt.Check(t, qt.ErrorMatches(err, `unknown hook ".*" \(known: xdp.*\)`), qt.Commentf("%q", text))
	}
}

func TestMode(t *testing.T) {
	for text, want := range map[string]hook.Mode{
		"": hook.ModeAuto, "auto": hook.ModeAuto, "native": hook.ModeNative, "drv": hook.ModeNative,
		"generic": hook.ModeGeneric, "skb": hook.ModeGeneric,
	} {
		got, err := hook.ParseMode(text)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, want), qt.Commentf("%q", text))
	}
	// Offload is shown but cannot be asked for: a dispatcher does not run on a card.
	for _, text := range []string{"offload", "hw", "Native", "Mode(7)"} {
		_, err := hook.ParseMode(text)
		qt.Check(t, qt.ErrorMatches(err, `unknown mode ".*" \(known: auto, native, generic\)`))
	}
	for mode, text := range map[hook.Mode]string{
		hook.ModeAuto: "auto", hook.ModeNative: "native", hook.ModeGeneric: "generic", hook.ModeOffload: "offload", 7: "Mode(7)",
	} {
		qt.Check(t, qt.Equals(mode.String(), text))
	}
}

func TestSettingsCheck(t *testing.T) {
	for _, test := range []struct {
		settings hook.Settings
		err      string // empty: in range
	}{
		{hook.Settings{}, ""},
		{hook.Settings{}.WithDefaults(), ""},
		{hook.Settings{Priority: hook.MinPriority}, ""},
		{hook.Settings{Priority: hook.MaxPriority}, ""},
		{hook.Settings{ContinueOn: hook.Never}, ""},
		{hook.Settings{OnMissing: hook.MissingAborted}, ""},
		{hook.Settings{Priority: -1}, `priority -1: must be from 1 \(runs first\) to 65535`},
		{hook.Settings{Priority: hook.MaxPriority + 1}, `priority 65536: .*`},
		{hook.Settings{Priority: 1<<32 + 50}, `priority 4294967346: .*`},
		{hook.Settings{ContinueOn: 1 << 5}, `continue-on 0x20: not a set of XDP verdicts`},
		{hook.Settings{ContinueOn: hook.Never | 1}, `continue-on aborted,0x80000000: .*`},
		{hook.Settings{OnMissing: hook.MissingAborted + 1}, `OnMissing\(4\): no such policy for an empty slot`},
	} {
		err := test.settings.Check()
		if test.err == "" {
			qt.Check(t, qt.IsNil(err), qt.Commentf("%+v", test.settings))
			continue
		}
		qt.Check(t, qt.ErrorMatches(err, test.err))
	}
}

// A zero field is a default on attaching and "leave it" on changing.
func TestSettingsOr(t *testing.T) {
	set := hook.Settings{Priority: 10, ContinueOn: hook.Never, OnMissing: hook.MissingDrop}
	qt.Check(t, qt.Equals(hook.Settings{}.Or(set), set))
	qt.Check(t, qt.Equals(set.Or(hook.Settings{Priority: 20, ContinueOn: hook.SetOf(hook.TX), OnMissing: hook.MissingContinue}), set))
	qt.Check(t, qt.Equals(set.WithDefaults(), set))
	qt.Check(t, qt.Equals(hook.Settings{}.WithDefaults(),
		hook.Settings{Priority: hook.DefaultPriority, ContinueOn: hook.SetOf(hook.Pass), OnMissing: hook.MissingContinue}))
}

// Names become file names, columns and arguments: what is accepted must survive all three.
func TestCheckName(t *testing.T) {
	for _, name := range []string{
		"a", "drop-icmp", "cil_xdp.entry", "a/b", "../..", ".", "%2F", "日本", "x-", `"'`, "root", "slot",
		strings.Repeat("x", hook.MaxName), strings.Repeat("é", hook.MaxName/2),
	} {
		qt.Check(t, qt.IsNil(hook.CheckName(name)), qt.Commentf("%q", name))
	}
	for name, why := range map[string]string{
		"":                                    `the name is empty`,
		"-x":                                  `the name "-x" starts with a dash`,
		"a b":                                 `the name "a b" has the character ' '; .*`,
		"a\tb":                                `.* has the character '\\t'; .*`,
		"a\x00":                               `.* has the character '\\x00'; .*`,
		"\x1b[31m":                            `.* has the character '\\x1b'; .*`,
		"a\u00a0b":                            `.* has the character '\\u00a0'; .*`, // no-break space
		"a\u202eb":                            `.* has the character '\\u202e'; .*`, // turns the text around
		"a\xff":                               `the name "a\\xff" is not valid UTF-8`,
		strings.Repeat("x", hook.MaxName+1):   `the name "x{20}"\.\.\. has 64 bytes, at most 63 fit`,
		strings.Repeat("é", 1+hook.MaxName/2): `.* has 64 bytes, at most 63 fit`,
		strings.Repeat("x", 200):              `.* has 200 bytes, at most 63 fit`,
	} {
		qt.Check(t, qt.ErrorMatches(hook.CheckName(name), why), qt.Commentf("%q", name))
	}
}

func TestChain(t *testing.T) {
	c := hook.Chain{Hook: hook.XDP, Members: []hook.Member{
		{Name: "a", Kind: hook.KindLegacy},
		{Name: "b", Kind: hook.KindMember, SlotID: 7},
	}}
	qt.Check(t, qt.IsNil(c.Member("a"))) // not a member, though it has a name
	qt.Check(t, qt.Equals(c.Member("b").SlotID, 7))
	qt.Check(t, qt.IsFalse(c.Protected()))
	qt.Check(t, qt.IsFalse(c.Ours()))
	c.LinkID, c.DispatcherID, c.Style = 1, 2, hook.StyleOwned
	qt.Check(t, qt.IsTrue(c.Protected()))
	qt.Check(t, qt.IsTrue(c.Ours()))
	qt.Check(t, qt.IsNil((&hook.Chain{}).Member("")))
}

// A pin that no path leads to is named so that it can be reached.
func TestHolderPinString(t *testing.T) {
	for want, pin := range map[string]hook.HolderPin{
		"/proc/7/root/bpf/a": {Path: "/proc/7/root/bpf/a", Names: []string{"/a"}},
		"/a at /bpf in the mount namespace /run/m": {
			Names: []string{"/a"}, Mounts: []hook.HolderMount{{NS: 5, Point: "/bpf", Enter: "/run/m"}},
		},
		"/a at /bpf in the mount namespace 5":        {Names: []string{"/a"}, Mounts: []hook.HolderMount{{NS: 5, Point: "/bpf"}}},
		"/a = /b in a bpffs that is mounted nowhere": {Names: []string{"/a", "/b"}},
	} {
		qt.Check(t, qt.Equals(pin.String(), want))
	}
}
