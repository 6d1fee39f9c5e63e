package document

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
)

// Folders are where documents are looked for if none is named: the administrator's, those of this
// boot, and those of packages. The first has precedence.
var Folders = []string{"/etc/dispatcher/attachments.d", "/run/dispatcher/attachments.d", "/usr/lib/dispatcher/attachments.d"}

// A Source is a document and where it is from.
type Source struct {
	*declare.Document
	File string
	// Owner is the label of the members that are made for the document.
	Owner string
}

// A Set is what files and folders declare together.
type Set struct {
	Sources []Source
	// Owners are the labels of all members that are made for the files and folders, also for those that
	// declare nothing any more.
	Owners []string
	// Ignored are files in folders that do not end in ".yaml".
	Ignored []string
	// Errs say what is wrong. Documents that are wrong are left out.
	Errs []error
}

// Read reads files and folders of files. In folders, files end in ".yaml"; of two of the same name that
// of the earlier folder counts, and a link to /dev/null masks those of later folders; files
// come in the order of their names. The folders are optional if they are those of Folders.
func Read(paths []string) *Set {
	s := &Set{}
	var dirs []string
	for _, path := range paths {
		st, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist) && slices.Contains(Folders, path):
			s.owner(path)
		case err != nil:
			s.fail(err)
		case st.IsDir():
			s.owner(path)
			dirs = append(dirs, path)
		case !st.Mode().IsRegular():
			s.fail(hook.Because(hook.ErrUsage, "%s: neither a file nor a folder", path))
		default:
			s.add(path, s.owner(strings.TrimSuffix(path, filepath.Ext(path))))
		}
	}
	files, ignored, err := merge(dirs)
	s.Ignored = ignored
	s.fail(err)
	for _, f := range files {
		s.add(f, s.owner(filepath.Dir(f)))
	}
	s.twice()
	return s
}

func (s *Set) fail(err error) {
	if err != nil {
		s.Errs = append(s.Errs, err)
	}
}

// owner is the label of the members that are made for a document outside of a folder, or for all those of
// a folder. So a member stays its owner's when it moves to another file of the folder.
func (s *Set) owner(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	owner := "apply/" + filepath.Base(path)
	if !slices.Contains(s.Owners, owner) {
		s.Owners = append(s.Owners, owner)
	}
	return owner
}

// add reads a file.
func (s *Set) add(file, owner string) {
	b, err := os.ReadFile(file)
	if err != nil {
		s.fail(err)
		return
	}
	if err := hook.CheckName(owner); err != nil {
		s.fail(hook.Because(hook.ErrUsage, "%s: the members' owner label would be %q: %w", file, owner, err).Hint("rename the file"))
		return
	}
	d, wrong := Parse(file, b)
	s.Errs = append(s.Errs, wrong...)
	if len(wrong) == 0 {
		s.Sources = append(s.Sources, Source{d, file, owner})
	}
}

// merge returns the files in the folders that count, by their names.
func merge(dirs []string) (files, ignored []string, err error) {
	byName := map[string]string{}
	for _, dir := range dirs {
		dir, absErr := filepath.Abs(dir)
		entries, readErr := os.ReadDir(dir)
		err = errors.Join(err, absErr, readErr)
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			switch {
			case filepath.Ext(path) == ".yaml":
				if byName[e.Name()] == "" {
					byName[e.Name()] = path
				}
			case !strings.HasPrefix(e.Name(), "."):
				ignored = append(ignored, path)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		if to, linkErr := filepath.EvalSymlinks(byName[name]); linkErr == nil && to == os.DevNull {
			continue
		}
		files = append(files, byName[name])
	}
	return files, ignored, err
}

// twice leaves out attachments that have their hook and name in common: which is meant, only
// people know.
func (s *Set) twice() {
	type place struct{ hook, name string }
	wanted := map[place][]string{}
	for _, src := range s.Sources {
		for _, a := range src.Attachments {
			at := place{a.Hook, a.Name}
			wanted[at] = append(wanted[at], src.File)
		}
	}
	said := map[place]bool{}
	for _, src := range s.Sources {
		src.Attachments = slices.DeleteFunc(src.Attachments, func(a declare.Attachment) bool {
			at := place{a.Hook, a.Name}
			if len(wanted[at]) > 1 && !said[at] {
				said[at] = true
				s.fail(hook.Because(hook.ErrUsage, "%s each want a member %q on %s; none of them was considered", join(wanted[at]), a.Name, a.Hook).
					Hint("give one of them another name, or mask a file with a link to %s", os.DevNull))
			}
			return len(wanted[at]) > 1
		})
	}
}

func join(files []string) string {
	last := len(files) - 1
	return fmt.Sprintf("%s and %s", strings.Join(files[:last], ", "), files[last])
}
