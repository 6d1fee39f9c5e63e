package xdploader_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/libxdp"
)

// TestDifferences checks what docs/xdp-loader.md says about chains that
// xdp-loader 1.6.3 does not change or clean up.
func TestDifferences(t *testing.T) {
	if err := libxdp.Supported(); err != nil {
		t.Skip("this kernel has no dispatcher of libxdp's: runs in the kernel matrix")
	}
	const object = objects + "/filter.o"
	folders := func(b *bench) []string {
		found, err := filepath.Glob(b.bpffs + "/xdp/dispatch-*")
		qt.Assert(t, qt.IsNil(err))
		return found
	}
	t.Run("the next load removes the pins of a detached dispatcher", func(t *testing.T) {
		b := newBench(t)
		b.run(t, 0, "load", "veth1", object)
		b.Server.IP(t, "link", "set", "dev", "veth1", "xdp", "off")
		old := folders(b)
		qt.Assert(t, qt.HasLen(old, 1))
		b.run(t, 0, "load", "veth1", object)
		qt.Check(t, qt.HasLen(folders(b), 1))
		qt.Check(t, qt.Not(qt.DeepEquals(folders(b), old)))
		b.run(t, 0, "unload", "veth1", "--all")
		qt.Check(t, qt.HasLen(folders(b), 0))
	})
	t.Run("a dispatcher without programs is replaced", func(t *testing.T) {
		b := newBench(t)
		b.run(t, 0, "load", "veth1", object, object)
		s := &scene{pair: b.Pair, bpffs: b.bpffs}
		s.directive(t, nil, []string{"forget"})
		_, stderr := b.run(t, 0, "load", "veth1", object)
		qt.Check(t, qt.Equals(stderr, " libxdp: Unable to read pinned progs: No such file or directory\n"))
		status, stderr := b.run(t, 0, "status", "veth1")
		qt.Check(t, qt.Equals(strings.Count(status, " => "), 1))
		qt.Check(t, qt.Equals(stderr, ""))
		b.run(t, 0, "unload", "veth1", "--all")
	})
	t.Run("an unspecified mode is the chain's mode", func(t *testing.T) {
		b := newBench(t)
		b.run(t, 0, "load", "veth1", object, "-m", "skb")
		b.run(t, 0, "load", "veth1", object, "-m", "unspecified")
		status, _ := b.run(t, 0, "status", "veth1")
		qt.Check(t, qt.Equals(strings.Count(status, " => "), 2))
		qt.Check(t, qt.StringContains(status, " skb "))
		b.run(t, 0, "unload", "veth1", "--all")
	})
}
