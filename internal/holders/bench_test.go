package holders_test

import (
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// BenchmarkLook asks for everything about every link, with 200 more processes and
// 2,000 links, which are open in one process or pinned.
func BenchmarkLook(b *testing.B) {
	const processes, links = 200, 2000
	testenv.Require(b)
	for _, held := range []string{"open", "pinned"} {
		p := newHolder(b)
		p.do("crowd %d", processes)
		if held == "open" {
			p.do("links %d", links)
		} else {
			p.do("links %d %s", links, testenv.BPFFS(b))
		}
		var all []link.ID
		for it := new(link.Iterator); it.Next(); {
			all = append(all, it.ID)
		}
		for name, o := range map[string]holders.Options{"iterators": {}, "proc": {NoIterators: true}} {
			b.Run(held+"/"+name, func(b *testing.B) {
				f := holders.Open(o)
				defer f.Close()
				for b.Loop() {
					view, err := f.Look(hook.HolderLink)
					qt.Assert(b, qt.IsNil(err))
					found := 0
					for _, l := range all {
						h, err := view.Of(hook.HolderRef{Kind: hook.HolderLink, ID: uint32(l)})
						qt.Assert(b, qt.IsNil(err))
						found += h.Found
					}
					qt.Assert(b, qt.IsTrue(found >= links), qt.Commentf("%d", found))
				}
			})
		}
		p.Kill()
	}
}

func BenchmarkOpen(b *testing.B) {
	testenv.Require(b)
	for b.Loop() {
		holders.Open(holders.Options{}).Close()
	}
}
