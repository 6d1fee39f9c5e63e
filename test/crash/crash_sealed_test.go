package crash

import (
	"fmt"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// The same while a chain is sealed, or about to be: whichever process is killed, packets run what is in the slots.
func TestCrashSealed(t *testing.T) {
	attach := func(c scene.Command) scene.Command {
		c.Op = "attach"
		return c
	}
	for _, c := range []crash{
		{
			name:   "seal",
			before: with(2, 9),
			fatal:  scene.Command{Op: "seal"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		}, {
			name: "seal with a guest and an empty slot",
			before: func(t *testing.T, s *scene.Scene) {
				with(2, 9)(t, s)
				s.Attach(t, s.Tracer(t, 4, scene.Pass), dispatcher.Options{Name: "4", Priority: 70})
				s.WantRun(t, 2, 4, 9)
				qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "3", Priority: 60}).Close()))
				s.WantRunSoon(t, 2, 4, 9)
			},
			fatal: scene.Command{Op: "seal"},
			from:  []int{2, 4, 9}, to: []int{2, 4, 9},
			dead: [][]int{{2, 4, 9}},
		}, {
			name:   "unseal",
			before: sealed(2, 9),
			fatal:  scene.Command{Op: "unseal"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		}, {
			name:   "replace",
			before: sealed(2, 9),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "update", Program: 3},
			from:   []int{2, 9}, to: []int{3, 9},
			dead: [][]int{{2, 9}, {3, 9}},
		}, {
			name:   "replace the guard",
			before: sealed(2, 9),
			first:  []scene.Command{{Op: "open", Member: "9"}},
			fatal:  scene.Command{Op: "update", Program: 9},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		}, {
			name:   "replace one with maps",
			before: with(9),
			first:  []scene.Command{attach(scene.Command{Maps: true, Persistent: true}), {Op: "seal"}},
			fatal:  scene.Command{Op: "update", Maps: true},
			from:   []int{9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name:   "set",
			before: sealed(2, 3, 9),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "set", Settings: scene.Priority(60)},
			from:   []int{2, 3, 9}, to: []int{3, 2, 9},
			dead: [][]int{{2, 3, 9}, {3, 2, 9}},
		}, {
			name:   "join",
			before: sealed(9),
			fatal:  attach(scene.Command{Program: 2}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}},
		}, {
			name:   "join for good",
			before: sealed(9),
			fatal:  attach(scene.Command{Program: 2, Persistent: true}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}, {2, 9}},
		}, {
			name:   "detach one of several",
			before: sealed(2, 9),
			fatal:  scene.Command{Op: "detach", Member: "2"},
			from:   []int{2, 9}, to: []int{9},
			dead: [][]int{{2, 9}, {9}},
		}, {
			name:   "detach all",
			before: sealed(2, 3),
			fatal:  scene.Command{Op: "clear"},
			from:   []int{2, 3},
			dead:   [][]int{{2, 3}, nil},
		}, {
			name:   "unpin",
			before: sealed(2, 9),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "unpin"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}, {9}},
		},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, scene.NewSealScene(t)) })
	}
}

// sealed begins a crash with persistent members that are linked into the dispatcher.
func sealed(members ...int) func(*testing.T, *scene.Scene) {
	return func(t *testing.T, s *scene.Scene) {
		with(members...)(t, s)
		var names []string
		for _, n := range members {
			names = append(names, fmt.Sprint(n))
		}
		s.Seal(t, strings.Join(names, " "))
	}
}
