package testenv

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// faulty are the errors of this process that [CheckError] has something against, until
// a test reports them.
var faulty struct {
	sync.Mutex
	errs []error
}

// Every error of the library that a test provokes is looked at.
func init() {
	kernel.OnError = func(err error) {
		wrong := CheckError(err)
		if wrong == nil {
			return
		}
		if _, helping := os.LookupEnv(helperEnv); helping {
			panic(wrong)
		}
		faulty.Lock()
		defer faulty.Unlock()
		faulty.errs = append(faulty.errs, wrong)
	}
}

// reportErrors fails the test with the errors so far that are not as they must be.
func reportErrors(t testing.TB) {
	t.Helper()
	faulty.Lock()
	defer faulty.Unlock()
	for _, err := range faulty.errs {
		t.Error(err)
	}
	faulty.errs = nil
}

// CheckError tells what is wrong with an error that the library returned. It must be
// the outermost and the only one of its kind, and have an operation, a cause and a text
// of one line that says nothing twice and has no empty parts.
func CheckError(err error) error {
	e, ok := err.(*hook.Error)
	if !ok {
		return fmt.Errorf("the error %q is a %T", err, err)
	}
	wrong := func(what string, args ...any) error {
		return fmt.Errorf("the error %q %s", err, fmt.Sprintf(what, args...))
	}
	var inner *hook.Error
	switch {
	case e.Op == "":
		return wrong("has no operation")
	case e.Err == nil || e.Reason() == "":
		return wrong("has no cause")
	case errors.As(e.Err, &inner):
		return wrong("has another one in it: %q", inner)
	case e.Hint != "" && strings.Contains(e.Reason(), e.Hint):
		return wrong("has its hint in the cause as well")
	}
	for _, bad := range []string{"\n", "\r", ": :", ": ;", "; ;", ";;", "%!", "<nil>"} {
		if strings.Contains(err.Error(), bad) {
			return wrong("has %q in it", bad)
		}
	}
	hints := strings.Split(e.Hint, "; ")
	for i, hint := range hints {
		if slices.Contains(hints[:i], hint) {
			return wrong("says %q twice", hint)
		}
	}
	return nil
}
