package dispatch_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

var update = flag.Bool("update", false, "write the golden files anew")

// plain are the default settings.
var plain = hook.Settings{}.WithDefaults()

func settings(continueOn hook.VerdictSet, missing hook.OnMissing) hook.Settings {
	return hook.Settings{Priority: hook.DefaultPriority, ContinueOn: continueOn, OnMissing: missing}
}

func anyVerdict() hook.VerdictSet {
	return hook.SetOf(hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect)
}

// plans are the chains whose code is in testdata.
var plans = map[string][]hook.Settings{
	"none":          {},
	"plain-1":       {plain},
	"plain-2":       {plain, plain},
	"plain-3":       {plain, plain, plain},
	"plain-drop":    {plain, settings(hook.SetOf(hook.Pass), hook.MissingDrop), plain},
	"plain-aborted": {plain, settings(hook.SetOf(hook.Pass), hook.MissingAborted), plain},
	"mixed": {
		plain,
		settings(hook.SetOf(hook.Pass, hook.TX), hook.MissingContinue),
		settings(hook.SetOf(hook.Aborted, hook.Redirect), hook.MissingContinue),
		plain,
	},
	"never":         {settings(hook.Never, hook.MissingContinue), plain},
	"never-drop":    {settings(hook.Never, hook.MissingDrop), plain},
	"never-aborted": {settings(hook.Never, hook.MissingAborted), plain},
	"any":           {settings(anyVerdict(), hook.MissingContinue), plain},
	// A closed door is final, even where the verdict of the same name goes on.
	"drop-in-set":      {settings(hook.SetOf(hook.Drop), hook.MissingDrop), plain},
	"drop-not-in-set":  {settings(hook.SetOf(hook.TX), hook.MissingDrop), plain},
	"aborted-in-set":   {settings(anyVerdict(), hook.MissingAborted), settings(anyVerdict(), hook.MissingDrop)},
	"aborted-not-in":   {settings(hook.SetOf(hook.Drop), hook.MissingAborted), plain},
	"last-not-plain":   {plain, settings(hook.Never, hook.MissingContinue)},
	"one-not-plain":    {settings(anyVerdict(), hook.MissingContinue)},
	"one-closed-door":  {settings(anyVerdict(), hook.MissingDrop)},
	"one-never-closed": {settings(hook.Never, hook.MissingAborted)},
}

// A change of the generated code shall be seen by whoever reviews it, and the
// kernel shall take every shape of it (see TestSemantics for what it does).
func TestGenerate(t *testing.T) {
	for name, slots := range plans {
		t.Run(name, func(t *testing.T) {
			got := fmt.Sprintf("%v", dispatch.Link(slots, nil, false))
			qt.Assert(t, qt.Equals(fmt.Sprintf("%v", dispatch.Link(slots, nil, false)), got), qt.Commentf("not always the same"))

			golden := filepath.Join("testdata", name+".golden")
			if *update {
				qt.Assert(t, qt.IsNil(os.WriteFile(golden, []byte(got), 0o644)))
			}
			want, err := os.ReadFile(golden)
			qt.Assert(t, qt.IsNil(err), qt.Commentf("make it with -update"))
			qt.Assert(t, qt.Equals(got, string(want)))
		})
	}
	// No golden file is of a plan that is gone.
	files, err := filepath.Glob("testdata/*.golden")
	qt.Assert(t, qt.IsNil(err))
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".golden")
		qt.Check(t, qt.IsNotNil(plans[name]), qt.Commentf("%s", f))
	}
}
