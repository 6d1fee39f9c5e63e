package scan

import (
	"fmt"
	"os/exec"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The machine has 200 more processes, 50 namespaces and 500 cgroups.
func BenchmarkAll(b *testing.B) {
	testenv.CheckLeaks(b)
	for range 50 {
		testenv.NewNetNS(b)
	}
	for range 10 {
		cg := testenv.NewCgroup(b)
		for i := range 49 {
			cg.Child(b, fmt.Sprint(i))
		}
	}
	for range 200 {
		sleep := exec.Command("sleep", "1000")
		qt.Assert(b, qt.IsNil(sleep.Start()))
		b.Cleanup(func() {
			sleep.Process.Kill()
			sleep.Wait()
		})
	}
	for b.Loop() {
		_, err := All(b.Context(), Options{})
		qt.Assert(b, qt.IsNil(err))
	}
}
