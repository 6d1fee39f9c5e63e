package declare_test

import (
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
)

var update = flag.Bool("update", false, "write the schema")

const schemaFile = "../docs/attachments.schema.json"

// The published schema is that of the Go type, with its comments.
func TestSchema(t *testing.T) {
	s := &schema{comments: comments(t)}
	whole := s.of(reflect.TypeFor[declare.Document]())
	whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	whole["title"] = "What dispatcher apply reads"
	b, err := json.MarshalIndent(whole, "", "  ")
	qt.Assert(t, qt.IsNil(err))
	b = append(b, '\n')
	if *update {
		qt.Assert(t, qt.IsNil(os.WriteFile(schemaFile, b, 0o644)))
	}
	committed, err := os.ReadFile(schemaFile)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(string(committed), string(b)), qt.Commentf("go test ./declare -update writes it"))
}

type schema struct{ comments map[string]string }

type object = map[string]any

// words are the keys that have few values.
var words = map[string][]string{
	"Attachment.Mode": declare.Modes, "Attachment.OnConflict": declare.Conflicts, "Attachment.OnDrift": declare.Drifts,
	"Maps.Reuse": declare.Reuses, "Order.OnMissing": declare.Missings, "Match.Role": declare.Roles, "Attachment.Hook": hooks(),
}

func hooks() (names []string) {
	for _, h := range hook.Hooks() {
		names = append(names, string(h))
	}
	return names
}

// required are the keys that must be there.
var required = map[string][]string{"Attachment": {"name", "hook", "on", "program"}, "Confirm": {"within", "probes"}}

func (s *schema) of(t reflect.Type) object {
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.Slice:
		return object{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int:
		return object{"type": "integer"}
	case reflect.String:
		if t == reflect.TypeFor[declare.Value]() {
			return object{"type": []string{"string", "number", "boolean"}}
		}
		return object{"type": "string"}
	}
	keys := object{}
	for i := range t.NumField() {
		f := t.Field(i)
		key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		of := s.of(f.Type)
		at := t.Name() + "." + f.Name
		if text := s.comments[at]; text != "" {
			of["description"] = text
		}
		if words[at] != nil {
			of["enum"] = words[at]
		}
		if at == "Order.Priority" {
			of["minimum"], of["maximum"] = hook.MinPriority, hook.MaxPriority
		}
		if at == "Attachment.Name" {
			of["minLength"], of["maxLength"] = 1, hook.MaxName
		}
		keys[key] = of
	}
	o := object{"type": "object", "properties": keys, "additionalProperties": false}
	if required[t.Name()] != nil {
		o["required"] = required[t.Name()]
	}
	return o
}

// comments are those of the fields, by "Type.Field".
func comments(t *testing.T) map[string]string {
	file, err := parser.ParseFile(token.NewFileSet(), "declare.go", nil, parser.ParseComments)
	qt.Assert(t, qt.IsNil(err))
	found := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if body, ok := spec.Type.(*ast.StructType); ok {
			for _, f := range body.Fields.List {
				for _, name := range f.Names {
					found[spec.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
				}
			}
		}
		return true
	})
	return found
}
