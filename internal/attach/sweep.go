package attach

import (
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// sweep removes what dead processes left among the pins of the bpffs.
func sweep(l *state.Locked) {
	links.Sweep(l)
	l.RemoveLeftovers()
	chains.Sweep(l)
}
