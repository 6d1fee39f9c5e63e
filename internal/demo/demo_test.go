package demo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// inBrief makes the demo run the command of this source tree, since the
// executable of a test is another one, and keeps the floods short.
func inBrief(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dispatcher")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", path, "../../cmd/dispatcher").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	set(t, &executable, path)
	set(t, &replacements, 3)
	set(t, &rounds, 2)
}

// set changes a variable for the length of a test.
func set[T any](t *testing.T, v *T, to T) {
	was := *v
	*v = to
	t.Cleanup(func() { *v = was })
}

// lines calls see with each line of a transcript.
type lines struct{ see func(line string) }

func (l lines) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		l.see(line)
	}
	return len(b), nil
}

// After an interruption at any line the demo removes everything that it made.
func TestInterrupted(t *testing.T) {
	testenv.Require(t)
	inBrief(t)
	var lengths []int // the acts' lengths in lines
	var whole strings.Builder
	err := perform(t.Context(), &transcript{out: lines{func(line string) {
		if strings.HasPrefix(line, "== ") {
			lengths = append(lengths, 0)
		}
		lengths[len(lengths)-1]++
		whole.WriteString(line)
	}}}, acts)
	if err != nil {
		t.Fatalf("%v\n%s", err, &whole)
	}
	end := "\nAll 16 acts went as they should"
	if !testenv.Has(t, testenv.FeatureTCX) {
		end = "\nOf 16 acts 1 could not be played on this machine, 2 could only in part; the others went as they should"
	}
	qt.Assert(t, qt.StringContains(whole.String(), end))

	for i := range acts {
		t.Run(acts[i].title, func(t *testing.T) {
			testenv.CheckLeaks(t)
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			act, left := 0, 1+lengths[i]/2
			var out strings.Builder
			err := perform(ctx, &transcript{out: lines{func(line string) {
				out.WriteString(line)
				if strings.HasPrefix(line, "== ") {
					act++
				}
				if act == i+1 {
					if left--; left == 0 {
						interrupt()
					}
				}
			}}}, acts)
			qt.Assert(t, qt.ErrorMatches(err, fmt.Sprintf("the demo was interrupted in act %d", i+1)), qt.Commentf("%s", &out))
			qt.Assert(t, qt.StringContains(out.String(), "ok  nothing is left"))
			root, err := cgroupRoot()
			qt.Assert(t, qt.IsNil(err))
			for _, dir := range []string{kernel.NetNSDir, os.TempDir(), root} {
				left, err := filepath.Glob(filepath.Join(dir, fmt.Sprintf("%s%d*", prefix, os.Getpid())))
				qt.Assert(t, qt.IsNil(err))
				qt.Assert(t, qt.HasLen(left, 0))
			}
		})
	}
}

// The demo names what the machine lacks, and plays the rest.
func TestNotHere(t *testing.T) {
	testenv.CheckLeaks(t)
	inBrief(t)
	set(t, &withoutTCX, true)
	set(t, &cgroupRoot, func() (string, error) { return "", fs.ErrNotExist })
	var out strings.Builder
	if err := perform(t.Context(), &transcript{out: &out}, acts); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{
		"NOT HERE  TCX, which came with Linux 6.6",
		"NOT HERE  cgroup v2 is not mounted",
		"attach tc/ingress veth1 builtin:count",
		"Of 16 acts 3 could not be played on this machine, 2 could only in part; the others went as they should",
		"ok  nothing is left",
	} {
		qt.Check(t, qt.StringContains(out.String(), want))
	}
}

// The next demo removes what a killed demo left behind, and keeps what belongs
// to a running one.
func TestSweep(t *testing.T) {
	testenv.CheckLeaks(t)
	root, err := cgroupRoot()
	qt.Assert(t, qt.IsNil(err))
	ended := exec.Command("true")
	qt.Assert(t, qt.IsNil(ended.Run()))
	dead := filepath.Join(root, fmt.Sprintf("%s%d", prefix, ended.Process.Pid))
	alive := filepath.Join(root, fmt.Sprintf("%s%d", prefix, os.Getpid()))
	for _, path := range []string{dead, alive} {
		qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Join(path, "child"), 0o755)))
		t.Cleanup(func() { qt.Check(t, qt.IsNil(removeCgroup(path))) })
	}
	sweep()
	_, err = os.Lstat(dead)
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = os.Lstat(filepath.Join(alive, "child"))
	qt.Check(t, qt.IsNil(err))
}

// What happens when an act fails.
func TestFailure(t *testing.T) {
	refusal := errors.New("refused")
	for name, test := range map[string]struct {
		act  func(*stage, context.Context)
		want string
	}{
		"a check": {
			func(s *stage, _ context.Context) { s.equal(19, 20, "%d arrived", 19) },
			"act 2 (It fails): 19 arrived (expected: 20)",
		},
		"a command": {
			func(s *stage, ctx context.Context) { s.run(ctx, "ip -n $NS link show dev nosuch") },
			`act 2 (It fails): ip -n NAME-server link show dev nosuch: exit status 1: Device "nosuch" does not exist.`,
		},
		"a call": {
			func(*stage, context.Context) { must(refusal) },
			"act 2 (It fails): refused",
		},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			var out strings.Builder
			var s *stage
			err := perform(t.Context(), &transcript{out: &out}, []act{
				{"All is well", func(its *stage, ctx context.Context) {
					s = its
					s.mountBPFFS()
					s.addNetNS(ctx, "$NS")
					s.pinRival()
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

// Remains at the end are an error, which names them.
func TestSomethingIsLeft(t *testing.T) {
	testenv.CheckLeaks(t)
	left := t.TempDir()
	var out strings.Builder
	err := perform(t.Context(), &transcript{out: &out}, []act{{"It leaves something", func(s *stage, _ context.Context) {
		s.made.pins[left] = true
	}}})
	qt.Assert(t, qt.ErrorMatches(err, "still there: "+left))
	qt.Assert(t, qt.StringContains(out.String(), "FAILED  still there"))
}

func TestGrouped(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 1234056: "1,234,056"} {
		qt.Check(t, qt.Equals(grouped(n), want))
	}
}
