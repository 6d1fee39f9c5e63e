// Package stress tests what must hold while packets flood in, while many processes change the same
// target, and when a process is killed at any step. A random model of a chain is compared with a real one.
package stress

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
