// Package lifetime tests when a member begins and ends: owners that close or are killed, pins, devices
// and namespaces that go away, and how members that were on them come back.
package lifetime

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
