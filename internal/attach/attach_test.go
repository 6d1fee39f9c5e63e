package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/filters"
	"github.com/libdispatcher/dispatcher/internal/interop"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// said returns the text and the hints of an error, as a user reads both.
func said(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(hook.Wrap("", "", "", err).Error(), ": ")
}

// A reference that is no name is refused if it has a prefix. A name that nobody can have is looked for, and not found.
func TestCheckRef(t *testing.T) {
	for _, test := range []struct {
		ref  hook.Ref
		text string
		is   error
	}{
		{"a", "", nil},
		{"link:1", "", nil},
		{"id:4294967295", "", nil},
		{"a b", "", nil},
		{"-a", "", nil},
		{"", "there is no member without a name", fs.ErrNotExist},
		{"id:", `"id:": a number of 1 or more comes after "id:"`, hook.ErrUsage},
		{"id:0", `"id:0": a number of 1 or more comes after "id:"`, hook.ErrUsage},
		{"link:x", `"link:x": a number of 1 or more comes after "link:"`, hook.ErrUsage},
		{"link:4294967296", `"link:4294967296": a number of 1 or more comes after "link:"`, hook.ErrUsage},
	} {
		err := checkRef(test.ref)
		qt.Check(t, qt.Equals(said(err), test.text), qt.Commentf("%q", test.ref))
		if test.is != nil {
			qt.Check(t, qt.ErrorIs(err, test.is))
		}
	}
}

// Every hook has its families, of which only XDP has two.
func TestFamilies(t *testing.T) {
	for _, h := range hook.Hooks() {
		want := []family{links.Family{}}
		switch h {
		case hook.XDP:
			want = []family{chains.Family{}, interop.Family{}}
		case hook.TCIngress, hook.TCEgress:
			want = []family{filters.Family{}}
		}
		qt.Check(t, qt.DeepEquals(families(h), want), qt.Commentf("%s", h))
	}
}

// The family that says that the chain is not its own leaves it to the other. When both say so the chain was exchanged
// meanwhile, and the first is asked again.
func TestIn(t *testing.T) {
	refused := errors.New("refused")
	style := fmt.Errorf("eth0: %w", chains.ErrStyle)
	for _, test := range []struct {
		about   string
		hook    hook.Hook
		answers []error // the last one again and again
		asked   int
		is      error
	}{
		{about: "the first has it", hook: hook.XDP, answers: []error{nil}, asked: 1},
		{about: "the first fails", hook: hook.XDP, answers: []error{refused}, asked: 1, is: refused},
		{about: "the second has it", hook: hook.XDP, answers: []error{style, nil}, asked: 2},
		{about: "the second fails", hook: hook.XDP, answers: []error{style, refused}, asked: 2, is: refused},
		{about: "the first has it by now", hook: hook.XDP, answers: []error{style, style, nil}, asked: 3},
		{about: "none ever has it", hook: hook.XDP, answers: []error{style}, asked: 20, is: hook.ErrChanged},
		{about: "the only one", hook: hook.TCXIngress, answers: []error{refused}, asked: 1, is: refused},
	} {
		t.Run(test.about, func(t *testing.T) {
			asked := 0
			err := in(t.Context(), &target.Opened{Target: target.Target{Hook: test.hook}}, func(f family) error {
				families := families(test.hook)
				qt.Check(t, qt.Equals(reflect.TypeOf(f), reflect.TypeOf(families[asked%len(families)])))
				asked++
				return test.answers[min(asked, len(test.answers))-1]
			})
			qt.Check(t, qt.Equals(asked, test.asked))
			if test.is == nil {
				qt.Check(t, qt.IsNil(err))
			} else {
				qt.Check(t, qt.ErrorIs(err, test.is))
			}
		})
	}
}

// Both families are asked before the end of the context counts.
func TestInEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	asked := 0
	err := in(ctx, &target.Opened{Target: target.Target{Hook: hook.XDP}}, func(family) error { asked++; return chains.ErrStyle })
	qt.Check(t, qt.ErrorIs(err, context.Canceled))
	qt.Check(t, qt.Equals(asked, 2))
}

// Links that were made first come first. What has no link comes before them.
func TestByAge(t *testing.T) {
	got := byAge([]string{"tcx_12", "xdp_9", "cgroup_100", "xdp_chain_ffffffffffffffff", "tcx_2"})
	qt.Check(t, qt.DeepEquals(got, []string{"xdp_chain_ffffffffffffffff", "tcx_2", "xdp_9", "tcx_12", "cgroup_100"}))
	qt.Check(t, qt.HasLen(byAge(nil), 0))
}

// What a hook does not have is refused without opening anything.
func TestNotOnThisHook(t *testing.T) {
	_, err := Convert(t.Context(), target.Target{Hook: hook.TCXIngress}, interop.ConvertRequest{})
	qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
	qt.Check(t, qt.Equals(said(err), "tcx/ingress has no styles of chains; only xdp has"))
	_, err = Effective(t.Context(), target.Target{Hook: hook.XDP})
	qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
	qt.Check(t, qt.Equals(said(err), "xdp is not a hook of cgroups: nothing is inherited there"))
}
