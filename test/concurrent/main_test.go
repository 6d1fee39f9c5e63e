// Package concurrent tests what must hold when many processes, or goroutines, change the same target at once.
package concurrent

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
