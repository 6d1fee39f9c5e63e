package scan

import (
	"fmt"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// What is in the place of functions belongs to those that it does something to.
func TestAttribute(t *testing.T) {
	member := func(m hook.Member) hook.Member {
		if m.State == "" {
			m.State = hook.StateRunning
		}
		return m
	}
	main, part := []hook.Extension{{LinkID: 30, Function: "run", Main: true}}, []hook.Extension{{LinkID: 31, Function: "part"}}
	owned := func(extensions []hook.Extension, members ...hook.Member) hook.Chain {
		return hook.Chain{Hook: hook.XDP, DispatcherID: 7, Extensions: extensions, Members: members}
	}
	a, empty, extended := member(hook.Member{}), member(hook.Member{State: hook.StateEmpty}), member(hook.Member{Extensions: main})
	sealed := member(hook.Member{Sealed: true, Program: hook.Program{ID: 8, Name: "part"}})
	component := member(hook.Member{Kind: hook.KindLibxdp, LinkID: 31, Program: hook.Program{ID: 9}})
	for name, test := range map[string]struct {
		chain hook.Chain
		want  string // how many the dispatcher has; of each member the state, and how many it has
	}{
		"none":                {owned(nil, a), "0 running 0"},
		"the dispatcher":      {owned(main, a, empty), "1 bypassed 0 empty 0"},
		"a part of it":        {owned(part, a, a), "1 running 0 running 0"},
		"a sealed member":     {owned(part, a, sealed), "0 running 0 bypassed 1"},
		"not in a slot":       {owned(nil, extended), "0 running 1"},
		"a member of libxdp":  {owned(part, component), "0 running 0"},
		"libxdp's dispatcher": {owned(main, component), "1 bypassed 0"},
		"a link":              {hook.Chain{Hook: hook.TCXIngress, Members: []hook.Member{a, extended}}, "0 running 0 bypassed 1"},
		"a part of a program": {hook.Chain{Hook: hook.TCXIngress, Members: []hook.Member{member(hook.Member{Extensions: part})}}, "0 running 1"},
		"a program alone":     {hook.Chain{Hook: hook.XDP, Members: []hook.Member{extended}}, "0 bypassed 1"},
	} {
		c := test.chain
		c.Extensions = append([]hook.Extension(nil), c.Extensions...)
		attribute(&c)
		words := []string{fmt.Sprint(len(c.Extensions))}
		for _, m := range c.Members {
			words = append(words, string(m.State), fmt.Sprint(len(m.Extensions)))
		}
		qt.Check(t, qt.Equals(strings.Join(words, " "), test.want), qt.Commentf("%s", name))
	}
}
