package main

import (
	"os"
	"strings"
	"testing"
)

// The example in the README is this one: what is shown there compiles.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	_, code, ok := strings.Cut(string(source), "package main\n")
	if !ok || !strings.Contains(string(readme), "```go\npackage main\n"+code+"```\n") {
		t.Error("README.md does not have the code of examples/readme/main.go")
	}
}
