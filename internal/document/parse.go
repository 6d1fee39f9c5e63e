package document

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
)

// maxSize is the size of the largest document that is read, in bytes.
const maxSize = 1 << 20

// A Failure is a document that is wrong at one place.
type Failure struct {
	File         string
	Line, Column int // from 1; 0 for the file as a whole
	Text         string
	Hint         string
}

// Error says where and what, as compilers do.
func (f *Failure) Error() string {
	if f.Line == 0 {
		return f.File + ": " + f.Text
	}
	return fmt.Sprintf("%s:%d:%d: %s", f.File, f.Line, f.Column, f.Text)
}

// Parse reads a document, and checks it. All that is wrong with its values is found at once; with the
// syntax and the keys, the first. Each error is a hook.Cause of a Failure.
func Parse(file string, b []byte) (*declare.Document, []error) {
	one := func(f *Failure) (*declare.Document, []error) { return nil, []error{because(f)} }
	if len(b) > maxSize {
		return one(&Failure{File: file, Text: fmt.Sprintf("%d bytes; a document has at most %d", len(b), maxSize)})
	}
	tree, err := parser.ParseBytes(b, 0)
	if err != nil {
		return one(failure(file, nil, err))
	}
	if n := filled(tree); len(n) > 1 {
		at := n[1].GetToken().Position
		return one(&Failure{File: file, Line: at.Line, Column: at.Column, Text: "a second document begins here; a file has one"})
	}
	if f := forbidden(file, tree); f != nil {
		return one(f)
	}
	var d declare.Document
	if err := yaml.NewDecoder(strings.NewReader(string(b)), yaml.Strict()).Decode(&d); err != nil && !errors.Is(err, io.EOF) {
		return one(failure(file, tree, err))
	}
	var found []error
	for _, p := range d.Check() {
		f := &Failure{File: file, Text: key(p.At) + ": " + p.Text}
		f.Line, f.Column = position(tree, p.At)
		found = append(found, because(f))
	}
	return &d, found
}

func because(f *Failure) error {
	return hook.Because(hook.ErrUsage, "%w", f).Hint("%s", f.Hint)
}

// filled returns the documents of a file that have something in them.
func filled(tree *ast.File) (bodies []ast.Node) {
	for _, d := range tree.Docs {
		if d.Body != nil && d.Body.Type() != ast.CommentType {
			bodies = append(bodies, d.Body)
		}
	}
	return bodies
}

// forbidden refuses anchors: an alias of an alias of an alias makes gigabytes of a few lines, and what
// is at a line should be all there is to know of it.
func forbidden(file string, tree *ast.File) *Failure {
	v := &anchors{}
	for _, d := range tree.Docs {
		if d.Body != nil {
			ast.Walk(v, d.Body)
		}
	}
	if v.at == nil {
		return nil
	}
	return &Failure{File: file, Line: v.at.Position.Line, Column: v.at.Position.Column, Text: "anchors and aliases are not supported; write it out"}
}

type anchors struct{ at *token.Token }

// Visit looks at one node.
func (v *anchors) Visit(n ast.Node) ast.Visitor {
	switch n.Type() {
	case ast.AnchorType, ast.AliasType, ast.MergeKeyType:
		if v.at == nil {
			v.at = n.GetToken()
		}
	}
	return v
}

// failure makes words of an error of the YAML library.
func failure(file string, tree *ast.File, err error) *Failure {
	f := &Failure{File: file, Text: err.Error()}
	var positioned yaml.Error
	if !errors.As(err, &positioned) {
		return f
	}
	f.Text = positioned.GetMessage()
	t := positioned.GetToken()
	if t != nil && t.Position != nil {
		f.Line, f.Column = t.Position.Line, t.Position.Column
	}
	var unknown *yaml.UnknownFieldError
	var wrong *yaml.TypeError
	var node *yaml.UnexpectedNodeTypeError
	switch {
	case errors.As(err, &unknown) && t != nil:
		known := keysNear(tree, t)
		f.Text = fmt.Sprintf("unknown key %q", t.Value)
		f.Hint = "known here: " + strings.Join(known, ", ")
		if near := nearest(t.Value, known); near != "" {
			f.Hint = fmt.Sprintf("did you mean %q?", near)
		}
	case errors.As(err, &wrong) && t != nil:
		f.Text = fmt.Sprintf("%q is not %s", t.Value, describe(wrong.DstType))
	case errors.As(err, &node):
		f.Text = fmt.Sprintf("there is %s where %s belongs", word(node.Actual), word(node.Expected))
	}
	return f
}

func word(t ast.NodeType) string {
	switch t {
	case ast.MappingType, ast.MappingValueType:
		return "a group of keys"
	case ast.SequenceType:
		return "a list"
	}
	return "a single value"
}

func describe(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Int:
		return "a whole number"
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a text"
	case reflect.Slice:
		return "a list, as in [a, b]"
	}
	return "a group of keys"
}

// keysNear returns the keys that are known where a key is. The path is that of the tree, and the
// keys are those of the Go type.
func keysNear(tree *ast.File, at *token.Token) []string {
	t := reflect.TypeFor[declare.Document]()
	for _, word := range strings.FieldsFunc(pathOf(tree, at), func(r rune) bool { return strings.ContainsRune("$.[]0123456789", r) }) {
		if t = field(t, word); t == nil {
			return nil
		}
	}
	var keys []string
	for i := range t.NumField() {
		keys = append(keys, name(t.Field(i)))
	}
	return keys
}

func field(t reflect.Type, key string) reflect.Type {
	for i := range t.NumField() {
		if name(t.Field(i)) != key {
			continue
		}
		t = t.Field(i).Type
		for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t.Kind() == reflect.Struct {
			return t
		}
	}
	return nil
}

func name(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

// pathOf is the path of the group that has the key at the token.
func pathOf(tree *ast.File, at *token.Token) string {
	v := &keys{at: at.Position}
	for _, d := range tree.Docs {
		if d.Body != nil {
			ast.Walk(v, d.Body)
		}
	}
	return v.path
}

type keys struct {
	at   *token.Position
	path string
}

// Visit looks at one node.
func (v *keys) Visit(n ast.Node) ast.Visitor {
	pair, ok := n.(*ast.MappingValueNode)
	if !ok {
		return v
	}
	k := pair.Key.GetToken()
	if k.Position.Line == v.at.Line && k.Position.Column == v.at.Column {
		v.path = strings.TrimSuffix(pair.Key.GetPath(), "."+k.Value)
	}
	return v
}

// position finds a key; a key that is not there is at what would have it.
func position(tree *ast.File, at string) (line, column int) {
	for ; at != ""; at = parent(at) {
		p, err := yaml.PathString("$." + at)
		if err != nil {
			continue
		}
		n, err := p.FilterFile(tree)
		if err != nil || n == nil {
			continue
		}
		t := n.GetToken()
		if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
			t = m.Values[0].Key.GetToken() // that of the node is the first colon
		} else if m, ok := n.(*ast.MappingValueNode); ok {
			t = m.Key.GetToken()
		}
		return t.Position.Line, t.Position.Column
	}
	return 1, 1
}

func parent(at string) string { return at[:max(0, strings.LastIndexAny(at, ".["))] }

// key is the path of a key without the number of the attachment, which the line tells.
func key(at string) string {
	if _, rest, ok := strings.Cut(at, "]."); ok {
		return rest
	}
	return at
}

// nearest returns the known word that is most like a wrong one; empty if none is near.
func nearest(wrong string, known []string) string {
	best, least := "", 3
	for _, word := range known {
		if d := distance(strings.ToLower(wrong), strings.ToLower(word)); d < min(least, 1+len(wrong)/2) {
			best, least = word, d
		}
	}
	return best
}

// distance is how many letters must be added, removed, changed or swapped with the next.
func distance(a, b string) int {
	var before []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next := slices.Clone(row)
		next[0] = i + 1
		for j := range len(b) {
			change := row[j]
			if a[i] != b[j] {
				change++
			}
			next[j+1] = min(change, row[j+1]+1, next[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
