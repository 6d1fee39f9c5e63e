// Package contract tests what holds on every kind of hook, as one table: a row for each promise, and
// each of them on XDP, TCX, clsact and cgroups.
package contract

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
