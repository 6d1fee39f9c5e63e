package hook

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// A Position asks for a place among the entries of a hook directly, and not by a
// priority. At most one field is set. The zero value asks for the place that the
// priority gives.
type Position struct {
	First  bool // before all others, entries of other tools too
	Last   bool // after all others
	Before Ref  // just before that entry
	After  Ref  // just after that entry
}

// IsZero tells whether no place is asked for.
func (p Position) IsZero() bool { return p == Position{} }

// Check returns an error when the position itself is wrong.
func (p Position) Check() error {
	asked := 0
	for _, set := range []bool{p.First, p.Last, p.Before != "", p.After != ""} {
		if set {
			asked++
		}
	}
	if asked > 1 {
		return errors.New("one place only can be asked for: first, last, before or after an entry")
	}
	for _, r := range []Ref{p.Before, p.After} {
		if err := r.Check(); r != "" && err != nil {
			return err
		}
	}
	return nil
}

// A Ref names an entry on a hook: a member by its name, any entry that a link
// attaches as "link:ID", any entry by its program as "id:PROG".
type Ref string

// LinkRef names the entry that the link of that id attaches.
func LinkRef(id uint32) Ref { return Ref(fmt.Sprintf("link:%d", id)) }

// ProgramRef names the entry with the program of that id.
func ProgramRef(id uint32) Ref { return Ref(fmt.Sprintf("id:%d", id)) }

// Link returns the id in "link:ID", or 0.
func (r Ref) Link() uint32 { return r.number("link:") }

// Program returns the id in "id:PROG", or 0.
func (r Ref) Program() uint32 { return r.number("id:") }

func (r Ref) number(prefix string) uint32 {
	digits, ok := strings.CutPrefix(string(r), prefix)
	if !ok {
		return 0
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// Check returns an error when r cannot name an entry.
func (r Ref) Check() error {
	for _, prefix := range []string{"link:", "id:"} {
		if strings.HasPrefix(string(r), prefix) && r.number(prefix) == 0 {
			return fmt.Errorf("%q: a number of 1 or more comes after %q", string(r), prefix)
		}
	}
	if r.Link() != 0 || r.Program() != 0 {
		return nil
	}
	return CheckName(string(r))
}

// Names tells whether r means the entry m.
func (r Ref) Names(m *Member) bool {
	switch {
	case r.Link() != 0:
		return m.LinkID == r.Link()
	case r.Program() != 0:
		return m.Program.ID == r.Program()
	}
	return m.Named() && m.Name == string(r)
}
