package kernel

import (
	"testing"

	"github.com/go-quicktest/qt"
)

// OpenNetNS takes a number for a process id.
func TestNetNSSpec(t *testing.T) {
	for name, want := range map[string]string{"blue": "blue", "42": "/run/netns/42", "4b": "4b"} {
		qt.Check(t, qt.Equals(netnsSpec(name), want))
	}
}
