package hook_test

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// A verdict that is read wrongly lets packets through, or ends a chain too early.
func TestParseVerdict(t *testing.T) {
	for text, want := range map[string]hook.Verdict{
		"aborted": hook.Aborted, "drop": hook.Drop, "pass": hook.Pass, "tx": hook.TX, "redirect": hook.Redirect,
		"XDP_PASS": hook.Pass, "Drop": hook.Drop, "xdp_tx": hook.TX,
	} {
		got, err := hook.ParseVerdict(text)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, want), qt.Commentf("%q", text))
	}
	for _, text := range []string{"", "xdp_", "none", "any", "ok", "2", " pass", "pass\n", "Verdict(7)"} {
		_, err := hook.ParseVerdict(text)
		qt.Check(t, qt.ErrorMatches(err, `unknown verdict ".*" \(known: aborted, drop, pass, tx, redirect\)`), qt.Commentf("%q", text))
	}
}

// What is printed must be what can be typed.
func TestVerdictText(t *testing.T) {
	for v := range hook.Verdict(hook.Verdicts) {
		back, err := hook.ParseVerdict(v.String())
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(back, v))
	}
	qt.Check(t, qt.Equals(hook.Verdict(7).String(), "Verdict(7)"))
}

func TestVerdictSet(t *testing.T) {
	for _, test := range []struct {
		set   hook.VerdictSet
		text  string
		list  []hook.Verdict
		valid bool
	}{
		{0, "default", []hook.Verdict{}, false},
		{hook.Never, "none", []hook.Verdict{}, true},
		{hook.SetOf(), "none", []hook.Verdict{}, true},
		{hook.SetOf(hook.Aborted), "aborted", []hook.Verdict{hook.Aborted}, true},
		{hook.SetOf(hook.TX, hook.Pass, hook.TX), "pass,tx", []hook.Verdict{hook.Pass, hook.TX}, true},
		{
			hook.SetOf(hook.Redirect, hook.TX, hook.Pass, hook.Drop, hook.Aborted), "aborted,drop,pass,tx,redirect",
			[]hook.Verdict{hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect}, true,
		},
		// Contradictions and unknown verdicts, however they came about.
		{hook.Never | hook.SetOf(hook.Pass), "pass,0x80000000", []hook.Verdict{hook.Pass}, false},
		{1 << hook.Verdicts, "0x20", []hook.Verdict{}, false},
		{hook.SetOf(hook.Pass, 5), "pass,0x20", []hook.Verdict{hook.Pass}, false},
		{hook.SetOf(31), "0x20", []hook.Verdict{}, false},
		{hook.SetOf(1000), "0x20", []hook.Verdict{}, false},
	} {
		qt.Check(t, qt.Equals(test.set.String(), test.text))
		qt.Check(t, qt.DeepEquals(test.set.List(), test.list), qt.Commentf("%s", test.text))
		qt.Check(t, qt.Equals(test.set.Valid(), test.valid), qt.Commentf("%s", test.text))
		for v := range hook.Verdict(40) {
			in := false
			for _, w := range test.list {
				in = in || v == w
			}
			qt.Check(t, qt.Equals(test.set.Has(v), in), qt.Commentf("%s has %v", test.text, v))
		}
	}
}

func TestParseVerdictSet(t *testing.T) {
	for text, want := range map[string]hook.VerdictSet{
		"pass":              hook.SetOf(hook.Pass),
		"pass,tx":           hook.SetOf(hook.Pass, hook.TX),
		" tx , XDP_PASS,tx": hook.SetOf(hook.Pass, hook.TX),
		"none":              hook.Never,
		"any":               hook.SetOf(hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect),
	} {
		got, err := hook.ParseVerdictSet(text)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, want), qt.Commentf("%q", text))
		qt.Check(t, qt.IsTrue(got.Valid()))
	}
	for _, text := range []string{"", ",", "pass,", "pass,none", "any,pass", "default", "pass tx", "0x20"} {
		_, err := hook.ParseVerdictSet(text)
		qt.Check(t, qt.ErrorMatches(err, `unknown verdict .*; "none" ends the chain here, "any" always goes on`), qt.Commentf("%q", text))
	}
}

// Every valid set can be printed and read back.
func TestVerdictSetText(t *testing.T) {
	for set := hook.VerdictSet(1); set < 1<<hook.Verdicts; set++ {
		back, err := hook.ParseVerdictSet(set.String())
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(back, set))
		qt.Check(t, qt.Equals(hook.SetOf(set.List()...), set))
	}
}

func TestOnMissing(t *testing.T) {
	for text, want := range map[string]hook.OnMissing{
		"continue": hook.MissingContinue, "drop": hook.MissingDrop, "aborted": hook.MissingAborted,
	} {
		got, err := hook.ParseOnMissing(text)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, want))
		qt.Check(t, qt.Equals(got.String(), text))
	}
	qt.Check(t, qt.Equals(hook.OnMissing(0).String(), "default"))
	qt.Check(t, qt.Equals(hook.OnMissing(9).String(), "OnMissing(9)"))
	for _, text := range []string{"", "default", "pass", "Drop", "OnMissing(9)"} {
		_, err := hook.ParseOnMissing(text)
		qt.Check(t, qt.ErrorMatches(err, `unknown policy ".*" for an empty slot \(known: continue, drop, aborted\)`))
	}
}
