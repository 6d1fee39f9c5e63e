package hook_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

func TestCompare(t *testing.T) {
	p := []byte("abcdefghijklmnop")
	for _, tc := range []struct {
		name  string
		after []byte
		want  hook.Change
	}{
		{"same", p, hook.Change{}},
		{"a byte", []byte("abcdefgHijklmnop"), hook.Change{Edits: []hook.Edit{{Offset: 7, Before: []byte("h"), After: []byte("H")}}}},
		{"two runs", []byte("ABcdefghijklmnoP"), hook.Change{Edits: []hook.Edit{
			{Offset: 0, Before: []byte("ab"), After: []byte("AB")}, {Offset: 15, Before: []byte("p"), After: []byte("P")},
		}}},
		{"head grown", append([]byte("1234"), p...), hook.Change{Head: 4}},
		{"head shrunk", p[4:], hook.Change{Head: -4}},
		{"tail grown", append(slices.Clone(p), "12"...), hook.Change{Tail: 2}},
		{"tail shrunk", p[:9], hook.Change{Tail: -7}},
		{"a tag put in, the beginning moved", []byte("abcd12efghijklmnop"), hook.Change{Head: 2, Edits: []hook.Edit{
			{Offset: 2, Before: []byte("abcd"), After: []byte("cd12")},
		}}},
		{"nothing left", nil, hook.Change{Tail: -16}},
	} {
		got := hook.Compare(p, tc.after)
		qt.Check(t, qt.DeepEquals(got, tc.want), qt.Commentf("%s", tc.name))
		qt.Check(t, qt.Equals(got.IsZero(), tc.name == "same"))
	}
}

// A change says all that is needed to make the second packet of the first, but for what is new.
func FuzzCompare(f *testing.F) {
	f.Add([]byte("abcdefgh"), []byte("12abcXefgh"))
	f.Add([]byte("abcdefgh"), []byte("cdefgh"))
	f.Fuzz(func(t *testing.T, before, after []byte) {
		c := hook.Compare(before, after)
		made := slices.Clone(before)
		if c.Head >= 0 {
			made = append(bytes.Clone(after[:c.Head]), made...)
		} else {
			made = made[-c.Head:]
		}
		if c.Tail >= 0 {
			made = append(made, after[len(after)-c.Tail:]...)
		} else {
			made = made[:len(made)+c.Tail]
		}
		for _, e := range c.Edits {
			qt.Assert(t, qt.DeepEquals(made[e.Offset:e.Offset+len(e.Before)], e.Before))
			copy(made[e.Offset:], e.After)
		}
		qt.Assert(t, qt.IsTrue(bytes.Equal(made, after)), qt.Commentf("%q, want %q", made, after))
	})
}

func TestReads(t *testing.T) {
	pass := hook.SetOf(hook.Pass)
	for _, tc := range []struct {
		hook     hook.Hook
		returned int32
		on       hook.VerdictSet
		says     string
		verdict  hook.Verdict
		goesOn   bool
	}{
		{hook.XDP, 2, pass, "pass", hook.Pass, true},
		{hook.XDP, 1, pass, "drop", hook.Drop, false},
		{hook.XDP, 1, hook.SetOf(hook.Drop), "drop", hook.Drop, true},
		{hook.XDP, 0, hook.Never, "aborted", hook.Aborted, false},
		{hook.XDP, 5, hook.SetOf(hook.Aborted), "5, taken for aborted", hook.Aborted, false},
		{hook.XDP, -1, pass, "-1, taken for aborted", hook.Aborted, false},
		{hook.TCXIngress, -1, 0, "next", hook.Pass, true},
		{hook.TCXIngress, 0, 0, "pass", hook.Pass, false},
		{hook.TCXEgress, 2, 0, "drop", hook.Drop, false},
		{hook.TCXEgress, 7, 0, "redirect", hook.Redirect, false},
		{hook.TCXIngress, 3, 0, "pipe", hook.Pass, false},
		{hook.TCXIngress, 1000, 0, "1000", hook.Pass, false},
		{hook.TCXIngress, -1 << 31, 0, "-2147483648", hook.Pass, false},
		{hook.CgroupSKBIngress, 1, 0, "allow", hook.Pass, true},
		{hook.CgroupSKBIngress, 0, 0, "deny", hook.Drop, true},
		{hook.CgroupSKBEgress, 2, 0, "deny", hook.Drop, true},
		{hook.CgroupSKBEgress, 3, 0, "allow", hook.Pass, true},
	} {
		says, v, goesOn := tc.hook.Interpret(uint32(tc.returned), tc.on)
		qt.Check(t, qt.Equals(says, tc.says), qt.Commentf("%v", tc))
		qt.Check(t, qt.Equals(v, tc.verdict), qt.Commentf("%v", tc))
		qt.Check(t, qt.Equals(goesOn, tc.goesOn), qt.Commentf("%v", tc))
	}
}
