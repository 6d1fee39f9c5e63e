// Package declared tests that a host has what documents declare.
package declared

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/internal/apply"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/plan"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// owner is the label of the tests' documents.
const owner = "apply/test"

// An order is what another process applies.
type order struct {
	Attachments []declare.Attachment
	NetNS       string
	BPFFS       string
	Prune       bool
	DieAt       string // the step, as "apply: replaced"
}

func (o order) run(ctx context.Context) (*apply.Report, error) {
	return apply.Apply(ctx, o.docs(), o.options())
}

func (o order) docs() []apply.Document {
	return []apply.Document{{Document: &declare.Document{Attachments: o.Attachments}, File: "test.yaml", Owner: owner}}
}

func (o order) options() apply.Options {
	return apply.Options{Options: plan.Options{Owners: []string{owner}, Prune: o.Prune}, NetNS: o.NetNS, BPFFS: o.BPFFS}
}

func init() {
	testenv.RegisterHelper("apply", func(args []string) {
		var o order
		if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
			panic(err)
		}
		kernel.OnStep = func(step string) {
			if step == o.DieAt {
				unix.Kill(os.Getpid(), unix.SIGKILL)
				select {}
			}
		}
		fmt.Println("ready")
		fmt.Scanln()
		report, err := o.run(context.Background())
		fmt.Println("report", words(report), err)
	})
}

// A stage is a scene with documents.
type stage struct {
	*scene.Scene
	objects string
}

func newStage(t *testing.T) *stage {
	objects, err := filepath.Abs("../testdata")
	qt.Assert(t, qt.IsNil(err))
	return &stage{scene.New(t), objects}
}

// filter declares the program that drops datagrams to a port, 7000 if none is given.
func (s *stage) filter(name string, port ...string) declare.Attachment {
	a := declare.Attachment{
		Name: name, Hook: "xdp", On: declare.Match{Names: []string{s.ServerDev}},
		Program: declare.Program{File: filepath.Join(s.objects, "filter.o")},
	}
	if len(port) > 0 {
		a.Program.Globals = map[string]declare.Value{"port": declare.Value(port[0])}
	}
	return a
}

// other declares the program that drops datagrams to port 7000, too: another file.
func (s *stage) other(name string) declare.Attachment {
	a := s.filter(name)
	a.Program.File, a.Program.Entry = filepath.Join(s.objects, "several.o"), "ldt_first"
	return a
}

func (s *stage) order(list ...declare.Attachment) order {
	return order{Attachments: list, NetNS: s.Server.Name, BPFFS: s.BPFFS}
}

// apply applies a document and compares the report.
func (s *stage) apply(t *testing.T, o order, want string) *apply.Report {
	t.Helper()
	report, err := o.run(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(words(report), want))
	return report
}

// again checks that there is nothing to do.
func (s *stage) again(t *testing.T, o order) {
	t.Helper()
	report, err := o.run(t.Context())
	qt.Assert(t, qt.IsNil(err))
	for _, r := range report.Results {
		qt.Assert(t, qt.Equals(r.State, plan.Keep), qt.Commentf("%s", words(report)))
	}
	qt.Assert(t, qt.HasLen(report.Sealed, 0))
}

// start starts a process that applies once it gets a line.
func (s *stage) start(t *testing.T, o order) *testenv.Proc {
	t.Helper()
	text, err := json.Marshal(o)
	qt.Assert(t, qt.IsNil(err))
	p := testenv.StartHelper(t, "apply", string(text))
	p.Expect(t, "ready")
	return p
}

// drops tells whether a port's datagrams are dropped.
func (s *stage) drops(t *testing.T, port int) bool {
	t.Helper()
	return s.Passed(t, port, 5) == 0
}

// words is a report in a line.
func words(r *apply.Report) string {
	if r == nil {
		return ""
	}
	var all []string
	for i := range r.Results {
		item := &r.Results[i]
		text := string(item.State) + " " + item.Name
		for _, d := range item.Differences {
			text += " " + d.What
			if d.What != "program" {
				text += " " + d.From + ">" + d.To
			}
		}
		if item.Acts() != item.Done {
			text += " not done"
		}
		if item.Err != nil {
			text += ": " + item.Err.Error()
		}
		all = append(all, text)
	}
	for i := range r.Sealed {
		if err := r.Sealed[i].Err; err != nil {
			all = append(all, "not sealed: "+err.Error())
		}
	}
	return strings.Join(all, "; ")
}
