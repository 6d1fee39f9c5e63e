package document_test

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/internal/document"
)

// What is written is read again as it was.
func TestFormat(t *testing.T) {
	d, errs := document.Parse("x.yaml", []byte(whole))
	qt.Assert(t, qt.HasLen(errs, 0))
	b, err := document.Format(d, map[int]string{1: "two\nlines"})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(string(b), `attachments:
- name: droplist
  hook: xdp
  on: {names: ["eth*"], driver: [mlx5_core], kind: [physical], role: leaf, netns: blue}
  program: {file: /usr/lib/bpf/filter.o, entry: filter, globals: {hex: "16", limit: "5", name: x, "on": "true", rate: "1.5"}}
  maps: {reuse: by-name}
  order: {priority: 20, before: [lb], after: [count], continueOn: [pass, tx], onMissing: drop}
  mode: native
  seal: false
  onConflict: adopt
  onDrift: report
# two
# lines
- name: proxy
  hook: cgroup/connect4
  on: {cgroup: /system.slice}
  program: {builtin: redirect, globals: {from_port: "80"}}
`))
	again, errs := document.Parse("x.yaml", b)
	qt.Assert(t, qt.HasLen(errs, 0))
	qt.Check(t, qt.DeepEquals(again, d))

	b, err = document.Format(&declare.Document{}, nil)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(string(b), "attachments: []\n"))
}
