package demo

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The command is tested whole in cmd/dispatcher: here, what happens when an act
// does not go as it should.
func TestFailure(t *testing.T) {
	refusal := errors.New("refused")
	for name, test := range map[string]struct {
		act  func(*stage, context.Context) error
		want string
	}{
		"a check": {
			func(s *stage, _ context.Context) error { return s.equal(19, 20, "%d arrived", 19) },
			"act 2 (It fails): 19 arrived (expected: 20)",
		},
		"a command": {
			func(s *stage, ctx context.Context) error { return s.run(ctx, "ip -n $NS link show dev nosuch") },
			`act 2 (It fails): ip -n NAME-server link show dev nosuch: exit status 1: Device "nosuch" does not exist.`,
		},
		"a call": {
			func(*stage, context.Context) error { return refusal },
			"act 2 (It fails): refused",
		},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			var out strings.Builder
			var s *stage
			err := perform(t.Context(), &transcript{out: &out}, []act{
				{"All is well", func(its *stage, ctx context.Context) error {
					s = its
					return errors.Join(s.mountBPFFS(), s.addNetNS(ctx, "$NS"), s.pinRival())
				}},
				{"It fails", test.act},
				{"Never seen", nil},
			})
			qt.Assert(t, qt.IsNotNil(err))
			qt.Assert(t, qt.Equals(strings.ReplaceAll(err.Error(), s.name, "NAME"), test.want))
			qt.Assert(t, qt.StringContains(out.String(), "ok  nothing is left"))
			_, err = os.Stat(s.bpffs)
			qt.Assert(t, qt.ErrorIs(err, os.ErrNotExist))
		})
	}
}

// What is still there in the end is an error, and named.
func TestSomethingIsLeft(t *testing.T) {
	testenv.CheckLeaks(t)
	left := t.TempDir()
	var out strings.Builder
	err := perform(t.Context(), &transcript{out: &out}, []act{{"It leaves something", func(s *stage, _ context.Context) error {
		s.made.pins[left] = true
		return nil
	}}})
	qt.Assert(t, qt.ErrorMatches(err, "still there: "+left))
	qt.Assert(t, qt.StringContains(out.String(), "FAILED  still there"))
}

func TestGrouped(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 1234056: "1,234,056"} {
		qt.Check(t, qt.Equals(grouped(n), want))
	}
}
