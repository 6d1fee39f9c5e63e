package main

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
)

func TestParseProgram(t *testing.T) {
	isFile := func(path string) bool { return path == "a:b.o" || path == "plain.o" }
	for word, want := range map[string]programWord{
		"plain.o":               {kind: fromFile, path: "plain.o"},
		"missing.o":             {kind: fromFile, path: "missing.o"},
		"plain.o:xdp_filter":    {kind: fromFile, path: "plain.o", name: "xdp_filter"},
		"plain.o:xdp/a":         {kind: fromFile, path: "plain.o", name: "xdp/a"},
		"a:b.o":                 {kind: fromFile, path: "a:b.o"},
		"a:b.o:xdp":             {kind: fromFile, path: "a:b.o", name: "xdp"},
		"./id:7":                {kind: fromFile, path: "./id", name: "7"},
		"id:7":                  {kind: fromID, id: 7},
		"id:4294967295":         {kind: fromID, id: 4294967295},
		"pin:/sys/fs/bpf/a":     {kind: fromPin, path: "/sys/fs/bpf/a"},
		"pin:/sys/fs/bpf/a:b":   {kind: fromPin, path: "/sys/fs/bpf/a:b"},
		"builtin:count":         {kind: fromBuiltin, name: "count"},
		"builtin:":              {kind: fromBuiltin},
		"builtin":               {kind: fromFile, path: "builtin"},
		"id":                    {kind: fromFile, path: "id"},
		"dir.d/x:y.o:my.second": {kind: fromFile, path: "dir.d/x:y.o", name: "my.second"},
	} {
		got, err := parseProgram(word, isFile)
		qt.Check(t, qt.IsNil(err), qt.Commentf("%s", word))
		qt.Check(t, qt.Equals(got, want), qt.Commentf("%s", word))
	}
	for word, want := range map[string]string{
		"id:":           "id:: not an id.*",
		"id:0":          "id:0: not an id.*",
		"id:-1":         "id:-1: not an id.*",
		"id:4294967296": "id:4294967296: not an id.*",
		"id:seven":      "id:seven: not an id.*",
		"pin:":          `"pin:": the path is missing; .*`,
		":filter":       `":filter": the file is missing; .*`,
		"plain.o:":      `"plain.o:": the program's name is missing; .*`,
	} {
		_, err := parseProgram(word, isFile)
		qt.Check(t, qt.ErrorMatches(shown(err), want), qt.Commentf("%s", word))
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage), qt.Commentf("%s", word))
	}
}

func TestPairs(t *testing.T) {
	got, err := pairs("global", []string{"limit=1000", "name=a=b", "text= "})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(got, map[string]string{"limit": "1000", "name": "a=b", "text": " "}))

	for value, want := range map[string]string{
		"limit":  `--map "limit": must be NAME=PATH or NAME=id:N`,
		"=5":     `--map "=5": must be .*`,
		"limit=": `--map "limit=": must be .*`,
	} {
		_, err := pairs("map", []string{value})
		qt.Check(t, qt.ErrorMatches(err, want))
	}
	_, err = pairs("global", []string{"a=1", "a=2"})
	qt.Check(t, qt.ErrorMatches(err, `--global "a=2": a is given twice`))
}
