package document_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/document"
)

// tree makes files and returns their folder. A text that begins with "->" is a link.
func tree(t *testing.T, files map[string]string) string {
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Dir(path), 0o755)))
		if to, ok := strings.CutPrefix(text, "->"); ok {
			qt.Assert(t, qt.IsNil(os.Symlink(to, path)))
		} else {
			qt.Assert(t, qt.IsNil(os.WriteFile(path, []byte(text), 0o600)))
		}
	}
	return dir
}

func attachment(name string) string {
	return "attachments: [{name: " + name + ", hook: xdp, on: {names: [eth0]}, program: {builtin: count}}]"
}

// Folders have the precedence of systemd-networkd's.
func TestFolders(t *testing.T) {
	dir := tree(t, map[string]string{
		"etc/attachments.d/20-b.yaml":    attachment("etc-b"),
		"etc/attachments.d/30-c.yaml":    "->/dev/null",
		"etc/attachments.d/50-e.yaml":    "->null",
		"etc/attachments.d/null":         "->/dev/null",
		"etc/attachments.d/notes.txt":    "nothing",
		"etc/attachments.d/.20-b.swp":    "nothing",
		"run/attachments.d/10-a.yaml":    attachment("run-a"),
		"run/attachments.d/20-b.yaml":    attachment("run-b"),
		"usr/attachments.d/10-a.yaml":    attachment("usr-a"),
		"usr/attachments.d/30-c.yaml":    attachment("usr-c"),
		"usr/attachments.d/40-d.yaml":    attachment("usr-d"),
		"usr/attachments.d/50-e.yaml":    attachment("usr-e"),
		"usr/attachments.d/60-link.yaml": "->../other.yaml",
		"usr/other.yaml":                 attachment("linked"),
		"single.yaml":                    attachment("single"),
	})
	in := func(name string) string { return filepath.Join(dir, name, "attachments.d") }
	set := document.Read([]string{in("etc"), in("run"), in("usr"), filepath.Join(dir, "single.yaml")})
	qt.Assert(t, qt.HasLen(set.Errs, 0))
	qt.Check(t, qt.DeepEquals(set.Ignored, []string{filepath.Join(in("etc"), "notes.txt"), filepath.Join(in("etc"), "null")}))
	var got []string
	for _, s := range set.Sources {
		got = append(got, s.Owner+" "+s.Attachments[0].Name)
	}
	qt.Check(t, qt.DeepEquals(got, []string{
		"apply/single single", "apply/attachments.d run-a", "apply/attachments.d etc-b", "apply/attachments.d usr-d", "apply/attachments.d linked",
	}))
}

// What is wrong is left out, and the rest is read.
func TestReadErrors(t *testing.T) {
	dir := tree(t, map[string]string{
		"d/10.yaml": attachment("same"), "d/20.yaml": attachment("same"), "d/30.yaml": attachment("good"), "d/40.yaml": "x: 1",
		"d/50.yaml": "->nowhere", strings.Repeat("n", 60) + ".yaml": attachment("other"),
	})
	in := func(name string) string { return filepath.Join(dir, name) }
	set := document.Read([]string{in("d"), in(strings.Repeat("n", 60) + ".yaml"), in("missing")})
	var got, said []string
	for _, s := range set.Sources {
		for _, a := range s.Attachments {
			got = append(got, a.Name)
		}
	}
	for _, err := range set.Errs {
		said = append(said, strings.ReplaceAll(err.Error(), dir+"/", ""))
	}
	qt.Check(t, qt.DeepEquals(got, []string{"good"}))
	qt.Check(t, qt.DeepEquals(said, []string{
		strings.Repeat("n", 60) + `.yaml: the members' owner label would be "apply/` + strings.Repeat("n", 60) + `": the name "apply/nnnnnnnnnnnnnn"... has 66 bytes, at most 63 fit`,
		"stat missing: no such file or directory",
		`d/40.yaml:1:1: unknown key "x"`,
		"open d/50.yaml: no such file or directory",
		`d/10.yaml and d/20.yaml each want a member "same" on xdp; none of them was considered`,
	}))

	// The usual folders need not be there.
	document.Folders = append(document.Folders, in("optional"))
	set = document.Read([]string{in("optional")})
	qt.Check(t, qt.HasLen(set.Sources, 0))
	qt.Check(t, qt.HasLen(set.Errs, 0))
	qt.Check(t, qt.DeepEquals(set.Owners, []string{"apply/optional"}))
}
